"""LoRiTrainer and red.distill(method="lori"): the objective's parts, every preset, and bad input refused. Its files are in test_lori_files."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_lori import (
    PREFIX,
    distil_tiny,
    logged,
    number_tokenizer,
    settings_of,
    table_rows,
    weights,
)
from transformers import TrainerCallback

import red
from red.errors import REDError
from red.lori import PRESETS, LoRiConfig, load, losses
from red.lori.batch import batch_of
from red.lori.data import encode_rows
from red.lori.distillation import distill
from red.lori.trainer import LoRiTrainer
from red.lori.trajectories import Trajectories, collect, stream


@pytest.fixture()
def train(tiny_teacher, tmp_path):
    """train(folder, rows=None, **settings): red.distill(method="lori") of a tiny teacher."""
    return lambda folder="run", rows=None, *, teacher=None, **settings: distil_tiny(teacher or tiny_teacher(), tmp_path / folder, rows, **settings)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_preset_trains_and_reloads(train, preset):
    """Its parts add up to the loss, are there where the preset says so, and the folder answers as the model in memory does."""
    settings = {} if PRESETS[preset]["latent_steps"] else {"latent_steps": 0}
    result = train(preset=preset, eval_data=table_rows(3, seed=5), **settings)
    args = result.trainer.args
    for loss, task, rationale, anchor, cot in logged(result, "loss", "task", "rationale", "anchor", "cot"):
        assert loss == pytest.approx(task + args.rationale_weight * rationale + args.anchor_weight * anchor + args.cot_weight * cot, rel=1e-5)
        assert (rationale > 0, anchor > 0, cot > 0) == (args.rationale_weight > 0, args.anchor_weight > 0, args.cot_weight > 0) and task > 0
    assert result.metrics["eval_loss"] > 0
    loaded, tokenizer, facts = load(result.path)
    assert (facts.preset, facts.target, facts.latent_steps) == (preset, args.target, args.latent_steps)
    state = loaded.state_dict()
    assert state.keys() == result.model.state_dict().keys() and all(torch.equal(value, state[name]) for name, value in result.model.state_dict().items())


def test_the_parts_are_the_losses_of_the_definitions(train, tiny_teacher):
    """The first logged step, again from the raw states of teacher and student."""
    rows, teacher = table_rows(4), tiny_teacher()
    captured = {}

    class Keep(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            captured["model"] = copy.deepcopy(model)

    result = train(rows=rows, teacher=teacher, per_device_train_batch_size=4, max_steps=1, callbacks=[Keep()], centred=False, second_order_weight=0.4, rank_layers=2,
                   rank_channels=5)
    trainer, tokenizer = result.trainer, result.trainer.processing_class
    encoded = encode_rows(rows, tokenizer, answer_prefix=PREFIX)
    batch = batch_of(encoded, "latent", pad=0, bot=64, eot=65)
    thought = captured["model"](**{name: batch[name] for name in ("prompt_ids", "prompt_mask", "target_ids", "target_mask")}, with_states=True)
    student = trainer.subspace.coordinates(thought.latent_states)
    truth = list(stream(teacher, encoded))
    rationale = anchor = 0.0
    for place, one in enumerate(truth):
        g, everything = trainer.subspace.coordinates(one.states)[None], lambda x: torch.ones(x.shape[:2], dtype=torch.bool)
        s = student[place][None]
        rationale += float(losses.rationale_loss(s, everything(s), g, everything(g), trainer.trajectories.scales, second_order_weight=0.4, centred=False)) / 4
        mine = torch.stack([state[place, len(encoded[place].prefix)] for state in thought.target_states])
        anchor += float(losses.anchor_loss(mine[None], one.anchor[None], trainer.anchor_std)) / 4
    labels = batch["labels"][:, 1:]
    task = torch.nn.functional.cross_entropy(thought.logits[:, :-1][labels != -100], labels[labels != -100])
    ((found_task, found_rationale, found_anchor),) = logged(result, "task", "rationale", "anchor")
    assert (found_task, found_rationale, found_anchor) == pytest.approx((float(task), rationale, anchor), rel=1e-4)


def test_trajectories_are_the_teachers_states(tiny_teacher, family, tmp_path):
    """Of a row alone, without padding: the states at its rationale's tokens and just before its answer; and the cache keeps their coordinates."""
    teacher, tokenizer = tiny_teacher(family), number_tokenizer()
    rows = encode_rows(table_rows(5), tokenizer, answer_prefix=PREFIX)
    cache = collect(teacher, rows, tmp_path, batch_size=3)
    assert len(cache) == 5 and cache.tokens == sum(len(row.rationale()) for row in rows)
    anchors = []
    for row, one, (g, anchor) in zip(rows, stream(teacher, rows, batch_size=3), cache, strict=True):
        ids = torch.tensor([[*row.question, *row.rationale(), *row.prefix, *row.answer]])
        with torch.no_grad():
            states = torch.stack(teacher(ids, output_hidden_states=True).hidden_states, 1)[0]
        start = len(row.question)
        torch.testing.assert_close(one.states, states[:, start : start + len(row.rationale())], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(anchor, states[:, start + len(row.rationale()) + len(row.prefix) - 1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(g, cache.subspace.coordinates(one.states))
        anchors.append(anchor)
    torch.testing.assert_close(cache.anchor_std, torch.stack(anchors).std(dim=(0, 2), correction=0), rtol=1e-4, atol=1e-5)
    batch = cache.batch([1, 4])
    assert batch["teacher_mask"].sum(1).tolist() == [len(rows[1].steps), len(rows[4].steps)] and torch.equal(batch["teacher_anchor"][1], anchors[4])


def test_the_cache_knows_what_it_is_of(tiny_teacher, tmp_path, monkeypatch):
    """Read again for the same teacher, rows and settings; made again for others, for shards of other sizes the same, and when torn."""
    tokenizer = number_tokenizer()
    rows = encode_rows(table_rows(5), tokenizer, answer_prefix=PREFIX)
    first = collect(tiny_teacher(), rows, tmp_path)
    stamp = (tmp_path / "trajectories.json").stat().st_mtime_ns
    collect(tiny_teacher(), rows, tmp_path)
    assert (tmp_path / "trajectories.json").stat().st_mtime_ns == stamp
    (tmp_path / "trajectories-00000.safetensors").unlink()  # not overwritten in place: it is mapped
    (tmp_path / "trajectories-00000.safetensors").write_bytes(b"torn")
    assert torch.equal(collect(tiny_teacher(), rows, tmp_path)[3][0], first[3][0])
    monkeypatch.setattr("red.lori.trajectories.SHARD_BYTES", 600)
    parts = collect(tiny_teacher(), rows, tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("trajectories-*.safetensors"))) > 1
    assert all(torch.equal(a, b) for one, other in zip(first, parts, strict=True) for a, b in zip(one, other, strict=True))
    for teacher, chosen in ((tiny_teacher(seed=1), rows), (tiny_teacher(), rows[:4])):
        assert collect(teacher, chosen, tmp_path).key != first.key
    assert isinstance(first, Trajectories)


def test_the_curriculum(train, monkeypatch):
    """Two steps each with 1 and 2 latent steps, which stand for as many steps of the rationale; then all, for the whole rationale."""
    seen, plain = [], LoRiTrainer.compute_loss

    def compute_loss(self, model, inputs, **kwargs):
        seen.append((self._stage, inputs["target_mask"].sum(1).tolist(), inputs["teacher_mask"].sum(1).tolist()))
        return plain(self, model, inputs, **kwargs)

    monkeypatch.setattr(LoRiTrainer, "compute_loss", compute_loss)
    rows = table_rows(2, most=4)
    lengths = [len(row.steps) for row in rows]
    train(rows=rows, curriculum=0.5, max_steps=8, train_sampling_strategy="sequential")
    assert [stage for stage, *_ in seen] == [1, 1, 2, 2, None, None, None, None] and max(lengths) > 2
    for stage, targets, points in seen:
        hidden = [length if stage is None else min(stage, length) for length in lengths]
        assert points == hidden and targets == [1 + length - first + 2 + 2 for length, first in zip(lengths, hidden, strict=True)]  # <eot>, prefix, answer and its end
    assert LoRiConfig(**settings_of("x", preset="no_cot", latent_steps=0)).stage(0, 8) is None


def test_accumulation_equals_one_big_batch(train):
    """4 micro-batches of 2 rows against 1 of 8: labels and examples are counted over the whole step."""
    settings = dict(max_steps=2, adam_epsilon=1e-3, rows=table_rows(16))
    many, one = train("many", gradient_accumulation_steps=4, **settings), train("one", per_device_train_batch_size=8, **settings)
    for (name, value), other in zip(weights(many).items(), weights(one).values(), strict=True):
        assert float((value - other).abs().max()) < 1e-5, name
    assert logged(many, "loss") == [pytest.approx(line, rel=1e-5) for line in logged(one, "loss")]


def test_training_lowers_every_part(train):
    result = train(max_steps=20, rows=table_rows(8), per_device_train_batch_size=8, learning_rate=3e-3)
    first, last = logged(result, "task", "rationale", "anchor")[0], logged(result, "task", "rationale", "anchor")[-1]
    assert all(b < 0.8 * a for a, b in zip(first, last, strict=True)), (first, last)


@pytest.mark.parametrize(("settings", "message"), [
    (dict(preset="lora"), "preset='lora' is no method.*codi"),
    (dict(latent_steps=0), "latent_steps=0: must be above 0 with target=latent"),
    (dict(preset="no_cot"), "latent_steps=3: must be above 0"),
    (dict(anchor_weight=-1.0), "anchor_weight=-1.0"),
    (dict(anchor_layers="7"), "anchor_layers='7'.*from 0 .* to 2"),
    (dict(energy=2.0), "energy=2.0"),
    (dict(rationale_layers="1,3"), "rationale_layers='1,3'.*from 0 .* to 2"),
    (dict(rationale_layers="1,2", rank_layers=3), "rank_layers=3: must lie between 1 and 2, the layers that count"),
    (dict(max_skipped_steps=0), "max_skipped_steps=0: must be at least 1"),
    (dict(fp16=True), "fp16=True: a gradient scaler"),
    (dict(gradient_checkpointing=True), "gradient_checkpointing=True.*cache"),
    (dict(answer_prefix=" "), "answer_prefix=' ' has no token"),
    (dict(max_length=5), "Row .* has .* tokens, more than max_length=5"),
    (dict(latent_stepz=5), "Unknown setting 'latent_stepz'; did you mean 'latent_steps'"),
])
def test_bad_settings_are_refused(train, tmp_path, settings, message):
    with pytest.raises(REDError, match=message):
        train(**settings)
    assert not (tmp_path / "run" / "student").exists()


def test_bad_input_is_refused(train, tiny_teacher, tmp_path):
    bare = [{"question": "table 3", "answer": "4"}] * 3
    with pytest.raises(REDError, match="Row 0 has no steps.*no_cot or coconut"):
        train(rows=bare)
    assert train("bare", rows=bare, preset="coconut").path.is_dir()
    with pytest.raises(REDError, match="4 layers of width 32, the teacher 2"):
        train("deep", student=tiny_teacher(num_hidden_layers=4))
    with pytest.raises(REDError, match="method='lory' is no method"):
        red.distill("teacher", [], method="lory")
    with pytest.raises(REDError, match="takes no calibration"):
        red.distill("teacher", [], method="lori", calibration="x")
    with pytest.raises(REDError, match="config or settings"):
        distill("teacher", bare, config=LoRiConfig(**settings_of(tmp_path)), energy=0.5)
    with pytest.raises(REDError, match="config is a REDConfig.*LoRiConfig"):
        red.distill("teacher", bare, method="lori", config=red.REDConfig(hidden_size=16, output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(REDError, match="config is a LoRiConfig.*REDConfig"):
        red.distill("teacher", bare, config=LoRiConfig(**settings_of(tmp_path)))
    with pytest.raises(REDError, match="needs an explicit teacher and problems"):
        distill(**settings_of(tmp_path))
    with pytest.raises(REDError, match="cannot be loaded"):
        distill(str(tmp_path / "missing"), bare, **settings_of(tmp_path / "out"))


def test_adapters_need_their_package(train, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(REDError, match="lora_rank=4 needs the `peft` package"):
        train(lora_rank=4)


def test_adapters_train_and_are_merged(train):
    """The base stays as it is, the exported folder has the adapters multiplied in, and answers as the model in memory."""
    pytest.importorskip("peft")
    result = train(lora_rank=4)
    trained = {name for name, value in result.model.named_parameters() if value.requires_grad}
    assert any("lora_A" in name for name in trained) and not any("base_layer" in name for name in trained)
    loaded, tokenizer, _ = load(result.path)
    batch = batch_of(encode_rows(table_rows(), tokenizer, answer_prefix=PREFIX), "latent", pad=0, bot=64, eot=65)
    given = {name: batch[name] for name in ("prompt_ids", "prompt_mask", "target_ids", "target_mask")}
    with torch.no_grad():
        torch.testing.assert_close(loaded(**given).logits, result.model.eval()(**given).logits, rtol=1e-4, atol=1e-4)
