"""The forecast of a fit: it grows with what costs, counts what is held, and says so in words."""

from __future__ import annotations

import itertools
import sys
from functools import partial

import pytest
import torch
from reference_lrc import random_batch
from tiny_models import build_tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config

from red import starts
from red.calibration import calibrate_batches
from red.cli import main
from red.fitting import forecast
from red.fitting.fit import fit_maps
from red.fitting.forecast import GIB, measured_rate
from red.fitting.shared_map import most_explained
from red.starts.base import StartContext

LARGE = dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, head_dim=128)


def config_of(**changes) -> LlamaConfig:
    return LlamaConfig(**{**LARGE, **changes}, tie_word_embeddings=False)


def student_bytes(config: LlamaConfig, hidden_size: int) -> int:
    """Of all matrices of a real student, fp32."""
    with torch.device("meta"):
        student = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "hidden_size": hidden_size}))
    return 4 * sum(parameter.numel() for parameter in student.parameters() if parameter.dim() == 2)


@pytest.mark.parametrize("explained", [False, True], ids=["streamed", "explained"])
@pytest.mark.parametrize("fit", ["none", "readers", "full"])
def test_grows_with_tokens_layers_and_width(fit, explained):
    kinds = dict(explained=explained, fit=fit)
    small = forecast(config_of(), 2048, 100_000, **kinds)
    for larger in (forecast(config_of(), 2048, 200_000, **kinds), forecast(config_of(num_hidden_layers=64), 2048, 100_000, **kinds),
                   forecast(config_of(hidden_size=8192), 2048, 100_000, **kinds)):
        assert larger.flops > small.flops and larger.host_bytes >= small.host_bytes and larger.device_bytes >= small.device_bytes
    wider = forecast(config_of(), 3072, 100_000, **kinds)
    assert (wider.flops > small.flops) == (explained or fit != "none") and wider.host_bytes > small.host_bytes
    if fit != "none":
        assert forecast(config_of(), 2048, 200_000, **kinds).host_bytes - small.host_bytes == 100_000 * (4 * 4096 + 4 * 2048), "both streams"


def test_each_stage_adds():
    costs = [forecast(config_of(), 2048, 100_000, explained=explained, fit=fit) for explained, fit in (
        (False, "none"), (False, "readers"), (False, "full"), (True, "full"))]
    for less, more in itertools.pairwise(costs):
        assert more.flops > less.flops and more.host_bytes > less.host_bytes and more.device_bytes >= less.device_bytes


def test_streamed_accumulators_do_not_grow_with_the_depth():
    """O(d²) on the device beside the student's weights; the covariance of every point is O(L d²)."""
    beside = {}
    for layers in (8, 16, 32):
        config = config_of(num_hidden_layers=layers, hidden_size=1024, intermediate_size=14336)
        for explained in (False, True):
            found = forecast(config, 512, 10_000, explained=explained)
            beside.setdefault(explained, []).append(found.device_bytes - student_bytes(config, 512))
    assert beside[False][0] == beside[False][1] == beside[False][2] == 8 * 2 * (1024**2 + 1024 * 512)
    points = [2 * layers + 1 for layers in (8, 16, 32)]
    grown = forecast(config_of(), 512, 1).device_bytes - forecast(config_of(num_hidden_layers=16), 512, 1).device_bytes
    assert grown == 4 * (points[2] - points[1]) * (3 * 4096**2 + 4 * 4096 * 512 + 4 * 512**2)


def test_numbers_of_an_eight_billion_teacher():
    """hidden_size 4096 → 2048, 32 layers, 64 rows of 2048 tokens, a bf16 teacher."""
    found = forecast(config_of(), 2048, 131072, teacher_bytes=2, rate=1e14)
    points, streams, maps = 65 * 4096**2 * 4, 131072 * (2 * 4096 + 4 * 2048), 8 * 4096 * 2048 * 6 * 32
    assert 4.3e9 < points < 4.4e9 and found.host_bytes == points + streams + maps
    matrices = 2 * 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)  # multiplications and additions of a token in the teacher's layers
    assert 3 * matrices * 131072 < found.flops < 12 * matrices * 131072  # passes of the teacher; the climb costs as much as four
    assert found.seconds == found.flops / 1e14 and 2 < found.seconds / 60 < 4
    assert 25e9 < found.device_bytes < 28e9, "the climb holds six matrices of each point, test_fitting_review.py measures it"
    thrice = forecast(config_of(), 2048, 131072, teacher_bytes=2, sweeps=3)
    assert thrice.flops == 3 * found.flops + 2 * 2 * 131072 * config_of().vocab_size * (4096 + 2048) and thrice.host_bytes == found.host_bytes + points
    words = str(found)
    assert "TFLOP, at least" in words and f"{found.host_bytes / GIB:.2g} GiB on the host" in words and "beside the teacher" in words
    assert "rate" not in str(forecast(config_of(), 2048, 131072))
    slow = [str(forecast(config_of(), 2048, 131072, teacher_bytes=2, rate=rate)) for rate in (1e15, 1e14, 1e12)]
    assert all(unit in text for unit, text in zip((" s at this", " min at this", " h at this"), slow, strict=True))


