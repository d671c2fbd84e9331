"""Statistics of a trajectory in the shared subspace: mean and second moment of its points, whatever their number.

A trajectory is a set of points `g_t`, one a token (or latent step). Its mean and second moment are averages over t, so saying every step twice, or in another
order, changes nothing: trajectories of different lengths can be compared. How LoRi (arXiv 2606.05315) weighs them is not public; the formulas are our
reconstruction.
"""

from __future__ import annotations

import torch
from torch import Tensor


def means(g: Tensor, mask: Tensor) -> Tensor:
    """μ = Σ_t g_t / T of g [B, T, D] where mask [B, T] (bool) is true: [B, D], in g's dtype. What the mask leaves out may hold anything."""
    return g.masked_fill(~mask[..., None], 0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1).to(g.dtype)


def points(g: Tensor, mask: Tensor, *, centred: bool) -> Tensor:
    """The points x_t [B, T, D] with C = Σ_t x_t x_tᵀ: g over √T, without its mean if `centred`, and 0 where the mask is false."""
    x = g - means(g, mask)[:, None] if centred else g
    return x.masked_fill(~mask[..., None], 0) / mask.sum(1).clamp(min=1).to(g.dtype).sqrt()[:, None, None]


def second_moments(g: Tensor, mask: Tensor, *, centred: bool = True) -> Tensor:
    """C = Σ_t (g_t - μ)(g_t - μ)ᵀ / T, or without the mean: [B, D, D]. For looking at; the loss never forms it."""
    x = points(g, mask, centred=centred)
    return x.mT @ x


def squared_distance(first: Tensor, second: Tensor) -> Tensor:
    """‖XᵀX - YᵀY‖²_F of X [B, S, D] and Y [B, T, D] (see `points`): [B].

    = ‖XXᵀ‖² - 2‖XYᵀ‖² + ‖YYᵀ‖², so it costs S·T·D instead of D²; differences of large equal terms, hence at least float32 and clamped at 0.
    """
    with torch.autocast(first.device.type, enabled=False):
        first, second = (x.float() if x.dtype in (torch.float16, torch.bfloat16) else x for x in (first, second))
        both = torch.cat([first, second], 1)
        signs = torch.cat([first.new_ones(first.shape[1]), -second.new_ones(second.shape[1])])
        return ((both @ both.mT).square() * signs[:, None] * signs).sum((1, 2)).clamp(min=0)
