"""Habits: what `make check` runs passes, a commit runs the same, and every environment variable that the code reads has its line in the documentation."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [*(path for folder in ("red", "red_kernels", "csrc", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))), ROOT / "setup.py", ROOT / "tests/tiny_fuzz.py"]
LOCK = dict(line.split(";")[0].split("==") for line in (ROOT / "requirements.txt").read_text().splitlines()
            if line and not line.startswith("#") and 'python_version < "3.11"' not in line)


def run(*command: str, **settings) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False, **settings)


def test_ruff_finds_nothing():
    pytest.importorskip("ruff")
    done = run("ruff", "check", "--no-cache", "--output-format=concise", ".")
    assert done.returncode == 0, done.stdout + done.stderr
    fault = run("ruff", "check", "--no-cache", "--stdin-filename", "red/new.py", "-", input="import os\n\n\ndef f(x=[]):\n    return eval(x)\n")
    assert {"F401", "B006", "S307"} <= set(re.findall(r"\b[A-Z]+\d{3}\b", fault.stdout)), "it would"


def test_types_agree():
    if importlib.util.find_spec("pyrefly") is None or any(version(name) != LOCK[name] for name in ("pyrefly", "transformers", "accelerate")):
        pytest.skip("types are checked with the lock's versions")
    done = run("pyrefly", "check", "--python-interpreter-path", sys.executable, "--output-format=min-text")
    assert done.returncode == 0, done.stdout + done.stderr


def test_types_are_looked_at(tmp_path):
    """The settings hold for files of both packages: a wrong return is found in either, a missing attribute in red_kernels."""
    pytest.importorskip("pyrefly")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    for name in ("red", "red_kernels"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "new.py").write_text('def f() -> int:\n    return "one"\n\n\ndef g(x: int | None) -> int:\n    return x.bit_length()\n')
    done = subprocess.run([sys.executable, "-m", "pyrefly", "check", "--output-format=min-text"], cwd=tmp_path, capture_output=True, text=True, check=False)
    found = re.findall(r"(red\w*)/new.py\S* .*\[([\w-]+)\]", done.stdout)
    assert sorted(found) == [("red", "bad-return"), ("red_kernels", "bad-return"), ("red_kernels", "missing-attribute")], done.stdout + done.stderr


def test_a_commit_runs_what_make_check_runs():
    yaml = pytest.importorskip("yaml")
    hooks = [hook for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"] for hook in repository["hooks"]]
    recipe = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M).group(1).replace("$(BIN)", ".venv/bin")
    assert [hook["language"] for hook in hooks] == ["system", "system"], "nothing is fetched"
    assert [hook["entry"].replace(" --force-exclude", "") for hook in hooks] == [line.strip().removesuffix(" .") for line in recipe.splitlines()]


def test_the_citation_is_of_this_version():
    yaml, red = pytest.importorskip("yaml"), pytest.importorskip("red")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["cff-version"], cited["version"], cited["license"]) == ("1.2.0", red.__version__, "Apache-2.0")


# ---- environment ----


def variables(source: str) -> set[str]:
    """Names that a file reads from its environment or sets in one: os.environ[...], .get, .pop, `in`, |= {...}, getenv, {**os.environ, ...}; FSDP_* for f"FSDP_{...}"."""
    tree, found = ast.parse(source), []
    constants = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("environ"):
            found.append(node.slice)
        elif isinstance(node, ast.Call) and re.search(r"(environ\.(get|pop|setdefault)|getenv)$", ast.unparse(node.func)):
            found.append(node.args[0])
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]).endswith("environ"):
            found.append(node.left)
        elif isinstance(node, ast.Dict) and any(key is None and ast.unparse(value).endswith("environ") for key, value in zip(node.keys, node.values, strict=True)):
            found += filter(None, node.keys)
        elif isinstance(node, ast.AugAssign) and ast.unparse(node.target).endswith("environ"):
            found += node.value.keys
    found = [constants.get(node.id, node) if isinstance(node, ast.Name) else node for node in found]
    return {node.values[0].value + "*" if isinstance(node, ast.JoinedStr) else ast.literal_eval(node) for node in found}


def test_the_page_has_every_variable():
    page = (ROOT / "docs/environment.md").read_text()
    named = set(re.findall(r"`([A-Z][A-Z0-9_]+\*?)(?:=[^`]*)?`", page))
    used = set().union(*(variables(source) for source in map(Path.read_text, SOURCES) if "environ" in source or "getenv" in source))
    families = tuple(name[:-1] for name in named if name.endswith("*"))
    assert {"RED_BACKEND", "RED_BUILD_CUDA", "ACCELERATE_USE_FSDP", "FSDP_*", "PYTHONPATH", "HF_DATASETS_OFFLINE"} <= used, "the search finds what is there"
    assert not {name for name in used - named if not name.startswith(families)}
    assert not {name for name in named if name.startswith(("RED_", "TRITON_"))} - used, "what nobody reads"


def test_the_search_knows_every_spelling():
    source = '''
import os
from os import environ, getenv
NAME = "G"
os.environ["A"], environ.get("B"), os.getenv("C"), getenv("D"), os.environ.pop("E", None), "F" in os.environ, os.environ.setdefault(NAME, "")
os.environ |= {"H": "1"}
child = {**os.environ, "I": "1", f"J": "2", f"K_{NAME}": "3"}
other.get("X"), {"Y": 1}
'''
    assert variables(source) == {*"ABCDEFGHI", "J*", "K_*"}
