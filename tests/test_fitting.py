"""The fit against brute force on the finished student, what it promises, and exactness where a narrower student can be exact. (Files: test_compress.py.)"""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import FAMILIES
from reference_lrc import MODULES, WRITERS, documents, normalised, random_batch, streams, use_exact_norms, watching
from tiny_training import settings_of

import red
from red import starts
from red.calibration import calibrate_batches
from red.config import REDConfig
from red.errors import REDError
from red.fitting import fit_maps
from red.fitting.fit import Fit, turned
from red.fitting.layers import Streams, half_layers
from red.training.projections import Projections
from red.starts.base import StartContext, StartMaps, random_orthonormal, selection, shared
from red.student import build_student
from red.training.taps import Taps

WIDTH, NARROW = 32, 16
VARIANTS = {"llama": {}, "llama-biases": {"attention_bias": True, "mlp_bias": True}, "qwen2": {}, "qwen3": {}}
EMBEDDING = "model.embed_tokens.weight"


def text(count: int = 3, rows: int = 6, length: int = 16) -> list[dict]:
    return [random_batch(rows, length, seed=seed) for seed in range(count)]


def start_of(teacher, name: str, width: int = NARROW, batches=None) -> StartMaps:
    return starts.get(name)(StartContext(teacher, width, calibrate_batches(teacher, batches or text(), covariance=True)))


def student_of(teacher, maps: dict):
    return Projections(teacher, build_student(teacher, len(maps["model.norm.weight"])), StartMaps(maps)).student.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    batch = random_batch(6, 16, seed=9)
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[batch["token_mask"]]


def streams_of(model, batches) -> list[torch.Tensor]:
    """The stream [N, width] at each of the 2L + 1 read points: every document alone, in float64."""
    found = [streams(model, document) for batch in batches for document in documents(batch)]
    return [torch.cat(point) for point in zip(*found, strict=True)]


def ridge_solution(x: torch.Tensor, y: torch.Tensor, ridge: float) -> torch.Tensor:
    """By QR of the data with one more row per unknown, not by normal equations."""
    extra = (ridge * x.square().sum() / x.shape[1]).sqrt() * torch.eye(x.shape[1], dtype=x.dtype)
    return torch.linalg.lstsq(torch.cat([x, extra]), torch.cat([y, y.new_zeros(x.shape[1], y.shape[1])])).solution


def close(found, expected, tolerance: float = 1e-6, what: str = ""):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()), msg=lambda text: f"{what}\n{text}")


# ---- the whole fit ----

@pytest.mark.parametrize("variant, tied, writers", [("llama", False, True), ("llama-biases", False, True), ("qwen2", False, True), ("qwen3", False, True),
                                                    ("llama-biases", True, True), ("qwen3", True, True), ("qwen2", True, False), ("qwen3", False, False)])
