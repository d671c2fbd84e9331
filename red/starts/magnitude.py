"""A start without data: keep the channels whose weights are largest."""

import torch
from torch import Tensor

from red import families
from red.starts.base import StartContext, StartMaps, register, selection


@register("magnitude")
def magnitude(context: StartContext) -> StartMaps:
    """The top `d'` channels by the squared weights that read or write them. A calibration serves the norm scale only."""
    return selection(context, weight_share(context).topk(context.hidden_size).indices)


def weight_share(context: StartContext) -> Tensor:
    """[d] fp64: each channel's share of the squared weights that touch the stream, summed over the modules.

    Readers count with their norm's gain folded in, a writer with its bias as one more column, and a tied embedding twice: as what writes the
    stream first and, with the final gain, as the head that reads it last. Every module is divided by its squared Frobenius norm, so each
    adds 1 in all: otherwise the embedding of a large vocabulary would decide alone.
    """
    weights = dict(context.teacher.named_parameters())
    readers = context.readers()
    if families.is_tied(context.teacher):
        readers = [*readers, (context.embedding, "model.norm")]
    squares = [_columns(weights[name]) * context.gain(norm).square() for name, norm in readers]
    squares.append(_columns(weights[context.embedding]))
    for name in context.writers():
        bias = weights.get(name.removesuffix("weight") + "bias")
        squares.append(_columns(weights[name].T) + (0 if bias is None else _columns(bias[None])))
    return torch.stack([square / square.sum().clamp_min(torch.finfo(square.dtype).tiny) for square in squares]).sum(0)


def _columns(weight: Tensor) -> Tensor:
    """[d] fp64 on the CPU: the sum of squares of each column of `weight [out, d]`."""
    return weight.detach().double().square().sum(0).cpu()
