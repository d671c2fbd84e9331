"""Maps that come from a file: names, shapes, dtypes and values are looked at before a student is made of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from red import families
from red.errors import REDError


def check_maps(maps: Mapping[str, Tensor], config: PreTrainedConfig, hidden_size: int, what: str) -> None:
    """REDError unless every map suits a student of that width.

    Args:
        maps: by the student parameter's name: readers, embedding and head [d, d'], writers [d', d], norm gains [d'], finite; and perhaps `channels [d']`
            int64, d' different ones of the teacher's.
        config: the teacher's.
        what: names the file, for the message.
    """
    d = config.hidden_size
    shapes = {f"{tap.path}.weight": (hidden_size, d) if tap.writes else (d, hidden_size) for tap in families.taps(config)}
    shapes |= {f"{path}.weight": (hidden_size,) for path in families.norm_paths(config)}
    shapes |= {"model.embed_tokens.weight": (d, hidden_size), "lm_head.weight": (d, hidden_size)}
    for name, value in sorted(maps.items(), key=lambda entry: entry[0] == "channels"):  # last: where the width is another, say that
        if name == "channels":
            if value.dtype != torch.int64 or tuple(value.shape) != (hidden_size,) or len(value.unique()) != hidden_size or not 0 <= int(value.min()) <= int(value.max()) < d:
                raise REDError(f"{what}: channels must be {hidden_size} different whole numbers from 0 to {d - 1}, and are {value.dtype} {list(value.shape)}. The file is damaged, or not red's.")
        elif name not in shapes:
            raise REDError(f"{what}: this student has no {name!r}. The file is of another model.")
        elif tuple(value.shape) != shapes[name]:
            raise REDError(f"{what}: {name} has shape {list(value.shape)}, this student needs {list(shapes[name])} for its hidden_size={hidden_size}.")
        elif not value.is_floating_point() or not value.isfinite().all():
            raise REDError(f"{what}: {name} has values that are not finite numbers ({value.dtype}). The file is damaged, or its training diverged.")
