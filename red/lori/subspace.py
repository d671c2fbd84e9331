"""The low-rank subspace that all trajectories share: factors of a higher-order SVD (Tucker) with the token mode left free.

    H [L+1, T, d]  ≈  U_L (U_Lᵀ H U_d) U_dᵀ,      g_t = vec(U_Lᵀ H_t U_d)  [r_L · r_d]

`U_L [L+1, r_L]` and `U_d [d, r_d]` are the leading eigenvectors of the two Gram matrices of the pooled trajectories, Σ_t H_t H_tᵀ and Σ_t H_tᵀ H_t: the
left singular vectors of the unfoldings, which is HOSVD (De Lathauwer, De Moor, Vandewalle 2000). The Gram matrices are sums over tokens, so they are taken in
a stream. That the teacher's trajectories are low-rank and that alignment happens in a shared subspace is LoRi's (arXiv 2606.05315); how the factors are made is
our reconstruction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from red.errors import REDError
from red_kernels import covariance


@dataclass(frozen=True)
class Subspace:
    """Orthonormal factors, and what the states are divided by before they are projected."""

    layers: Tensor  # U_L [L+1, r_L] float32
    channels: Tensor  # U_d [d, r_d] float32
    scale: Tensor  # [L+1] float32: the teacher's RMS in each layer, or ones; infinity where a layer is left out

    @property
    def size(self) -> int:
        return self.layers.shape[1] * self.channels.shape[1]

    def to(self, device) -> Subspace:
        return Subspace(self.layers.to(device), self.channels.to(device), self.scale.to(device))

    def coordinates(self, states: Tensor) -> Tensor:
        """g [..., T, r_L · r_d] of states [..., L+1, T, d]; differentiable, in float32 at least."""
        with torch.autocast(states.device.type, enabled=False):
            dtype = torch.promote_types(states.dtype, torch.float32)
            narrow = states.to(dtype) @ self.channels.to(dtype)  # channels first: layers are few
            mixed = torch.einsum("...ltb,la->...tab", narrow, self.layers.to(dtype) / self.scale.to(dtype)[:, None])
        return mixed.flatten(-2)


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of the two Gram matrices, descending, float64."""

    layers: Tensor  # [L+1]
    channels: Tensor  # [d]

    def ranks(self, energy: float) -> tuple[int, int]:
        """The least (r_L, r_d) whose eigenvalues hold this share of their sum."""
        return rank_of(self.layers, energy), rank_of(self.channels, energy)


class GramStream:
    """The two Gram matrices of trajectories that come one after another; sums are float64."""

    def __init__(self):
        self.blocks: Tensor | None = None  # [L+1, d, d] each layer's Σ h hᵀ
        self.inner: Tensor | None = None  # [L+1, L+1] Σ_t H_t H_tᵀ
        self.tokens = 0

    def add(self, states: Tensor) -> None:
        """One trajectory [L+1, T, d], or several joined along T: padding must not be in it."""
        states = states.detach()
        depth, count, width = states.shape
        if self.blocks is None:
            self.blocks = torch.zeros(depth, width, width, dtype=torch.float64, device=states.device)
            self.inner = torch.zeros(depth, depth, dtype=torch.float64, device=states.device)
        elif self.blocks.shape[:2] != (depth, width):
            raise REDError(f"A trajectory of {depth} layers and width {width} came after some of {self.blocks.shape[0]} and {self.blocks.shape[1]}: "
                           "they are of different models. Collect them from one teacher.")
        for layer in range(depth):
            covariance(states[layer], out=self.blocks[layer])
        flat = states.double().flatten(1)
        self.inner += flat @ flat.mT
        self.tokens += count

    def extend(self, trajectories: Iterable[Tensor]) -> GramStream:
        for states in trajectories:
            self.add(states)
        return self

    def grams(self, normalize_layers: bool = True, chosen: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(Σ H_t H_tᵀ [L+1, L+1], Σ H_tᵀ H_t [d, d], scale [L+1]) of the states divided by their layer's RMS, or as they are; float64.

        Layers that are not `chosen` are divided by infinity: their states are 0 here and in all coordinates.
        """
        if not self.tokens:
            raise REDError("There are no rationale tokens to take a subspace of. Give rows with steps.")
        depth, width, _ = self.blocks.shape
        scale = torch.ones(depth, dtype=torch.float64, device=self.blocks.device)
        if normalize_layers:
            square = self.inner.diagonal() / (self.tokens * width)
            scale = torch.where(square > 0, square.sqrt(), 1.0)
        if chosen is not None:
            scale[[layer for layer in range(depth) if layer not in chosen]] = math.inf
        return self.inner / scale[:, None] / scale, (self.blocks / scale[:, None, None] ** 2).sum(0), scale


def fit_subspace(stream: GramStream, *, energy: float = 0.9, rank_layers: int | None = None, rank_channels: int | None = None,
                 normalize_layers: bool = True, chosen: Sequence[int] | None = None) -> tuple[Subspace, Spectrum]:
    """HOSVD factors of everything in the stream.

    Args:
        energy: the share of each unfolding's squared norm to keep, where its rank is not given.
        rank_layers, rank_channels: r_L and r_d.
        normalize_layers: divide each layer's states by their RMS first. Without it the layers with the largest states, in a language model the last ones and
            those with massive activations, decide the subspace alone.
        chosen: the layers that count, 0 being the embedding; None: all.

    Raises:
        REDError: no tokens, states that are not finite, ranks or an energy that cannot be.
    """
    if not 0 < energy <= 1:
        raise REDError(f"energy={energy!r}: must lie above 0 and not above 1, such as 0.9.")
    inner, outer, scale = stream.grams(normalize_layers, chosen)
    sizes = (len(scale) if chosen is None else len(chosen), len(outer))
    for gram in (inner, outer):
        if not gram.isfinite().all():
            raise REDError("The teacher's states have NaN or infinite values. Load it in float32 or bfloat16.")
    factors, spectra = [], []
    for name, gram, rank, size in zip(("rank_layers", "rank_channels"), (inner, outer), (rank_layers, rank_channels), sizes, strict=True):
        values, vectors = torch.linalg.eigh(gram)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        rank = rank_of(values, energy) if rank is None else rank
        if not 1 <= rank <= size:
            what = "the layers that count, the embedding too" if name == "rank_layers" else "the teacher's hidden size"
            raise REDError(f"{name}={rank}: must lie between 1 and {size}, {what}.")
        spectra.append(values)
        factors.append(vectors[:, :rank].float().contiguous())
    return Subspace(factors[0], factors[1], scale.float()), Spectrum(*spectra)


def rank_of(eigenvalues: Tensor, energy: float) -> int:
    """How many of the (descending) eigenvalues hold this share of their sum."""
    share = eigenvalues.double().cumsum(0) / eigenvalues.double().sum()
    return min(int((share < energy - 1e-12).sum()) + 1, len(eigenvalues))
