"""The pictures of docs/method.md: `python -m benchmarks.method_figures`, about a minute on one core.

collapse    the linear auto-encoder of `benchmarks.study.autoencoder` on the embedded teacher's states at half its width: energy lost and eRank, step by step
channels    the mean activation of every channel, sorted, of the same teacher: what a selection of half of them keeps
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from transformers import AutoTokenizer

import red
from benchmarks.study.autoencoder import measure
from red.demo.plots import ROLES, STYLE, svg
from red.example import documents, teacher_path
from red.files import atomic_write_text

ROOT = Path(__file__).parents[1]
STEPS = (*range(0, 100, 10), *range(100, 1001, 50))
STARTS = {"random": ("random (LRC)", "start1"), "activation": ("activation (RED)", "start0"), "pca": ("pca", "start3"), "balanced": ("balanced: fitted's map, unfitted", "start4")}


def write(path: Path, draw, description: str) -> None:
    for dark in (False, True):
        atomic_write_text(path.with_name(f"{path.stem}-dark.svg") if dark else path, svg(draw(), description, page=False, dark=dark))


def collapse(steps=STEPS, tokens: int = 4169):
    """The function that draws it; what is measured is measured once."""
    found = {start: measure(start, 64, 0, teacher_path(), steps=steps, tokens=tokens) for start in STARTS}

    def draw():
        with plt.rc_context(STYLE):
            figure, (lost, rank) = plt.subplots(1, 2, figsize=(9.6, 3.1))
            for start, (name, role) in STARTS.items():
                lost.plot(found[start]["steps"], found[start]["loss"], color=ROLES[role], label=name)
                rank.plot(found[start]["steps"], found[start]["erank"], color=ROLES[role], label=name)
            rank.axhline(found["pca"]["teacher_erank"], color=ROLES["teacher"], linestyle=(0, (5, 3)), linewidth=1.4, label="the teacher's states")
            lost.set_title("share of the energy lost")
            rank.set_title("effective rank of what comes back")
            for axes in (lost, rank):
                axes.set_ylim(bottom=0)
                axes.set_xlabel("steps of Adam")
            lost.legend(*rank.get_legend_handles_labels(), frameon=False, fontsize=8, labelcolor=ROLES["muted"], loc="upper right")
            return figure

    return draw


def channels(rows: int = 64):
    tokenizer = AutoTokenizer.from_pretrained(teacher_path())
    texts = [document.text for document in islice(documents(0), 40 * rows)]
    scores = red.calibrate(red.load_teacher(teacher_path(), "float32"), texts, tokenizer, samples=rows, max_length=112).scores.double().sort(descending=True).values
    half = len(scores) // 2

    def draw():
        with plt.rc_context(STYLE):
            figure, axes = plt.subplots(figsize=(7.2, 2.7))
            axes.fill_between(range(half), scores[:half], step="mid", color=ROLES["start0"], linewidth=0, label="kept")
            axes.fill_between(range(half - 1, len(scores)), scores[half - 1:], step="mid", color=ROLES["grid"], linewidth=0, label="dropped")
            axes.set_ylim(bottom=0)
            axes.set_xlabel("channels, the most active first")
            axes.set_title("RED's score of every channel")
            axes.legend(frameon=False, labelcolor=ROLES["muted"])
            return figure

    return draw


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    folder = parser.parse_args(arguments).out
    torch.set_num_threads(1)
    write(folder / "collapse.svg", collapse(), "Energy lost and effective rank of a linear auto-encoder of the teacher's states, by start, over steps of Adam")
    write(folder / "channels.svg", channels(), "Mean activation of every channel of the embedded teacher, sorted, with the half that is kept")


if __name__ == "__main__":
    main()
