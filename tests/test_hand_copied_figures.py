"""Tables that were copied by hand into README.md and docs/ hold what benchmarks/results/ hold."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def result(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


HALF, EIGHTHS, QUARTER = result("starts")["rows"], result("starts_chains_48")["rows"], result("starts_chains_32")["rows"]
UNTRAINED = {name: found["widths"] for name, found in result("untrained")["main"].items()}


def plain(cell):
    return re.sub(r"[*`]|%", "", cell).strip()


def table(page, heading):
    """The rows of the first table of a page whose heading begins so: {first cell, or the one above it with the second: cells}."""
    lines = (ROOT / page).read_text().splitlines()
    begin = next(number for number, line in enumerate(lines) if line.startswith(heading)) + 2
    rows = []
    for line in lines[begin:]:
        if not line.startswith("|"):
            break
        rows.append([plain(cell) for cell in line.strip().strip("|").split("|")])
    return rows


def spread(found):
    return f"{100 * found['mean']:.1f} ± {100 * found['std']:.1f}"


def matches(cell, found):
    """`14.1 ± 2.2`, or `0.0` for what rounds to none."""
    return spread(found).startswith(cell.split(" (")[0] if "±" in cell else f"{cell} ± 0.0")


def reached(cell, rows, key):
    """Tokens to 90 %, with their range; or in how many tokens not."""
    if cell in ("", "not run"):
        return key not in rows
    found = rows[key]["tokens_to_90"]
    seeds = [seed for seed in found["per_seed"] if seed is not None]
    if not seeds:
        return cell.startswith(f"not in {found['budget'] / 1000:.0f}k")
    if len(seeds) < len(found["per_seed"]):
        return str(len(seeds)) in cell or all(f"{seed / 1000:.0f}k" in cell for seed in seeds)
    told = "0" if not any(seeds) else f"{found['mean'] / 1000:.0f}k ({min(seeds) / 1000:.0f}k–{max(seeds) / 1000:.0f}k)"
    return cell.startswith(told) or cell == told.split(" ")[0]


ROWS = 19  # of the table of the trained starts
NAMES = {"activation (RED)": "activation", "random (LRC's start)": "random", "random (LRC)": "random", "explained, not fitted": "explained", "balanced, not fitted": "balanced",
         "activation + fitted readers": "activation + readers", "activation + start_fit: readers": "activation + readers", "orthogonal, one per module": "orthogonal", "activation + the whole fit": "activation + full", "pca + fitted readers": "pca + readers",
         "activation, norm tap (as Minitron)": "activation, norm tap", "fitted (lowest rate of the grid)": "fitted"}


def test_the_readmes_table():
    for name, half, half_tokens, quarter, trained, quarter_tokens in table("README.md", "| start | half the width, untrained"):
        key = NAMES.get(name, name)
        assert matches(half, UNTRAINED["chains"]["64"][key]["exact_match"]) and matches(quarter, UNTRAINED["chains"]["32"][key]["exact_match"]), name
        assert matches(trained, QUARTER[key]["horizons"]["150"]["exact_match"]), name
        assert reached(half_tokens, HALF, key) and reached(quarter_tokens, QUARTER, key), name


def test_the_trained_table():
    rows = table("docs/starts.md", "| start | half width | three eighths")
    assert len(rows) == ROWS
    for name, half, eighths, quarter, trained in rows:
        key = NAMES.get(name, name)
        assert reached(half, HALF, key) and reached(eighths, EIGHTHS, key) and reached(quarter, QUARTER, key), name
        assert not trained or matches(trained, QUARTER[key]["horizons"]["150"]["exact_match"]), name


@pytest.mark.parametrize("heading, teacher, places", [
    ("| start | half the width: untrained", "massive", (("massive_64", "64"), ("massive_48", "48"))),
    ("| start | untrained | after 204k tokens", "rich", (("rich_80", "80"),)),
])
def test_the_other_teachers_tables(heading, teacher, places):
    rows = table("docs/starts.md", heading)
    assert [NAMES.get(name, name) for name, *_ in rows] == ["fitted", "pca", "activation"]
    for name, *cells in rows:
        key = NAMES.get(name, name)
        for (file, width), (untrained, trained, tokens) in zip(places, zip(*[iter(cells)] * 3, strict=True), strict=True):
            found = result(f"starts_{file}")["rows"]
            assert matches(untrained, UNTRAINED[teacher][width][key]["exact_match"]), (name, width)
            assert matches(trained, found[key]["horizons"]["150"]["exact_match"]) and reached(tokens, found, key), (name, width)


def test_the_short_table_of_the_guide():
    for name, half, quarter in table("docs/choose_start.md", "| start | half the width | a quarter |"):
        assert reached(half, HALF, NAMES.get(name, name)) and reached(quarter, QUARTER, NAMES.get(name, name)), name


@pytest.mark.parametrize("page, heading", [("docs/starts.md", "| teacher | width | `fitted`")])
def test_the_untrained_table(page, heading):
    teachers = {"chains, trained basis": "chains", "the same function, principal basis": "principal", "the same function, random basis": "random basis", "massive activations": "massive",
                "rich: tied Qwen3, mean of five kinds": "rich"}
    teacher, seen = "", 0
    for name, width, *cells in table(page, heading):
        teacher = teachers.get(name, teacher)
        whole = {"rich": 160}.get(teacher, 128)
        found = UNTRAINED[teacher][str(int(whole * {"1/2": 0.5, "3/8": 0.375, "1/4": 0.25}[width]))]
        for key, cell in zip(("fitted", "activation + readers", "balanced", "pca", "activation", "random"), cells, strict=True):
            assert matches(cell, found[key]["exact_match"]), (teacher, width, key)
            seen += 1
    assert seen == 66


def test_seeds_are_counted():
    three = {key for key, row in HALF.items() for found in row["horizons"].values() if len(found["exact_match"]["per_seed"]) == 3}
    assert three == {"random", "activation, plain taps", "random, public LRC objective", "activation, no norm scale", "orthogonal"}  # docs/starts.md names them
    assert "five; three for `random` in 611k tokens, `activation` without norm scale or with plain taps, the public LRC objective and `orthogonal`" in (ROOT / "docs/starts.md").read_text()


def test_what_sweeps_bring():
    sweeps = result("push")["sweeps"]["chains 32"]
    assert f"{100 * sweeps['1']['exact_match']['mean']:.0f} → {100 * sweeps['3']['exact_match']['mean']:.0f} %" in (ROOT / "README.md").read_text()
