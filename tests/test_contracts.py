"""What RED (arXiv 2605.29327) says about its start and the linear auto-encoder, as contracts on the code that trains.

A writer followed by a reader over identity weights *is* the linear auto-encoder: `x ↦ x Bᵀ ↦ x Bᵀ Aᵀ`, so `Q = Bᵀ [d, d']` and
`O = Aᵀ [d', d]`. The tests drive it through `red.training.projections.Factor`, with gradients of the products' results pulled back.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from red import starts
from red.calibration import calibrate_batches as calibrate
from red.training.projections import Factor
from red.starts.base import random_orthonormal
from red_kernels import channel_stats, erank


class AutoEncoder:
    """`x Q O` as a writer and a reader of the projections, whose frozen teacher weights are the identity."""

    def __init__(self, q: Tensor, o: Tensor):  # [d, d'], [d', d]
        eye = torch.eye(len(q), dtype=q.dtype)
        self.writer = Factor("writer", "output", nn.Parameter(q.T.clone()), nn.Parameter(torch.empty_like(q.T)), eye)
        self.reader = Factor("reader", "input", nn.Parameter(o.T.clone()), nn.Parameter(torch.empty_like(o.T)), eye)
        self.push()

    @property
    def q(self) -> Tensor:
        return self.writer.master.detach().T

    @property
    def o(self) -> Tensor:
        return self.reader.master.detach().T

    def __call__(self, x: Tensor) -> Tensor:
        return x @ self.writer.weight.T @ self.reader.weight.T

    @torch.no_grad()
    def push(self) -> None:
        for factor in (self.writer, self.reader):
            factor.push()
            factor.weight.grad = None

    def pulled(self, x: Tensor) -> tuple[float, Tensor, Tensor]:
        """Loss ‖X - XQO‖²/2n and minus its gradients in Q and O: the flow's velocities."""
        loss = (x - self(x)).square().sum() / (2 * len(x))
        loss.backward()
        self.writer.master.grad, self.reader.master.grad = self.writer.pull(), self.reader.pull()
        return float(loss.detach()), -self.writer.master.grad.T, -self.reader.master.grad.T

    def euler(self, x: Tensor, step: float) -> tuple[Tensor, Tensor]:
        _, q_dot, o_dot = self.pulled(x)
        with torch.no_grad():
            self.writer.master += step * q_dot.T
            self.reader.master += step * o_dot.T
        self.push()
        return q_dot, o_dot


