"""docs/scale.md is what `benchmarks/scale.py` writes, and its prose agrees with its tables."""

from __future__ import annotations

import pytest

from benchmarks import scale
from red.planning.planner import config_of
from red.planning.costs import Sizes, memory, start_bytes, tap_bytes


def test_the_page_is_up_to_date():
    page = scale.PAGE.read_text()
    assert page == scale.filled(page), "run python benchmarks/scale.py"
    with pytest.raises(ValueError, match="0 places"):
        scale.filled(page.replace("<!-- growth -->", ""))


def test_figures_in_the_prose():
    page, (teacher, width) = scale.PAGE.read_text(), scale.LARGE
    sizes = Sizes.of(config_of(teacher))
    held = memory(sizes, width, 1)
    assert (held.teacher + held.student + held.gradients + held.projections + held.adam) / scale.GIB == pytest.approx(539, abs=1) and "over 530 GiB" in page
    assert round(start_bytes(sizes, width) / scale.GIB) == 333 and "333 GiB here" in page
    assert tap_bytes(sizes, width, 1, "full") / 2**20 == pytest.approx(12.5, abs=0.5) and "about 12 MiB a token" in page
    assert memory(sizes, width, 1, shards=64).gathered / scale.GIB == pytest.approx(14, abs=0.5) and "14 GiB whatever" in page
    eight, thousand = (scale.last(*scale.SMALL, gpus, tap_target="gather").step_tokens for gpus in (8, 1000))
    assert thousand / eight == 125 and "125 of the paper's steps" in page and "1628 steps instead of 203 451" in page
    assert round(10e9 / eight) == 203451 and round(10e9 / thousand) == 1628
