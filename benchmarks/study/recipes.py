"""Other ways to train the same projections: how each differs from the study's recipe, as a change to a trainer that has not begun.

    fading taps      the alignment's weight falls to zero over the run
    optimisers       Muon, SGD with momentum and Shampoo in Adam's place; Adam's β2 is a field of REDConfig
    whitened         Adam on `S^½ A`, `S = W_TᵀW_T`: steps of one length in the student's weights, not in the projections
    own weights      no projections: the student's own weights are trained, from the same start
    low rank         a selection of channels and a trained correction of rank r in place of every dense projection
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from red.training.projections import Factor
from red.training.trainer import REDTrainer
from red_kernels import selection_low_rank

RIDGE = 1e-3  # of the mean eigenvalue, where something is divided by a root


# ---- the alignment's weight ----

class Fade(TrainerCallback):
    """The taps' weight times `1 - p` or `(1 + cos πp)/2` at the share p of the run."""

    def __init__(self, shape: str, weight: float):
        self.shape, self.weight = shape, weight

    def on_step_begin(self, args, state, control, **kwargs):
        share = state.global_step / state.max_steps
        args.tap_weight = self.weight * (1 - share if self.shape == "linear" else (1 + math.cos(math.pi * share)) / 2)


def fading(trainer: REDTrainer, shape: str) -> None:
    trainer.add_callback(Fade(shape, trainer.args.tap_weight))


# ---- optimisers ----

class _Beside(torch.optim.Optimizer):
    """An optimiser for the matrices with Adam for the gains beside it; `lr` is the matrices', and Adam's is `gain_lr`, on the same schedule."""

    def __init__(self, groups, lr: float, gain_lr: float, matrices):
        super().__init__(groups, {"lr": lr})
        self.inner = matrices(self.param_groups[0]["params"], lr), torch.optim.Adam(self.param_groups[1]["params"], gain_lr, betas=(0.9, 0.98))
        self.full = lr, gain_lr

    @torch.no_grad()
    def step(self, closure=None):
        for inner, full, group in zip(self.inner, self.full, self.param_groups, strict=True):
            inner.param_groups[0]["lr"] = group["lr"] / self.full[0] * full
            inner.step()


class Shampoo(torch.optim.Optimizer):
    """`L^-¼ G R^-¼` of the averaged gradient with momentum (arXiv 1802.09568), at the length that Adam's step has: `lr · √(numel)` (grafting)."""

    def __init__(self, params, lr: float, beta: float = 0.95, every: int = 5):
        super().__init__(params, {"lr": lr})
        self.beta, self.every = beta, every

    @torch.no_grad()
    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state.update(step=0, mean=torch.zeros_like(weight), left=weight.new_zeros(len(weight), len(weight)),
                             right=weight.new_zeros(weight.shape[1], weight.shape[1]))
            state["mean"].lerp_(weight.grad, 0.1)
            state["left"].lerp_(weight.grad @ weight.grad.T, 1 - self.beta)
            state["right"].lerp_(weight.grad.T @ weight.grad, 1 - self.beta)
            if state["step"] % self.every == 0:
                state["roots"] = tuple(power(state[side], -0.25) for side in ("left", "right"))
            state["step"] += 1
            update = state["roots"][0] @ state["mean"] @ state["roots"][1]
            weight -= self.param_groups[0]["lr"] * math.sqrt(weight.numel()) * update / update.norm().clamp_min(1e-12)


def optimiser(trainer: REDTrainer, name: str, gain_lr: float = 1e-3) -> None:
    """Muon's matrices move by Adam's usual RMS (`match_rms_adamw`), so that the rates of the three adaptive ones are of one size."""
    made = {"muon": lambda params, lr: torch.optim.Muon(params, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            "sgd": lambda params, lr: torch.optim.SGD(params, lr, momentum=0.9), "shampoo": Shampoo}[name]
    trainer.optimizer_cls_and_kwargs = _Beside, {"lr": trainer.args.learning_rate, "gain_lr": gain_lr, "matrices": made}


# ---- parametrisations ----

@dataclass
class Whitened(Factor):
    """`W_T A = (W_T S^-½)(S^½ A)` with `S` the Gram matrix of `W_T` on the stream's side, `S^½ A` the master."""

    root: Tensor | None = None  # S^½; the taps project with the map itself
    inverse: Tensor | None = None

    def whole(self, name: str):
        value = super().whole(name)
        return value if name != "master" else self.inverse @ value if self.side == "input" else value @ self.inverse


def whitened(trainer: REDTrainer) -> None:
    trainer.projections.use([_whitened(factor) for factor in trainer.projections])


@torch.no_grad()
def _whitened(factor: Factor) -> Factor:
    if factor.side == "gain":
        return factor
    reads, weight = factor.side == "input", factor.teacher.double()
    gram = weight.T @ weight if reads else weight @ weight.T
    gram = gram / gram.diagonal().mean()  # of mean one, so that rates keep their size
    root, inverse = power(gram, 0.5).to(factor.master), power(gram, -0.5).to(factor.master)
    master = nn.Parameter(root @ factor.master if reads else factor.master @ root)
    return Whitened(factor.name, factor.side, master, factor.weight, (weight @ inverse.double() if reads else inverse.double() @ weight).to(factor.teacher),
                    root=root, inverse=inverse)


def own_weights(trainer: REDTrainer) -> None:
    """Each weight is its own master, as a gain is. The projected taps go on with the start's projections of the teacher's outputs."""
    maps = dict(trainer.projections._by_name)
    trainer.projections.use([Factor(factor.name, "gain", nn.Parameter(factor.weight.detach().clone()), factor.weight) for factor in trainer.projections])
    trainer.taps.projections = maps


@dataclass
class LowRank(Factor):
    """`W[:, G] + (W down) up`; the master is `[r, d + d']`, `downᵀ` beside `up`, because a factor has one."""

    channels: Tensor | None = None

    def _product(self, master: Tensor) -> Tensor:
        width = self.teacher.shape[1 if self.side == "input" else 0]
        return selection_low_rank(self.teacher, self.channels, master[:, :width].T.contiguous(), master[:, width:].contiguous(), self.side)

    def push(self) -> None:
        self.weight.copy_(self._product(self.master.detach()))

    def pull(self) -> Tensor | None:
        if self.weight.grad is None:
            return None
        with torch.enable_grad():
            master = self.master.detach().requires_grad_()
            return torch.autograd.grad(self._product(master), master, self.weight.grad.to(self.weight))[0]


def low_rank(trainer: REDTrainer, rank: int) -> None:
    """From a start that selects channels: the correction begins at zero."""
    generator, channels = torch.Generator().manual_seed(trainer.args.seed), trainer.projections.channels

    def narrow(factor: Factor) -> Factor:
        if factor.side == "gain":
            return factor
        width, kept = sorted(factor.master.shape, reverse=True)
        down = torch.randn(rank, width, generator=generator) / width**0.5
        return LowRank(factor.name, factor.side, nn.Parameter(torch.cat([down, torch.zeros(rank, kept)], 1)), factor.weight, factor.teacher, channels=channels)

    trainer.projections.use([narrow(factor) for factor in trainer.projections])
    trainer.projections.push_forward()


def power(matrix: Tensor, exponent: float) -> Tensor:
    """Of a symmetric positive semi-definite matrix, its small eigenvalues raised."""
    values, vectors = torch.linalg.eigh(matrix)
    values = values.clamp_min(0) + RIDGE * values.clamp_min(0).mean().clamp_min(1e-30)
    return (vectors * values**exponent) @ vectors.T
