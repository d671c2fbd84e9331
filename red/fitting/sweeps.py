"""Later sweeps: documents on which the student of the sweeps before is far from its teacher count more.

Readers and writers are fitted to the stream, where an error that breaks a chain of thought looks like one that nobody hears. What the finished student
says of a document tells them apart, so with `D` its KL from the teacher there, a mean over the document's tokens, every token of it counts

    w = (κ_1 κ_2 … κ_s)^(1/2s),   κ_t = D_t / mean D_t + FLOOR

times in all sums of sweep s + 1, map and fit; `w` is scaled to mean one. By documents, because an answer depends on tokens that are themselves easily told.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from red.calibration import segments
from red.fitting.fit import Fit

FLOOR = 0.03  # of the mean: no document falls out
TOKENS = 512  # whose logits exist at a time


class DocumentWeights:
    """`w` of all documents over the sweeps so far."""

    def __init__(self) -> None:
        self.logs: list[list[Tensor]] = []  # of each sweep and batch, log κ [B, T]

    @torch.no_grad()
    def update(self, fit: Fit) -> list[Tensor]:
        """Count a finished sweep; the weights [B, T] fp32 of each batch on the host, 0 where no token counts."""
        found = [_by_document(batch, _divergence(fit, place), fit.streams.mask(place).cpu()) for place, batch in enumerate(fit.streams.batches)]
        masks = [fit.streams.mask(place).cpu() for place in range(len(found))]
        mean = sum(float(part[mask].sum()) for part, mask in zip(found, masks, strict=True)) / fit.streams.tokens
        self.logs.append([(part / max(mean, torch.finfo(torch.float64).tiny) + FLOOR).log() for part in found])
        weights = [torch.stack(logs).mean(0).div(2).exp() * mask for logs, mask in zip(zip(*self.logs, strict=True), masks, strict=True)]
        scale = fit.streams.tokens / sum(float(part.sum()) for part in weights)
        return [(part * scale).float() for part in weights]


def _divergence(fit: Fit, place: int) -> Tensor:
    """KL(teacher‖student) of each position's next token, [B, T] fp64; from the streams before the last norm."""
    device = fit.teacher.device
    parts = []
    for teacher, student in zip(*(stream[place].to(device).flatten(0, 1).split(TOKENS) for stream in (fit.streams.teacher, fit.streams.student)), strict=True):
        expected, found = (linear(model.get_submodule("model.norm")(hidden), model.get_output_embeddings().weight).float().log_softmax(-1)
                           for model, hidden in ((fit.teacher, teacher), (fit.student, student)))
        parts.append((expected.exp() * (expected - found)).sum(-1).clamp_min(0).double().cpu())  # rounding may leave less than nothing
    return torch.cat(parts).view(fit.streams.teacher[place].shape[:2])


def _by_document(batch: dict[str, Tensor], values: Tensor, mask: Tensor) -> Tensor:
    """Each token's value replaced by the mean over its document, [B, T]; 0 where no token counts."""
    numbers, count = segments(batch.get("position_ids"), mask)
    numbers = numbers.flatten().clamp_min(0)
    sums, tokens = (torch.zeros(count, dtype=values.dtype).index_add_(0, numbers, part.flatten()) for part in (values * mask, mask.to(values)))
    return (sums / tokens.clamp_min(1))[numbers].view_as(values) * mask
