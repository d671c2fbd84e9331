"""Files that are whole or absent: written beside their place, synced, then renamed. And refusals about paths, with the nearest right name."""

from __future__ import annotations

import codecs
import difflib
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from red.errors import REDError

START_FILE = "start.safetensors"  # a run's fitted start
HALF_LAYERS = "start-half-layers"  # what of it was fitted before an interruption
STARTS = ("start.", ".start.", HALF_LAYERS)  # how the names of both begin, of earlier ones beside them, and of one that a kill cut short
RUN_FILE, CHANNELS_FILE, PAGE = "run.json", "channels.safetensors", "report.html"  # what red.report keeps of a run


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder (a rename must not cross file systems); renamed to `path` on success, removed on failure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask says; some writers (safetensors) make files for their owner only
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Ask the system to put a file or a folder's entries on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot sync folders
            raise
    finally:
        os.close(handle)


def atomic_write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file that is never seen half-written; makes the folder where it is missing."""
    with _beside(Path(path)) as temporary:
        temporary.write_bytes(content)


def atomic_write_text(path: str | Path, text: str) -> None:
    """UTF-8 text; see `atomic_write_bytes`."""
    atomic_write_bytes(path, text.encode())


def atomic_write_json(path: str | Path, value, *, indent: int | None = 2) -> None:
    """Strict JSON (NaN and infinity are refused with ValueError: write None); see `atomic_write_bytes`."""
    atomic_write_text(path, json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")


def atomic_write_safetensors(path: str | Path, tensors: Mapping, metadata: Mapping[str, str] | None = None) -> None:
    """Tensors by name, each contiguous and none sharing memory with another; see `atomic_write_bytes`."""
    from safetensors.torch import save_file

    with _beside(Path(path)) as temporary:
        save_file(dict(tensors), temporary, metadata=dict(metadata) if metadata else None)


def require_empty_output(path: str | Path, *, what: str = "output_dir", remedy: str = "", ignoring: tuple[str, ...] = ()) -> Path:
    """The path, if it does not exist yet or is an empty folder.

    Args:
        path: where something is going to be written.
        what: the setting's name, for the message.
        remedy: what else the user can do here, a whole sentence.
        ignoring: how the names of entries begin that may be there.

    Raises:
        REDError: the path is a file, a folder with something in it, or in a place where nothing can be written. Nothing is touched.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise REDError(f"{what}={str(path)!r} is a file; a folder that does not exist yet, or an empty one, is needed. Choose another path.")
    if path.is_dir():
        entries = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(ignoring))
        if entries:
            shown = ", ".join(entries[:3]) + (f" and {len(entries) - 3} more" if len(entries) > 3 else "")
            raise REDError(f"{what}={str(path)!r} is not empty (it holds {shown}) and nothing is overwritten. "
                           f"Choose another folder, or move this one away.{' ' + remedy if remedy else ''}")
    parent = next(folder for folder in [path, *path.absolute().parents] if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise REDError(f"{what}={str(path)!r} cannot be made: {parent} is not a folder that this user may write to. Choose another path.")
    return path


def require_place_for(path: str | Path, option: str) -> Path:
    """The path, if a file can be written there; asked before minutes are spent on what goes into it.

    Raises:
        REDError: it is a folder, or in a place where nothing can be written.
    """
    path = Path(path)
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if path.is_dir():
        raise REDError(f"{option}={str(path)!r} is a folder; a file is written. Add a name to it.")
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise REDError(f"{option}={str(path)!r} cannot be written: {parent} is not a folder that this user may write to. Choose another path.")
    return path


def json_lines(path: str | Path) -> Iterator[tuple[int, object]]:
    """(line, value) of each line of a .jsonl file that is not blank. A line ends with a line feed alone: U+2028, U+0085 and their like may stand in a text.

    Raises:
        REDError: a line that is not JSON in UTF-8, by its number; a file that cannot be read.
    """
    number = 1
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    yield number, json.loads(line.decode())
    except OSError as error:
        raise REDError(f"{path} cannot be read: {error}.") from error
    except (ValueError, RecursionError) as error:
        raise REDError(f"{path}, line {number} is not JSON: {error}. A .jsonl file holds one object a line, in UTF-8.") from error


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None if none is like it. Hyphens and case do not count."""
    fold = {known_name.lower().replace("-", "_"): known_name for known_name in sorted(known, reverse=True)}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), fold, n=1, cutoff=0.5)
    return fold[found[0]] if found else None


def require_existing(path: str | Path, what: str) -> Path:
    """The path, if it exists.

    Raises:
        REDError: naming the part that is missing and the sibling with the nearest name.
    """
    path = Path(path)
    if path.exists():
        return path
    if path.is_symlink():
        raise REDError(f"{what} {str(path)!r} is a link to {os.readlink(path)!r}, which does not exist.")
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    siblings = [entry.name for entry in missing.parent.iterdir()] if missing.parent.is_dir() else []
    like = nearest(missing.name, siblings)
    hint = f"did you mean {str(missing.parent / like)!r}?" if like else f"{str(missing.parent.absolute())!r} holds nothing of a like name."
    part = "" if missing == path else f" ({str(missing)!r} is the part that is missing)"
    raise REDError(f"{what} {str(path)!r} does not exist{part}; {hint}")


def in_gib(count: float) -> str:
    """Bytes for people: `1.2 GiB`, or MiB below a tenth of one."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 / 10 else f"{count / 2**20:,.2f} MiB"
