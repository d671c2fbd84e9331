"""What a fit leaves alone, what it holds, and when files of an earlier one are used."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from tiny_models import VOCAB
from reference_lrc import random_batch
from test_compress import fitted_points  # noqa: F401 (a fixture)
from test_distill import texts
from test_fitting import EMBEDDING, NARROW, WIDTH, start_of, text
from tiny_training import settings_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import red
from red.calibration import calibrate_batches
from red.config import REDConfig
from red.errors import REDError
from red.fitting import fit, forecast, shared_map, tied
from red.fitting.fit import fit_maps
from red.fitting.forecast import measured_rate
from red.fitting.layers import _block_arguments, half_layers
from red.fitting.resume import HALF_LAYERS, START_FILE, StartFolder, read_start
from red.fitting.shared_map import explained_shares, most_explained, reader_gramians
from red.fitting.tied import tied_gain
from red.starting import start_maps


def equal(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


class Largest(TorchDispatchMode):
    """The largest result of any operation, in elements; of one dtype, or of any."""

    def __init__(self, dtype: torch.dtype | None = None):
        super().__init__()
        self.dtype, self.elements = dtype, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(value.numel() for value in tree_iter(out) if isinstance(value, torch.Tensor) and self.dtype in (None, value.dtype))])
        return out


# ---- the pass that takes notes ----

@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_what_attention_is_given_is_what_the_model_gives_it(tiny_teacher, family, attention):
    """Masks, windows and angles of a stream one channel wide are those of the whole model."""
    windows = {} if family == "llama" else {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    batch = random_batch()
    for dtype in (torch.float32, torch.bfloat16):
        teacher, seen = tiny_teacher(family, dtype=dtype, attn_implementation=attention, **windows), {}
        for half in half_layers(teacher.config)[::2]:
            module = teacher.get_submodule(half.block)
            handle = module.register_forward_pre_hook(lambda _m, _a, given, half=half, seen=seen: seen.update({half.point: given}), with_kwargs=True)
            teacher.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
            handle.remove()
            with Largest() as largest:
                noted = _block_arguments(teacher, batch, half)
            assert noted.keys() == seen[half.point].keys() - {"hidden_states"}
            for name, value in noted.items():
                pairs = zip(tree_iter(value), tree_iter(seen[half.point][name]), strict=True)
                assert all(torch.equal(ours, theirs) and ours.dtype == theirs.dtype if isinstance(ours, torch.Tensor) else ours == theirs for ours, theirs in pairs), name
            assert largest.elements < batch["input_ids"].numel() * WIDTH, "no stream of the model's width is made"


def test_a_forward_of_an_instance_is_put_back(tiny_teacher):
    """As accelerate's hooks and kernels set it."""
    plain, patched = tiny_teacher(), tiny_teacher()
    layer, calls = patched.model.layers[1], []
    for module in (layer.self_attn, layer.mlp, layer.input_layernorm, patched.model.norm):
        def forward(self, *args, **kwargs):
            calls.append(self)
            return type(self).forward(self, *args, **kwargs)
        module.forward = MethodType(forward, module)
    start = start_of(plain, "pca").maps
    assert equal(fit_maps(patched, start, text()), fit_maps(plain, start, text()))
    assert all("forward" in vars(module) for module in (layer.self_attn, layer.mlp, layer.input_layernorm, patched.model.norm))
    calls.clear()
    patched(random_batch()["input_ids"])
    assert len(calls) == 4


