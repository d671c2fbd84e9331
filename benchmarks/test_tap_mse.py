"""Masked mean-squared error of a tap, forward and backward, at the student's width and with a selection of the teacher's channels."""

import torch
import torch.nn.functional as F

from benchmarks import roofline
from benchmarks.cases import SIZE, Case, normal, selection, with_compiled
from benchmarks.timing import DEVICE
from red_kernels import tap_mse

SHAPES = {"gpu": (6144, 3072, 1536), "cpu": (1024, 512, 256), "tiny": (24, 40, 20)}


def test_tap_mse(measure, case):
    measure(case)


def cases(size: str) -> list[Case]:
    tokens, teacher_width, width = SHAPES[size]
    return [case(tokens, width, width, False), case(tokens, teacher_width, width, True)]


def case(tokens: int, teacher_width: int, width: int, indexed: bool) -> Case:
    index = selection(teacher_width, width) if indexed else None
    mask = torch.arange(tokens, device=DEVICE) % 10 > 0

    def eager(student, teacher):
        target = teacher[:, index] if indexed else teacher
        per_token = F.mse_loss(student.float(), target.float(), reduction="none").mean(-1)
        return torch.where(mask, per_token, 0).sum() / mask.sum()

    def step(loss_of):
        def gradient(student, teacher):
            loss = loss_of(student, teacher)
            return loss.detach(), torch.autograd.grad(loss, student)[0]

        return gradient

    return Case(
        "tap_mse", "selected channels" if indexed else "same width", dict(tokens=tokens, d=teacher_width, kept=width),
        roofline.tap_mse(tokens, width, teacher_width, SIZE), lambda: (normal(tokens, width, grad=True), normal(tokens, teacher_width)),
        step(lambda student, teacher: tap_mse(student, teacher, mask, index=index)), with_compiled(eager, step),
    )  # fmt: skip
