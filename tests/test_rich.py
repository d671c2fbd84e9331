"""The rich teacher: its model, the stream of its text, its trainer, and the one that is shipped."""

import hashlib
import json
from importlib.resources import files

import pytest
import torch

from red.example import corpus, train_rich
from red.example.rich_corpus import KINDS, LEVELS, VOCABULARY, problems
from red.example.rich_model import SIZES, build_model, build_rich_tokenizer
from red.example.rich_stream import CHUNK_STEPS, STAGES, Chunks, stage_at, steps_of
from red.example.tokenizer import build_tokenizer
from red.example.train_rich import train
from red.example.train_teacher import QUESTION_WEIGHT, ROW, document_mask

SHIPPED = files("red.example") / "rich"


def test_the_tokenizer_extends_the_small_one(tmp_path):
    from transformers import AutoTokenizer

    build_rich_tokenizer().save_pretrained(tmp_path)
    built, small = build_rich_tokenizer(), build_tokenizer()
    text = " ".join(corpus.VOCABULARY)
    for tokenizer in (built, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tokenizer) == len(VOCABULARY) + 4 == 142 and tokenizer.padding_side == "left"
        assert tokenizer(text)["input_ids"] == small(text)["input_ids"]
        assert tokenizer.decode(tokenizer("ann likes 22 ;")["input_ids"]) == "<bos> ann likes 22 ;"


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_qwen3_with_real_models_habits(size):
    with torch.device("meta" if size == "full" else "cpu"):
        model = build_model(size, build_rich_tokenizer(), 0)
    config = model.config
    assert config.model_type == "qwen3" and config.tie_word_embeddings and config.num_attention_heads == 2 * config.num_key_value_heads
    assert model.lm_head.weight is model.model.embed_tokens.weight
    parameters = sum(p.numel() for p in model.parameters())
    assert {"tiny": parameters < 50_000, "small": 1_500_000 < parameters < 3_000_000, "full": parameters >= 25_000_000}[size]
    optimized = [p for optimizer, _ in train_rich.optimizers(model, size) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, optimized)) == sorted(map(id, model.parameters()))
    for share in (0.5, 0.375, 0.25):
        assert config.hidden_size * share % config.num_attention_heads == 0, "the study's student widths"


def test_chunks_hold_whole_documents_that_do_not_see_each_other():
    chunks = Chunks("tiny", 0, 100)
    ids, positions, weights = chunks[0]
    tokenizer = chunks.tokenizer
    assert ids.shape == positions.shape == weights.shape == (CHUNK_STEPS * SIZES["tiny"].rows, ROW)
    assert (ids != tokenizer.pad_token_id).float().mean() > 0.9
    assert (weights[ids == tokenizer.bos_token_id] == 0).all() and (weights[ids == tokenizer.pad_token_id] == 0).all()
    assert ((positions == 0) == (ids == tokenizer.bos_token_id))[ids != tokenizer.pad_token_id].all()
    for row, weight in zip(ids[:8].tolist(), weights[:8], strict=True):
        words = tokenizer.convert_ids_to_tokens(row)
        for place, word in enumerate(words):
            if word == ":":
                assert weight[place] == pytest.approx(QUESTION_WEIGHT) and weight[place + 1] == 1
    model = build_model("tiny", tokenizer, 0).eval()
    with torch.no_grad():
        packed = model(input_ids=ids[:1], position_ids=positions[:1], attention_mask=document_mask(positions[:1]), use_cache=False).logits
        start, end = (positions[0] == 0).nonzero().flatten()[1:3].tolist()
        alone = model(input_ids=ids[:1, start:end]).logits
    torch.testing.assert_close(packed[:, start:end], alone, rtol=1e-4, atol=1e-5)


def test_chunks_depend_on_their_number_alone():
    whole, later = Chunks("tiny", 3, 10 * CHUNK_STEPS), Chunks("tiny", 3, 10 * CHUNK_STEPS, first=4)
    assert len(whole) == 10 and len(later) == 6 and len(Chunks("tiny", 3, 10 * CHUNK_STEPS + 1)) == 11
    assert all(torch.equal(one, other) for one, other in zip(whole[5], later[1], strict=True))
    assert not torch.equal(whole[5][0], whole[6][0]) and not torch.equal(whole[5][0], Chunks("tiny", 4, 10 * CHUNK_STEPS)[5][0])
    with pytest.raises(IndexError):
        later[6]


