"""torch.compile of the decoder layers, one graph for all layers of a model: regional compilation.

Compiling the whole model would unroll its layers and break at every tap. Here one compiled function runs any layer: its weights are inputs of the graph, so layers share it, and
a hook on each tapped module puts the module's input and output aside, which are graph outputs. The taps are told of them after the layer, outside the graph. Nothing that the graph sees knows
which layer it is; that would compile each layer anew.

The compiler's partitioner decides itself what the backward computes again, and takes what `checkpointing=cheap` would; with that, or with `full`, it is refused.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from red import families
from red.families import Tap
from red.training.taps import Taps

BACKEND = "inductor"


class CompiledLayers:
    """Use: `with compiled.running(teacher, student, taps): ...` around a training step. Outside of it the models are as they were."""

    def __init__(self):
        self._runs: dict[int, Callable] = {}  # by the model's id, a compiled function each
        self._models: dict[int, _Watched] = {}

    @contextmanager
    def running(self, teacher: PreTrainedModel, student: PreTrainedModel, taps: Taps | None) -> Iterator[None]:
        models, handles = (teacher, student), []
        try:
            if taps:
                taps.compiled = self
            for model in models:
                watched = self._models[id(model)] = _Watched(families.taps(model.config))
                run = self._runs.setdefault(id(model), _compiled_forward())
                handles += [model.get_submodule(tap.path).register_forward_hook(watched.put_aside) for tap in watched.taps]
                for index, layer in enumerate(families.decoder_layers(model)):
                    layer.forward = _reporting(run, watched, layer, index)
            yield
        finally:
            if taps:
                taps.compiled = None
            self._models.clear()
            for handle in handles:
                handle.remove()
            for model in models:
                for layer in families.decoder_layers(model):
                    layer.__dict__.pop("forward", None)

    def watch(self, model: PreTrainedModel, handler: Callable[[Tap, Tensor, Tensor], None]) -> _Handle:
        """Call `handler(tap, input, output)` for every tapped module of the model, after each layer; `remove()` of the result ends it."""
        return _Handle(self._models[id(model)], handler)


class _Watched:
    """What the hooks of one model's layers put aside."""

    def __init__(self, taps: list[Tap]):
        self.taps, self.aside = taps, []
        self.handler: Callable[[Tap, Tensor, Tensor], None] | None = None

    def put_aside(self, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.aside.append((args[0], output))

    def taps_of(self, layer: int) -> list[Tap]:
        return self.taps[layer * len(families.TAPS):(layer + 1) * len(families.TAPS)]


class _Handle:
    def __init__(self, watched: _Watched, handler: Callable[[Tap, Tensor, Tensor], None]):
        self._watched, watched.handler = watched, handler

    def remove(self) -> None:
        self._watched.handler = None


def _compiled_forward() -> Callable:
    """A compiled function `(layer, *args, **kwargs)`. The compiler counts recompilations by code object, so each gets one of its own."""
    own = types.FunctionType(_forward.__code__.replace(), _forward.__globals__)
    return torch.compile(own, backend=BACKEND, fullgraph=True)


def _forward(layer: nn.Module, *args, **kwargs):
    return type(layer).forward(layer, *args, **kwargs)


def _reporting(run: Callable, watched: _Watched, layer: nn.Module, index: int) -> Callable:
    """The layer's forward that tells the handler what was put aside."""
    def forward(*args, **kwargs):
        watched.aside.clear()
        result = run(layer, *args, **kwargs)
        if watched.handler is not None:
            for tap, (module_input, output) in zip(watched.taps_of(index), watched.aside, strict=True):
                watched.handler(tap, module_input, output)
        watched.aside.clear()
        return result
    return forward
