"""The same function in another basis: logits, the stream itself, ties, what is kept, and what a rotation does to the starts."""

from __future__ import annotations

import copy

import pytest
import torch
from reference_lrc import documents, random_batch, streams, use_exact_norms
from transformers import AutoModelForCausalLM

import red
from red import starts
from red.calibration import calibrate_batches as calibrate
from red.errors import REDError
from red.training.projections import Projections
from red.rotation import principal_basis, random_basis, rotate
from red.starts.base import StartContext, selection, selection_scales
from red.student import build_student

WIDTH, NARROW = 32, 16
BIASES = {"llama": {"attention_bias": True, "mlp_bias": True}, "qwen2": {}, "qwen3": {"attention_bias": True}}
NORMS = [f"model.layers.{layer}.{norm}.weight" for layer in range(2) for norm in ("input_layernorm", "post_attention_layernorm")] + ["model.norm.weight"]


def batches() -> list[dict]:
    return [random_batch(4, 16, seed=seed) for seed in range(2)]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(random_batch(4, 16, seed=9)["input_ids"]).logits


def equal(model, other) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_logits_are_the_teachers(tiny_teacher, family, tied, biases, monkeypatch):
    """In fp32 as transformers computes it, and in fp64 throughout; the stream is the teacher's times the basis at every read point."""
    settings = BIASES[family] if biases else {}
    basis = random_basis(WIDTH, seed=3)
    teacher = tiny_teacher(family, tied=tied, **settings)
    reference = logits(teacher)
    assert reference.std() > 0.3, "logits near zero would make any model look right"
    torch.testing.assert_close(logits(rotate(teacher, basis, untie=tied)), reference, rtol=0, atol=1e-5)

    use_exact_norms(monkeypatch)
    teacher = tiny_teacher(family, tied=tied, dtype=torch.float64, **settings)
    turned = rotate(teacher, basis, untie=tied)
    torch.testing.assert_close(logits(turned), logits(teacher), rtol=0, atol=1e-11)
    document = documents(random_batch())[0]
    for there, here in zip(streams(teacher, document), streams(turned, document), strict=True):
        torch.testing.assert_close(here, there @ basis, rtol=0, atol=1e-11)
        assert (here - there).abs().max() > 0.1
    assert all(torch.equal(turned.get_parameter(name), torch.ones(WIDTH, dtype=torch.float64)) for name in NORMS)
    for name, value in teacher.named_parameters():  # what the stream does not touch
        if (name.endswith("bias") and "o_proj" not in name and "down_proj" not in name) or "q_norm" in name or "k_norm" in name:
            assert torch.equal(turned.get_parameter(name), value), name


def test_a_tied_head_cannot_take_the_final_gain(tiny_teacher, family):
    teacher = tiny_teacher(family, tied=True)
    with torch.no_grad():
        teacher.model.norm.weight[0], teacher.model.norm.weight[1] = 0.25, 4
    with pytest.raises(REDError, match="tied.*gain is not constant.*from 0.25 to 4.*untie=True"):
        rotate(teacher, torch.eye(WIDTH))


