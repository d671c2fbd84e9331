"""Figures drawn by matplotlib as SVG whose colours are CSS variables: one figure, light and dark. All pages and pictures of red draw with this.

matplotlib draws with stand-in colours (ROLES); `svg` replaces them by `var(--…)`, which the page defines for both themes, and strips
what refers to the outside (DOCTYPE, name spaces, metadata), so that a page with these figures loads nothing.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from html import escape

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# role → a colour that nothing else has. Each is a CSS variable of the page: --ink, --muted, --grid, --teacher, --start0 …
ROLES = {"ink": "#010203", "muted": "#040506", "grid": "#070809", "teacher": "#0a0b0c",
         **{f"start{i}": f"#0d0e{i:02x}" for i in range(8)}}
# (light, dark): red for RED, blue for LRC; told apart with any colour vision (checked by lightness too)
PALETTE = {"ink": ("#1d2025", "#e9eaec"), "muted": ("#626a75", "#9aa2ad"), "grid": ("#e3e5e9", "#2d323a"), "teacher": ("#3c4450", "#c3c9d2"),
           "start0": ("#c8102e", "#ff5a66"), "start1": ("#2f6fb5", "#6fb0f2"), "start2": ("#e08a00", "#ffb84d"), "start3": ("#12836f", "#3fc7ad"),
           "start4": ("#8046b0", "#bd8fe8"), "start5": ("#7a5c3a", "#c9a77c"), "start6": ("#c2478f", "#f08cc4"), "start7": ("#5c7a12", "#a8cc4e")}
STYLE = {"font.size": 10, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.spines.top": False,
         "axes.spines.right": False, "axes.edgecolor": ROLES["muted"], "axes.labelcolor": ROLES["muted"], "axes.titlecolor": ROLES["ink"],
         "text.color": ROLES["ink"], "xtick.color": ROLES["muted"], "ytick.color": ROLES["muted"], "grid.color": ROLES["grid"],
         "axes.grid": True, "axes.grid.axis": "y", "axes.axisbelow": True, "grid.linewidth": 0.8, "lines.linewidth": 2.0,
         "lines.markersize": 4.5, "svg.fonttype": "none", "xtick.major.size": 0, "ytick.major.size": 0, "axes.linewidth": 0.8}
MARKERS = "osD^vP*X"


def svg(figure, description: str, *, page: bool = True, dark: bool = False) -> str:
    """The figure as SVG text and close it.

    Args:
        description: for readers who cannot see it, and the salt of its ids, so that two figures of a page share none.
        page: for a page that defines the variables; False: a file of its own, in the light or `dark` palette.
    """
    buffer = io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([^;\"]*?)(\d[\d.]*px) [^;\"]*", r"font: \1\2 system-ui, sans-serif", text)
    for role, stand_in in ROLES.items():
        text = text.replace(stand_in, f"var(--{role})" if page else PALETTE[role][dark])
    size = re.search(r'width="([\d.]+)pt" height="([\d.]+)pt"', text)
    if page:
        text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
        text = text.replace(size.group(0), f'role="img" aria-label="{escape(description)}" style="max-width: {float(size.group(1)) * 4 / 3:.0f}px"', 1)
    return text


def numbers(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]
