"""LRC's start (arXiv 2505.12781): Gaussian maps, one per module, and norm gains of one."""

import torch

from red.starts.base import StartContext, StartMaps, register


@register("random")
def random(context: StartContext) -> StartMaps:
    """Every `A [d, d']` and `B [d', d]` is N(0, std²) and independent; the teacher's norm gains are not used, as published."""
    def gaussian(*shape: int) -> torch.Tensor:
        return context.std * torch.randn(shape, generator=context.generator, dtype=torch.float64)

    down, wide = context.hidden_size, context.width
    maps = {context.embedding: gaussian(wide, down)}
    maps |= {name: gaussian(down, wide) for name in context.writers()}
    maps |= {name: gaussian(wide, down) for name, _ in context.readers()}
    maps |= {f"{norm}.weight": torch.ones(down, dtype=torch.float64) for norm in context.norms}
    return StartMaps(maps)