@pytest.mark.parametrize("tied", [False, True])
def test_selection_is_an_orthonormal_projector(tiny_teacher, family, tied):
    """HᵀH = I, M = HHᵀ, M² = M, for the map of every module; every B is Hᵀ."""
    teacher = tiny_teacher(family, tied=tied)
    calibration = calibrate(teacher, [{"input_ids": torch.randint(0, 64, (2, 9))}])
    start = starts.get("activation")(starts.StartContext(teacher, 12, calibration))
    select = start.maps["model.embed_tokens.weight"]
    assert select.shape == (32, 12) and set(select.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(select.T @ select, torch.eye(12, dtype=select.dtype))
    projector = select @ select.T
    assert torch.equal(projector @ projector, projector)
    assert torch.equal(projector.diagonal().nonzero()[:, 0], start.channels)
    matrices = {name: value for name, value in start.maps.items() if value.dim() == 2}
    assert len(matrices) == 7 * 2 + (1 if tied else 2)
    for name, value in matrices.items():
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        assert torch.equal(value, select.T if writes else select), name


def test_two_by_two_gradient_flow():
    """Σ=[[1,.5],[.5,1]], Q=(1,0)ᵀ, O=(1,0): Q̇=0, Ȯ=(0,.5), Ṁ=[[0,.5],[0,0]]; the singular value does not move, the matrix does."""
    sigma = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    x = torch.linalg.cholesky(sigma).T * 2**0.5  # XᵀX / 2 = Σ
    q, o = torch.tensor([[1.0], [0.0]], dtype=torch.float64), torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    _, q_dot, o_dot = AutoEncoder(q, o).pulled(x)
    expected = {"Q": torch.zeros(2, 1), "O": torch.tensor([[0.0, 0.5]]), "M": torch.tensor([[0.0, 0.5], [0.0, 0.0]])}
    for name, value in {"Q": q_dot, "O": o_dot, "M": q_dot @ o + q @ o_dot}.items():
        torch.testing.assert_close(value, expected[name].double(), atol=1e-14, rtol=0, msg=name)
    # zero initial slope of the singular value: u^T Ṁ v with M's singular vectors e1, e1
    assert abs(float((q_dot @ o + q @ o_dot)[0, 0])) < 1e-14


def test_gradient_flow_equals_its_closed_form():
    """Q̇ = -Σ(QO-I)Oᵀ and Ȯ = -QᵀΣ(QO-I) at a random point."""
    x, q, o = (torch.randn(shape, dtype=torch.float64) for shape in ((50, 7), (7, 3), (3, 7)))
    _, q_dot, o_dot = AutoEncoder(q, o).pulled(x)
    error = x.T @ x / len(x) @ (q @ o - torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(q_dot, -error @ o.T, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(o_dot, -q.T @ error, atol=1e-12, rtol=1e-12)


def test_balance_is_conserved_along_the_flow():
    """QᵀQ - OOᵀ stands still: an Euler step of size h moves it by exactly h²(Q̇ᵀQ̇ - ȮȮᵀ), so halving h halves the drift per time."""
    x = torch.randn(80, 9, dtype=torch.float64) * torch.linspace(0.3, 1.5, 9, dtype=torch.float64)
    q, o = 0.3 * torch.randn(9, 4, dtype=torch.float64), 0.3 * torch.randn(4, 9, dtype=torch.float64)

    def balance(model: AutoEncoder) -> Tensor:
        return model.q.T @ model.q - model.o @ model.o.T

    drifts = []
    for step in (1e-2, 5e-3):
        model = AutoEncoder(q, o)
        start, before = balance(model), model.q.T @ model.q
        for _ in range(round(4 / step)):
            old = balance(model)
            q_dot, o_dot = model.euler(x, step)
            torch.testing.assert_close(balance(model) - old, step**2 * (q_dot.T @ q_dot - o_dot @ o_dot.T), atol=1e-14, rtol=0)
        moved = float((model.q.T @ model.q - before).norm())
        drifts.append(float((balance(model) - start).norm()))
        assert moved > 0.3, "the flow must go somewhere, else its conservation says nothing"
        assert drifts[-1] < 0.03 * moved
    assert drifts[1] == pytest.approx(drifts[0] / 2, rel=0.1)


def anisotropic_rows(rows: int, width: int, seed: int) -> Tensor:
    """Synthetic tokens [rows, width]: a decaying spectrum, a basis near the channels', and channels of unequal strength."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    spectrum = torch.arange(1, width + 1, dtype=torch.float64) ** -0.6
    basis, _ = torch.linalg.qr(torch.eye(width, dtype=torch.float64) + 0.15 * gaussian(width, width))
    x = gaussian(rows, width) * spectrum @ basis.T * (0.8 * gaussian(width)).exp()
    return (x / x.square().mean().sqrt()).float()


@pytest.mark.parametrize("seed", [0, 1])
def test_order_of_the_starts_in_the_linear_auto_encoder(seed):
    """eRank of the reconstruction: random < orthogonal < activation, and the loss the other way round (RED, arXiv 2605.29327)."""
    width, bottleneck, std = 64, 24, 0.02
    x = anisotropic_rows(800, width, seed)
    generator = torch.Generator().manual_seed(seed)
    stats = channel_stats(x.view(8, 100, width))  # RED's score: mean |x| per sequence, L2 norm over the sequences
    top = (stats.abs_sum / stats.count[:, None]).norm(dim=0).topk(bottleneck).indices
    select = torch.eye(width)[:, top]

    class Context:  # what random_orthonormal reads of a StartContext
        pass

    context = Context()
    context.width, context.hidden_size, context.generator = width, bottleneck, generator
    orthonormal = random_orthonormal(context).float()
    begin = {"random": (std * torch.randn(width, bottleneck, generator=generator), std * torch.randn(bottleneck, width, generator=generator)),
             "orthogonal": (orthonormal, orthonormal.T), "activation": (select, select.T)}
    losses, ranks = {}, {}
    for name, (q, o) in begin.items():
        model = AutoEncoder(q, o)
        adam = torch.optim.Adam([model.writer.master, model.reader.master], lr=1e-3)
        for _ in range(120):
            losses[name], _, _ = model.pulled(x)
            adam.step()
            model.push()
        ranks[name] = float(erank(model(x).detach()))
    assert ranks["random"] * 1.2 < ranks["orthogonal"] and ranks["orthogonal"] * 1.1 < ranks["activation"], ranks
    assert losses["random"] > 1.2 * losses["orthogonal"] and losses["orthogonal"] > 1.2 * losses["activation"], losses