def test_equals_brute_force(tiny_teacher, monkeypatch, variant, tied, writers):
    """Every map follows from the finished student's own streams and writer inputs, document by document."""
    use_exact_norms(monkeypatch)
    teacher = tiny_teacher(variant.partition("-")[0], tied=tied, dtype=torch.float64, rms_norm_eps=1e-12, **VARIANTS[variant])
    start, batches, ridges = start_of(teacher, "pca").maps, text(), (3e-3, 2e-2)
    maps = fit_maps(teacher, start, batches, writers=writers, reader_ridge=ridges[0], writer_ridge=ridges[1])
    assert maps.keys() == start.keys()
    rotation = torch.linalg.lstsq(start[EMBEDDING], maps[EMBEDDING]).solution  # a tied student is turned for its head; undone here
    last, maps = maps["model.norm.weight"], turned(maps, rotation.T)
    close(rotation.T @ rotation, torch.eye(NARROW, dtype=torch.float64))
    close(maps[EMBEDDING], start[EMBEDDING])
    assert (tied and writers) or torch.equal(rotation.round(decimals=9), torch.eye(NARROW, dtype=torch.float64))
    assert all(value.dtype == torch.float64 for value in maps.values())
    student, weights, scale = student_of(teacher, maps), dict(teacher.named_parameters()), (WIDTH / NARROW) ** 0.5
    points = list(zip(streams_of(teacher, batches), streams_of(student, batches), strict=True))
    inner = {}
    for document in (document for batch in batches for document in documents(batch)):
        with watching(student) as seen, torch.no_grad():
            student(document[None])
        for key, (given, _) in seen.items():
            inner.setdefault(key, []).append(given[0])
    for point, (wide, narrow) in enumerate(points[:-1]):
        layer, attention = point // 2, point % 2 == 0
        root, norm = f"model.layers.{layer}", "input_layernorm" if attention else "post_attention_layernorm"
        gain = weights[f"{root}.{norm}.weight"].detach()
        up = ridge_solution(normalised(narrow), normalised(wide), ridges[0])
        for name in MODULES[:3] if attention else MODULES[4:6]:
            close(maps[f"{root}.{name}.weight"], (up * gain).T / scale, what=f"{root}.{name}")
        assert torch.equal(maps[f"{root}.{norm}.weight"], torch.full((NARROW,), scale, dtype=torch.float64))
        module = WRITERS[0 if attention else 1]
        name, bias = f"{root}.{module}.weight", weights.get(f"{root}.{module}.bias")
        if not writers:
            close(maps[name], start[name], 1e-9)
            continue
        written = torch.cat(inner[layer, module]) @ weights[name].detach().T + (0 if bias is None else bias.detach())
        after = points[point + 1][0]
        error = after @ maps[EMBEDDING] - narrow - written @ start[name].T
        rms = after.square().mean(1, keepdim=True).sqrt()  # of the teacher's token: the next norm divides by it
        close(maps[name], (start[name].T + ridge_solution(written / rms, error / rms, ridges[1])).T, what=name)
        assert (maps[name] - start[name]).norm() > 0.05 * start[name].norm(), "there was something to repair"
    wide, narrow = (normalised(stream) for stream in points[-1])
    wanted = ridge_solution(narrow, wide, ridges[0]) * weights["model.norm.weight"].detach()  # of a gain of one
    if not tied:
        close(maps["lm_head.weight"], wanted.T / scale)
        return
    words = weights[EMBEDDING].detach() - weights[EMBEDDING].detach().mean(0)
    places = torch.combinations(torch.arange(NARROW), with_replacement=True)  # the free entries of a symmetric matrix S: logits are y S Qᵀ Eᵀ
    places = places if writers else places[places[:, 0] == places[:, 1]]  # a writing side that stays is not turned: a gain is all there is
    heard = words @ maps[EMBEDDING]
    design = torch.stack([(torch.einsum("n,v->nv", narrow[:, i], heard[:, j]) + (i != j) * torch.einsum("n,v->nv", narrow[:, j], heard[:, i])).reshape(-1)
                          for i, j in places.tolist()], 1)
    entries = torch.linalg.lstsq(design, (narrow @ wanted @ words.T).reshape(-1, 1)).solution[:, 0]
    symmetric = torch.zeros(NARROW, NARROW, dtype=torch.float64)
    symmetric[places[:, 0], places[:, 1]] = symmetric[places[:, 1], places[:, 0]] = entries
    close(rotation @ torch.diag(last) @ rotation.T, symmetric)


@pytest.mark.parametrize("family, name", [("llama", "random"), ("qwen2", "activation"), ("qwen3", "orthogonal")])
def test_a_repair_lowers_the_error_and_a_reader_explains_more(tiny_teacher, family, name):
    """Half layer by half layer, all before it fitted: the student's error with and without the fit of that one."""
    teacher, batches = tiny_teacher(family), text(1, 8, 24)
    start, weights, wide = start_of(teacher, name).maps, dict(teacher.named_parameters()), streams_of(teacher, batches)
    fitted, maps = fit_maps(teacher, start, batches), dict(start)
    narrow = streams_of(student_of(teacher, maps), batches)[0]
    for point in range(4):
        root = f"model.layers.{point // 2}"
        norm = f"{root}.{('input_layernorm', 'post_attention_layernorm')[point % 2]}.weight"
        readers = [f"{root}.{path}.weight" for path in (MODULES[:3], MODULES[4:6])[point % 2]]
        y, z, gain = normalised(narrow), normalised(wide[point]), weights[norm].detach().double()
        missed = [float(((y * one[norm]) @ one[readers[0]].T / gain - z).square().sum()) for one in (maps, fitted)]
        assert missed[1] < 0.99 * missed[0], f"reader of point {point}"
        maps |= {key: fitted[key] for key in (norm, *readers)}
        writer, errors = f"{root}.{WRITERS[point % 2]}.weight", []
        for _ in range(2):
            narrow = streams_of(student_of(teacher, maps), batches)[point + 1]
            errors.append(float(((narrow - wide[point + 1] @ start[EMBEDDING]).square().sum(1) / wide[point + 1].square().mean(1)).sum()))
            maps[writer] = fitted[writer]
        assert errors[1] < 0.99 * errors[0], f"writer of point {point}"


