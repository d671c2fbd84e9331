"""What the study compares, in the order of importance: an interrupted study has the first rows first."""

from __future__ import annotations

GRID = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)  # learning rates, one grid for all rows
HORIZONS = (150, 450)  # optimiser steps
SWEEP_SEED = 100  # of the runs that choose the rate, judged on the validation split
SEEDS = (0, 1, 2, 3, 4)  # of the runs that are reported, on the test split
EARLY = (0, 2, 5, 10, 15, 20, 30)  # steps after which a student is measured, besides …
EVERY = 15  # … each of these: about 20k tokens

ROWS: dict[str, tuple[str, dict]] = {  # name → start, REDConfig fields
    "fitted": ("fitted", {}),
    "activation": ("activation", {}),  # RED (arXiv 2605.29327)
    "pca": ("pca", {}),
    "random": ("random", {}),  # LRC's start (arXiv 2505.12781)
    "balanced": ("balanced", {}),
    "activation + readers": ("activation", {"start_fit": "readers"}),
    "explained": ("explained", {}),
    "activation, T=40": ("activation", {"temperature": 40.0}),  # with the next one and the two starts above: the paper's 2 × 2
    "random, T=40": ("random", {"temperature": 40.0}),
    "activation + full": ("activation", {"start_fit": "full"}),
    "pca + readers": ("pca", {"start_fit": "readers"}),
    "random_selection": ("random_selection", {}),
    "orthogonal_shared": ("orthogonal_shared", {}),
    "activation, plain taps": ("activation", {"tap_normalize": False}),  # squared errors as they are, as in LRC's public code and as we read RED
    "random, public LRC objective": ("random", {"lrc_faithful": True}),  # T = 40 and its reductions (public code)
    "magnitude": ("magnitude", {}),
    "variance": ("variance", {}),
    "activation, norm tap": ("activation", {"calibration_tap": "norm"}),  # activations after the norms, as Minitron reads them (arXiv 2407.14679)
    "activation_lstsq": ("activation_lstsq", {}),
    "activation, no norm scale": ("activation", {"norm_scale": False}),
    "orthogonal": ("orthogonal", {}),
}

# What changes a student before it is trained: its start and these fields. The other rows begin as another row does.
SHAPING = {"start_fit", "calibration_tap", "norm_scale"}
UNTRAINED_ROWS = [row for row, (_, options) in ROWS.items() if set(options) <= SHAPING]


def measured_at(steps: int) -> list[int]:
    """The steps after which a student of so many steps is measured; StudentRun.full_steps come in any case."""
    return sorted({step for step in (*EARLY, *range(0, steps, EVERY)) if step <= steps})
