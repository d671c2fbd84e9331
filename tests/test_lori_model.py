"""Latent steps: padding never leaks, the cache changes nothing, gradients pass through every step, and a saved model is the same model."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_lori import PREFIX, number_tokenizer, table_rows
from transformers import AutoModelForCausalLM

from red.errors import REDError
from red.lori import files
from red.lori.batch import batch_of
from red.lori.data import encode_rows
from red.lori.evaluate import accuracy, answer
from red.lori.generation import generate
from red.lori.model import LatentModel, add_special_tokens


@pytest.fixture()
def made(tiny_model):
    """make(family="llama", **settings): a latent model in eval mode, its tokenizer, encoded rows, and the keywords of a latent batch."""
    def make(family: str = "llama", count: int = 4, tied: bool = False, dtype=torch.float64, **settings):
        plain, tokenizer = tiny_model(family, tied=tied, dtype=dtype), number_tokenizer()
        bot, eot = add_special_tokens(plain, tokenizer)
        model = LatentModel(plain, **{"latent_steps": 3, **settings}).to(dtype).eval()
        rows = encode_rows(table_rows(count), tokenizer, answer_prefix=PREFIX)
        return model, tokenizer, rows, dict(pad=tokenizer.pad_token_id, bot=bot, eot=eot)

    return make


def inputs(batch: dict) -> dict:
    return {name: batch[name] for name in ("prompt_ids", "prompt_mask", "target_ids", "target_mask")}


@pytest.mark.parametrize("target", ["latent", "explicit", "none"])
def test_padding_never_leaks(made, family, target):
    """A row in a batch of longer ones, with any token at the padding, gives what it gives alone."""
    model, _, rows, tokens = made(family, latent_steps=3 if target == "latent" else 0)
    batch = batch_of(rows, target, **tokens)
    assert (batch["prompt_mask"] == 0).any()
    for name in ("prompt", "target"):
        batch[f"{name}_ids"] = torch.where(batch[f"{name}_mask"] == 1, batch[f"{name}_ids"], torch.randint_like(batch[f"{name}_ids"], 60))
    together = model(**inputs(batch), with_states=True)
    for place, row in enumerate(rows):
        alone = model(**inputs(batch_of([row], target, **tokens)), with_states=True)
        length = alone.logits.shape[1]
        torch.testing.assert_close(together.logits[place, :length], alone.logits[0], rtol=1e-9, atol=1e-9)
        for mine, other in zip(together.target_states, alone.target_states, strict=True):
            torch.testing.assert_close(mine[place, :length], other[0], rtol=1e-9, atol=1e-9)
        if target == "latent":
            torch.testing.assert_close(together.latent_states[place], alone.latent_states[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("projection", [True, False])
def test_the_latent_steps_are_what_they_say(made, projection):
    """One question, no padding, no cache: every thought's state is projected and appended as an input, by hand."""
    model, _, rows, tokens = made(projection=projection)
    batch = batch_of(rows[:1], "latent", **tokens)
    thought = model(**inputs(batch), with_states=True)
    table, sequence, states = model.model.get_input_embeddings(), model.model.get_input_embeddings()(batch["prompt_ids"]), []
    for _ in range(3):
        hidden = model.model(inputs_embeds=sequence, use_cache=False, output_hidden_states=True).hidden_states[-1][:, -1:]
        sequence = torch.cat([sequence, model.projection(hidden) if projection else hidden], 1)
    out = model.model(inputs_embeds=torch.cat([sequence, table(batch["target_ids"])], 1), use_cache=False, output_hidden_states=True)
    length, start = batch["target_ids"].shape[1], batch["prompt_ids"].shape[1]
    torch.testing.assert_close(thought.logits, out.logits[:, -length:], rtol=1e-9, atol=1e-9)
    states = torch.stack(out.hidden_states, 1)[:, :, start : start + 3]
    torch.testing.assert_close(thought.latent_states, states, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("projection", [True, False])
def test_gradients_pass_through_every_step(made, projection):
    """The analytic gradient of the answer's loss in the embedding of <bot>, which only the first hidden state of the chain reads directly, against differences."""
    model, _, rows, tokens = made(projection=projection)
    batch, table = batch_of(rows[:2], "latent", **tokens), model.model.get_input_embeddings().weight
    place = (tokens["bot"], 3)

    def loss():
        return model(**inputs(batch)).logits[:, -1].square().sum()

    loss().backward()
    analytic, step = float(table.grad[place]), 1e-3  # transformers' norms compute in float32, whatever the dtype
    with torch.no_grad():
        table[place] += step
        above = float(loss())
        table[place] -= 2 * step
        below = float(loss())
    assert abs(analytic) > 1e-4 and analytic == pytest.approx((above - below) / (2 * step), rel=2e-3)
    if projection:
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.projection.parameters())


@pytest.mark.parametrize(("target", "projection"), [("latent", True), ("latent", False), ("none", False)])
def test_cached_generation_equals_uncached(made, family, target, projection):
    model, _, rows, tokens = made(family, latent_steps=3 if target == "latent" else 0, projection=projection)
    batch = batch_of(rows, target, **tokens)
    first = batch["target_ids"][:, 0]
    said = [generate(model, batch["prompt_ids"], batch["prompt_mask"], first, max_new_tokens=6, eos_ids={2}, cached=cached) for cached in (True, False)]
    assert said[0] == said[1] and any(said[0].ids)
    alone = batch_of(rows[1:2], target, **tokens)
    assert generate(model, alone["prompt_ids"], alone["prompt_mask"], first[1:2], max_new_tokens=6, eos_ids={2}).ids == said[0].ids[1:2]


