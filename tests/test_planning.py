"""`red.plan`: what fits and what does not, times and traffic by hand, refusals without a network, and the command."""

from __future__ import annotations

import json
import socket

import pytest
from tiny_models import build_tiny_model
from transformers import AutoConfig, LlamaConfig

import red
from red.planning import costs
from red.cli import main
from red.planning.costs import Sizes
from red.errors import REDError
from red.planning.gpus import GPUS, find_gpu
from red.planning.report import PAPER, paper_rows
from red.planning.planner import SPARE, config_of
from red.planning.shapes import SHAPES

GIB = 2**30
LLAMA = ("Llama-3.2-3B", 1536)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked for the network"))


def test_the_largest_micro_batch_fits_and_one_row_more_does_not():
    found = red.plan(*LLAMA, gpus=8)
    for one in found.placements:
        peaks = [red.plan(*LLAMA, gpus=one.gpus, per_device_train_batch_size=rows, gradient_accumulation_steps=one.accumulation).placements[-1].memory.peak
                 for rows in (one.largest_batch, one.largest_batch + 1)]
        assert peaks[0] <= (1 - SPARE) * GPUS["H100"].memory < peaks[1]
    assert [one.gpus for one in red.plan(*LLAMA, gpus=6).placements] == [1, 2, 4, 6]


def test_a_step_by_hand():
    """Eight H100 with one micro-batch of 6144 tokens: FLOPs over rate, and every byte that arrives."""
    found = red.plan(*LLAMA, gpus=8, utilisation=0.5, tap_target="gather").placements[-1]
    assert found.accumulation == 1 and found.step_tokens == 49152
    assert found.compute == pytest.approx(18.0499e9 * 6144 / (989.4e12 * 0.5), rel=1e-4)
    teacher, student, pair = 3212749824, 1606374912, 3072 * 1536
    layers = 28 * 1536 * 32768
    arriving = 7 / 8 * (2 * teacher + 2 * (student + layers) + 4 * student + 2 * (4 * pair * (5 * 28 + 1) + 2 * 28 * 3072 * 11264))
    assert found.traffic.bytes == pytest.approx(arriving) and found.traffic.seconds == pytest.approx(arriving / 450e9)
    assert found.hours == pytest.approx(10e9 / 49152 * found.compute / 3600)
    assert found.hours_apart == pytest.approx(found.hours * (1 + found.traffic.seconds / found.compute))
    projected = red.plan(*LLAMA, gpus=8, tap_target="projected").placements[-1].traffic
    assert projected.targets == pytest.approx(7 / 8 * 4 * 2 * 28 * pair)


def test_data_parallel_copies_everything_and_repeats_the_products():
    one, eight = (red.plan(*LLAMA, gpus=8, sharding="none", gradient_accumulation_steps=1).placements[index] for index in (0, -1))
    for part in ("teacher", "projections", "adam", "gradients", "taps"):
        assert getattr(eight.memory, part) == getattr(one.memory, part)
    assert eight.memory.student > 2 * one.memory.student, "fp32, and autocast's copies"
    assert eight.memory.buckets == eight.memory.gradients == 4 * 1606374912
    assert eight.compute == one.compute and eight.flops.projections == one.flops.projections
    assert eight.traffic.bytes == pytest.approx(2 * 7 / 8 * 4 * 1606374912)


def test_sharded_gradients_are_whole_while_micro_batches_add_up():
    asked = dict(gpus=8, gradient_accumulation_steps=4)
    held, reduced = (red.plan(*LLAMA, **asked, sync_each_batch=every).placements[-1] for every in (False, True))
    assert held.memory.gradients == 8 * reduced.memory.gradients
    assert reduced.traffic.gradients == 4 * held.traffic.gradients and reduced.traffic.teacher == held.traffic.teacher


def test_rings():
    """One node: its link. Whole nodes: all ports together. One GPU a node: its own port."""
    gpu = find_gpu("h100")
    assert costs.rate(gpu, 8, 8) == 450e9 and costs.rate(gpu, 64, 64) == 400e9 and costs.rate(gpu, 8, 64) == 50e9
    sizes = Sizes.of(AutoConfig.for_model(**SHAPES[LLAMA[0]]))
    within = costs.traffic(sizes, 1536, gpu, shards=8, replicas=8, micro_steps=1)
    whole = costs.traffic(sizes, 1536, gpu, shards=8, replicas=1, micro_steps=1)
    summed = 2 * 4 * 1606374912 / 8 * 7 / 8
    assert within.seconds - whole.seconds == pytest.approx(summed / 50e9) and within.gradients - whole.gradients == pytest.approx(summed)


@pytest.mark.parametrize("gpus, sharding, dtype, said", [(1, "full", "bfloat16", "in bfloat16\n"), (8, "full", "bfloat16", "in bfloat16 on one GPU, in float32 on several\n"),
                                                         (8, "none", "bfloat16", "in bfloat16 on one GPU, in float32 on several\n"), (8, "none", "float32", "in float32\n")])
def test_the_students_dtype_is_that_of_its_bytes(gpus, sharding, dtype, said):
    found = red.plan(*LLAMA, gpus=gpus, sharding=sharding, student_dtype=dtype)
    for one in found.placements:
        casts = 0 if one.shards > 1 or one.memory.student == 2 * found.student.parameters else 2 * found.student.matrices
        size = (one.memory.student - casts) * one.shards / found.student.parameters
        assert round(size) == (2 if dtype == "bfloat16" and one.gpus == 1 else 4)
    assert f"student {said}" in str(found)


