"""Functions that kernels of a divergence call, accurate in float32 where they vanish; `tl` alone, so that they run everywhere."""

import triton
import triton.language as tl


@triton.jit
def expm1_of_negative(x):
    """e^x - 1 of x <= 0: near 0 by a series, where the difference has few digits left."""
    series = 1 / 40320
    series = series * x + 1 / 5040
    series = series * x + 1 / 720
    series = series * x + 1 / 120
    series = series * x + 1 / 24
    series = series * x + 1 / 6
    series = series * x + 1 / 2
    return tl.where(x > -0.5, series * x * x + x, tl.exp(x) - 1)


@triton.jit
def tanh(x):
    e = expm1_of_negative(-2 * tl.abs(x))
    return tl.where(x < 0, e, -e) / (2 + e)


@triton.jit
def log1p_of_negative(x):
    """log(1 + x) of -1 < x <= 0: the logarithm, and what rounding took from 1 + x."""
    u = 1 + x
    return tl.log(u) + (x - (u - 1)) / u


@triton.jit
def divergence_term(p, q, ratio):
    """p (e^-r - 1 + r) with r = log(p / q), by a series near 0."""
    series = 1 / 20160
    series = series * ratio - 1 / 2520
    series = series * ratio + 1 / 360
    series = series * ratio - 1 / 60
    series = series * ratio + 1 / 12
    series = series * ratio - 1 / 3
    series = series * ratio + 1
    return tl.where(tl.abs(ratio) < 0.5, 0.5 * p * ratio * ratio * series, q - p + p * ratio)


@triton.jit
def student_ratio(ratio, beta):
    """log(q / m) with m = β p + (1-β) q, from log(p / q)."""
    s = log1p_of_negative(tl.where(ratio > 0, 1 - beta, beta) * expm1_of_negative(-tl.abs(ratio)))
    return tl.minimum(-ratio, 0.0) - s