def test_a_row_that_has_ended_says_nothing_more(made):
    model, _, rows, tokens = made()
    batch = batch_of(rows, "latent", **tokens)
    given = (batch["prompt_ids"], batch["prompt_mask"], batch["target_ids"][:, 0])
    endless = generate(model, *given, max_new_tokens=6, eos_ids=set())
    end = endless.ids[0][2]
    ended = generate(model, *given, max_new_tokens=6, eos_ids={end})
    assert ended.ids == [row[: row.index(end)] if end in row else row for row in endless.ids] and len({len(row) for row in ended.ids}) > 1
    assert endless.passes == 1 + 3 + 6


def test_generation_says_what_training_reads(made):
    """The likeliest tokens of a teacher-forced pass over what was said are what was said."""
    model, _, rows, tokens = made()
    batch = batch_of(rows[:1], "latent", **tokens)
    said = generate(model, batch["prompt_ids"], batch["prompt_mask"], batch["target_ids"][:, 0], max_new_tokens=5, eos_ids=set()).ids[0]
    ids = torch.tensor([[tokens["eot"], *said]])
    logits = model(**{**inputs(batch), "target_ids": ids, "target_mask": torch.ones_like(ids)}).logits
    assert logits[0, :-1].argmax(-1).tolist() == said


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("llama", True)])
def test_a_saved_model_is_the_same(made, tmp_path, family, tied):
    """Answers, logits and facts; and the folder is a plain model for everyone else."""
    model, tokenizer, rows, tokens = made(family, tied=tied, dtype=torch.float32)
    facts = files.Facts("latent", 3, True, PREFIX, "lori")
    files.save(tmp_path / "saved", model, tokenizer, facts)
    loaded, again, found = files.load(tmp_path / "saved")
    assert found == facts and not loaded.training
    batch = batch_of(rows, "latent", **tokens)
    assert torch.equal(loaded(**inputs(batch)).logits, model(**inputs(batch)).logits)
    assert answer(loaded, again, table_rows(), facts, max_new_tokens=4) == answer(model, tokenizer, table_rows(), facts, max_new_tokens=4)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(plain(batch["target_ids"]).logits, model.model(batch["target_ids"]).logits)


def test_a_saved_model_serves_in_bfloat16(made, tmp_path):
    """Also loaded on the CPU and moved afterwards: the projection's dtype need not be the model's. Logits are the float32 ones to bfloat16's rounding."""
    model, tokenizer, rows, tokens = made(dtype=torch.float32)
    files.save(tmp_path / "saved", model, tokenizer, files.Facts("latent", 3, True, PREFIX, "lori"))
    loaded, again, facts = files.load(tmp_path / "saved", dtype=torch.bfloat16)
    batch = batch_of(rows, "latent", **tokens)
    mine, theirs = (one(**inputs(batch)).logits.float() for one in (loaded, model))
    assert loaded.model.dtype == torch.bfloat16 and (mine - theirs).norm() <= 0.05 * theirs.norm()
    assert len(answer(loaded, again, table_rows(3), facts, max_new_tokens=2)[0]) == 3


def test_a_folder_that_is_no_latent_model_is_refused(made, tmp_path):
    model, tokenizer, _, _ = made(dtype=torch.float32)
    folder = files.save(tmp_path / "saved", model, tokenizer, files.Facts("latent", 3, True, PREFIX))
    facts = json.loads((folder / "lori.json").read_text())
    (folder / "lori.json").write_text(json.dumps({**facts, "version": 2}))
    with pytest.raises(REDError, match="version=2"):
        files.load(folder)
    (folder / "lori.json").write_text(json.dumps(facts))
    (folder / "lori.safetensors").unlink()
    with pytest.raises(REDError, match="lori.safetensors"):
        files.load(folder)
    (folder / "lori.json").unlink()
    with pytest.raises(REDError, match="no lori.json"):
        files.load(folder)
    with pytest.raises(REDError, match="The latent model"):
        files.load(tmp_path / "missing")


def test_scores(made, monkeypatch):
    """By the number of steps; answers in the rows' order; words counted without the end."""
    model, tokenizer, _, _ = made()
    rows = table_rows(9)
    right = {row.question: row.answer for row in rows}
    monkeypatch.setattr("red.lori.evaluate.answer", lambda model, tokenizer, rows, facts: ([f"{PREFIX} {right[row.question]}" for row in rows[:-1]] + ["3 9 w1"], [3] * 9))
    found = accuracy(model, tokenizer, rows, files.Facts("latent", 3, True, PREFIX))
    wrong = str(len(rows[-1].steps))
    assert found["accuracy"] == pytest.approx(8 / 9) and found["tokens"] == 3
    assert {steps for steps, share in found["accuracy_by_steps"].items() if share < 1} == {wrong}
    assert set(found["accuracy_by_steps"]) == {str(len(row.steps)) for row in rows}


def test_special_tokens_are_added_once(tiny_model):
    plain, tokenizer = tiny_model(tied=True), number_tokenizer()
    before = plain.get_input_embeddings().weight.detach().clone()
    ids = add_special_tokens(plain, tokenizer)
    assert ids == (64, 65) == add_special_tokens(plain, tokenizer) and plain.get_input_embeddings().weight.shape[0] == 66 == len(tokenizer)
    assert torch.equal(plain.get_input_embeddings().weight[:64], before) and plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert plain.get_input_embeddings().weight[64:].detach().std() == pytest.approx(float(before.std()), rel=0.3)