def test_a_constant_final_gain_stays_and_so_does_the_tie(tiny_teacher, family, monkeypatch):
    """Nothing to fold: `x R` times the constant, against `E R`."""
    use_exact_norms(monkeypatch)
    teacher = tiny_teacher(family, tied=True, dtype=torch.float64)
    torch.nn.init.constant_(teacher.model.norm.weight, 1.75)
    turned = rotate(teacher, random_basis(WIDTH))
    torch.testing.assert_close(logits(turned), logits(teacher), rtol=0, atol=1e-11)
    assert turned.get_output_embeddings().weight is turned.get_input_embeddings().weight and turned.config.tie_word_embeddings
    assert turned.num_parameters() == teacher.num_parameters()
    assert all(turned.get_parameter(name).eq(1.75 if name == "model.norm.weight" else 1).all() for name in NORMS)
    untied = rotate(teacher, random_basis(WIDTH), untie=True)  # still a choice, and then the constant is folded
    torch.testing.assert_close(logits(untied), logits(teacher), rtol=0, atol=1e-11)
    assert untied.model.norm.weight.eq(1).all() and untied.num_parameters() == teacher.num_parameters() + 64 * WIDTH


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saved_loaded_and_generating(tiny_teacher, family, tied, tmp_path):
    """A head of its own survives the checkpoint, and greedy continuations are the teacher's."""
    teacher = tiny_teacher(family, tied=tied)
    teacher.generation_config.update(max_new_tokens=12, do_sample=False, eos_token_id=63, pad_token_id=0)
    turned = rotate(teacher, random_basis(WIDTH), untie=tied)
    turned.save_pretrained(tmp_path)
    loaded, facts = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(facts.values()), facts
    assert torch.equal(logits(loaded), logits(turned)) and equal(loaded, turned)
    for model in (turned, loaded):
        assert not model.config.tie_word_embeddings
        assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
        prompt = random_batch(3, 8)["input_ids"]
        assert torch.equal(model.generate(prompt), teacher.generate(prompt))
    assert turned.generate(prompt).shape[1] > 8


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_teacher_is_left_alone(tiny_teacher, family, tied):
    teacher = tiny_teacher(family, tied=tied, **BIASES[family])
    before, config, generator = copy.deepcopy(teacher.state_dict()), teacher.config.to_dict(), torch.random.get_rng_state()
    turned = rotate(teacher, random_basis(WIDTH), untie=True)
    with torch.no_grad():
        for parameter in turned.parameters():  # no storage is shared
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert teacher.config.to_dict() == config and (teacher.lm_head.weight is teacher.model.embed_tokens.weight) == tied
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_what_is_kept(tiny_teacher):
    teacher = tiny_teacher("qwen3", dtype=torch.bfloat16, rms_norm_eps=3e-5, attn_implementation="eager").train()
    teacher.model.norm.float()  # a mixed checkpoint
    teacher.generation_config.max_new_tokens = 7
    turned = rotate(teacher, random_basis(WIDTH))
    assert type(turned) is type(teacher) and turned.training and not rotate(teacher.eval(), random_basis(WIDTH)).training
    for (name, value), (other, theirs) in zip(turned.named_parameters(), teacher.named_parameters(), strict=True):
        assert name == other and value.dtype == theirs.dtype and value.device == theirs.device and value.shape == theirs.shape
        assert value.requires_grad and value.is_contiguous()
    for (name, value), (other, theirs) in zip(turned.named_buffers(), teacher.named_buffers(), strict=True):
        assert name == other and value.dtype == theirs.dtype and torch.equal(value, theirs)
    assert turned.config.to_dict() == teacher.config.to_dict() and turned.config is not teacher.config
    assert turned.config._attn_implementation == "eager" and turned.model.rotary_emb.config is turned.config
    assert turned.model.norm.variance_epsilon == 3e-5
    assert turned.generation_config.to_dict() == teacher.generation_config.to_dict()
    assert turned.generation_config is not teacher.generation_config


def test_weights_are_rounded_once(tiny_teacher):
    """A bf16 teacher's weights are those of its exact copy, rounded to bf16."""
    teacher = tiny_teacher("qwen2", dtype=torch.bfloat16)
    exact = rotate(copy.deepcopy(teacher).double(), random_basis(WIDTH))
    for name, value in rotate(teacher, random_basis(WIDTH)).named_parameters():
        assert torch.equal(value, exact.get_parameter(name).bfloat16()), name


def test_the_identity_folds_and_does_nothing_else(tiny_teacher, family):
    teacher = tiny_teacher(family, **BIASES[family])
    folded = rotate(teacher, torch.eye(WIDTH))
    for name, value in teacher.named_parameters():
        new, readers = folded.get_parameter(name), ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")
        if name in NORMS:
            assert torch.equal(new, torch.ones_like(value)), name
        elif name.endswith(readers) or name == "lm_head.weight":
            norm = "model.norm.weight" if name == "lm_head.weight" else name.partition("self_attn" if "self_attn" in name else "mlp")[0] + (
                "input_layernorm.weight" if "self_attn" in name else "post_attention_layernorm.weight")
            assert torch.equal(new, value * teacher.get_parameter(norm)), name
        else:
            assert torch.equal(new, value), name


