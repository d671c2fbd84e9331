"""What a start is, the registry of starts, and the two shapes that most starts share: a selection of channels and a shared map.

A start is a function from a StartContext to StartMaps. To add one, write one file in this folder:

    @register("mine", needs=("scores",))
    def mine(context):
        return selection(context, my_choice(context.calibration.scores)[: context.hidden_size])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from red import families
from red.calibration import Calibration
from red.errors import REDError
from red.files import nearest
from red.fitting.tied import tied_basis

NEEDS = ("scores", "covariance", "point_covariance", "batches")


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
    batches: Iterable[dict[str, Tensor]] | None = None  # the calibration text, for what is fitted after the start
    on_step: Callable[[float], None] | None = None  # called along a start that iterates, with the value that it climbs
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
    fit: str = "none"  # what is fitted after it unless start_fit says otherwise: none, readers or full

    def __call__(self, context: StartContext) -> StartMaps:
        calibration = context.calibration
        if self.needs and calibration is None:
            raise REDError(f"start={self.name!r} needs a calibration. Pass calibration=red.calibrate(...).")
        for name in ("covariance", "point_covariance"):
            if name in self.needs and getattr(calibration, name) is None:
                raise REDError(f"start={self.name!r} needs a calibration with {name}. Calibrate with {name}=True.")
        if "batches" in self.needs and context.batches is None:
            raise REDError(f"start={self.name!r} fits to the calibration text itself. Pass it: batches=... (red.distill and red.compress do).")
        if calibration is not None and calibration.scores.numel() != context.width:
            raise REDError(f"The calibration has {calibration.scores.numel()} channels, the teacher {context.width}. Calibrate this teacher.")
        return self.build(context)


_registry: dict[str, Start] = {}


def register(name: str, needs: tuple[str, ...] = (), fit: str = "none") -> Callable:
    """Decorator: make a function a start under `name`; `needs` is a subset of NEEDS, `fit` what is fitted after it by default."""
    if not set(needs) <= set(NEEDS):
        raise ValueError(f"needs={needs} of start {name!r}: known are {NEEDS}")

    def add(build: Callable[[StartContext], StartMaps]) -> Callable[[StartContext], StartMaps]:
        if name in _registry:
            raise ValueError(f"start {name!r} is registered twice")
        _registry[name] = Start(name, build, needs, fit)
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
    maps = {context.embedding: select, **dict.fromkeys(context.writers(), select.T)}
    folded = {norm: select if reader_up is None else context.gain(norm)[:, None] * reader_up.T for norm in context.norms}
    maps |= {name: folded[norm] for name, norm in context.readers()}
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


def shared(context: StartContext, down: Tensor, estimate: Tensor | None = None) -> StartMaps:
    """One map `down [d, d']` for all modules: embedding `down`, writers `downᵀ`, readers `diag(g) estimateᵀ`.

    Args:
        down: `Q`; orthonormal columns where there is no estimate.
        estimate: `O [d', d]`, the stream from the student's, with `|x Q| = |x Q O|` (red.fitting.shared_map.gauge). None: `Qᵀ`.

    The teacher's gains are folded into the readers, because a gain per channel does not commute with a rotation. A tied head cannot
    fold: without an estimate its gain is the diagonal of `downᵀ diag(g) down`, the nearest diagonal gain in the Frobenius norm; with one the
    student is turned into the basis in which a gain comes nearest to the logits (red/fitting/tied.py). The scale of the others is
    `sqrt(tr(downᵀ C down) / d')` (`selection_scales` in the rotated basis, pooled over the norms), or `sqrt(d / d')` where the estimate is as
    long as the stream.
    """
    scale, covariance = 1.0, context.calibration.covariance if context.calibration is not None else None
    if context.norm_scale and estimate is not None:
        scale = (down.shape[0] / down.shape[1]) ** 0.5
    elif context.norm_scale and covariance is not None:
        scale = float(((down.T @ covariance) * down.T).sum() / down.shape[1]) ** 0.5
    tied, gains = families.is_tied(context.teacher), {norm: torch.full((down.shape[1],), scale, dtype=torch.float64) for norm in context.norms}
    last = context.gain("model.norm")[:, None]
    if tied and estimate is None:
        gains["model.norm"] = scale * (down * last * down).sum(0)
    elif tied:
        second = down.T @ _second_moment(context) @ down
        rotation, gains["model.norm"] = tied_basis(context.teacher.get_output_embeddings().weight, down, scale * last * estimate.T,
                                                   second / second.diagonal().mean())
        down, estimate = down @ rotation, rotation.T @ estimate
    up = down if estimate is None else estimate.T
    maps = {context.embedding: down, **dict.fromkeys(context.writers(), down.T), **{f"{norm}.weight": gain for norm, gain in gains.items()}}
    folded = {norm: context.gain(norm)[:, None] * up for norm in context.norms}  # one map for all that read at one point
    maps |= {name: folded[norm] for name, norm in context.readers()}
    return StartMaps(maps)


def _second_moment(context: StartContext) -> Tensor:
    """`C` of the stream that the head reads, or pooled over all points where that is what there is."""
    calibration = context.calibration
    return calibration.covariance if calibration.point_covariance is None else calibration.point_covariance[-1].double()


def random_orthonormal(context: StartContext) -> Tensor:
    """[d, d'] with orthonormal columns, Haar distributed (QR with the signs of R's diagonal divided out)."""
    gaussian = torch.randn(context.width, context.hidden_size, generator=context.generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()
