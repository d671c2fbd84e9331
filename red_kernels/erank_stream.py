"""Effective rank of more rows than fit in memory, batch by batch: O(d²), whatever the number of rows.

Rows are centred by the mean of *all* rows before each is scaled to unit length (red_kernels.erank), and the length of x - mean is no sum over rows that could be
kept while the mean is unknown. So one pass cannot be exact, and this makes two: the mean, then the covariance of the unit rows.

    stream = ERankStream(d)
    for x in batches: stream.add_to_mean(x)
    for x in batches: stream.add(x)
    stream.erank()
"""

from __future__ import annotations

import torch
from torch import Tensor

from red_kernels import checks
from red_kernels.covariance import covariance


class ERankStream:
    """Two passes over rows of width d. Sums are float64: adding n rows is off by at most n ulp, 1e-10 of the covariance for a million rows.

    float32 rows (and narrower) are multiplied in float32 within a batch, which puts 1e-6 of noise into the covariance; float64 rows in float64.
    Streams over parts of the data (data parallel) are merged after each pass: `a.merge(b)`; the second one begins from `a.fork()` in every part.

    Args:
        width: d.
        device: where the sums are, and the rows have to be.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        if width < 1:
            raise ValueError(f"ERankStream: width must be at least 1, got {width}")
        zeros = dict(dtype=torch.float64, device=device)
        self.total, self.count = torch.zeros(width, **zeros), torch.zeros((), **zeros)  # Σ x and the number of rows of the first pass
        self.largest = torch.zeros((), **zeros)  # the longest row, to tell a zero row from rounding
        self.second, self.rows = torch.zeros(width, width, **zeros), torch.zeros((), **zeros)  # Σ of the unit rows' squares, and the rows of the second pass

    @property
    def mean(self) -> Tensor:  # [d] float64
        return self.total / self.count.clamp(min=1)

    def add_to_mean(self, x: Tensor, mask: Tensor | None = None) -> None:
        """First pass: rows x [..., d] with mask [...] bool; what the mask leaves out may hold anything."""
        x = self._valid("add_to_mean", x, mask).double()
        if self.rows > 0:
            raise ValueError(f"ERankStream: the second pass has begun ({int(self.rows)} rows): the mean cannot change any more. Begin a new stream.")
        self.total += x.sum(0)
        self.count += x.shape[0]
        if x.shape[0]:
            self.largest = torch.maximum(self.largest, torch.linalg.vector_norm(x, dim=-1).amax())

    def add(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Second pass: the same rows again, in any order and any batches."""
        x = self._valid("add", x, mask)
        if self.count == 0:
            raise ValueError("ERankStream: the mean is not known yet. Give all rows to add_to_mean first.")
        centred = x.double() - self.mean
        norm = torch.linalg.vector_norm(centred, dim=-1)
        kept = norm > self.count * torch.finfo(torch.float64).eps * self.largest  # as red_kernels.erank does: the mean's rounding is no direction
        unit = torch.where(kept[:, None], centred / norm[:, None], 0).to(x.dtype if x.dtype == torch.float64 else torch.float32)
        covariance(unit, out=self.second)
        self.rows += x.shape[0]

    def merge(self, other: ERankStream) -> None:
        """Add the sums of another part of the data. After the first pass every part goes on from a `fork` of the sum; after the second, merge those."""
        if other.total.shape != self.total.shape:
            raise ValueError(f"ERankStream: widths {self.total.shape[0]} and {other.total.shape[0]} cannot be merged")
        if self.rows > 0 or other.rows > 0:
            same = torch.equal(self.total, other.total.to(self.total.device)) and bool(self.count == other.count)
            if not same:
                raise ValueError("ERankStream: these parts were centred by different means. Merge after the first pass, and begin the second from forks of the sum.")
            self.second += other.second.to(self.second.device)
            self.rows += other.rows.to(self.rows.device)
            return
        self.total += other.total.to(self.total.device)
        self.count += other.count.to(self.count.device)
        self.largest = torch.maximum(self.largest, other.largest.to(self.largest.device))

    def fork(self, device: torch.device | str | None = None) -> ERankStream:
        """An empty second pass with this stream's mean, for another part of the data."""
        part = ERankStream(self.total.shape[0], device or self.total.device)
        part.total, part.count, part.largest = (one.to(part.total.device, copy=True) for one in (self.total, self.count, self.largest))
        return part

    def spectrum(self) -> Tensor:  # [d] float64
        """Eigenvalues of the unit rows' covariance, descending; the last ones are zeros where there are fewer rows than d."""
        if self.rows != self.count:
            raise ValueError(f"ERankStream: the first pass had {int(self.count)} rows and the second {int(self.rows)}. Give the same rows to both.")
        return torch.linalg.eigvalsh(self.second).clamp(min=0).flip(-1)

    def erank(self) -> Tensor:  # 0-dim float64
        """exp(-Σ r ln r) of all rows; NaN where there is no spectrum: fewer than two rows, all equal, or not finite."""
        eigenvalues = self.spectrum() if self.second.isfinite().all() else torch.full_like(self.total, torch.nan)
        r = eigenvalues / eigenvalues.sum()
        return torch.where(self.count >= 2, (-torch.special.xlogy(r, r).sum()).exp(), torch.nan)

    def _valid(self, what: str, x: Tensor, mask: Tensor | None) -> Tensor:
        """The rows [n, d] that count."""
        name, width = f"ERankStream.{what}", self.total.shape[0]
        checks.require_floating(name, x=x)
        if x.dim() < 1 or x.shape[-1] != width:
            raise ValueError(f"{name}: x must have shape [..., {width}], got {list(x.shape)}")
        x = x.detach()
        if mask is None:
            return x.reshape(-1, width)
        checks.require_dtype(name, "mask", mask, torch.bool)
        checks.require_shape(name, "mask", mask, x.shape[:-1], "x's [...]")
        return x[mask]
