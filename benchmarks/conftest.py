"""`pytest benchmarks/ --benchmark-only`: every case of every test file, measured; one line a row at the end, and JSON where asked.

Shapes are small on a CPU and those of the targets on a GPU. pytest-benchmark's own table has the time of a call as a user makes it, dispatch
included; the rows below it have the time on the device (timing.py). `--benchmark-disable` only checks that the rivals agree.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import cases, report, timing
from red.files import atomic_write_text

ROWS, CEILINGS = pytest.StashKey[list](), pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("kernels")
    group.addoption("--kernels-json", type=Path, metavar="PATH", help="write all rows to PATH, or into the folder PATH as kernels_<device>.json")
    group.addoption("--shapes", choices=("gpu", "cpu", "tiny"), default="gpu" if timing.GPU else "cpu", help="which shapes (default: the device's)")


def pytest_configure(config):
    config.stash[ROWS] = []


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", metafunc.module.cases(metafunc.config.getoption("shapes")), ids=str)


def pytest_collection_modifyitems(items):
    """Rows of the targets first, should time run out; effective rank last: its rivals take tens of seconds, and no other row should wait for them."""
    def place(item):
        case = item.callspec.params.get("case") if hasattr(item, "callspec") else None
        return item.path.stem.startswith("test_erank"), getattr(case, "target", None) is None

    items.sort(key=place)


@pytest.fixture(scope="session")
def ceilings(pytestconfig):
    pytestconfig.stash[CEILINGS] = timing.ceilings()
    return pytestconfig.stash[CEILINGS]


@pytest.fixture
def measure(benchmark, request):
    """Times a case with its rivals, and keeps the row."""

    def measured(case: cases.Case) -> None:
        if benchmark.disabled:
            cases.check(case)
            benchmark.pedantic(lambda: None)
            return
        inputs = case.draw()

        def call():
            case.run(*inputs)  # noqa: F821 - deleted after the timing, below
            timing.synchronise()

        benchmark.group = case.op
        benchmark.pedantic(call, rounds=case.repeats, warmup_rounds=int(case.repeats > 1))
        del inputs
        row = cases.row_of(case, request.getfixturevalue("ceilings"), [])
        row["call_ms"] = benchmark.stats.stats.median * 1e3
        benchmark.extra_info.update(row)
        request.config.stash[ROWS].append(row)
        keep_rows(request.config)

    yield measured
    timing.forget()


def keep_rows(config) -> None:
    """After every row, because a run may be killed in the next one."""
    place = config.getoption("kernels_json")
    if place is None:
        return
    found = report.document(config.stash[ROWS], config.stash[CEILINGS])
    if place.is_dir():
        place /= report.file_name(found["device"])
    atomic_write_text(place, json.dumps(found, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[ROWS]:
        terminalreporter.section("kernels")
        for line in report.lines(config.stash[ROWS], config.stash[CEILINGS]):
            terminalreporter.write_line(line)
