"""`pytest benchmarks/ --benchmark-only`: every case of every test file, measured; one line a row at the end, and JSON where asked.

Shapes are small on a CPU and those of the targets on a GPU. pytest-benchmark's own table has the time of a call as a user makes it, dispatch
included; the rows below it have the time on the device (timing.py). `--benchmark-disable` only checks that the rivals agree.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import cases, report, timing

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
    items.sort(key=lambda item: item.path.stem == "test_erank")  # last: its rival takes tens of seconds, and no other row should wait for it


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
        benchmark.pedantic(call, rounds=case.repeats, warmup_rounds=1)
        del inputs
        row = cases.row_of(case, request.getfixturevalue("ceilings"), [])
        row["call_ms"] = benchmark.stats.stats.median * 1e3
        benchmark.extra_info.update(row)
        request.config.stash[ROWS].append(row)

    yield measured
    timing.forget()


def pytest_sessionfinish(session):
    rows, place = session.config.stash[ROWS], session.config.getoption("kernels_json")
    if place is None or not rows:
        return
    found = report.document(rows, session.config.stash[CEILINGS])
    if place.is_dir():
        place /= report.file_name(found["device"])
    place.write_text(json.dumps(found, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[ROWS]:
        terminalreporter.section("kernels")
        for line in report.lines(config.stash[ROWS], config.stash[CEILINGS]):
            terminalreporter.write_line(line)
