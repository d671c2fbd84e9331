"""Every supported family in its variants, all the way: identity, gradients, taps, masks, a fitted start, a checkpoint that reloads; and who is refused."""

from __future__ import annotations

import json

import pytest
import torch
from reference_lrc import Chained, default_objective, documents, random_batch, tap_squares, use_exact_norms
from tiny_training import NARROW, make_trainer, masters, shake, tokenised
from transformers import AutoConfig, AutoModelForCausalLM

from red import families, starts
from red.sharing import export
from red.sharing import preflight
from red.config import REDConfig
from red.errors import REDError
from red.prepare import load_teacher, pack_rows, ready_calibration, start_projections
from red.training.projections import Projections
from red.student import build_student

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
WINDOW = dict(use_sliding_window=True, sliding_window=4)
VARIANTS = {
    "Llama 2": ("llama", dict(num_key_value_heads=4, head_dim=None)),
    "Llama 3.1": ("llama", dict(rope_parameters=LLAMA3)),
    "Llama 3.2": ("llama", dict(rope_parameters=LLAMA3, tied=True)),
    "Qwen2.5": ("qwen2", dict(**WINDOW, max_window_layers=1, head_dim=None, rope_parameters=YARN)),
    "Qwen2.5, tied": ("qwen2", dict(tied=True)),
    "Qwen3": ("qwen3", dict(**WINDOW, max_window_layers=1, head_dim=12)),
    "Qwen3, tied": ("qwen3", dict(tied=True, attention_bias=True)),
    "Mistral 0.1": ("mistral", dict(sliding_window=4, head_dim=None)),
    "Mistral Nemo": ("mistral", dict(sliding_window=None, head_dim=12, tied=True)),
    "SmolLM3": ("smollm3", dict(tied=True, head_dim=None, no_rope_layer_interval=2)),
    "SmolLM3, all options": ("smollm3", dict(**WINDOW, no_rope_layer_interval=2, attention_bias=True, mlp_bias=True)),
}


@pytest.fixture(params=sorted(VARIANTS))
def variant(request):
    return VARIANTS[request.param]


def test_every_supported_family_is_here():
    assert {family for family, _ in VARIANTS.values()} == set(families.SUPPORTED)


