"""Random orthonormal starts: one map per module, as RED's ablation, or one shared by all."""

import torch

from red import families
from red.starts.base import StartContext, StartMaps, random_orthonormal, register, shared


@register("orthogonal")
def orthogonal(context: StartContext) -> StartMaps:
    """A random orthonormal map for each module of its own: singular values 1, but no reader inverts a writer."""
    maps = {context.embedding: random_orthonormal(context)}
    maps |= {name: random_orthonormal(context).T for name in context.writers()}
    maps |= {name: context.gain(norm)[:, None] * random_orthonormal(context) for name, norm in context.readers()}
    maps |= {f"{norm}.weight": torch.ones(context.hidden_size, dtype=torch.float64) for norm in context.norms}
    if families.is_tied(context.teacher):  # the tied head is the embedding's map, whose nearest diagonal gain is the teacher's seen through it
        maps["model.norm.weight"] = (maps[context.embedding].square() * context.gain("model.norm")[:, None]).sum(0)
    return StartMaps(maps)


@register("orthogonal_shared")
def orthogonal_shared(context: StartContext) -> StartMaps:
    """One random orthonormal map for all modules: readers invert writers on the kept subspace.

    No norm scale: a random subspace keeps the RMS in expectation.
    """
    return shared(context, random_orthonormal(context))
