"""What a student owes its teacher: the licence, the notices and the name, carried from the teacher's folder into the exported one.

Whatever a teacher's files say was written by others. Of its README.md only names that look like names are taken, links that are links, and files that lie
in its folder; nothing else goes into the student's card.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers.utils import logging

PATTERNS = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
LARGEST = 2**20  # bytes of a licence or a card
NAME = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}", re.ASCII)
REPOSITORY = re.compile(rf"{NAME.pattern}(/{NAME.pattern})?", re.ASCII)
LINK = re.compile(r"https://[\w.\-/~%+#?=&]{1,300}|(LICEN[SC]E|COPYING)[\w.\-]{0,40}", re.ASCII)
RESEARCH = re.compile(r"research|non-?commercial|cc-by-nc", re.IGNORECASE)
LINE = re.compile(r"(license|license_name|license_link):[ \t]+(\S.*)")
OPEN = ("other", "unknown")  # what a front matter says where the hub has no name for the licence

USAGE = ("from transformers import AutoModelForCausalLM, AutoTokenizer", "", 'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
         'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")')
CITATION = "The method is RED, [arXiv 2605.29327](https://arxiv.org/abs/2605.29327), which starts from LRC, [arXiv 2505.12781](https://arxiv.org/abs/2505.12781)."

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class Terms:
    """A teacher's name and terms. `base_model` is a name on the hub, or that of the folder, never a path."""

    base_model: str
    license: str | None = None  # as the hub names it: apache-2.0, llama3.2, other
    license_name: str | None = None  # of license: other
    license_link: str | None = None
    files: tuple[Path, ...] = ()

    @property
    def known(self) -> bool:
        return bool(self.files or self.license_name or (self.license and self.license not in OPEN))

    @property
    def wants_llama(self) -> bool:
        """Llama 3's licences: a model made with it has a name that begins with Llama, and says "Built with Llama"."""
        return (self.license or "").startswith("llama3") or (self.license_name or "").lower().startswith("llama3")

    @property
    def research_only(self) -> bool:
        return bool(RESEARCH.search(f"{self.license} {self.license_name}"))


def terms_of(teacher: str | Path) -> Terms:
    """The terms of a teacher, from its folder, or of a name on the hub from its repository (or the cache, where there is no network)."""
    folder, name = _folder(teacher), name_of(teacher)
    if folder is None:
        return Terms(name)
    said = front_matter(folder / "README.md")
    inside = sorted({path for pattern in PATTERNS for path in folder.glob(pattern) if _belongs(path, folder)})
    return Terms(name, _matching(NAME, said.get("license")), _matching(NAME, said.get("license_name")), _matching(LINK, said.get("license_link")), tuple(inside))


def carry(terms: Terms, folder: str | Path, *, hidden_size: int) -> None:
    """Copy the licence and notices into a student's folder, and write its README.md; warn where something is missing or has to be minded."""
    for path in terms.files:
        shutil.copyfile(path, Path(folder) / path.name)
    (Path(folder) / "README.md").write_text(card(terms, hidden_size), encoding="utf-8")
    if not terms.known:
        logger.warning(f"The teacher {terms.base_model} names no licence (no LICENSE file, no license in its README.md), so the student carries none. Look its terms up before "
                       "you share the student, and put LICENSE and README.md into the teacher's folder.")
    if terms.wants_llama:
        logger.warning(f"{terms.base_model} is licensed as {terms.license_name or terms.license}: give the student a name that begins with Llama, and keep \"Built with Llama\" in its card.")
    if terms.research_only:
        logger.warning(f"{terms.base_model} is licensed as {terms.license_name or terms.license}, for research or non-commercial use only; so is the student.")


