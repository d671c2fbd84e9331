"""The teacher's trajectories: its states of all layers at the rationale's tokens and just before the answer, taken once, offline, and kept on disk.

Two passes of the frozen explicit teacher over the data: the first accumulates the Gram matrices of the shared subspace, the second keeps each example's
coordinates `g [T, r_L · r_d]` (not the states, which would be hundreds of times larger) and its anchor states `[L+1, d]`, in shards of safetensors.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from red.calibration import model_hash
from red.errors import REDError
from red.evaluate import evaluating
from red.files import atomic_write_json, atomic_write_safetensors
from red.lori.batch import batch_of
from red.lori.data import Encoded, rows_hash
from red.lori.losses import Scales, ScaleStream
from red.lori.model import positions
from red.lori.subspace import GramStream, Subspace, fit_subspace

INDEX = "trajectories.json"
SHARD_BYTES = 2**30
FORMAT = 1

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Trajectory:
    """One example of the explicit teacher."""

    states: Tensor  # [L+1, T, d] at the rationale's tokens, on the model's device
    anchor: Tensor  # [L+1, d] at the last token before the answer


@dataclass(frozen=True)
class SubspaceSettings:
    """What decides the subspace; see `red.lori.subspace.fit_subspace`."""

    energy: float = 0.9
    rank_layers: int | None = None
    rank_channels: int | None = None
    normalize_layers: bool = True
    chosen: tuple[int, ...] | None = None


def stream(teacher: PreTrainedModel, rows: Sequence[Encoded], *, batch_size: int = 32, pad: int = 0, bot: int | None = None,
           eot: int | None = None) -> Iterator[Trajectory]:
    """Trajectories in the order of `rows`; at no time more than a batch of states is held. Padding is in none of them.

    Args:
        bot, eot: the tokens around the teacher's rationale; None where it was trained without them.

    Raises:
        REDError: a row without steps.
    """
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        for place, row in enumerate(part, start):
            if not row.steps:
                raise REDError(f"Row {place} has no steps, so its teacher has no trajectory. "
                               "Give rows with steps, or a preset that needs none (no_cot, coconut).")
        batch = {name: value.to(teacher.device) for name, value in batch_of(part, "explicit", pad=pad, bot=bot, eot=eot).items()}
        ids, mask = (torch.cat([batch[f"prompt_{name}"], batch[f"target_{name}"]], 1) for name in ("ids", "mask"))
        with evaluating(teacher):
            states = torch.stack(teacher(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False, output_hidden_states=True,
                                         logits_to_keep=1).hidden_states, 1)
        first = batch["prompt_ids"].shape[1] + 1  # one token of the target comes before the rationale
        for index, row in enumerate(part):
            anchor = first - 1 + int(batch["anchor"][index])
            yield Trajectory(states[index, :, first : first + len(row.rationale())], states[index, :, anchor])


def cache_key(teacher: PreTrainedModel, rows: Sequence[Encoded], settings: SubspaceSettings, around: Sequence[int | None]) -> str:
    """SHA-256 of everything that decides a cache: the teacher's weights, the rows' tokens, the settings and the format."""
    facts = [FORMAT, model_hash(teacher), rows_hash(rows), dataclasses.asdict(settings), list(around)]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def kept(folder: Path, key: str) -> Trajectories | None:
    """The cache in the folder, if it is whole and of this key (`cache_key`)."""
    if not (folder / INDEX).is_file():
        return None
    try:
        found = Trajectories(folder)
    except Exception as error:  # noqa: BLE001 - torn by hand or by a full disk: made again
        logger.warning(f"The trajectories in {folder} cannot be read ({error}); they are computed again.")
        return None
    if found.key != key:
        logger.warning(f"The trajectories in {folder} are of another teacher, other data or other settings; they are computed again.")
        return None
    return found


def collect(teacher: PreTrainedModel, rows: Sequence[Encoded], folder: str | Path, settings: SubspaceSettings = SubspaceSettings(), *,
            batch_size: int = 32, pad: int = 0, bot: int | None = None, eot: int | None = None) -> Trajectories:
    """The trajectories of `rows`, from `folder` if it holds exactly these, else computed and written there.

    Args:
        teacher: the explicit teacher, a causal language model.
        folder: gets `trajectories.json`, written last, and one safetensors file a shard.

    Raises:
        REDError: a row without steps, states that are not finite, or ranks that cannot be.
    """
    folder = Path(folder)
    key = cache_key(teacher, rows, settings, (bot, eot))
    reading = dict(batch_size=batch_size, pad=pad, bot=bot, eot=eot)
    if (found := kept(folder, key)) is not None:
        return found
    (folder / INDEX).unlink(missing_ok=True)  # what follows overwrites the shards it names
    grams = GramStream().extend(one.states for one in stream(teacher, rows, **reading))
    subspace, spectrum = fit_subspace(grams, **dataclasses.asdict(settings))
    scales, spread = ScaleStream(), _Spread()
    shards: list[int] = []
    points: list[Tensor] = []
    anchors: list[Tensor] = []

    def write() -> None:
        lengths = torch.tensor([len(g) for g in points])
        atomic_write_safetensors(folder / f"trajectories-{len(shards):05d}.safetensors",
                                 {"g": torch.cat(points), "lengths": lengths, "anchors": torch.stack(anchors)}, {"key": key})
        shards.append(len(points))
        points.clear()
        anchors.clear()

    held = 0
    for one in stream(teacher, rows, **reading):
        g = subspace.coordinates(one.states).cpu()
        scales.add(g)
        spread.add(one.anchor)
        points.append(g)
        anchors.append(one.anchor.cpu().clone())
        held += g.numel() * 4 + one.anchor.numel() * one.anchor.element_size()
        if held > SHARD_BYTES:
            write()
            held = 0
    if points:
        write()
    atomic_write_safetensors(folder / "subspace.safetensors", {
        "layers": subspace.layers.cpu(), "channels": subspace.channels.cpu(), "scale": subspace.scale.cpu(), "anchor_std": spread.std().float().cpu(),
        "spectrum_layers": spectrum.layers.cpu(), "spectrum_channels": spectrum.channels.cpu()}, {"key": key})
    atomic_write_json(folder / INDEX, {"key": key, "shards": shards, "scales": dataclasses.asdict(scales.scales()), "tokens": grams.tokens,
                                       "settings": dataclasses.asdict(settings)})
    return Trajectories(folder)


class Trajectories:
    """A cache that `collect` wrote, read as memory-mapped files.

    Attributes: `subspace`, `scales`, `anchor_std [L+1]`, `spectrum` (the two modes' eigenvalues), `tokens` (rationale tokens in all).
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        facts = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        factors = load_file(folder / "subspace.safetensors")
        self.key, self.tokens = facts["key"], facts["tokens"]
        self.subspace = Subspace(factors["layers"], factors["channels"], factors["scale"])
        self.spectrum = {"layers": factors["spectrum_layers"], "channels": factors["spectrum_channels"]}
        self.anchor_std, self.scales = factors["anchor_std"], Scales(**facts["scales"])
        self._shards = [load_file(folder / f"trajectories-{number:05d}.safetensors") for number in range(len(facts["shards"]))]
        for shard in self._shards:
            shard["bounds"] = torch.cat([torch.zeros(1, dtype=torch.long), shard["lengths"].cumsum(0)])
        self._places = [(number, place) for number, count in enumerate(facts["shards"]) for place in range(count)]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """(g [T, D], anchor [L+1, d]) of one example."""
        number, place = self._places[index]
        shard = self._shards[number]
        start, end = shard["bounds"][place : place + 2].tolist()
        return shard["g"][start:end], shard["anchors"][place]

    def batch(self, indices: Sequence[int], lengths: Sequence[int | None] | None = None) -> dict[str, Tensor]:
        """`teacher_g` [B, T, D], `teacher_mask` [B, T] bool, `teacher_anchor` [B, L+1, d] of several examples; of each the first `lengths` points."""
        found = [(g[:length], anchor) for (g, anchor), length in zip((self[index] for index in indices), lengths or [None] * len(indices), strict=True)]
        longest = max(len(g) for g, _ in found)
        g = found[0][0].new_zeros(len(found), longest, self.subspace.size)
        mask = torch.zeros(len(found), longest, dtype=torch.bool)
        for place, (points, _) in enumerate(found):
            g[place, : len(points)] = points
            mask[place, : len(points)] = True
        return {"teacher_g": g, "teacher_mask": mask, "teacher_anchor": torch.stack([anchor for _, anchor in found])}


class _Spread:
    """Standard deviation per layer of states [L+1, d] that come one by one, over examples and channels together."""

    def __init__(self):
        self.total: float | Tensor = 0.0
        self.square: float | Tensor = 0.0
        self.count = 0

    def add(self, states: Tensor) -> None:
        states = states.double()
        self.total, self.square, self.count = self.total + states.sum(-1), self.square + states.square().sum(-1), self.count + states.shape[-1]

    def std(self) -> Tensor:
        variance = self.square / self.count - (self.total / self.count) ** 2
        return variance.clamp(min=1e-12).sqrt()
