"""Are the teacher's trajectories low-rank? The energy spectra of their two modes, beside a control that has the same values without their relations.

The control permutes every channel of every layer over all tokens by itself (the permutation of parallel analysis, Horn 1965): each channel keeps its
distribution, and what tokens, channels and layers have to do with each other is gone. Both are centred by each layer's mean token and divided by each layer's
RMS first: the mean alone would be a large direction in both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from red.files import atomic_write_text
from red.lori.subspace import GramStream, rank_of
from red.report.drawing import ROLES, STYLE, plt, svg

ENERGY = 0.9


def spectra(states: Sequence[Tensor], *, seed: int = 0) -> dict:
    """Of trajectories [L+1, T, d]: `{"trajectories" | "shuffled": {"layers" | "channels": {"energy": eigenvalues' shares, "rank_90"}}, "tokens", "shape"}`."""
    pooled = torch.cat(list(states), 1).double()
    pooled = pooled - pooled.mean(1, keepdim=True)
    order = torch.rand(pooled.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).argsort(1)
    found: dict = {"tokens": pooled.shape[1], "shape": [pooled.shape[0], pooled.shape[2]]}
    for name, tensor in (("trajectories", pooled), ("shuffled", pooled.gather(1, order))):
        layers, channels, _ = GramStream().extend([tensor]).grams()
        found[name] = {}
        for mode, gram in (("layers", layers), ("channels", channels)):
            values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
            found[name][mode] = {"energy": (values / values.sum()).tolist(), "rank_90": rank_of(values, ENERGY)}
    return found


def plot(found: dict, path: str | Path, *, dark: bool = False) -> None:
    """Cumulative energy over the number of directions, one panel a mode, as SVG in the light or `dark` palette."""
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9.6, 3.0), width_ratios=(2, 1))
        for axes, mode in zip(panels, ("channels", "layers"), strict=True):
            for name, role, style in (("trajectories", "start0", "-"), ("shuffled", "teacher", (0, (5, 3)))):
                share = torch.tensor(found[name][mode]["energy"]).cumsum(0) * 100
                axes.plot(range(1, len(share) + 1), share, color=ROLES[role], linestyle=style, marker="o" if mode == "layers" else "",
                          label=f"{name}: {found[name][mode]['rank_90']} for 90 %")
            axes.axhline(100 * ENERGY, color=ROLES["muted"], linewidth=0.8)
            axes.set_ylim(0, 104)
            axes.set_title(f"energy in {mode[:-1]} directions, %")
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            axes.legend(frameon=False, fontsize=8, labelcolor=ROLES["muted"], loc="lower right", handlelength=3)
        described = "Cumulative energy of the teacher's trajectories and of the shuffled control, over channel and layer directions"
        atomic_write_text(path, svg(figure, described, page=False, dark=dark))

