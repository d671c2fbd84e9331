"""Bytes and FLOPs that each *operation needs*, whatever an implementation moves: what the benchmarks divide by.

Bytes are one read of every input and one write of every result; a result that stays inside (logits, Gram matrices) costs nothing. FLOPs are
those of the matrix products, 2 per multiply-add. `size` is the bytes of an element of the activations or weights; sums are float32,
indices int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SUM, INDEX = 4, 8  # bytes of a float32 sum and of an int64 index


class Work(NamedTuple):
    bytes: int
    flops: int = 0

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The floor: the longer of the two times, as if moving and multiplying overlapped completely."""
        return max(self.bytes / bytes_per_second, self.flops / flops_per_second)

    def memory_bound(self, bytes_per_second: float, flops_per_second: float) -> bool:
        return self.bytes / bytes_per_second >= self.flops / flops_per_second


def channel_stats(tokens: int, padding: int, width: int, segments: int, size: int, sums: int = 1) -> Work:
    """Reads `tokens` rows of x (padding is not read) and every token's id; writes `sums` of [segments, width] and a count a segment."""
    return Work(tokens * width * size + (tokens + padding) * INDEX + segments * (sums * width * SUM + INDEX))


def rms_norm(tokens: int, width: int, size: int, residual: bool) -> Work:
    """Reads x and the gain, writes the output; with a residual, reads it too and writes the stream: 2 or 4 passes over [tokens, width]."""
    return Work((4 if residual else 2) * tokens * width * size + width * size)


def rms_norm_stats(tokens: int, width: int, segments: int, size: int, residual: bool) -> Work:
    """RMSNorm's own bytes, an id and a mean square a token, [segments, width] sums with a count each, two moments of [width]."""
    own = rms_norm(tokens, width, size, residual).bytes
    return Work(own + tokens * (INDEX + SUM) + segments * (width * SUM + INDEX) + 2 * width * SUM)


def gather(rows: int, width: int, kept: int, size: int) -> Work:
    """Columns: reads [rows, width] whole, since a 32-byte sector holds 16 bf16 channels and half of them are kept; writes [rows, kept].

    The backward is the same count the other way round: reads [rows, kept], writes [rows, width].
    """
    return Work(rows * (width + kept) * size + kept * INDEX)


def gather_rows(kept: int, columns: int, size: int) -> Work:
    """Rows: reads and writes the kept ones only."""
    return Work(2 * kept * columns * size + kept * INDEX)


def gather_many(columns: Sequence[tuple[int, int]], rows: Sequence[tuple[int, int]], kept: int, size: int) -> Work:
    """All weights of a layer: `columns` lists the [rows, width] whose columns are gathered, `rows` the [width, columns] whose rows are."""
    work = [gather(height, width, kept, size) for height, width in columns] + [gather_rows(kept, across, size) for _, across in rows]
    return Work(sum(one.bytes for one in work))


def selection_low_rank(out: int, width: int, kept: int, rank: int, size: int, factor_size: int) -> Work:
    """W[:, G] + (W U) V: reads W, G, U [width, rank] and V [rank, kept] once, writes [out, kept]; two products of rank `rank`."""
    moved = out * (width + kept) * size + kept * INDEX + rank * (width + kept) * factor_size
    return Work(moved, 2 * out * rank * (width + kept))


def covariance(tokens: int, width: int, size: int) -> Work:
    """C += xᵀ x: reads x, reads and writes C [width, width]; the product needs one triangle only, diagonal included."""
    return Work(tokens * width * size + 2 * width * width * SUM, tokens * width * (width + 1))


def linear_kd(rows: int, vocabulary: int, teacher_width: int, width: int, size: int) -> Work:
    """Forward and backward: two heads' products, and the student's two more for its gradients.

    2NV(d + d') + 4NVd' FLOPs. Reads both hidden states and heads and the labels, writes the gradients of the student's two.
    """
    flops = 2 * rows * vocabulary * (teacher_width + width) + 4 * rows * vocabulary * width
    return Work((rows + vocabulary) * (teacher_width + 2 * width) * size + rows * INDEX, flops)


def tap_mse(tokens: int, width: int, teacher_width: int, size: int) -> Work:
    """Forward and backward: reads the student's [tokens, width], the teacher's whole rows (as `gather`), a mask byte a token; writes the gradient."""
    return Work(tokens * (2 * width + teacher_width) * size + tokens)


def erank(matrices: int, rows: int, width: int, size: int) -> Work:
    """Reads every matrix; one triangle of the smaller Gram matrix, and 4/3 n³ for its eigenvalues (Golub & Van Loan, 4th ed., section 8.3)."""
    small, large = sorted((rows, width))
    return Work(matrices * rows * width * size, matrices * (small * (small + 1) * large + 4 * small**3 // 3))
