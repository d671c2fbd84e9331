"""What a start is, the registry of starts, and the two shapes that most starts share: a selection of channels and a shared map.

A start is a function from a StartContext to StartMaps. To add one, write one file in this folder:

    @register("mine", needs=("scores",))
    def mine(context):
        return selection(context, my_choice(context.calibration.scores)[: context.hidden_size])
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from red import families
from red.calibration import Calibration
from red.errors import REDError
from red.files import nearest

NEEDS = ("scores", "covariance")


@dataclass
class StartMaps:
    """Initial maps of one student. Keys are names of student parameters.

    `maps[name]` is `A [d, d']` of a reader, the embedding or the head, `B [d', d]` of a writer, or a norm gain `[d']`.
    `channels [d']` (sorted int64) is set where every writer selects the same channels: the taps may then gather the teacher's side.
    """

    maps: dict[str, Tensor]
    channels: Tensor | None = None


@dataclass
class StartContext:
    """What a start may look at. Maps are computed in fp64 on the CPU."""

    teacher: PreTrainedModel
    hidden_size: int
    calibration: Calibration | None = None
    seed: int = 0
    std: float = 0.02  # of the Gaussian start
    norm_scale: bool = True  # correct the gains for the RMS of the kept channels
    generator: torch.Generator = field(init=False)

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)

    @property
    def width(self) -> int:
        return self.teacher.config.hidden_size

    def gain(self, norm_path: str) -> Tensor:
        """The teacher's gain `[d]` of one norm, fp64."""
        return self.teacher.get_submodule(norm_path).weight.detach().double().cpu()

    @property
    def norms(self) -> list[str]:
        return families.norm_paths(self.teacher.config)

    def readers(self) -> list[tuple[str, str]]:
        """(parameter name, path of its norm) of every reader with a map of its own; a tied head has none."""
        pairs = [(f"{tap.path}.weight", families.norm_path_of(tap)) for tap in families.taps(self.teacher.config) if not tap.writes]
        return pairs if families.is_tied(self.teacher) else [*pairs, ("lm_head.weight", "model.norm")]

    def writers(self) -> list[str]:
        """Parameter names of every `o` and `down`."""
        return [f"{tap.path}.weight" for tap in families.taps(self.teacher.config) if tap.writes]

    embedding: str = field(init=False, default="model.embed_tokens.weight")


@dataclass(frozen=True)
class Start:
    """A registered start: its function and the statistics it needs of a calibration."""

    name: str
    build: Callable[[StartContext], StartMaps]
    needs: tuple[str, ...] = ()

    def __call__(self, context: StartContext) -> StartMaps:
        calibration = context.calibration
        if self.needs and calibration is None:
            raise REDError(f"start={self.name!r} needs a calibration. Pass calibration=red.calibrate(...).")
        if "covariance" in self.needs and calibration.covariance is None:
            raise REDError(f"start={self.name!r} needs a calibration with covariance. Calibrate with covariance=True.")
        if calibration is not None and calibration.scores.numel() != context.width:
            raise REDError(f"The calibration has {calibration.scores.numel()} channels, the teacher {context.width}. Calibrate this teacher.")
        return self.build(context)


_registry: dict[str, Start] = {}


def register(name: str, needs: tuple[str, ...] = ()) -> Callable:
    """Decorator: make a function a start under `name`; `needs` is a subset of ("scores", "covariance")."""
    if not set(needs) <= set(NEEDS):
        raise ValueError(f"needs={needs} of start {name!r}: known are {NEEDS}")

    def add(build: Callable[[StartContext], StartMaps]) -> Callable[[StartContext], StartMaps]:
        if name in _registry:
            raise ValueError(f"start {name!r} is registered twice")
        _registry[name] = Start(name, build, needs)
        return build
    return add


def names() -> tuple[str, ...]:
    """All registered starts, sorted."""
    return tuple(sorted(_registry))


