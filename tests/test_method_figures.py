"""The pictures of docs/method.md: drawn from what is measured, light and dark alike but for the colours."""

from __future__ import annotations

import re

import pytest

from benchmarks import method_figures


def test_the_pictures_are_drawn_for_both_themes(tmp_path, monkeypatch):
    monkeypatch.setattr(method_figures, "STARTS", {name: method_figures.STARTS[name] for name in ("random", "pca")})
    method_figures.write(tmp_path / "collapse.svg", method_figures.collapse(steps=(0, 3), tokens=200), "a description")
    method_figures.write(tmp_path / "channels.svg", method_figures.channels(rows=2), "another")
    for name in ("collapse", "channels"):
        light, dark = ((tmp_path / f"{name}{theme}.svg").read_text() for theme in ("", "-dark"))
        assert light != dark and re.sub("#[0-9a-f]{6}", "", light) == re.sub("#[0-9a-f]{6}", "", dark) and "var(--" not in light + dark
    text = (tmp_path / "collapse.svg").read_text()
    assert "random (LRC)" in text and "effective rank of what comes back" in text and "activation (RED)" not in text


def test_the_page_s_curve_is_the_study_s():
    """docs/starts.md has the same auto-encoder in figures; the collapse that the picture shows is measured here at one of its steps."""
    found = method_figures.measure("random", 64, 0, method_figures.teacher_path(), steps=(0, 100))
    assert found["erank"] == pytest.approx([14.7, 3.3], abs=0.1) and found["loss"] == pytest.approx([1.000, 0.725], abs=2e-3)