def test_a_student_of_full_width_is_the_teacher(tiny_teacher, variant):
    family, settings = variant
    teacher = tiny_teacher(family, **settings)
    student = build_student(teacher, 32)
    Projections(teacher, student, starts.base.selection(starts.StartContext(teacher, 32), torch.arange(32)))
    batch = random_batch(3, 20)
    place = dict(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    with torch.no_grad():
        assert torch.equal(student(**place).logits, teacher(**place).logits)
    prompt = batch["input_ids"][:1, :6]
    options = dict(attention_mask=torch.ones_like(prompt), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(student.generate(prompt, **options), teacher.generate(prompt, **options))


def test_only_the_width_changes(tiny_teacher, variant):
    family, settings = variant
    teacher = tiny_teacher(family, **settings)
    student = build_student(teacher, NARROW)
    ours, theirs = student.config.to_dict(), teacher.config.to_dict()
    assert {key for key in ours | theirs if ours.get(key) != theirs.get(key)} - {"head_dim"} == {"hidden_size"}
    assert ours["head_dim"] == teacher.model.layers[0].self_attn.head_dim
    assert families.is_tied(student) == families.is_tied(teacher)
    torch.testing.assert_close(student.model.rotary_emb.inv_freq, teacher.model.rotary_emb.inv_freq, rtol=0, atol=0)
    for mine, own in zip(student.model.layers, teacher.model.layers, strict=True):
        for fact in ("sliding_window", "use_rope", "scaling", "layer_type"):
            assert getattr(mine.self_attn, fact, None) == getattr(own.self_attn, fact, None), fact


def test_gradients_are_those_of_the_products(tiny_teacher, tmp_path, monkeypatch, variant):
    """Loss and gradient of CE, KL and the taps in every map and gain, against backpropagation through the products; in float64."""
    use_exact_norms(monkeypatch)
    family, settings = variant
    teacher = tiny_teacher(family, dtype=torch.float64, **settings)
    trainer = make_trainer(teacher, tmp_path, max_length=16)
    shake(trainer.projections)
    trainer.student.train()
    rows = [trainer.train_dataset[index] for index in range(trainer.args.calibration_samples)]
    squares = tap_squares(teacher, {key: torch.stack([row[key] for row in rows]) for key in rows[0]})
    chained, batch = Chained(teacher, masters(trainer)), random_batch(3, 14)
    parts = default_objective(chained, batch, channels=trainer.projections.channels, squares=squares)
    expected = parts["ce"] + parts["kl"] + 0.2 * parts["tap"]
    gradients = dict(zip(chained.maps, torch.autograd.grad(expected, chained.maps.values()), strict=True))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    trainer.projections.pull_back()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-10, atol=0)
    assert set(gradients) == {factor.name for factor in trainer.projections}
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 1e-6, f"{name}: a zero gradient would prove nothing"
        torch.testing.assert_close(trainer.projections[name].master.grad, gradient, rtol=0, atol=1e-9 * max(1.0, float(gradient.abs().max())), msg=name)


def test_packed_documents_stay_apart(tiny_teacher, variant):
    """Also beneath sliding windows and without rotary angles: a packed row's logits are those of its documents alone."""
    family, settings = variant
    teacher = tiny_teacher(family, **settings)
    batch = random_batch(2, 20)
    with torch.no_grad():
        packed = teacher(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[batch["token_mask"]]
        alone = torch.cat([teacher(document[None]).logits[0] for document in documents(batch)])
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)


def fitted(teacher, folder):
    """A student with the fitted start at a small width, from calibration to weights."""
    config = REDConfig(output_dir=str(folder), hidden_size=NARROW, max_length=16, calibration_samples=8, use_cpu=True, report_to="none")
    rows = pack_rows(tokenised(), None, teacher, config)
    batches = [{key: torch.stack([rows[index][key] for index in range(8)]) for key in rows[0]}]
    return start_projections(teacher, config, ready_calibration(teacher, config, rows=rows), batches).student.eval()


def test_fitted_exported_reloaded(tiny_teacher, tiny_tokenizer, tmp_path, monkeypatch, variant):
    """The preflight runs in this process: a fresh one for each family would take a minute in all; the test below starts one."""
    monkeypatch.setattr(export, "run_preflight", lambda folder, reference: preflight.check(str(folder), str(reference)))
    family, settings = variant
    # transformers takes its own Qwen2Tokenizer for every qwen2 folder, and the words here are not its
    tokenizer = tiny_tokenizer if family != "qwen2" else None
    teacher = tiny_teacher(family, **settings)
    student = fitted(teacher, tmp_path / "run")
    report = export.export(student, tokenizer, tmp_path / "student")
    assert report.model_type == family and len(report.generated) == preflight.GENERATED
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert type(loaded) is type(teacher) and families.is_tied(loaded) == families.is_tied(teacher)
    written = json.loads((tmp_path / "student" / "config.json").read_text())
    for key in ("rope_parameters", "layer_types", "no_rope_layers", "sliding_window", "use_sliding_window", "max_window_layers", "attention_bias", "mlp_bias"):
        assert written.get(key) == teacher.config.to_dict().get(key), key
    batch = random_batch(2, 20)
    place = dict(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    with torch.no_grad():
        assert torch.equal(loaded(**place).logits, student(**place).logits)
        near, far = student(**place).logits, fitted_less(teacher)(**place).logits
        truth = teacher(**place).logits
    assert (near - truth).square().mean() < (far - truth).square().mean(), "what was fitted is nearer to the teacher than what was drawn"


def fitted_less(teacher):
    student = build_student(teacher, NARROW)
    Projections(teacher, student, starts.get("random")(starts.StartContext(teacher, NARROW)))
    return student


def test_training_and_a_fresh_process(tiny_teacher, tiny_tokenizer, tmp_path):
    family, settings = VARIANTS["SmolLM3"]
    trainer = make_trainer(tiny_teacher(family, **settings), tmp_path / "run", tokenised(4), max_steps=12)
    trainer.processing_class = tiny_tokenizer
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    assert trainer.export(tmp_path / "student").model_type == family


@pytest.mark.parametrize("model_type, message", [
    ("qwen3_moe", "A feed-forward network of 128 experts is no gate, up and down. Take a dense teacher"),
    ("mixtral", "network of 8 experts"), ("qwen2_moe", "network of 60 experts"), ("deepseek_v3", "network of 256 experts"),
    ("gemma", "gains are 1 . weight"), ("gemma2", "passes a norm of its own"), ("olmo2", "passes a norm of its own"),
    ("phi3", "one weight each; split them and save the model as Llama"), ("gpt_neox", "Convert the teacher to one of these"),
])
def test_others_are_refused_by_name_before_any_weight_is_read(tmp_path, model_type, message):
    """The folder holds a config and nothing else."""
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(REDError, match=f"model_type='{model_type}' is not supported; supported are llama, mistral, qwen2, qwen3, smollm3. .*{message}"):
        load_teacher(tmp_path)