def test_principal_basis(tiny_teacher):
    """Orthogonal, strongest first, one sign; in it the stream's second moment is diagonal, and the principal basis the identity."""
    teacher = tiny_teacher(dtype=torch.float64)
    calibration = calibrate(teacher, batches(), covariance=True)
    basis = principal_basis(calibration)
    assert basis.dtype == torch.float64 and basis.shape == (WIDTH, WIDTH)
    torch.testing.assert_close(basis.T @ basis, torch.eye(WIDTH, dtype=torch.float64), rtol=0, atol=1e-12)
    strengths = torch.linalg.eigvalsh(calibration.covariance).flip(0)
    torch.testing.assert_close(basis.T @ calibration.covariance @ basis, strengths.diag(), rtol=0, atol=1e-12)
    assert all(column[column.abs().argmax()] > 0 for column in basis.T)
    again = calibrate(rotate(teacher, basis), batches(), covariance=True)
    torch.testing.assert_close(again.covariance, strengths.diag(), rtol=0, atol=1e-6)  # transformers' norms round to fp32
    torch.testing.assert_close(principal_basis(again), torch.eye(WIDTH, dtype=torch.float64), rtol=0, atol=1e-4)
    with pytest.raises(REDError, match="needs a calibration with covariance.*covariance=True"):
        principal_basis(calibrate(teacher, batches()))


