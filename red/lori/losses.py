"""The two alignment losses: the student's latent steps with the teacher's rationale, and the two states just before the answer.

Both are our reconstruction of LoRi (arXiv 2606.05315), whose equations are not public; the anchor is that of CODI (arXiv 2502.21074).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from red.errors import REDError
from red.lori import statistics

DISTANCES = ("l1", "mse")


@dataclass(frozen=True)
class Scales:
    """What makes the losses free of units: taken once from the teacher's trajectories."""

    first: float  # mean over the examples of ‖μ - mean μ‖²: 1 is the loss of knowing nothing about the example
    centred: float  # mean over the examples of ‖C‖²_F, C the covariance …
    raw: float  # … or the second moment without the mean


def rationale_loss(student: Tensor, student_mask: Tensor, teacher: Tensor, teacher_mask: Tensor, scales: Scales, *, second_order_weight: float = 1.0,
                   centred: bool = True) -> Tensor:
    """mean over B of ‖μ_S - μ‖² / scales.first + λ ‖C_S - C‖²_F / (scales.centred or scales.raw).

    Args:
        student: [B, K, D] coordinates of the latent steps in the shared subspace (`Subspace.coordinates`); student_mask [B, K] bool.
        teacher: [B, T, D] those of the rationale tokens; teacher_mask [B, T] bool. No gradient goes there.
        second_order_weight: λ; 0 leaves the second order out.
        centred: C is the covariance, else the raw second moment.
    """
    teacher = teacher.detach().to(student.dtype)
    loss = (statistics.means(student, student_mask) - statistics.means(teacher, teacher_mask)).square().sum(-1).mean() / scales.first
    if second_order_weight:
        spread = statistics.squared_distance(statistics.points(student, student_mask, centred=centred),
                                             statistics.points(teacher, teacher_mask, centred=centred))
        loss = loss + second_order_weight * spread.mean() / (scales.centred if centred else scales.raw)
    return loss


def anchor_loss(student: Tensor, teacher: Tensor, std: Tensor, *, distance: str = "l1") -> Tensor:
    """Mean over batch, layers and channels of |h_S - h_T| / std (l1), or of its square (mse).

    Args:
        student, teacher: [B, A, d] states of the last token before the answer in A layers; no gradient goes to the teacher's.
        std: [A] the standard deviation of the teacher's anchor states in each layer, over examples and channels together: per channel it would be
            next to nothing wherever a state follows from its token alone, as in the first layers.
    """
    if distance not in DISTANCES:
        raise REDError(f"anchor_distance={distance!r}: use one of {', '.join(DISTANCES)}.")
    difference = (student - teacher.detach().to(student.dtype)) / std.to(student.dtype)[:, None]
    return difference.abs().mean() if distance == "l1" else difference.square().mean()


class ScaleStream:
    """Scales of the teacher's trajectories g [T, D], which come one by one; sums are float64."""

    def __init__(self):
        self.count, self.square, self.centred, self.raw = 0, 0.0, 0.0, 0.0
        self.total: float | Tensor = 0.0

    def add(self, g: Tensor) -> None:
        g = g.double()[None]
        mask = torch.ones(g.shape[:2], dtype=torch.bool, device=g.device)
        mean = statistics.means(g, mask)[0]
        self.count, self.total, self.square = self.count + 1, self.total + mean, self.square + float(mean.square().sum())
        for centred in (True, False):
            x = statistics.points(g, mask, centred=centred)[0]
            norm = float((x @ x.mT).square().sum())
            if centred:
                self.centred += norm
            else:
                self.raw += norm

    def scales(self) -> Scales:
        count, tiny = max(self.count, 1), torch.finfo(torch.float32).tiny  # one example, or examples of one token, have no spread
        first = self.square / count - float((self.total / count).square().sum()) if self.count else 0.0
        return Scales(max(first, tiny), max(self.centred / count, tiny), max(self.raw / count, tiny))
