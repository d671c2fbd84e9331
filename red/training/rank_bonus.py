"""An objective's reward for effective rank: - erank_weight · mean over embedding and layers of ln eRank of the student's hidden states.

Ours, not RED's, and off by default: RED keeps the rank up by its start. ln eRank, so that a layer that collapses pulls hardest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from red import families
from red_kernels import log_erank

TOKENS = 256  # of a micro-batch that count: an eigendecomposition of at most so many rows a layer


class RankBonus:
    """Use: `with bonus.watching(): student(...)`, then `bonus.loss(token_mask)`. Outside `watching` the student has no hooks."""

    def __init__(self, student: PreTrainedModel, weight: float):
        self.student, self.weight = student, weight
        self._states: list[Tensor] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        self._states.clear()
        layers = families.decoder_layers(self.student)
        keep = self._states.append
        handles = [layers[0].register_forward_pre_hook(lambda module, args, kwargs: keep(args[0] if args else kwargs["hidden_states"]), with_kwargs=True)]
        handles += [layer.register_forward_hook(lambda module, args, output: keep(output[0] if isinstance(output, tuple) else output)) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def loss(self, token_mask: Tensor) -> Tensor:
        """The term for the last forward, 0-dim float32; the first TOKENS tokens that are not padding count. 0 where there are fewer than two."""
        states = [state[token_mask][:TOKENS] for state in self._states]
        self._states.clear()
        if len(states[0]) < 2:
            return states[0].new_zeros((), dtype=torch.float32)
        return -self.weight * log_erank(torch.stack(states)).mean().float()
