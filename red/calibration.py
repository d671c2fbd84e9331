"""Calibration: what the teacher's residual stream looks like on a small text, in memory that does not grow with the text.

The channel score is RED's (arXiv 2605.29327): per sequence and point the mean over tokens of |activation|, then the L2 norm over sequences, then the
mean over points. The papers do not say where the activation is read, so `tap` offers both: "residual" is the stream after the embedding
and after each layer (L + 1 points), "norm" the outputs of the norms (2 L + 1 points).

The mean square of each tapped module's output says how large an error there is. The other statistics serve the norm gains and the starts
that rotate or predict; they are of `z = x / rms(x)`, the stream as a norm without gain returns it, at the 2 L + 1 points where it is read:
mean and mean square per channel and point, O(L d), and on demand the second moment `C = E[zᵀz]`, pooled over points, O(d²), or of each
point, O(L d²). Last, the longest tokens of each point, in which massive activations show (red/fitting/massive.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from red import families
from red.errors import REDError
from red.files import atomic_write_safetensors
from red.data.packing import for_attention
from red_kernels import covariance as second_moment
from red_kernels import rms_norm_stats

TAPS = ("residual", "norm")
LONGEST = 16  # tokens per point


@dataclass
class Calibration:
    """Statistics of a teacher's residual stream on a calibration text."""

    scores: Tensor  # [d] fp64: RED's importance of each channel
    mean: Tensor  # [2L+1, d] fp64: E[z] at each norm, in reading order
    mean_square: Tensor  # [2L+1, d] fp64: E[z²] likewise
    longest: Tensor  # [2L+1, LONGEST, d] fp32: the stream `x` of the tokens with the largest rms(x) at each norm; zeros where there are fewer
    mean_log_rms: Tensor  # [2L+1] fp64: E[log rms(x)]
    tap_square: Tensor  # [L, 7] fp64: mean square of each tapped module's output, in the order of families.TAPS
    covariance: Tensor | None  # [d, d] fp64: pooled E[zᵀz], or None if it was not asked for
    tap: str
    sequences: int
    tokens: int
    model_hash: str
    tokenizer_hash: str = ""
    point_covariance: Tensor | None = None  # [2L+1, d, d] fp32 (fp64 of a fp64 teacher): E[zᵀz] at each norm, or None likewise

    def save(self, path: str | Path) -> None:
        """Write one safetensors file (scores, moments; the rest as metadata)."""
        tensors = {key: value.contiguous() for key, value in vars(self).items() if isinstance(value, Tensor)}
        facts = {key: value for key, value in vars(self).items() if key not in tensors and value is not None}
        atomic_write_safetensors(path, tensors, metadata={"calibration": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what `save` wrote; REDError if the file is not a calibration."""
        if not Path(path).is_file():
            raise REDError(f"There is no calibration file {path}. Make one with red.calibrate(...).save(path).")
        try:
            with safe_open(path, "pt") as file:
                facts = (file.metadata() or {}).get("calibration")
                tensors = {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise REDError(f"{path} is not a calibration: {error}. Make one with red.calibrate(...).save(path).") from error
        if facts is None:
            raise REDError(f"{path} is a safetensors file but not a calibration. Make one with red.calibrate(...).save(path).")
        if "longest" not in tensors:
            raise REDError(f"{path} is a calibration of an earlier red and lacks statistics. Make it again with red.calibrate(...).save(path).")
        try:
            return cls(**json.loads(facts), covariance=tensors.pop("covariance", None), **tensors)
        except (ValueError, TypeError, RecursionError) as error:
            raise REDError(f"{path} is no whole calibration: {error}. Make it again with red.calibrate(...).save(path).") from error

    def check(self, teacher: PreTrainedModel, tokenizer_hash: str = "") -> None:
        """REDError unless this calibration is whole and was made with that teacher and, where both are known, that tokenizer."""
        self._check_tensors(teacher.config)
        if self.model_hash != model_hash(teacher):
            raise REDError(f"The calibration was made with another model (hash {self.model_hash[:12]}, the teacher's is "
                           f"{model_hash(teacher)[:12]}). Calibrate this teacher.")
        if tokenizer_hash and self.tokenizer_hash and tokenizer_hash != self.tokenizer_hash:
            raise REDError(f"The calibration text was made with another tokenizer (hash {self.tokenizer_hash[:12]}, this one's is "
                           f"{tokenizer_hash[:12]}). Calibrate with the teacher's tokenizer.")


    def _check_tensors(self, config) -> None:
        """A file says what it likes: shapes, dtypes and values are looked at before anything is computed from them."""
        d, layers = config.hidden_size, config.num_hidden_layers
        points = 2 * layers + 1
        shapes = {"scores": (d,), "mean": (points, d), "mean_square": (points, d), "longest": (points, LONGEST, d), "mean_log_rms": (points,),
                  "tap_square": (layers, len(families.TAPS)), "covariance": (d, d), "point_covariance": (points, d, d)}
        for name, shape in shapes.items():
            value = getattr(self, name)
            if value is None and name in ("covariance", "point_covariance"):
                continue
            if not isinstance(value, Tensor) or tuple(value.shape) != shape or not value.is_floating_point() or not value.isfinite().all():
                found = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise REDError(f"The calibration's {name} is {found}; finite numbers of shape {list(shape)} are needed for this teacher. Calibrate it.")
            if name in ("mean", "mean_square", "covariance", "point_covariance") and value.abs().max() > 1.01 * d:  # z² sums to d in every token
                raise REDError(f"The calibration's {name} has a value of {value.abs().max().item():.3g}, where none above the hidden size of {d} can be. Its file is damaged: calibrate this teacher again.")
            if name.endswith("covariance") and value.diagonal(dim1=-2, dim2=-1).min() < 0:
                raise REDError(f"The calibration's {name} has a negative mean square. Its file is damaged: calibrate this teacher again.")
        for name in ("model_hash", "tokenizer_hash", "tap"):
            if not isinstance(getattr(self, name), str):
                raise REDError(f"The calibration's {name} is {getattr(self, name)!r}, not text. Calibrate this teacher.")


def model_hash(model: PreTrainedModel) -> str:
    """SHA-256 over names, shapes and a spread sample of 64 values of every parameter: cheap, and any training moves it."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        count = min(64, flat.numel())
        sample = flat[torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)]  # integers: fp32 cannot index 2^24
        # fp32, so that a bf16 checkpoint has one hash whether it is loaded as bf16 or as fp32
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def calibrate_batches(teacher: PreTrainedModel, batches: Iterable[dict[str, Tensor]], *, tap: str = "residual",
                      covariance: bool = False, point_covariance: bool = False, tokenizer_hash: str = "") -> Calibration:
    """Stream `batches` through the teacher once and return its channel statistics; `red.calibrate` takes text instead.

    Args:
        teacher: a causal language model of a supported family (`red.families.SUPPORTED`).
        batches: dicts of `input_ids [B, T]`, and optionally `position_ids [B, T]` (a restart begins a new sequence) and
            `token_mask [B, T]` (False on padding): what `red.data.loading.collate` returns; and `token_weight [B, T]`, of mean one over the tokens that
            count: how often each counts in the second moments.
        tap: "residual" or "norm", where RED's score reads the activations.
        covariance: also accumulate the pooled second moment, O(d²) memory; `pca`, `activation_lstsq` and `balanced` need it.
        point_covariance: the pooled one and also that of each read point, O(L d²) host memory; `explained` and `fitted` need it.

    Raises:
        REDError: unknown tap, no valid token, or a channel whose activation is NaN or infinite (with the point and the channel).
    """
    families.check_family(teacher.config)
    if tap not in TAPS:
        raise REDError(f"tap={tap!r} is unknown; use one of {', '.join(map(repr, TAPS))}.")
    sums = _Sums(teacher, tap, covariance or point_covariance, point_covariance)
    was_training = teacher.training
    teacher.eval()
    try:
        with sums.watching(teacher):
            for batch in batches:
                batch = {key: value.to(teacher.device) for key, value in batch.items()}
                batch = for_attention(batch, teacher.config)
                sums.begin(batch)
                teacher.model(input_ids=batch["input_ids"], position_ids=batch.get("position_ids"), use_cache=False)
    finally:
        teacher.train(was_training)
    return sums.finish(tap, model_hash(teacher), tokenizer_hash)


class _Sums:
    """The running sums on the teacher's device, filled while the teacher runs: each norm is computed together with what is counted there."""

    def __init__(self, teacher: PreTrainedModel, tap: str, covariance: bool, point_covariance: bool):
        config, device = teacher.config, teacher.device
        self.norms, self.taps, self.tap = families.norm_paths(config), families.taps(config), tap
        d, norms = config.hidden_size, len(self.norms)
        points, wide = config.num_hidden_layers + 1 if tap == "residual" else norms, dict(dtype=torch.float64, device=device)
        self.squared_means = torch.zeros(points, d, **wide)  # Σ over sequences of (mean over tokens of |x|)²
        self.sum, self.square, self.log_rms = torch.zeros(norms, d, **wide), torch.zeros(norms, d, **wide), torch.zeros(norms, **wide)
        self.longest = torch.zeros(norms, LONGEST, d, device=device)
        self.tap_square = torch.zeros(config.num_hidden_layers, len(families.TAPS), **wide)
        self.covariance = torch.zeros(d, d, **wide) if covariance else None
        self.dtype = torch.promote_types(teacher.dtype, torch.float32)
        self.point_covariance = torch.zeros(norms, d, d, dtype=self.dtype) if point_covariance else None  # on the host
        self.sequences = self.tokens = 0

    @contextmanager
    def watching(self, teacher: PreTrainedModel):
        norms = [teacher.get_submodule(path) for path in self.norms]
        own = [norm.__dict__.get("forward") for norm in norms]
        handles = [teacher.get_submodule(tap.path).register_forward_hook(self._tap_hook(tap)) for tap in self.taps]
        try:
            for point, norm in enumerate(norms):
                norm.forward = partial(self._normalise, point, norm, norm.forward)
            yield
        finally:
            for norm, forward in zip(norms, own, strict=True):
                norm.__dict__.pop("forward", None)
                if forward is not None:
                    norm.forward = forward
            for handle in handles:
                handle.remove()

    def begin(self, batch: dict[str, Tensor]) -> None:
        ids = batch["input_ids"]
        mask = batch.get("token_mask")
        self.mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        self.weight = batch["token_weight"].sqrt() if "token_weight" in batch else None
        self.segments, count = segments(batch.get("position_ids"), self.mask)
        self.num_segments = count
        self.sequences += count
        self.tokens += int(self.mask.sum())

    def _normalise(self, point: int, norm: nn.Module, own_forward: Callable[[Tensor], Tensor], stream: Tensor) -> Tensor:
        """The norm's output for `stream [B, T, d]`; what is counted at this read point comes out of the same pass."""
        # Read points 0, 2, 4, … are the embedding and the outputs of the layers: the residual tap.
        scored = point // 2 if self.tap == "residual" and point % 2 == 0 else point if self.tap == "norm" else None
        found = rms_norm_stats(stream, norm.weight, norm.variance_epsilon, segment_ids=self.segments, num_segments=self.num_segments,
                               of="stream" if self.tap == "residual" else "output", ordered=True)
        if scored is not None:
            self.squared_means[scored] += (found.abs_sum.double() / found.count.double().unsqueeze(-1)).square().sum(0)
        self.sum[point] += found.sum
        self.square[point] += found.square_sum
        square = found.mean_square.clamp_min(1e-30)  # [B, T]
        self.log_rms[point] += torch.where(self.mask, square.double().log(), 0).sum() / 2
        top = torch.where(self.mask, found.mean_square, 0).flatten().topk(min(LONGEST, square.numel()))
        rows = torch.where(top.values[:, None] > 0, stream.flatten(0, 1)[top.indices].float(), 0)
        candidates = torch.cat([self.longest[point], rows])
        self.longest[point] = candidates[candidates.square().sum(-1).topk(LONGEST).indices]
        if self.covariance is not None or self.point_covariance is not None:
            scale = square.rsqrt() if self.weight is None else square.rsqrt() * self.weight
            product = second_moment(stream, scale=scale, mask=self.mask, out=stream.new_zeros((stream.shape[-1],) * 2, dtype=self.dtype))
            if self.covariance is not None:
                self.covariance += product
            if self.point_covariance is not None:
                self.point_covariance[point] += product.cpu()
        # The op rounds where transformers does, to float32 at best; a float64 teacher's norms may be somebody's own.
        return own_forward(stream) if stream.dtype == torch.float64 else found.output

    def _tap_hook(self, tap: families.Tap):
        place = (tap.layer, families.TAPS.index(tap.name))

        def hook(_: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            square = output.to(self.dtype).square().mean(-1)
            self.tap_square[place] += torch.where(self.mask, square, 0).sum(dtype=torch.float64)
        return hook

    def finish(self, tap: str, model: str, tokenizer: str) -> Calibration:
        if self.tokens == 0:
            raise REDError("The calibration set has no token. Give at least one sequence of text.")
        for what, values in (("activation", self.squared_means), ("normalised activation", self.square)):
            if not values.isfinite().all():
                point, channel = (~values.isfinite()).nonzero()[0].tolist()
                raise REDError(f"The teacher's {what} is NaN or infinite at point {point}, channel {channel} of the residual stream. "
                               "Load the teacher in fp32 or bf16 (fp16 overflows), and check its weights for NaN.")
        count, points = self.tokens, self.point_covariance
        pooled = None if self.covariance is None else self.covariance.cpu() / (count * len(self.norms))
        return Calibration(self.squared_means.sqrt().mean(0).cpu(), self.sum.cpu() / count, self.square.cpu() / count, self.longest.cpu(),
                           self.log_rms.cpu() / count, self.tap_square.cpu() / count, pooled, tap, self.sequences, count, model, tokenizer,
                           None if points is None else points.div_(count))


def segments(position_ids: Tensor | None, mask: Tensor) -> tuple[Tensor, int]:
    """Number the sequences of a packed batch: ids `[B, T]` from 0, -1 on padding, and how many there are."""
    starts = torch.zeros_like(mask)
    starts[:, 0] = True
    if position_ids is not None:
        starts[:, 1:] |= position_ids[:, 1:] != position_ids[:, :-1] + 1
    numbers = starts.reshape(-1).cumsum(0).view_as(starts) - 1
    kept, dense = torch.unique(numbers[mask], return_inverse=True)
    ids = torch.full_like(numbers, -1)
    ids[mask] = dense
    return ids, len(kept)
