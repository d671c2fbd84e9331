"""The documentation's site builds without a warning and shows what it should; checks that need no Sphinx come first."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in DOCS.glob("*.md")}
needs_docs = pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in ("sphinx", "myst_nb", "furo")), reason='the extra docs is not installed: pip install -e ".[docs]"')


@pytest.mark.parametrize("package, page", [("red", "api"), ("red.lori", "api_lori"), ("red_kernels", "api_kernels")])
def test_every_public_name_is_in_the_reference(package, page):
    named = set(re.findall(rf"^\.\. (?:auto|py:)\w+:: {re.escape(package)}\.(\w+)", PAGES[page] + PAGES["settings"], re.MULTILINE))
    assert set(importlib.import_module(package).__all__) <= named


def test_every_page_is_on_the_front_page():
    linked = set(re.findall(r"\]\((?:notebooks/)?(\w+)\.(?:md|ipynb)\)", PAGES["index"]))
    listed = {Path(name).stem for block in re.findall(r"```\{toctree\}\n(.*?)```", PAGES["index"], re.DOTALL) for name in block.split() if not name.startswith(":")}
    everything = set(PAGES) - {"index"} | {path.stem for path in (DOCS / "notebooks").glob("*.ipynb")}
    assert linked >= everything, everything - linked
    assert listed >= everything, everything - listed


def test_links_between_pages_hold_on_a_forge():
    """Sphinx checks the site's; a forge has the files alone."""
    broken = [f"{stem}.md: {target}" for stem, text in PAGES.items() for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
              if not (DOCS / target).exists()]
    pictures = [f"{stem}.md: {target}" for stem, text in PAGES.items() for target in re.findall(r'(?:src|srcset)="([^"]+)"', text) if not (DOCS / target).exists()]
    assert not broken + pictures


@needs_docs
def test_the_site_builds_without_a_warning(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "sphinx", "-n", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "trees"), str(DOCS), str(tmp_path / "site")],
                          env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr[-3000:]

    def page(name: str) -> str:
        return (tmp_path / "site" / f"{name}.html").read_text(encoding="utf-8")

    starts = page("starts")
    for theme, picture in (("light", "untrained.svg"), ("dark", "untrained-dark.svg")):
        assert re.search(rf'<img[^>]*class="only-{theme}[^>]*src="_images/{picture}"', starts), "both pictures, each for its theme"
        assert (tmp_path / "site/_images" / picture).is_file()
    assert "<picture>" not in starts
    api, kernels, settings = page("api"), page("api_kernels"), page("settings")
    assert 'href="#red.DistillResult"' in api and 'href="settings.html#red.REDConfig"' in api, "annotations lead to the public names"
    assert "its exported checkpoint, reloaded and compared" in api, "a comment beside a field"
    assert re.search(r"teacher_hidden\s+\[N, d\]", re.sub(r"<[^>]+>", "", kernels)), "a comment with a shape"
    from red.config import REDConfig

    assert all(f">{name}</span>" in settings for name in REDConfig.__annotations__) and "0.0001" in settings
    shown = re.findall(r'<img[^>]* src="\.\./(_images/\w+\.svg)"', page("notebooks/collapse_explained"))
    assert len(shown) == 2 and all((tmp_path / "site" / picture).is_file() for picture in shown), "the notebook's pictures are in its page"
    for path in (tmp_path / "site").glob("*.html"):
        assert not re.search(r'<(?:script|img|link)[^>]*(?:src|href)="https?:', path.read_text(encoding="utf-8")), f"{path.name} loads something from elsewhere"