def get(name: str) -> Start:
    """The start of that name; REDError with the nearest name if there is none."""
    if name not in _registry:
        near = nearest(name, names())
        hint = f" Did you mean {near!r}?" if near else ""
        raise REDError(f"start={name!r} is unknown; known are {', '.join(names())}.{hint}")
    return _registry[name]


def selection(context: StartContext, channels: Tensor, reader_up: Tensor | None = None) -> StartMaps:
    """Every writer keeps `channels`; readers read them (`A = H`), or predict the whole stream from them.

    Args:
        channels: [d'] indices of the kept channels; sorted here, so that equal sets give equal students.
        reader_up: [d', d], the estimate of the teacher's stream from the student's. None: the dropped channels are taken as zero.

    The gains are the teacher's at the kept channels. A prediction of dropped channels comes after the norm and before the gain, so there the
    teacher's gain is folded into the reader (`A = diag(g) Oᵀ`) and the student's is 1. Times the norm scale in both cases.
    """
    channels = channels.sort().values
    select = torch.zeros(context.width, len(channels), dtype=torch.float64)
    select[channels, torch.arange(len(channels))] = 1.0  # H
    scales = selection_scales(context, channels)
    maps = {context.embedding: select, **{name: select.T for name in context.writers()}}
    for name, norm in context.readers():
        maps[name] = select if reader_up is None else context.gain(norm)[:, None] * reader_up.T
    for norm, scale in zip(context.norms, scales, strict=True):
        tied_head = norm == "model.norm" and families.is_tied(context.teacher)  # its reader is the embedding, which only selects
        maps[f"{norm}.weight"] = scale * (context.gain(norm)[channels] if reader_up is None or tied_head else torch.ones(len(channels)))
    return StartMaps(maps, channels)


def selection_scales(context: StartContext, channels: Tensor) -> Tensor:
    """[2L+1] ratio of the RMS over the kept channels to the RMS over all, at each norm.

    A norm divides by the RMS of what it sees. The student sees only the kept channels, so its output is too large by `rms(x) / rms(x_G)`;
    `s = sqrt(mean over G of E[z²])` undoes this in closed form. Without a calibration, or with `norm_scale=False`, the scales are 1.
    """
    if not context.norm_scale or context.calibration is None:
        return torch.ones(len(context.norms), dtype=torch.float64)
    return context.calibration.mean_square[:, channels].mean(1).sqrt()


def shared(context: StartContext, down: Tensor) -> StartMaps:
    """One orthonormal map `down [d, d']` for all modules: writers `downᵀ`, readers `diag(g) down`, embedding `down`.

    The teacher's gains are folded into the readers, because a gain per channel does not commute with a rotation. A tied head cannot
    fold: its gain is the diagonal of `downᵀ diag(g) down`, the nearest diagonal gain in the Frobenius norm.
    The scale is `sqrt(tr(downᵀ C down) / d')`, the closed form of `selection_scales` in the rotated basis, pooled over the norms.
    """
    scale = 1.0
    if context.norm_scale and context.calibration is not None and context.calibration.covariance is not None:
        scale = float(((down.T @ context.calibration.covariance) * down.T).sum() / down.shape[1]) ** 0.5
    maps = {context.embedding: down, **{name: down.T for name in context.writers()}}
    for name, norm in context.readers():
        maps[name] = context.gain(norm)[:, None] * down
    for norm in context.norms:
        gain = torch.ones(down.shape[1], dtype=torch.float64)
        if norm == "model.norm" and families.is_tied(context.teacher):
            gain = (down.square() * context.gain(norm)[:, None]).sum(0)
        maps[f"{norm}.weight"] = scale * gain
    return StartMaps(maps)


def random_orthonormal(context: StartContext) -> Tensor:
    """[d, d'] with orthonormal columns, Haar distributed (QR with the signs of R's diagonal divided out)."""
    gaussian = torch.randn(context.width, context.hidden_size, generator=context.generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()
