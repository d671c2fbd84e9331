"""Who may import whom: `red_kernels → red → cli, benchmarks, tests`, read from the syntax trees; and imports without Triton."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import red_kernels

ROOT = Path(__file__).resolve().parents[1]
TRITON_ONLY_WHERE_USED = "triton must be imported inside a function: red_kernels imports without it"


def imports(tree: ast.AST, package: str, lazy: bool = False) -> Iterator[tuple[str, list[str], bool]]:
    """(module, names taken from it — none for a plain `import` —, whether inside a function) of every import, relative ones resolved."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, [], lazy
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*above, module] if module else above)
            yield module, [alias.name for alias in node.names], lazy
        else:
            yield from imports(node, package, lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))


def faults(path: str, source: str) -> list[str]:
    """What `source` at `path` (relative to the root) imports and should not."""
    parts = Path(path).with_suffix("").parts
    owner, package = parts[0], ".".join(parts[:-1])
    found = []
    for module, names, lazy in imports(ast.parse(source), package):
        top = module.split(".")[0]
        if owner == "red_kernels" and top in ("red", "transformers"):
            found.append(f"red_kernels imports {module}: it knows torch, and Triton, only")
        if owner == "red_kernels" and top == "triton" and not lazy and parts[1:2] != ("triton",):
            found.append(TRITON_ONLY_WHERE_USED)
        if owner in ("red", "red_kernels") and top in ("tests", "benchmarks"):
            found.append(f"{owner} imports {module}, which is not installed with it")
        if owner == "red" and top == "red_kernels":
            private = [name for name in names if name not in red_kernels.__all__]
            if module != "red_kernels" or not names or private:
                what = f"{', '.join(private)} from {module}" if names else module
                found.append(f"red imports {what}: take public names only, `from red_kernels import <name>`")
        is_cli = parts[1:2] in (("cli",), ("__main__",))
        if owner == "red" and not is_cli and (module.startswith("red.cli") or (module == "red" and "cli" in names)):
            found.append("red imports red.cli: the command line imports the library, not the other way")
    return found


def test_one_file_knows_the_compiled_extension():
    """`csrc → red_kernels`: the library and its ops are named in red_kernels/extension.py alone; everything else asks that."""
    naming = {str(path.relative_to(ROOT)) for path in SOURCES if any(name in path.read_text() for name in ("red_csrc", "_csrc.so", "load_library"))}
    assert naming == {"red_kernels/extension.py"}


SOURCES = sorted(path for folder in ("red_kernels", "red") for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_directions(path):
    assert not faults(str(path.relative_to(ROOT)), path.read_text())


@pytest.mark.parametrize(
    ("path", "source"),
    (
        ("red_kernels/a.py", "import red.config"),
        ("red_kernels/a.py", "def f():\n    from transformers import AutoModel"),
        ("red_kernels/a.py", "import triton.language as tl"),
        ("red_kernels/sub/a.py", "try:\n    import triton\nexcept ImportError:\n    triton = None"),
        ("red_kernels/a.py", "from tests.conftest import x"),
        ("red/a.py", "import red_kernels"),
        ("red/a.py", "import red_kernels.gather as g"),
        ("red/a.py", "from red_kernels.gather import gather"),
        ("red/a.py", "from red_kernels import reference"),
        ("red/a.py", "from red_kernels import *"),
        ("red/sub/a.py", "def f():\n    from benchmarks import roofline"),
        ("red/sub/a.py", "from ..cli import main"),
        ("red/a.py", "from . import cli"),
    ),
)
def test_a_wrong_direction_is_seen(path, source):
    assert faults(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    (
        ("red_kernels/a.py", "import torch\nfrom red_kernels import reference\nfrom . import backend"),
        ("red_kernels/a.py", "def f():\n    import triton"),
        ("red/a.py", "from red_kernels import gather, linear_kd\nfrom red.config import REDConfig\nimport transformers"),
        ("red/cli.py", "from red.cli import helpers"),
        ("red/cli/a.py", "from ..config import REDConfig"),
        ("red/__main__.py", "from red.cli import main"),
    ),
)
def test_a_right_direction_passes(path, source):
    assert not faults(path, source)


def test_red_kernels_works_without_triton():
    """Import and one call, in a fresh process that cannot import Triton; nothing else of the project or of transformers comes along."""
    script = """
import sys

class NoTriton:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ImportError("triton is blocked")

sys.meta_path.insert(0, NoTriton())
import red_kernels, torch
assert red_kernels.gather(torch.arange(4.0), torch.tensor([2])).item() == 2
assert red_kernels.tap_mse(torch.ones(2, 3), torch.zeros(2, 3)).item() == 1
extra = {"red", "transformers", "triton"} & set(sys.modules)
assert not extra, extra
print("works")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() == "works", done.stderr