def test_stages_follow_one_another():
    assert sum(stage.part for stage in STAGES) == pytest.approx(1)
    assert all(sum(stage.shares.values()) == pytest.approx(1) for stage in STAGES)
    assert [STAGES.index(stage_at(done)) for done in (0, 0.099, 0.1, 0.349, 0.35, 0.45, 0.61, 0.8, 1.0)] == [0, 0, 1, 1, 2, 3, 4, 5, 5]


def test_training_writes_a_teacher_and_resumes_to_the_same_bits(tmp_path):
    """Also across the end of a chunk, and from a checkpoint in the middle of one."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokens = 50 * SIZES["tiny"].rows * ROW
    settings = dict(size="tiny", seed=3, tokens=tokens, log_every=20, problems_measured=2)
    record = train(tmp_path / "whole", **settings)
    assert train(tmp_path / "cut", **settings, until=17) is None
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    assert train(tmp_path / "cut", **settings, resume=True, until=40) is None
    again = train(tmp_path / "cut", **settings, resume=True)
    one, two = (load_file(tmp_path / run / "model.safetensors") for run in ("whole", "cut"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert record["model_sha256"] == again["model_sha256"] == sha256(tmp_path / "cut")

    assert record == {**json.loads((tmp_path / "whole" / "training.json").read_text())}
    assert record["steps"] == steps_of("tiny", tokens) == 50 and [point["step"] for point in record["curve"]] == [20, 40, 50]
    assert [point["loss"] for point in record["curve"]] == [point["loss"] for point in again["curve"]]
    assert record["curve"][-1]["loss"] < record["curve"][0]["loss"] < 5.5
    assert set(record["exact_match"]["test"]) == {*KINDS, "mean"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert model.dtype == torch.bfloat16 and model.config.tie_word_embeddings and model.generation_config.eos_token_id == 2
    assert len(AutoTokenizer.from_pretrained(tmp_path / "whole")) == model.config.vocab_size


def test_a_checkpoint_is_neither_overwritten_nor_mistaken(tmp_path):
    settings = dict(size="tiny", tokens=30_000, log_every=0, problems_measured=0)
    train(tmp_path, **settings, until=1)
    with pytest.raises(ValueError, match="holds a checkpoint"):
        train(tmp_path, **settings)
    with pytest.raises(ValueError, match="same settings"):
        train(tmp_path, **settings, resume=True, seed=9)


def sha256(folder) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


# --- the shipped teacher ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    """The shipped bf16 file, computed with in fp32, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(str(SHIPPED), dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(str(SHIPPED))


def test_the_teacher_is_small_and_says_how_it_was_made(shipped):
    model, tokenizer = shipped
    made = json.loads((SHIPPED / "training.json").read_text())
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 16 * 2**20
    assert {path.name for path in SHIPPED.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"
    }
    assert {"command", "seed", "tokens", "seconds", "versions", "commit", "exact_match", "easy", "level"} <= made.keys()
    assert made["model_sha256"] == sha256(SHIPPED) and made["parameters"] == sum(p.numel() for p in model.parameters())
    assert tokenizer.get_vocab() == build_rich_tokenizer().get_vocab()
    assert made["exact_match"]["validation"]["mean"] >= train_rich.GOAL


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_solves_unseen_problems(shipped, kind):
    from red.evaluate import forced_exact_match

    model, tokenizer = shipped
    fewest, most = LEVELS["small"].steps[kind]
    asked = [problem for steps in {fewest, most} for problem in problems("test", kind, steps, 50, seed=11)]
    assert forced_exact_match(model, tokenizer, asked)["exact_match"] >= 0.9


def test_a_broken_teacher_is_noticed(shipped):
    """A mutation: with one layer's attention silenced the figure must fall to nothing."""
    import copy

    from red.evaluate import forced_exact_match

    broken = copy.deepcopy(shipped[0])
    broken.model.layers[1].self_attn.o_proj.weight.data.zero_()
    assert forced_exact_match(broken, shipped[1], problems("test", "shuffled", 6, 50))["exact_match"] < 0.1
