"""K3: a selection of channels as a gather, of activations and of weights, forward alone and with its backward."""

import torch
import torch.nn.functional as F

from benchmarks import roofline
from benchmarks.cases import DTYPE, SIZE, Case, Rival, compiled, normal, percent_of_ceiling, selection
from red_kernels import gather, inverse_index

SHAPES = {
    "gpu": {"activations": (6144, 3072, 1536), "weights": (8192, 3072, 1536)},
    "cpu": {"activations": (2048, 512, 256), "weights": (1024, 512, 256)},
    "tiny": {"activations": (24, 40, 20)},
}


def test_gather(measure, case):
    measure(case)


def cases(size: str) -> list[Case]:
    return [case(what, *shape, backward) for what, shape in SHAPES[size].items() for backward in (False, True)]


def case(what: str, rows: int, width: int, kept: int, backward: bool) -> Case:
    index = selection(width, kept)
    inverse = inverse_index(index, width)
    one_hot = F.one_hot(index, width).T.to(DTYPE)

    def draw():
        return normal(rows, width, grad=backward), normal(rows, kept)

    def step(forward):
        if not backward:
            return lambda x, grad: forward(x)
        return lambda x, grad: torch.autograd.grad(forward(x), x, grad)[0]

    def wide(x, grad):
        return x.detach().float().requires_grad_(backward), grad.float()

    select = lambda x: x.index_select(-1, index)  # noqa: E731
    quick = compiled(select)
    rivals = {
        "index_select": Rival(step(select)),
        "torch.compile": Rival(quick and step(quick), why_not="on a GPU only"),
        f"one-hot product, {str(DTYPE).removeprefix('torch.')}": Rival(step(lambda x: x @ one_hot)),
    }
    if DTYPE != torch.float32:
        rivals["one-hot product, float32"] = Rival(step(lambda x: x @ one_hot.float()), wide)
    moved = roofline.gather(rows, width, kept, SIZE).bytes
    return Case(
        "gather", f"{what}, forward{' and backward' * backward}", dict(rows=rows, d=width, kept=kept), roofline.Work(moved * (1 + backward)), draw,
        step(lambda x: gather(x, index, inverse=inverse)), rivals, "K3", (percent_of_ceiling(85),),
    )  # fmt: skip
