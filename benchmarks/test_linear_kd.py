"""K4: output heads, cross-entropy at 1 and divergence at T = 2, forward and backward."""

import math

import torch
import torch.nn.functional as F

from benchmarks import roofline
from benchmarks.cases import SIZE, Case, Goal, faster_than, integers, liger, normal, with_compiled
from red_kernels import linear_kd

SHAPES = {"gpu": (6144, 128256, 3072, 1536), "cpu": (256, 4096, 256, 128), "tiny": (24, 40, 16, 8)}
TEMPERATURE = 2.0
BETA = {"forward": 0.0, "reverse": 1.0, "jsd": 0.5}  # Liger's names for them


def test_linear_kd(measure, case):
    measure(case)


def cases(size: str) -> list[Case]:
    return [case(*SHAPES[size], divergence) for divergence in BETA]


def gradients(loss_of):
    """Value and gradients of the student's two tensors."""

    def step(hidden, weight, *others):
        loss = loss_of(hidden, weight, *others)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))

    return step


def eager_loss(divergence: str):
    """With the logits of all rows."""

    def loss(hidden, weight, teacher_hidden, teacher_weight, labels):
        z = (hidden @ weight.T).float()
        log_q = (z / TEMPERATURE).log_softmax(-1)
        log_p = ((teacher_hidden @ teacher_weight.T).float() / TEMPERATURE).log_softmax(-1)
        if divergence == "forward":
            kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        elif divergence == "reverse":
            kl = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        else:
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            kl = (F.kl_div(log_m, log_p, reduction="batchmean", log_target=True) + F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)) / 2
        return F.cross_entropy(z, labels) + kl

    return loss


def liger_chunked(divergence: str):
    """Chunks through torch.compile, cross-entropy and divergence together."""

    def build():
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        return gradients(LigerFusedLinearJSDLoss(weight_hard_loss=1.0, weight_soft_loss=1.0, beta=BETA[divergence], temperature=TEMPERATURE))

    return liger(build, capture=False)


def liger_triton(divergence: str):
    """Its two fused kernels, each with its own logits; the head's gradient summed in float32 as ours is."""

    def build():
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

        ce = LigerFusedLinearCrossEntropyLoss(accum_dtype=torch.float32)
        jsd = LigerFusedLinearJSD(jsd_beta=BETA[divergence], temperature=TEMPERATURE, accum_dtype=torch.float32)
        return gradients(lambda hidden, weight, *others: ce(weight, hidden, others[2]) + jsd(hidden, weight, *others))

    return liger(build, capture=False)


def less_memory(row: dict) -> float | None:
    rival = row["rivals"].get("eager", {}).get("peak_mib")
    return rival / row["peak_mib"] if rival and row["peak_mib"] else None


def case(rows: int, vocabulary: int, teacher_width: int, width: int, divergence: str) -> Case:
    def draw():
        return (
            normal(rows, width, grad=True), normal(vocabulary, width, scale=width**-0.5, grad=True),
            normal(rows, teacher_width), normal(vocabulary, teacher_width, scale=teacher_width**-0.5), integers(vocabulary, rows),
        )  # fmt: skip

    rivals = with_compiled(eager_loss(divergence), gradients) | {"Liger chunked": liger_chunked(divergence), "Liger Triton": liger_triton(divergence)}
    goals = (
        Goal("time over the floor", "<=", 1.5, lambda row: 100 / row["percent_of_ceiling"]),
        Goal("peak memory in MiB", "<=", 1024, lambda row: row["peak_mib"]),
        faster_than("eager", 2),
        Goal("times less memory than eager", ">=", 10, less_memory),
        faster_than("Liger", 1.5),
    )
    target, goals = ("K4", goals) if divergence == "forward" else (None, ())
    return Case(
        "linear_kd", divergence, dict(N=rows, V=vocabulary, d=teacher_width, kept=width),
        roofline.linear_kd(rows, vocabulary, teacher_width, width, SIZE), draw,
        gradients(lambda *inputs: linear_kd(*inputs, temperature=TEMPERATURE, divergence=divergence).loss), rivals, target, goals, repeats=5,
    )  # fmt: skip
