"""Packaging: the lock, the wheel's contents, and a Makefile that sets up from nothing and repairs what was interrupted."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]


def names(requirements):
    return {re.match(r"[\w.-]+", line).group().lower().replace("_", "-") for line in requirements}


def test_the_lock_pins_everything_and_names_no_index():
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+(; (python_version|sys_platform) \S+ \"[\w.]+\")?", line) for line in LOCK), "pins only: no url, no option"
    assert {"torch==2.13.0", "accelerate==1.15.0", "datasets==5.2.0", "safetensors==0.8.0", "ninja==1.13.2", "pytest-benchmark==5.3.1"} <= set(LOCK)
    assert any(line.startswith("transformers==5.23.0") for line in LOCK) and any(line.startswith("triton==3.7.1") for line in LOCK)
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"] + ["setuptools", "wheel"]
    assert names(wanted) <= names(LOCK)


def test_this_environment_is_the_locks():
    from importlib.metadata import PackageNotFoundError, version

    if "PIP_PREFIX" in os.environ or not (Path(sys.prefix) / ".ready").exists():
        pytest.skip("not an environment that make set up")
    for line in LOCK:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate():
            try:
                assert requirement.specifier.contains(version(requirement.name)), line
            except PackageNotFoundError:
                pytest.fail(f"{line} is not installed")


def test_project_metadata():
    assert PROJECT["name"] == "red-distill" and PROJECT["requires-python"] == ">=3.10" and PROJECT["license"] == "Apache-2.0"
    assert PROJECT["scripts"] == {"red": "red.cli:main"}
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    import red

    assert red.__version__ == PROJECT["version"]


def test_continuous_integration_runs_the_same_command():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and script.read_text().startswith("#!/usr/bin/env bash") and "make test" in script.read_text()
    ignored = (ROOT / ".gitignore").read_text().split()
    assert {".venv/", "runs/", "build/", "*.egg-info/", "__pycache__/"} <= set(ignored)


def test_the_wheel_holds_packages_and_data(tmp_path):
    source = tmp_path / "source"  # a build writes beside setup.py
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("red", "red_kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-w", str(tmp_path),
                    str(source)], check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("red_distill-*.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    modules = {path.relative_to(ROOT).as_posix() for package in ("red", "red_kernels") for path in (ROOT / package).rglob("*.py")}
    data = {path.relative_to(ROOT).as_posix() for package in ("red", "red_kernels") for path in (ROOT / package).rglob("*")
            if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".py", ".so")}
    assert {"red/demo/report_template.html", "red/demo/learning_rates.json", "red/example/rich/model.safetensors", "red/judge/tasks/red_chains.yaml"} <= data
    (about,) = [name for name in inside if name.endswith(".dist-info/METADATA")]
    packed = {name for name in inside if not name.startswith(about.removesuffix("METADATA"))}
    assert packed == modules | data, sorted(packed ^ (modules | data))
    metadata = email.message_from_bytes(zipfile.ZipFile(wheel).read(about))
    assert set(metadata.get_all("Provides-Extra")) == PROJECT["optional-dependencies"].keys() and metadata["Requires-Python"] == ">=3.10"
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    assert {one.name for one in required if one.marker is None} == names(PROJECT["dependencies"])
    for extra, wanted in PROJECT["optional-dependencies"].items():
        assert {one.name for one in required if one.marker is not None and one.marker.evaluate({"extra": extra})} == names(wanted), extra


# ---- make ----

FAKE_PYTHON = """#!/bin/bash
# Stands for every interpreter: a new environment gets a copy of this file.
echo "$@" >> "$FAKE_LOG"
case "$1 $2" in
  "-m venv") mkdir -p "$4/bin"; cp "$0" "$4/bin/python" ;;
  "-m pip") [ -z "${FAKE_FAILS:-}" ] || exit 1 ;;
  "-c import sys"*) exit "${FAKE_TOO_OLD:-0}" ;;
  "-c import venv"*) exit "${FAKE_NO_VENV:-0}" ;;
esac
"""


@pytest.fixture()
def make(tmp_path):
    """Run make in a copy of the repository's packaging files, with an interpreter that only writes down what it was asked."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    for name in ("Makefile", "requirements.txt", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    log = tmp_path / "log"

    def run(**environment):
        log.write_text("")
        outer = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}  # of the make that runs the tests
        done = subprocess.run(["make", "setup", f"PYTHON={python}"], cwd=tmp_path, env={**outer, "FAKE_LOG": str(log), **environment},
                              capture_output=True, text=True)
        return done, log.read_text()

    return run


def test_make_sets_up_once(make, tmp_path):
    done, log = make()
    assert done.returncode == 0, done.stderr
    assert "-m venv --clear .venv" in log and "-r requirements.txt" in log and "--no-build-isolation --no-deps -e ." in log
    assert log.index("-r requirements.txt") < log.index("-e .")
    done, log = make()
    assert done.returncode == 0 and log == ""
    os.utime(tmp_path / "requirements.txt", (2**31, 2**31))  # a newer lock: installed again, into the same environment
    done, log = make()
    assert "-r requirements.txt" in log and "-m venv" not in log


def test_make_repairs_what_was_interrupted(make):
    assert make(FAKE_FAILS="1")[0].returncode != 0
    done, log = make()
    assert done.returncode == 0 and "-m venv --clear .venv" in log


@pytest.mark.parametrize("environment, message", [({"FAKE_TOO_OLD": "1"}, "red needs Python 3.10 or newer"), ({"FAKE_NO_VENV": "1"}, "apt install python3-venv")])
def test_make_says_what_is_missing(make, environment, message):
    done, _ = make(**environment)
    assert done.returncode != 0 and message in done.stderr
