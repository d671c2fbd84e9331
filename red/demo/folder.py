"""The demo's output folder: a new run may replace an old run's folder, once it has succeeded, and nothing else is ever touched.

A run writes into a folder aside. `publish` puts it in its place. A folder that a demo wrote is known by MARKER, which lists its
files; anything else in it, or any other folder that is not empty, is refused before the work begins.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

from red.report.provenance import write_json
from red.errors import REDError

MARKER = ".red-demo.json"
IGNORED = {".DS_Store"}  # the Finder puts it into every folder that it shows


class OutputFolder:
    """Checks `path` at once (REDError), then offers `staging`, a folder beside it to write into.

    With `overwrite` an earlier demo's folder is replaced; without it, only a folder that is missing or empty will do.
    """

    def __init__(self, path: str | Path, *, overwrite: bool = False):
        self.path, self.overwrite = Path(path).absolute(), overwrite
        self.check()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.staging = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}-unfinished-"))
        os.chmod(self.staging, 0o755)  # noqa: S103 - mkdtemp lets only its owner in, and the folder becomes the report's

    def check(self) -> None:
        """Refuse a place that holds anything but an earlier demo's own files."""
        if not self.path.exists() and not self.path.is_symlink():
            return
        if not self.path.is_dir() or self.path.is_symlink():
            raise REDError(f"output_dir={self.path} is not a folder. Name another place, or remove it.")
        present = _files(self.path)
        if not present:
            return
        if MARKER not in present:
            raise REDError(f"output_dir={self.path} is not empty and was not written by a demo (it holds {_some(present)}). "
                           "Nothing was changed. Name another place, or empty it.")
        if not self.overwrite:
            raise REDError(f"output_dir={self.path} holds an earlier demo. Nothing was changed. Replace it with --overwrite (overwrite=True), "
                           "or name another place.")
        foreign = present - {MARKER} - set(json.loads((self.path / MARKER).read_text())["files"])
        if foreign:
            raise REDError(f"output_dir={self.path} holds an earlier demo, which would be replaced, and files that the demo did not write: "
                           f"{_some(foreign)}. Nothing was changed. Move them away, or name another place.")

    def publish(self) -> None:
        """Put what was written in its place, and only then remove the earlier demo."""
        write_json(self.staging / MARKER, {"what": "written by `red demo`; its next run replaces these files", "files": sorted(_files(self.staging))})
        self.check()  # the place may have changed during the run
        old = None
        if self.path.exists():
            old = Path(tempfile.mkdtemp(dir=self.path.parent, prefix=f".{self.path.name}-old-"))
            os.replace(self.path, old)  # onto an empty folder: a rename
        try:
            os.replace(self.staging, self.path)
        except OSError:
            if old is not None:
                os.replace(old, self.path)
            raise
        if old is not None:
            shutil.rmtree(old)

    def discard(self) -> None:
        """Remove what an unfinished run wrote, if it is still there."""
        shutil.rmtree(self.staging, ignore_errors=True)


def _files(folder: Path) -> set[str]:
    """Every file and link below, and every empty folder, relative."""
    found = set()
    for place, folders, files in os.walk(folder):
        inside, files = Path(place).relative_to(folder), set(files) - IGNORED
        found |= {(inside / name).as_posix() for name in files}
        found |= {(inside / name).as_posix() for name in folders if (Path(place) / name).is_symlink()}
        if not folders and not files and inside != Path("."):
            found.add(inside.as_posix())
    return found


def _some(names: set[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
