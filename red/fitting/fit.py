"""Readers and writers fitted through the depth, each to the stream that the student itself produces by then.

With `z_i` the teacher's normalised stream at read point i, `y_i` the student's, `γ_i` the norm's gain (row vectors):

    reader   O_i = argmin Σ |y_i O - z_i|²  (ridge)        A = diag(γ_i) O_iᵀ / s,  the student's gain s = √(d/d')          (2)
    writer   B   = argmin Σ |x_S + u B - x Q|² / rms(x)²   u [N, d]: the writer's output at the teacher's width, computed
             (ridge towards the start's B)                 from the student's own input; x_S: the student's stream before it,
                                                           x: the teacher's behind it                                          (3)

So a reader undoes what the width and the layers before it did to the stream, as far as a linear map can; and a writer does not only write its
own part, it also repairs the error made so far. Neither raises the error that it is fitted to, on the text it is fitted on. The next norm
divides a token by its RMS, so (3) counts errors relative to it: without that, the few tokens with massive activations would decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from red import families
from red.errors import REDError
from red.fitting.layers import HalfLayer, Streams, half_layers, normalised, run_block, writer_input
from red.fitting.least_squares import LeastSquares
from red.fitting.resume import StartFolder
from red.fitting.tied import tied_basis, tied_gain
from red.student import build_student

ROWS = 8192  # of a weight, multiplied in fp64 at a time

Progress = Callable[[int, int, str], None]  # half layers done, of how many, what was measured


def fit_maps(teacher: PreTrainedModel, maps: dict[str, Tensor], batches: Iterable[dict[str, Tensor]], **settings) -> dict[str, Tensor]:
    """The maps of `fit_student`."""
    return fit_student(teacher, maps, batches, **settings).maps


@torch.no_grad()
def fit_student(teacher: PreTrainedModel, maps: dict[str, Tensor], batches: Iterable[dict[str, Tensor]], *, writers: bool = True,
                reader_ridge: float = 1e-4, writer_ridge: float = 1e-4, kept: StartFolder | None = None,
                on_progress: Progress | None = None) -> Fit:
    """Fit the readers, and the writers too, of a student that starts from `maps`.

    Args:
        teacher: in eval mode; its weights are only read.
        maps: a start's maps by the student parameter's name, see `red.starts.StartMaps`; its writing side is where the fit begins. The
            embedding's map `Q [d, d']` is the target that every writer repairs towards: `x_teacher Q`.
        batches: calibration text, dicts as `red.data.loading.collate` returns them, perhaps with `token_weight [B, T]`: how often a token counts in every sum.
        writers: False leaves the writing side as it is, so a selection of channels stays one.
        reader_ridge, writer_ridge: relative to the mean square of what is multiplied.
        kept: where finished half layers are kept, and not fitted again; None keeps nothing.
        on_progress: called after each read point.

    Returns:
        The finished student beside the streams of both models before the last norm. Its `maps` are new for all readers, writers and gains, fp64 on the
        CPU; the embedding's is unchanged, or for a tied teacher whose writers are fitted, turned.

    Raises:
        REDError: no token, activations that are not finite, or a singular problem.
    """
    kept = kept or StartFolder(None, "")
    was_training, attention = teacher.training, teacher.config._attn_implementation
    teacher.eval()
    try:
        if "flash" in (attention or ""):  # its kernels take no fp32, in which the student is, and packed text in one row only
            teacher.config._attn_implementation = "sdpa"
        fit = Fit(teacher, maps, Streams(teacher, batches), reader_ridge, writer_ridge if writers else None)
        kept.begin(fit.down)
        fit.streams.begin(fit.student)
        halves = half_layers(teacher.config)
        for half in halves:
            found = kept.half_layer(half.point)
            report = "resumed"
            if found is None:
                found, report = fit.readers(half)
                if writers:
                    found |= fit.writer(half)
                kept.keep_half_layer(half.point, found)
            fit.take(found)
            fit.advance(half)
            if on_progress is not None:
                on_progress(half.point + 1, len(halves) + 1, report)
        found, report = fit.head()
        fit.take(found)
        if on_progress is not None:
            on_progress(len(halves) + 1, len(halves) + 1, report)
    finally:
        teacher.config._attn_implementation = attention
        teacher.train(was_training)
    return fit


class Fit:
    """The student under construction and the streams of both models at the current read point."""

    def __init__(self, teacher: PreTrainedModel, maps: dict[str, Tensor], streams: Streams, reader_ridge: float, writer_ridge: float | None):
        if streams.tokens == 0:
            raise REDError("The calibration text has no token to fit to. Give at least one sequence of text.")
        self.teacher, self.streams, self.reader_ridge, self.writer_ridge = teacher, streams, reader_ridge, writer_ridge
        self.maps = {name: tensor.double().cpu() for name, tensor in maps.items()}
        self.down = self.maps["model.embed_tokens.weight"]  # Q [d, d']
        self.width, self.hidden_size = self.down.shape
        self.scale = (self.width / self.hidden_size) ** 0.5
        self.weights = dict(teacher.named_parameters())
        self.student = build_student(teacher, self.hidden_size, dtype=torch.promote_types(teacher.dtype, torch.float32)).eval()
        self.parameters = dict(self.student.named_parameters())
        self.eps = teacher.config.rms_norm_eps
        self.take(dict(self.maps))

    def take(self, found: dict[str, Tensor]) -> None:
        """Put maps into the student's weights."""
        self.maps |= found
        for name, value in found.items():
            weight, source = self.parameters.get(name), self.weights.get(name)
            if weight is None:
                continue  # the head of a tied student is its embedding
            value = value.to(weight.device)
            if weight.dim() == 1:
                weight.copy_(value)
            elif name.endswith(tuple(f"{path}.weight" for path in families.WRITERS.values())):
                weight.copy_((value @ source.double()).to(weight))
                bias = name.removesuffix("weight") + "bias"
                if bias in self.parameters:
                    self.parameters[bias].copy_((value @ self.weights[bias].double()).to(weight))
            else:
                for rows, part in zip(weight.split(ROWS), source.split(ROWS), strict=True):
                    rows.copy_((part.double() @ value).to(rows))

    def sums(self) -> LeastSquares:
        """The problem of (2) at the present read point."""
        solver = LeastSquares(self.hidden_size, self.width, self.teacher.device)
        for place, teacher, student in self.streams:
            mask, weight = self.streams.mask(place), self.streams.weight(place)
            y, z = normalised(student[mask], self.eps) * weight, normalised(teacher[mask], self.eps) * weight
            solver.add(y, z.to(y.dtype))
        return solver

    def estimate(self, norm: str) -> tuple[Tensor, Tensor, float]:
        """`O [d', d]` of (2) with the gain folded in: `O diag(γ)`, the second moment of `y` `[d', d']`, and the share of `z` that it explains."""
        solver = self.sums()
        solution = solver.solve(self.reader_ridge)
        gain = self.teacher.get_submodule(norm).weight.detach().double()
        share = 1 - solver.residual(solution) / solver.yy
        return (solution * gain).cpu(), (solver.xx / solver.rows).cpu(), share

    def readers(self, half: HalfLayer) -> tuple[dict[str, Tensor], str]:
        """Maps of the half layer's readers and its norm, and what was explained."""
        estimate, _, share = self.estimate(half.norm)
        found = dict.fromkeys((f"{path}.weight" for path in half.readers), (estimate.T / self.scale).contiguous())  # one map, in memory and in files
        found[f"{half.norm}.weight"] = torch.full((self.hidden_size,), self.scale, dtype=torch.float64)
        self.take(found)  # the writer's fit runs the block with these readers
        return found, f"explained {share:.4f}"

    def writer(self, half: HalfLayer) -> dict[str, Tensor]:
        """The map of (3)."""
        name = f"{half.writer}.weight"
        weight, bias = self.weights[name].detach(), self.weights.get(f"{half.writer}.bias")
        before = self.maps[name].T.to(self.teacher.device)  # B [d, d']
        down = self.down.to(self.teacher.device)
        solver = LeastSquares(self.width, self.hidden_size, self.teacher.device)
        for place, teacher, student in self.streams:
            arguments, mask = self.streams.arguments(half, place), self.streams.mask(place)
            after = teacher + run_block(self.teacher, half, teacher, arguments)
            inner = writer_input(self.student, half, student, arguments)[mask]
            written = inner @ weight.to(inner).T  # u [N, d]
            if bias is not None:
                written = written + bias.detach().to(written)
            after = after[mask].double()
            error = after @ down - student[mask].double() - written.double() @ before
            weight_of_token = after.square().mean(-1, keepdim=True).clamp_min(self.eps).rsqrt() * self.streams.weight(place)
            solver.add((written * weight_of_token).to(written), (error * weight_of_token).to(written))
        return {name: (before + solver.solve(self.writer_ridge)).T.contiguous().cpu()}

    def advance(self, half: HalfLayer) -> None:
        """Both streams behind the half layer."""
        for place, teacher, student in self.streams:
            arguments = self.streams.arguments(half, place)
            self.streams.teacher[place] = (teacher + run_block(self.teacher, half, teacher, arguments)).cpu()
            self.streams.student[place] = (student + run_block(self.student, half, student, arguments)).cpu()

    def head(self) -> tuple[dict[str, Tensor], str]:
        """The last norm and the head. A tied head has no map of its own: the whole student is turned into the basis that serves it best, or, where
        the writing side is not to be touched, its norm's gain is fitted."""
        estimate, second, share = self.estimate("model.norm")
        if not families.is_tied(self.teacher):
            gain = torch.full((self.hidden_size,), self.scale, dtype=torch.float64)
            return {"lm_head.weight": estimate.T / self.scale, "model.norm.weight": gain}, f"explained {share:.4f}"
        embedding, report = self.teacher.get_output_embeddings().weight, f"explained {share:.4f}, read through the tied embedding"
        if self.writer_ridge is None:
            return {"model.norm.weight": tied_gain(embedding, self.down, estimate.T, second)}, report
        rotation, gain = tied_basis(embedding, self.down, estimate.T, second)
        for place, _, student in self.streams:  # what is measured on the finished student reads them
            self.streams.student[place] = (student @ rotation.to(student)).cpu()
        return {**turned(self.maps, rotation), "model.norm.weight": gain}, report


def turned(maps: dict[str, Tensor], rotation: Tensor) -> dict[str, Tensor]:
    """The maps of the same student with its stream turned, `x_S R`; gains must be constant over channels, and are left as they are."""
    writers = tuple(f"{path}.weight" for path in families.WRITERS.values())
    done: dict[tuple, Tensor] = {}  # what is one map stays one
    for name, value in maps.items():
        place = id(value), name.endswith(writers)
        if place not in done:
            done[place] = value if value.dim() == 1 else rotation.T @ value if place[1] else value @ rotation
    return {name: done[id(value), name.endswith(writers)] for name, value in maps.items()}