def card(terms: Terms, hidden_size: int, *, facts: Mapping[str, object] | None = None, summary: str = "", usage: Sequence[str] | None = None,
         sections: Sequence[str] = (), citation: str | None = None) -> str:
    """A model card: YAML front matter as the Hugging Face hub reads it, what the student is and how it is used, and the terms.

    Args:
        facts: more of the front matter.
        summary, sections: markdown (`red.report.card` makes it from a run): after the title, and between usage and licence.
        usage: lines of Python; None is transformers'.
        citation: of the method; None is RED's.
    """
    short = terms.base_model.rpartition("/")[2] or "student"
    known = {"base_model": terms.base_model, "base_model_relation": terms.base_model and "finetune", "library_name": "transformers", "pipeline_tag": "text-generation",
             "license": terms.license, "license_name": terms.license_name, "license_link": terms.license_link, "tags": ["red", "distillation"], **(facts or {})}
    title = f"{short}-red-{hidden_size}"
    if terms.wants_llama and not title.lower().startswith("llama"):
        title = f"Llama-{title}"
    made_of = f"`{terms.base_model}`" if terms.base_model else "a model that is not named here"
    lines = ["---", yaml.safe_dump({key: value for key, value in known.items() if value}, sort_keys=False).strip(), "---", "", f"# {title}", "",
             f"A student of {made_of} (hidden size {hidden_size}), made with [red](https://arxiv.org/abs/2605.29327). {summary}".rstrip(), "",
             "```python", *(usage or USAGE), "```", "", *sections, "## Licence", ""]
    if terms.wants_llama:
        lines += ["Built with Llama.", ""]
    named = terms.license_name or (terms.license if terms.license not in OPEN else None)
    lines.append(f"The teacher's terms hold for this student: {f'`{named}`' if named else 'see below' if terms.files else 'the teacher named none; look them up before sharing'}."
                 + (" For research or non-commercial use only." if terms.research_only else ""))
    lines += [f"* [{path.name}]({path.name})" for path in terms.files if NAME.fullmatch(path.name)]
    return "\n".join([*lines, "", "## Citation", "", citation or CITATION]) + "\n"


def front_matter(path: Path) -> dict[str, str]:
    """The plain `key: value` lines between the `---` lines at the head of a card. No YAML parser: a stranger's file can keep one busy for hours."""
    try:
        with path.open(encoding="utf-8-sig") as file:  # some editors put a byte order mark in front
            head = file.read(LARGEST).lstrip()
    except (OSError, ValueError):
        return {}
    opening, *lines = head.splitlines() or [""]
    if opening.strip() != "---" or "---" not in (stripped := [line.strip() for line in lines]):
        return {}
    pairs = (LINE.fullmatch(line) for line in lines[:stripped.index("---")])
    return {pair[1]: pair[2].strip(" \t\"'") for pair in pairs if pair}


def _folder(teacher: str | Path) -> Path | None:
    if Path(teacher).is_dir():
        return Path(teacher)
    if not REPOSITORY.fullmatch(str(teacher)):
        return None
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(teacher), allow_patterns=[*PATTERNS, "README.md"]))
    except Exception as error:  # noqa: BLE001 - a network has many ways to fail, and a student that is trained must be written
        logger.warning(f"The licence of {teacher} could not be read: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
        return None


def name_of(teacher: str | Path) -> str:
    """`organisation/name`, also of a snapshot in the hub's cache; else the folder's own name without what a name cannot hold."""
    path = Path(teacher)
    if path.is_dir():
        path = path.resolve()
        if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
            return path.parent.parent.name.removeprefix("models--").replace("--", "/", 1)
    elif REPOSITORY.fullmatch(str(teacher)):
        return str(teacher)
    return re.sub(r"[^\w.\-]+", "-", path.name, flags=re.ASCII).strip("-.")[:96] or "teacher"


def _belongs(path: Path, folder: Path) -> bool:
    """A small file in that folder, or a link of the hub's cache to one of its blobs; a link to anywhere else is not followed."""
    place, home = path.resolve(), folder.resolve()
    inside = place.is_relative_to(home) or (home.parent.name == "snapshots" and place.is_relative_to(home.parent.parent / "blobs"))
    return inside and place.is_file() and place.stat().st_size <= LARGEST


def _matching(pattern: re.Pattern, value) -> str | None:
    return value if isinstance(value, str) and pattern.fullmatch(value) else None
