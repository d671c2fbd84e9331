"""The teacher's licence, notices and name go into the exported student; nothing else that its files say does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from tiny_models import build_tiny_tokenizer
from tiny_training import make_trainer

import red
from red.sharing import licences
from red.cli import main
from red.sharing.export import export
from red.sharing.licences import Terms, card, carry, front_matter, terms_of

QWEN = "license: other\nlicense_name: qwen-research\nlicense_link: https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/LICENSE"


@pytest.fixture()
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(licences.logger, "warning", said.append)
    return said


@pytest.fixture()
def teacher(tmp_path, tiny_teacher):
    folder = tmp_path / "Llama-tiny"
    tiny_teacher().save_pretrained(folder)
    build_tiny_tokenizer().save_pretrained(folder)
    (folder / "LICENSE.txt").write_text("The terms.")
    (folder / "NOTICE").write_text("The notice.")
    (folder / "USE_POLICY.md").write_text("The policy.")
    (folder / "README.md").write_text("---\nlicense: llama3.2\nbase_model: somebody/else\n---\n# Whatever <script>alert(1)</script>\n")
    return folder


def texts(folder) -> dict[str, str]:
    return {path.name: path.read_text() for path in Path(folder).iterdir() if path.suffix in (".md", ".txt", "") and path.is_file()}


def test_compress_and_distill_carry_them(teacher, tmp_path, warnings, monkeypatch):
    # the folder is reloaded in a fresh process, README.md and all, in tests/test_cli.py: three times here would take half a minute
    monkeypatch.setattr(sys.modules["red.sharing.export"], "run_preflight", lambda *_: {"max_abs_logit_difference": 0.0, "generated": []})
    (tmp_path / "text.txt").write_text("\n".join(" ".join(f"w{4 + (7 * row + place) % 60}" for place in range(12)) for row in range(30)))
    settings = dict(hidden_size=16, max_length=16, calibration_samples=4, use_cpu=True, report_to="none", disable_tqdm=True, start="activation")
    small = red.compress(teacher, tmp_path / "text.txt", output_dir=str(tmp_path / "small"), **settings)
    done = red.distill(teacher, tmp_path / "text.txt", output_dir=str(tmp_path / "run"), max_steps=1, save_steps=1, per_device_train_batch_size=2, **settings)
    assert main(["export", str(tmp_path / "run" / "checkpoint-1"), "--out", str(tmp_path / "again"), "--tokenizer", str(teacher)]) == 0
    for folder in (small.path, done.path, tmp_path / "again"):
        found = texts(folder)
        assert found["LICENSE.txt"] == "The terms." and found["NOTICE"] == "The notice." and found["USE_POLICY.md"] == "The policy."
        facts = ModelCard(found["README.md"]).data
        assert facts.base_model == "Llama-tiny" and facts.license == "llama3.2" and facts.library_name == "transformers"
        assert "# Llama-tiny-red-16" in found["README.md"] and "Built with Llama." in found["README.md"] and "script" not in found["README.md"]
        assert str(tmp_path) not in found["README.md"], "no path of this machine"
    assert len(warnings) == 3 and all("begins with Llama" in text for text in warnings)


def test_a_teacher_without_a_licence_is_warned_of(teacher, tmp_path, warnings, tiny_teacher):
    for name in ("LICENSE.txt", "NOTICE", "USE_POLICY.md", "README.md"):
        (teacher / name).unlink()
    export(tiny_teacher(), None, tmp_path / "student", teacher=teacher, verify=False)
    assert len(warnings) == 1 and "names no licence" in warnings[0] and "LICENSE and README.md" in warnings[0]
    assert "named none" in texts(tmp_path / "student")["README.md"]
    export(tiny_teacher(), None, tmp_path / "alone", verify=False)
    assert "README.md" not in texts(tmp_path / "alone")


def test_research_only_is_said(tmp_path, warnings):
    (tmp_path / "README.md").write_text(f"---\n{QWEN}\n---\n")
    terms = terms_of(tmp_path)
    assert terms.research_only and terms.license_link.endswith("/LICENSE") and not terms.wants_llama
    (tmp_path / "out").mkdir()
    carry(terms, tmp_path / "out", hidden_size=8)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "research or non-commercial use only" in text and ModelCard(text).data.license_name == "qwen-research"
    assert len(warnings) == 1 and "qwen-research" in warnings[0]
    assert not Terms("a", "apache-2.0").research_only and Terms("a", "cc-by-nc-4.0").research_only


def test_a_byte_order_mark_hides_nothing(tmp_path):
    (tmp_path / "README.md").write_text("---\r\nlicense: mit\r\n---\r\n", encoding="utf-8-sig", newline="")
    assert terms_of(tmp_path).license == "mit"


def test_names():
    assert licences.name_of("meta-llama/Llama-3.2-3B") == "meta-llama/Llama-3.2-3B"
    assert licences.name_of("/home/someone/my models/Qwen 2.5 (copy)") == "Qwen-2.5-copy"
    assert licences.name_of("a/b/c/`x`") == "x" and licences.name_of("/") == "teacher"
    assert Terms("Qwen/x", "llama3.1").wants_llama and "# Llama-x-red-8" in card(Terms("Qwen/x", "llama3.1"), 8)


def test_a_snapshot_of_the_cache_has_its_name_and_its_linked_files(tmp_path):
    home = tmp_path / "models--meta-llama--Llama-3.2-1B"
    (home / "snapshots" / "abc").mkdir(parents=True)
    (home / "blobs").mkdir()
    (home / "blobs" / "0123").write_text("The terms.")
    (home / "snapshots" / "abc" / "LICENSE").symlink_to("../../blobs/0123")
    terms = terms_of(home / "snapshots" / "abc")
    assert terms.base_model == "meta-llama/Llama-3.2-1B" and [path.name for path in terms.files] == ["LICENSE"]


def test_a_name_that_cannot_be_fetched_is_no_error(warnings, monkeypatch):
    import huggingface_hub

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    assert terms_of("organisation/name") == Terms("organisation/name") and "no network" in warnings[0]
    assert terms_of("no such/../place") == Terms("place") and len(warnings) == 1


@pytest.mark.skipif(sys.platform == "win32", reason="links")
def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "secret").write_text("key")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "LICENSE").symlink_to(tmp_path / "secret")
    (tmp_path / "teacher" / "NOTICE").mkdir()
    (tmp_path / "teacher" / "LICENSE.big").write_bytes(b"x" * (licences.LARGEST + 1))
    assert terms_of(tmp_path / "teacher").files == ()


@pytest.mark.parametrize("said", [
    "license: 'mit\n---\n# <img src=x onerror=alert(1)>'", "license: [a, b]", "license: '](http://evil) [x'", "license_link: 'javascript:alert(1)'", "license_name: \"a'b\\nbase_model: x\"",
    "license: !!python/object/apply:os.system ['touch pwned']", "&a [*a]", "- 1", "{" * 5000, "license: \x00", "license: mit # no", "[" * 200_000, "a: &a [x]\nb: &b [*a,*a]\nlicense: *b"])
def test_what_a_card_says_cannot_get_out_of_its_field(said, tmp_path, warnings):
    (tmp_path / "README.md").write_text(f"---\n{said}\n---\n")
    terms = terms_of(tmp_path)
    assert (terms.license, terms.license_name, terms.license_link) in [(None, None, None), ("mit", None, None)]
    assert yaml.safe_load(card(terms, 8).split("\n---\n")[0].removeprefix("---\n"))["base_model"] == terms.base_model
    assert not (tmp_path / "pwned").exists() and isinstance(front_matter(tmp_path / "README.md"), dict)


def test_a_checkpoint_remembers_its_teacher(teacher, tmp_path):
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(AutoModelForCausalLM.from_pretrained(teacher), tmp_path / "run", max_steps=1)
    trainer.save_model(str(tmp_path / "saved"))
    with safe_open(tmp_path / "saved" / "projections.safetensors", "pt") as file:
        assert file.metadata()["teacher"] == str(teacher)