@pytest.mark.parametrize("explained, fit", [(False, "none"), (False, "readers"), (False, "full"), (True, "full")])
def test_operations_are_those_that_torch_counts(monkeypatch, explained, fit):
    """Of calibration, map and fit in matrix products; attention's own and decompositions are small beside them and not counted."""
    monkeypatch.setattr(sys.modules["red.fitting.forecast"], "ITERATIONS", 30)  # the function of that name hides the module
    monkeypatch.setattr("red.starts.explained.most_explained", partial(most_explained, iterations=30))
    teacher = build_tiny_model(hidden_size=64, num_hidden_layers=3, intermediate_size=160, num_attention_heads=4, head_dim=16)
    batches = [random_batch(8, 64, seed=seed) for seed in range(2)]
    with FlopCounterMode(display=False) as counter:
        calibration = calibrate_batches(teacher, batches, covariance=True, point_covariance=explained)
        start = starts.get("explained" if explained else "balanced")(StartContext(teacher, 32, calibration)).maps
        if fit != "none":
            fit_maps(teacher, start, batches, writers=fit == "full")
    assert 0.9 < forecast(teacher.config, 32, 2 * 8 * 64, explained=explained, fit=fit).flops / counter.get_total_flops() < 1.2


@pytest.mark.parametrize("explained, fit, streams", [(False, "none", False), (False, "readers", True), (False, "full", True), (True, "full", True)])
def test_host_bytes_cover_what_is_held(explained, fit, streams):
    """Every storage of a real start and fit, counted once; embedding and head are what the forecast leaves out."""
    teacher, batches = build_tiny_model(num_hidden_layers=6), [random_batch(8, 24)]
    calibration = calibrate_batches(teacher, batches, covariance=True, point_covariance=explained)
    start = starts.get("explained" if explained else "balanced")(StartContext(teacher, 16, calibration)).maps
    maps = start if fit == "none" else fit_maps(teacher, start, batches, writers=fit == "full")
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in [*start.values(), *maps.values()]}
    bytes_held = sum(held.values()) + (8 * 24 * 4 * (32 + 16) if streams else 0) + (calibration.point_covariance.nbytes if explained else 0)
    found = forecast(teacher.config, 16, 8 * 24, explained=explained, fit=fit)
    assert 0.8 * bytes_held < found.host_bytes <= 1.05 * bytes_held


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weights_multiplied_by_parts_give_the_same(monkeypatch, tied):
    """A head of many words is never whole in fp64; seven rows at a time here."""
    teacher, batches = build_tiny_model(tied=tied, dtype=torch.float64), [random_batch(8, 24)]
    calibration, found = calibrate_batches(teacher, batches, covariance=True), []
    for rows in (10_000, 7):
        for module, name in (("fit", "ROWS"), ("shared_map", "OUTPUTS"), ("tied", "WORDS")):
            monkeypatch.setattr(sys.modules[f"red.fitting.{module}"], name, rows)
        found.append(fit_maps(teacher, starts.get("balanced")(StartContext(teacher, 16, calibration)).maps, batches))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=1e-6 * float(value.abs().max()), msg=name)


def test_heads_and_rate():
    """A config without head_dim or key-value heads counts too; the rate is one of this machine."""
    plain = Qwen2Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=50)
    assert forecast(plain, 32, 100).flops > 0
    assert 1e8 < measured_rate("cpu", 128) < 1e14


def test_dry_run_reads_no_weight(tiny_teacher, tmp_path, capsys):
    tiny_teacher().config.save_pretrained(tmp_path / "teacher")
    assert [path.name for path in (tmp_path / "teacher").iterdir()] == ["config.json"]
    given = ["compress", "--dry-run", "--teacher_model_name_or_path", str(tmp_path / "teacher"), "--output_dir", str(tmp_path / "small"), "--use_cpu"]
    assert main([*given, "--hidden_size", "16", "--calibration_samples", "8", "--max_length", "100"]) == 0
    shown = capsys.readouterr().out
    assert "hidden_size 32 -> 16, 2 layers, start=fitted, start_fit=full, 800 tokens of calibration" in shown and "TFLOP, at least" in shown
    assert main([*given, "--hidden_size", "16", "--start", "activation"]) == 0
    assert "start=activation, start_fit=none" in capsys.readouterr().out
    for extra, message in ((["--hidden_size", "18"], "not a multiple"), (["--hidden_size", "16", "--start", "x"], "start='x' is unknown")):
        assert main([*given, *extra]) == 2
        assert message in capsys.readouterr().err
    assert main(["compress", "--dry-run", "--hidden_size", "16", "--output_dir", str(tmp_path / "small")]) == 2
    assert "Give teacher_model_name_or_path" in capsys.readouterr().err
    assert not (tmp_path / "small").exists()