def test_a_teacher_by_name_folder_file_and_config(tmp_path):
    config = build_tiny_model("qwen2").config
    config.save_pretrained(tmp_path)
    assert len({red.plan(teacher, 16).trainable for teacher in (config, str(tmp_path), tmp_path / "config.json", tmp_path)}) == 1
    assert config_of("meta-llama/Llama-3.2-3B-Instruct").hidden_size == 3072
    assert config_of("qwen3-8b").model_type == "qwen3"


@pytest.mark.parametrize("teacher, changes, message", [
    ("Llama-3.2-3C", {}, "did you mean Llama-3.2-3B?"),
    ("/nowhere/Llama-3.2-3B", {}, "does not exist"),
    ("Llama-3.2-3B", {"hidden_size": 1500}, "not a multiple of num_attention_heads=24; the nearest are 1488 and 1512"),
    ("Llama-3.2-3B", {"gpu": "H1000"}, "use one of H100, H200"),
    ("Llama-3.2-3B", {"gpus": 0}, "gpus=0 must be at least 1"),
    ("Llama-3.2-3B", {"tokens": float("nan")}, "tokens=nan must be at least 1 and finite"),
    ("Llama-3.2-3B", {"tokens": float("inf")}, "tokens=inf must be at least 1 and finite"),
    ("Llama-3.2-3B", {"utilisation": 40}, "between 0 and 1"),
    ("Llama-3.2-3B", {"checkpointing": "some"}, "use one of none, cheap, full"),
    (AutoConfig.for_model("gpt2"), {}, "model_type='gpt2' is not supported"),
])
def test_refusals(teacher, changes, message):
    with pytest.raises(REDError, match=message):
        red.plan(teacher, **{"hidden_size": 1536, **changes})


@pytest.mark.parametrize("held, message", [
    ({}, "no model's config.json"), ([], "no model's config.json"), ({"model_type": "llama", "hidden_size": "wide"}, "no model's config.json.*hidden_size"),
    ({"model_type": "llama", "num_attention_heads": 0}, "no model's config.json"), ({"model_type": "qwen3_moe"}, "^model_type='qwen3_moe' is not supported.*experts"),
])
def test_a_file_that_is_no_config(tmp_path, held, message):
    (tmp_path / "config.json").write_text(json.dumps(held))
    with pytest.raises(REDError, match=f"(?s){message}"):
        red.plan(tmp_path / "config.json", 16)
    with pytest.raises(REDError, match="Cannot read the teacher|is not supported"):
        red.plan(tmp_path, 16)


def test_the_command(tmp_path, capsys):
    assert main(["plan", "Llama-3.2-3B", "--hidden-size", "1536", "--gpus", "2", "--paper", "--json", str(tmp_path / "plan.json")]) == 0
    said = capsys.readouterr().out
    for line in ("trained 930 M", "= 18.58; floor (2 teacher + 6 student) 16.06", "assumed, not measured", "peak                       53.1  47.0", "RED-4B"):
        assert line in said, line
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["parameters"] == {"teacher": 3212749824, "student": 1606374912, "trainable": 929650176}
    assert [one["gpus"] for one in found["placements"]] == [1, 2] and found["settings"]["utilisation"] == 0.4
    assert found["placements"][0]["memory"]["peak"] / GIB == pytest.approx(53.1, abs=0.05) and found["placements"][0]["memory"]["fits"]
    assert main(["plan", "Llama-3.1-70B", "--hidden-size", "4096"]) == 0
    assert "does not fit into 79.6 GiB" in capsys.readouterr().out
    assert main(["plan", "Llama-3.1-70B", "--hidden-size", "4096", "--gpu", "H200", "--gpus", "16", "--per_device_train_batch_size", "1", "--sync-each-batch"]) == 0
    said = capsys.readouterr().out
    assert "does not fit" not in said and "It could not start: before it shards, each GPU holds whole weights, 333 GiB" in said


def test_the_papers_runs():
    rows = paper_rows()
    assert [row[0] for row in rows[1:]] == ["RED-1.5B", "RED-1.7B", "RED-4B"]
    assert rows[1][5] == "11,574" and rows[1][6] == "19%"
    inferred = Sizes.of(AutoConfig.for_model(**SHAPES[PAPER[2].teacher]))
    widths = {width: abs(inferred.narrowed(width).parameters - 4e9) for width in range(28, inferred.width, 28)}
    assert min(widths, key=widths.get) == PAPER[2].width


def test_a_small_model_on_a_small_gpu():
    config = LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)  # kv heads left to the default
    assert red.plan(config, 32, gpu="RTX 4090").placements[0].largest_batch > 100


def test_a_large_micro_batch_is_found_at_once(monkeypatch):
    """A toy teacher's rows by the hundred thousand: counting them one by one took 10 s a column."""
    asked = []
    monkeypatch.setattr(costs, "memory", lambda *args, own=costs.memory, **kwargs: asked.append(args) or own(*args, **kwargs))
    config = LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    assert red.plan(config, 32, max_length=64).placements[0].largest_batch > 100_000 and len(asked) < 100