def test_random_basis():
    state = torch.random.get_rng_state()
    basis = random_basis(24, seed=5)
    assert basis.dtype == torch.float64 and torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(basis.T @ basis, torch.eye(24, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(basis, random_basis(24, seed=5)) and not torch.allclose(basis, random_basis(24, seed=6))
    # Haar: a plain QR gives a first entry that is negative or positive by convention; its mean over seeds is 0, its mean square 1/width
    entries = torch.stack([random_basis(3, seed) for seed in range(600)])
    assert entries.mean(0).abs().max() < 0.1 and (entries.square().mean(0) - 1 / 3).abs().max() < 0.06
    for width in (0, 2.0, True, "8"):
        with pytest.raises(REDError, match="width=.*positive integer"):
            random_basis(width)


def started(teacher, start) -> torch.nn.Module:
    student = build_student(teacher, NARROW)
    Projections(teacher, student, start)
    return student


def test_selection_in_the_principal_basis_is_the_pca_start(tiny_teacher, family, monkeypatch):
    """The first channels of the turned teacher against the leading directions of the teacher.

    RED's score need not choose exactly these channels (it is of |x|, not of z²), so they are given. `pca` pools one norm scale over the norms, a
    selection has one for each: without the scale the students are equal, with it they are once `pca` is given the scale of each norm.
    """
    use_exact_norms(monkeypatch)
    teacher = tiny_teacher(family, dtype=torch.float64, **BIASES[family])
    calibration = calibrate(teacher, batches(), covariance=True)
    turned = rotate(teacher, principal_basis(calibration))
    again, first = calibrate(turned, batches(), covariance=True), torch.arange(NARROW)
    for norm_scale in (False, True):
        context = StartContext(turned, NARROW, again, norm_scale=norm_scale)
        reference = starts.get("pca")(StartContext(teacher, NARROW, calibration, norm_scale=norm_scale))
        scales = selection_scales(context, first)
        pooled = torch.stack([reference.maps[name][0] for name in NORMS])
        torch.testing.assert_close(pooled.square(), scales.square().mean().expand(5), rtol=1e-9, atol=0)
        assert (scales.std() > 1e-3) == norm_scale
        for name, scale in zip(NORMS, scales, strict=True):
            reference.maps[name] = scale * torch.ones(NARROW, dtype=torch.float64)
        selected, rotated = started(turned, selection(context, first)), started(teacher, reference)
        torch.testing.assert_close(logits(selected), logits(rotated), rtol=0, atol=1e-9)
        assert (logits(selected) - logits(teacher)).abs().max() > 0.1


def test_in_the_principal_basis_the_most_active_channels_are_the_first(tiny_teacher):
    """Half the directions strong, hidden by a rotation: RED's rule cannot see them, and after `rotate` it takes exactly them."""
    teacher = tiny_teacher(dtype=torch.float64)
    with torch.no_grad():
        for weight in (teacher.model.embed_tokens.weight.T, *(module.weight for layer in teacher.model.layers
                                                              for module in (layer.self_attn.o_proj, layer.mlp.down_proj))):
            weight[::2] *= 20
    hidden = rotate(teacher, random_basis(WIDTH))
    calibration = calibrate(hidden, batches(), covariance=True)
    assert calibration.scores.max() < 4 * calibration.scores.median()
    turned = rotate(hidden, principal_basis(calibration))
    context = StartContext(turned, NARROW, calibrate(turned, batches()))
    assert torch.equal(starts.get("activation")(context).channels, torch.arange(NARROW))
    assert context.calibration.scores[:NARROW].min() > 4 * context.calibration.scores[NARROW:].max()


@pytest.mark.parametrize(("basis", "message"), (
    (torch.eye(WIDTH)[:, :NARROW], r"basis is \[32, 16\] of torch.float32; expected a floating tensor \[32, 32\].*red.random_basis"),
    (torch.eye(48), r"basis is \[48, 48\].*hidden_size=32"),
    (torch.eye(WIDTH, dtype=torch.int64), r"basis is \[32, 32\] of torch.int64; expected a floating tensor"),
    (torch.eye(WIDTH).tolist(), "basis is list; expected"),
    (torch.eye(WIDTH).index_fill(1, torch.tensor([3]), float("nan")), r"basis\[0, 3\] is nan.*finite"),
    (torch.full((WIDTH, WIDTH), float("inf")), r"basis\[0, 0\] is inf"),
    (torch.eye(WIDTH) * 1.01, r"not orthogonal.*is 0.02, allowed is 1e-05.*torch.linalg.qr"),
    (random_basis(WIDTH).bfloat16(), "not orthogonal.*fp32 or fp64: bf16 and fp16 round too much"),
))
def test_a_bad_basis_is_refused(tiny_teacher, basis, message):
    with pytest.raises(REDError, match=message):
        rotate(tiny_teacher(), basis)


def test_an_fp32_basis_is_good_enough(tiny_teacher):
    teacher = tiny_teacher()
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH)).Q
    torch.testing.assert_close(logits(rotate(teacher, basis)), logits(teacher), rtol=0, atol=2e-5)


def test_a_teacher_that_cannot_be_rotated_is_refused(tiny_teacher):
    other = tiny_teacher()
    other.config.model_type = "gpt2"
    with pytest.raises(REDError, match="model_type='gpt2' is not supported.*llama"):
        rotate(other, torch.eye(WIDTH))
    with pytest.raises(REDError, match="weights are on meta;.*one device"):
        rotate(tiny_teacher().to("meta"), torch.eye(WIDTH))
    split = tiny_teacher()
    split.lm_head.to("meta")
    with pytest.raises(REDError, match="weights are on cpu, meta;.*device_map"):
        rotate(split, torch.eye(WIDTH))
    packed = tiny_teacher()
    packed.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(48, WIDTH, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(REDError, match="layers.1.mlp.up_proj.weight is of torch.uint8.*fp32 or bf16"):
        rotate(packed, torch.eye(WIDTH))


def test_public_names():
    assert (red.rotate, red.principal_basis, red.random_basis) == (rotate, principal_basis, random_basis)
    assert {"rotate", "principal_basis", "random_basis"} <= set(red.__all__)
