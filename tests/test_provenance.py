"""The commit that a record names."""

from __future__ import annotations

import subprocess

from red.report import provenance


def test_what_a_study_writes_does_not_make_its_code_dirty(tmp_path, monkeypatch):
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True)

    files = [tmp_path / "red/__init__.py", tmp_path / "benchmarks/results/runs.jsonl", tmp_path / "docs/starts.md"]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_text("before")
    monkeypatch.setattr(provenance.red, "__file__", str(files[0]))
    git("init")
    assert provenance.commit() == "unknown", "red itself is not tracked there"
    git("add", ".")
    git("commit", "-m", "all")
    for file in files[1:]:
        file.write_text("after")
    assert len(provenance.commit()) == 40
    files[0].write_text("after")
    assert provenance.commit().endswith("-dirty")