def test_streams_between_half_layers_are_the_models_own(tiny_teacher, family):
    """What the fit keeps at its end is what both whole models hand to their last norm: packed rows, windows and all."""
    windows = {} if family == "llama" else {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    teacher, batches = tiny_teacher(family, **windows), text(2)
    with torch.no_grad():
        fit = Fit(teacher, start_of(teacher, "pca").maps, Streams(teacher, batches), 1e-4, 1e-4)
        fit.streams.begin(fit.student)
        for half in half_layers(teacher.config):
            fit.writer(half)  # of which nothing stays behind
            fit.advance(half)
        assert not any(module._forward_pre_hooks for module in fit.student.modules())
        for kept, model in ((fit.streams.teacher, teacher), (fit.streams.student, fit.student)):
            for ours, batch in zip(kept, batches, strict=True):
                seen = []
                handle = model.model.norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
                model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
                handle.remove()
                assert float(ours.std()) > 0.1
                torch.testing.assert_close(ours, seen[0], rtol=0, atol=1e-6)


# ---- exactness ----

@pytest.mark.parametrize("turned", [False, True], ids=["identity", "rotation"])
@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_full_width_is_the_teacher(tiny_teacher, variant, turned):
    """At d' = d, from writers that write nonsense and gains and readers of one, the fit finds the teacher's function."""
    for tied in (False, True):
        teacher = tiny_teacher(variant.partition("-")[0], tied=tied, dtype=torch.float64, **VARIANTS[variant])
        context = StartContext(teacher, WIDTH)
        down = random_orthonormal(context) if turned else torch.eye(WIDTH, dtype=torch.float64)
        maps = {**shared(context, down).maps, **{name: torch.randn(WIDTH, WIDTH, dtype=torch.float64) for name in context.writers()}}
        maps |= {name: torch.ones_like(value) for name, value in maps.items() if value.dim() == 1}
        fitted = fit_maps(teacher, maps, text(), reader_ridge=1e-13, writer_ridge=1e-13)
        assert (logits(student_of(teacher, maps)) - logits(teacher)).abs().max() > 1
        torch.testing.assert_close(logits(student_of(teacher, fitted)), logits(teacher), rtol=0, atol=1e-4)
        if tied:
            gains = (fitted["model.norm.weight"], teacher.model.norm.weight.detach())  # in the order of the turned channels
            torch.testing.assert_close(*(gain.sort().values for gain in gains), rtol=0, atol=1e-5)


@torch.no_grad()
def widened(narrow, wide, basis: torch.Tensor):
    """`wide` with the function of `narrow`: its stream is `x basisᵀ`, `basis [d, d']` orthonormal; its norms keep their random gains."""
    source, scale = dict(narrow.named_parameters()), (basis.shape[1] / basis.shape[0]) ** 0.5
    for name, parameter in wide.named_parameters():
        module, _, kind = name.rpartition(".")
        if module.endswith(WRITERS):
            parameter.copy_(basis @ source[name])
        elif name == EMBEDDING:
            parameter.copy_(source[name] @ basis.T)
        elif kind == "weight" and parameter.dim() == 2:
            norm = "model.norm" if module == "lm_head" else ".".join(module.split(".")[:3]) + (
                ".input_layernorm" if "self_attn" in module else ".post_attention_layernorm")
            parameter.copy_(scale * source[name] * source[f"{norm}.weight"] @ basis.T / wide.get_submodule(norm).weight)
        elif parameter.shape == source[name].shape:
            parameter.copy_(source[name])
    return wide


@pytest.mark.parametrize("family, tied", [*((family, False) for family in FAMILIES), ("llama", True), ("qwen2", True)])
def test_lossless_where_the_stream_has_the_students_dimension(tiny_teacher, monkeypatch, tmp_path, family, tied):
    """Whatever the gains: readers fold them, and for a tied head the student is turned into the basis in which they are a gain again."""
    use_exact_norms(monkeypatch)
    kind = dict(tied=tied, dtype=torch.float64, rms_norm_eps=1e-12)
    narrow, wide = tiny_teacher(family, hidden_size=NARROW, seed=1, **kind), tiny_teacher(family, **kind)
    teacher, batches = widened(narrow, wide, random_orthonormal(StartContext(wide, NARROW, seed=4))), text()
    if not tied:  # the random last gain, between the wide basis and back, is no gain of the narrow model
        torch.testing.assert_close(logits(teacher), logits(narrow), rtol=0, atol=1e-8)
    calibration = calibrate_batches(teacher, batches, point_covariance=True)
    found = {}
    for start in ("fitted", "balanced", "activation"):
        config = REDConfig(**settings_of(tmp_path, start=start, fit_reader_ridge=1e-11, fit_writer_ridge=1e-8))
        found[start] = red.start_projections(teacher, config, calibration, batches).student.eval()
    torch.testing.assert_close(logits(found["fitted"]), logits(teacher), rtol=0, atol=1e-4)
    torch.testing.assert_close(logits(found["balanced"]), logits(teacher), rtol=0, atol=1e-3)  # without any fit
    assert (logits(found["activation"]) - logits(teacher)).abs().max() > 0.5


# ---- what the text is ----

def test_neither_batches_nor_packing_nor_padding_matter(tiny_teacher, family):
    """Row by row, all at once, one document a row or several, whatever stands at padding: the same maps."""
    teacher = tiny_teacher(family, dtype=torch.float64)
    start, whole = start_of(teacher, "pca").maps, random_batch(9, 16, seed=3)
    rows = [{key: value[row:row + 1] for key, value in whole.items()} for row in range(9)]
    threes = [{key: value[row:row + 3] for key, value in whole.items()} for row in range(0, 9, 3)]
    dirty = [{**whole, "input_ids": torch.where(whole["token_mask"], whole["input_ids"], 33), "token_mask": whole["token_mask"].long()}]
    alone = [{"input_ids": document[None]} for document in documents(whole)]
    assert len(alone) > 9 and not torch.equal(dirty[0]["input_ids"], whole["input_ids"])
    maps = fit_maps(teacher, start, [whole])
    for name, batches in {"rows": rows, "threes": iter(threes), "dirty": dirty, "alone": alone}.items():
        found = fit_maps(teacher, start, batches)
        for key in maps:
            close(found[key], maps[key], 1e-5, f"{name} {key}")
    seen_by_all = fit_maps(teacher, start, [{key: whole[key] for key in ("input_ids", "token_mask")}])  # documents that see each other
    assert not torch.allclose(seen_by_all["lm_head.weight"], maps["lm_head.weight"], atol=1e-3)


def test_a_selection_stays_one_where_only_readers_are_fitted(tiny_teacher, tmp_path, family):
    teacher, batches = tiny_teacher(family), text()
    plain, readers, full = (red.start_projections(teacher, REDConfig(**settings_of(tmp_path, start="activation", start_fit=fit)),
                                                  calibrate_batches(teacher, batches), batches) for fit in ("none", "readers", "full"))
    assert torch.equal(readers.channels, plain.channels) and full.channels is None
    for factor in plain:
        same = [torch.equal(factor.master, other[factor.name].master) for other in (readers, full)]
        assert same == ([True, factor.name == EMBEDDING] if factor.side == "output" or factor.name == EMBEDDING else [False, False]), factor.name
    assert Taps(teacher, readers.student, readers).target == "gather" and Taps(teacher, full.student, full).target == "projected"


def test_leaves_the_teacher_as_it_was_and_repeats_itself(tiny_teacher):
    teacher = tiny_teacher().train()
    before, start = copy.deepcopy(teacher.state_dict()), selection(StartContext(teacher, NARROW), torch.arange(NARROW)).maps
    kept = {name: value.clone() for name, value in start.items()}
    first, second = (fit_maps(teacher, start, text()) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(start[name], kept[name]) for name in kept), "the start's own maps stay"
    assert teacher.training and all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert not any("forward" in vars(module) or module._forward_pre_hooks or module._forward_hooks for module in teacher.modules())


def test_flash_attention_is_left_for_the_fit(tiny_teacher):
    """Its kernels take no fp32, in which the student is, and one row only."""
    teacher = tiny_teacher()
    start = start_of(teacher, "pca").maps
    expected = fit_maps(teacher, start, text())
    teacher.config._attn_implementation = "flash_attention_2"
    found = fit_maps(teacher, start, text())
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert teacher.config._attn_implementation == "flash_attention_2"


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("start", ["pca", "balanced"])
def test_fewer_tokens_than_channels_are_enough_to_go_on(tiny_teacher, tmp_path, start, tied):
    """The problems are singular then, and by fp32's rounding indefinite."""
    teacher, few = tiny_teacher("llama", tied=tied, hidden_size=64), [random_batch(1, 12)]
    config = REDConfig(**settings_of(tmp_path, hidden_size=32, start=start, start_fit="full"))
    student = red.start_projections(teacher, config, calibrate_batches(teacher, few, point_covariance=True), few).student.eval()
    assert 0.3 < logits(student).std() / logits(teacher).std() < 3


def test_bad_text_or_teacher_is_refused(tiny_teacher):
    start, batch = start_of(teacher := tiny_teacher(), "pca").maps, random_batch()
    for nothing in ([], [{**batch, "token_mask": torch.zeros_like(batch["token_mask"])}]):
        with pytest.raises(REDError, match="no token to fit to.*at least one sequence"):
            fit_maps(teacher, start, nothing)
    with torch.no_grad():
        teacher.model.layers[1].mlp.down_proj.weight[3, 5] = float("nan")
    with pytest.raises(REDError, match="NaN or infinite"):
        fit_maps(teacher, start, [batch])