# ---- dtypes ----

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_in_half_precision(tiny_teacher, tmp_path, family, dtype):
    """Near the fit of the same weights in fp32, biases and windows included; the student stays fp32 while it is fitted."""
    changes = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "qwen3": {}}[family]
    found, batch = [], random_batch(6, 16, seed=9)
    for target in (dtype, torch.float32):
        teacher = tiny_teacher(family, tied=family == "qwen2", dtype=dtype, **changes).to(target)
        config = REDConfig(**settings_of(tmp_path, start="balanced", start_fit="full"))
        student = red.start_projections(teacher, config, calibrate_batches(teacher, text(), covariance=True), text()).student.eval()
        assert student.dtype == torch.float32
        with torch.no_grad():
            found.append(student(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[batch["token_mask"]])
    assert (found[0] - found[1]).norm() < 0.03 * found[1].norm()


# ---- memory ----

def test_a_large_vocabulary_is_read_in_parts(tiny_teacher, monkeypatch):
    """The same numbers, and never the whole embedding in fp64."""
    def run():
        teacher, moments = tiny_teacher(tied=True, vocab_size=8 * VOCAB), torch.eye(WIDTH, dtype=torch.float64).expand(5, -1, -1)
        head, down = teacher.lm_head.weight, start_of(teacher, "orthogonal_shared").maps[EMBEDDING]
        with Largest(torch.float64) as largest:
            gramian = list(reader_gramians(teacher, moments))[-1]
            gain = tied_gain(head, down, down, torch.eye(NARROW, dtype=torch.float64))
        start = start_of(teacher, "orthogonal_shared").maps
        streams = fit.Streams(teacher, text())
        with torch.no_grad():
            student = fit.Fit(teacher, start, streams, 1e-4, None).student
        return largest.elements, gramian, gain, student.lm_head.weight.detach()

    whole = run()
    for module, name in ((shared_map, "OUTPUTS"), (tied, "WORDS"), (fit, "ROWS")):
        monkeypatch.setattr(module, name, 50)
    parts = run()
    assert whole[0] >= 8 * VOCAB * WIDTH > 4 * parts[0]
    for ours, truth in zip(parts[1:4], whole[1:4], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-7)


class Held(TorchDispatchMode):
    """The most bytes that storages which were made meanwhile hold together."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        import weakref

        out = function(*args, **(kwargs or {}))
        for storage in {value.untyped_storage()._cdata: value.untyped_storage() for value in tree_iter(out) if isinstance(value, torch.Tensor)}.values():
            key, size = storage._cdata, storage.nbytes()
            if key not in self.live:
                self.live[key], self.now = size, self.now + size
                weakref.finalize(storage, self._gone, key)
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, key) -> None:
        self.now -= self.live.pop(key, 0)


@pytest.mark.parametrize("narrow", [24, 48, 72])
def test_the_forecast_of_the_climb_covers_what_it_holds(tiny_teacher, narrow):
    config, points = tiny_teacher().config, 65
    config.hidden_size, config.num_hidden_layers, config.vocab_size = 96, 32, 4
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(2, points, 200, 96, generator=draw, dtype=torch.float64)
    covariances, gramians = (normal.mT @ normal / 200).unbind()
    begin = torch.linalg.qr(torch.randn(96, narrow, generator=draw, dtype=torch.float64)).Q
    with Held() as held:
        most_explained(begin, covariances.clone(), gramians.clone(), iterations=2)
    expected = forecast(config, narrow, 1, fit="none").device_bytes
    assert 0.85 * held.peak < expected < 1.25 * held.peak


def test_shares_do_not_depend_on_how_they_are_multiplied():
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(2, 3, 8, 8, generator=draw, dtype=torch.float64)
    (covariances, gramians), down = (root @ root.mT).unbind(), torch.linalg.qr(torch.randn(8, 3, generator=draw, dtype=torch.float64)).Q
    heard, totals = covariances @ gramians @ covariances, (gramians * covariances).sum((-2, -1))
    for found, c, h, total in zip(explained_shares(down, covariances, heard, totals), covariances, heard, totals, strict=True):
        torch.testing.assert_close(found, torch.trace(torch.linalg.inv(down.T @ c @ down) @ down.T @ h @ down) / total, rtol=1e-4, atol=0)


def test_the_callers_generator_stays_where_it_is():
    torch.manual_seed(3)
    expected = torch.randn(3)
    torch.manual_seed(3)
    measured_rate("cpu", 64)
    assert torch.equal(torch.randn(3), expected)


# ---- files ----

def test_half_layers_of_another_basis_are_not_used(tiny_teacher, tmp_path, fitted_points):  # noqa: F811
    """The key is the same where another machine finds the same map with other signs; half of one and half of the other is no student."""
    teacher = tiny_teacher()
    start = start_of(teacher, "pca").maps
    signs = torch.ones(NARROW, dtype=torch.float64)
    signs[::3] = -1
    turned = fit.turned(start, torch.diag(signs))

    def interrupted(done: int, *_):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_maps(teacher, start, text(), kept=StartFolder(tmp_path, "key"), on_progress=interrupted)
    kept = [path.read_bytes() for path in sorted((tmp_path / HALF_LAYERS).iterdir())]
    fitted_points.clear()
    rounded = {name: value * (1 + 1e-12) for name, value in start.items()}
    fit_maps(teacher, rounded, text(), kept=StartFolder(tmp_path, "key", writes=False))
    assert fitted_points == [2, 3, "head"], "rounding is no other basis"
    fitted_points.clear()
    found = fit_maps(teacher, turned, text(), kept=StartFolder(tmp_path, "key", writes=False))
    assert fitted_points == [0, 1, 2, 3, "head"] and equal(found, fit_maps(teacher, turned, text()))
    assert kept == [path.read_bytes() for path in sorted((tmp_path / HALF_LAYERS).iterdir())], "who only reads leaves all as it is"


def test_other_processes_read_what_the_first_kept(tiny_teacher, tmp_path, monkeypatch, capsys, fitted_points):  # noqa: F811
    """They write nothing and print nothing; without a file they fit themselves."""
    teacher = tiny_teacher()
    calibration = calibrate_batches(teacher, text(), covariance=True)
    config = REDConfig(**settings_of(tmp_path / "run", start="balanced", start_fit="full", disable_tqdm=False))

    def run(rank: int):
        fitted_points.clear()
        with monkeypatch.context() as patch:
            patch.setattr(REDConfig, "process_index", rank)
            return start_maps(teacher, config, calibration, text(), config.output_dir if rank == 0 else None).maps

    alone = run(1)
    shown = capsys.readouterr()
    assert fitted_points and not (tmp_path / "run").exists() and not shown.out + shown.err
    first = run(0)
    shown = capsys.readouterr()
    assert equal(alone, first) and fitted_points and "TFLOP" in shown.out + shown.err
    content = (tmp_path / "run" / START_FILE).read_bytes()
    assert equal(run(1), first) and not fitted_points and (tmp_path / "run" / START_FILE).read_bytes() == content


def test_a_file_that_vanishes_is_fitted_again(tmp_path, monkeypatch):
    """The first process removes its half layers when it is done."""
    kept = StartFolder(tmp_path, "key")
    kept.begin(torch.eye(3, dtype=torch.float64))
    kept.keep_half_layer(0, {"a": torch.ones(2)})
    assert kept.half_layer(0).keys() == {"a"}
    monkeypatch.setattr("red.fitting.resume.safe_open", lambda *_: (_ for _ in ()).throw(FileNotFoundError()))
    assert kept.half_layer(0) is None


def test_a_start_in_another_dtype_says_so(tiny_teacher, tmp_path):
    StartFolder(tmp_path, "key").keep_whole(start_of(tiny_teacher(), "pca").maps, "0" * 64)
    with pytest.raises(REDError, match="another teacher.*same teacher_dtype"):
        read_start(tmp_path / START_FILE, "1" * 64)


def test_compress_is_one_process(tiny_teacher, tiny_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(REDConfig, "world_size", 2)
    with pytest.raises(REDError, match="work of one process, and 2 were started"):
        red.compress(tiny_teacher(), texts(), tokenizer=tiny_tokenizer, **settings_of(tmp_path / "run", start="activation"))
    assert not (tmp_path / "run").exists()
