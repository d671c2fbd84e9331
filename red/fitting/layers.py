"""A Hugging Face decoder as its 2L half layers, run one at a time on streams that are kept between them.

A half layer is `x ← x + block(norm(x))` with the attention or the feed-forward network as the block. The modules are transformers' own, and so are
the attention masks and rotary angles: transformers is asked for them once per batch and layer, by a forward pass of a stream one channel wide,
whose blocks only take notes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from red import families
from red.data.packing import for_attention


@dataclass(frozen=True)
class HalfLayer:
    """Where one half layer's parts are; paths hold for a teacher and its student alike."""

    point: int  # of the 2L+1 read points, the one it reads
    layer: int
    attention: bool
    norm: str
    block: str
    readers: tuple[str, ...]
    writer: str


def half_layers(config) -> list[HalfLayer]:
    """All 2L, in the order of the data's way."""
    found = []
    for point, norm in enumerate(families.norm_paths(config)[:-1]):
        layer, attention = point // 2, point % 2 == 0
        root = f"model.layers.{layer}"
        names = ("q", "k", "v") if attention else ("gate", "up")
        found.append(HalfLayer(point, layer, attention, norm, f"{root}.{'self_attn' if attention else 'mlp'}",
                               tuple(f"{root}.{families.READERS[name]}" for name in names),
                               f"{root}.{families.WRITERS['o' if attention else 'down']}"))
    return found


class Streams:
    """The residual streams of teacher and student at one read point, batch by batch, on the host.

    Args:
        teacher: the model whose masks and rotary angles are used, and whose embedding begins its stream.
        batches: dicts of `input_ids [B, T]`, perhaps `position_ids`, `token_mask` and `token_weight`, re-iterable in one order.
    """

    def __init__(self, teacher: PreTrainedModel, batches):
        self.teacher_model = teacher
        self.batches = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
        self.teacher: list[Tensor] = []  # [B, T, d]
        self.student: list[Tensor] = []  # [B, T, d']
        self.tokens = sum(int(self._mask(batch).sum()) for batch in self.batches)

    @staticmethod
    def _mask(batch: dict[str, Tensor]) -> Tensor:
        return batch["token_mask"].bool() if "token_mask" in batch else torch.ones_like(batch["input_ids"], dtype=torch.bool)

    def mask(self, place: int) -> Tensor:
        """[B, T] bool on the teacher's device: the tokens that count."""
        return self._mask(self.batches[place]).to(self.teacher_model.device)

    def weight(self, place: int) -> Tensor:
        """[tokens that count, 1] on the teacher's device: the root of how often each counts, for both sides of a regression."""
        batch, mask = self.batches[place], self.mask(place)
        if "token_weight" not in batch:
            return torch.ones(int(mask.sum()), 1, device=mask.device)
        return batch["token_weight"].to(mask.device)[mask].sqrt()[:, None]

    def begin(self, student: PreTrainedModel) -> None:
        """Both streams at the first read point: the embeddings."""
        for stream, model in ((self.teacher, self.teacher_model), (self.student, student)):
            device = model.device
            stream[:] = [model.get_input_embeddings()(batch["input_ids"].to(device)).cpu() for batch in self.batches]

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(batch number, teacher's stream, student's stream), on the device."""
        device = self.teacher_model.device
        for place, (teacher, student) in enumerate(zip(self.teacher, self.student, strict=True)):
            yield place, teacher.to(device), student.to(device)

    def arguments(self, half: HalfLayer, place: int) -> dict[str, Any]:
        """What transformers passes to that block beside the hidden states."""
        return _block_arguments(self.teacher_model, self.batches[place], half) if half.attention else {}


def run_block(model: PreTrainedModel, half: HalfLayer, stream: Tensor, arguments: dict[str, Any]) -> Tensor:
    """`block(norm(x))`, [B, T, width of the model]."""
    norm, block = model.get_submodule(half.norm), model.get_submodule(half.block)
    out = block(hidden_states=norm(stream), **arguments) if half.attention else block(norm(stream))
    return out[0] if isinstance(out, tuple) else out


def writer_input(model: PreTrainedModel, half: HalfLayer, stream: Tensor, arguments: dict[str, Any]) -> Tensor:
    """What the half layer's writer multiplies, [B, T, heads·head_dim or FFN width]: the same widths in a teacher and its student."""
    caught = []
    handle = model.get_submodule(half.writer).register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    try:
        run_block(model, half, stream, arguments)
    finally:
        handle.remove()
    return caught[0]


def normalised(stream: Tensor, eps: float) -> Tensor:
    """The stream as an RMSNorm without gain returns it, in fp32 or wider."""
    stream = stream.to(torch.promote_types(stream.dtype, torch.float32))
    return stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + eps)


def _block_arguments(model: PreTrainedModel, batch: dict[str, Tensor], half: HalfLayer) -> dict[str, Any]:
    """Run the model with norms and blocks that do nothing, and keep what attention is given at `half`."""
    batch = for_attention({key: value.to(model.device) for key, value in batch.items()}, model.config)
    noted: dict[str, Any] = {}
    wanted = model.get_submodule(half.block)

    def attention(module, *args, **kwargs):
        hidden = kwargs.pop("hidden_states", args[0] if args else None)
        if module is wanted:
            noted.update(kwargs)
        return torch.zeros_like(hidden), None

    narrow = torch.zeros(*batch["input_ids"].shape, 1, dtype=model.dtype, device=model.device)  # shape, dtype and device are all that counts
    with _replaced(model, attention):
        model.model(inputs_embeds=narrow, position_ids=batch.get("position_ids"), use_cache=False)
    return noted


@contextmanager
def _replaced(model: PreTrainedModel, attention) -> Iterator[None]:
    """Attention that only takes notes, feed-forward networks that return zeros, norms that return what they are given."""
    replaced: list[tuple[nn.Module, Any]] = []  # with the forward that was the instance's own (of a hook or a kernel), or None

    def replace(module: nn.Module, forward) -> None:
        replaced.append((module, vars(module).get("forward")))
        module.forward = forward

    try:
        for layer in families.decoder_layers(model):
            replace(layer.self_attn, lambda *args, _module=layer.self_attn, **kwargs: attention(_module, *args, **kwargs))
            replace(layer.mlp, torch.zeros_like)
        for path in families.norm_paths(model.config):
            replace(model.get_submodule(path), lambda hidden: hidden)
        yield
    finally:
        for module, own in replaced:
            if own is None:
                del module.forward
            else:
                module.forward = own
