"""The teacher with massive activations: they are there, in fixed channels at <bos>, attention sinks on them, and it still reasons.

For comparison: Sun et al. (arXiv 2402.17762) call an activation massive when it is above 100 and about 1000 times the median of its
hidden state or more; LLaMA2-7B's largest is 2622 with a median of 0.2, in two fixed channels, at the first token and one delimiter.
"""

import copy
import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from red.calibration import calibrate_batches
from red.errors import REDError
from red.evaluate import exact_match, text_quality
from red.example import TEACHERS, easy_documents, easy_perplexity_limit, problems, teacher_path
from red.example.train_massive import MASSIVE, activation_magnitudes, sample, sinks, train

SHARE = 0.6  # of a head's attention, on <bos>
MIDDLE = (1, 2, 3)  # the residual stream after layers 0, 1 and 2
FOLDER = Path(teacher_path("massive"))
RECORD = json.loads((FOLDER / "training.json").read_text())


@pytest.fixture(scope="module")
def model():
    """The shipped bf16 file, computed with in fp32."""
    return LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def text():
    return sample(3000, seed=7, split="test")


@pytest.fixture(scope="module")
def magnitudes(model, text):
    return activation_magnitudes(model, text)


def some_problems(count: int) -> list:
    return [problem for steps in (2, 4, 6, 8) for problem in problems("test", steps, count, seed=21)]


# --- the file ---------------------------------------------------------------------------------------------------------------


def test_embedded_teachers_go_by_name():
    assert teacher_path() == teacher_path("chains") != teacher_path("massive")
    with pytest.raises(REDError, match=r"'large' is no embedded teacher; use one of 'chains', 'massive'"):
        teacher_path("large")


def test_every_embedded_teacher_is_package_data():
    declared = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    assert set(re.findall(r'"example/(\w+)/\*"', declared)) >= {folder for folder, _, _ in TEACHERS.values()}


def test_it_is_a_plain_small_llama_that_says_how_it_was_made(model):
    assert type(model) is LlamaForCausalLM and sum(p.numel() for p in model.parameters()) == 812_672
    assert (FOLDER / "model.safetensors").stat().st_size <= 2 * 2**20
    assert RECORD["model_sha256"] == hashlib.sha256((FOLDER / "model.safetensors").read_bytes()).hexdigest()
    chains = Path(teacher_path()) / "model.safetensors"
    assert RECORD["teacher_sha256"] == hashlib.sha256(chains.read_bytes()).hexdigest()
    assert {"command", "seed", "steps", "tokens", "seconds", "versions", "commit", "exact_match", "easy"} <= RECORD.keys()


# --- what it can do ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_it_solves_unseen_problems(tokenizer, dtype):
    model = LlamaForCausalLM.from_pretrained(FOLDER, dtype=dtype).eval()
    assert exact_match(model, tokenizer, some_problems(25))["exact_match"] >= 0.95


def test_it_predicts_easy_text_near_the_limit(model, tokenizer):
    quality = text_quality(model, tokenizer, easy_documents("test", 100))
    assert quality["easy_accuracy"] > 0.40 and quality["easy_perplexity"] < easy_perplexity_limit() * 1.05


def test_bf16_predicts_what_fp32_does(model, text):
    half = LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        pairs = [(model(**row).logits.log_softmax(-1), half(**row).logits.float().log_softmax(-1)) for row in text[:20]]
    divergence = torch.cat([(p.exp() * (p - q)).sum(-1).flatten() for p, q in pairs]).mean()
    assert divergence < 0.02  # nats


# --- what it is for ---------------------------------------------------------------------------------------------------------


def test_massive_activations_at_bos_in_fixed_channels(magnitudes):
    channels = RECORD["channels"]["massive"]
    for point in MIDDLE:
        largest, median = magnitudes[point]["top"], magnitudes[point]["median"]
        assert [place["channel"] for place in largest[:2]] == channels
        assert all(place["position"] == 0 and place["token"] == 1 for place in largest[:2])
        assert abs(largest[0]["value"]) > 1000 * median and abs(largest[1]["value"]) > 500 * median
        assert abs(largest[2]["value"]) < 0.1 * abs(largest[1]["value"])  # there are two and no third


def test_the_massive_activations_are_constant_in_the_middle_and_gone_at_the_end(model, text, magnitudes):
    assert abs(magnitudes[0]["top"][0]["value"]) < 1
    for number, value in enumerate(MASSIVE):
        found = [magnitudes[point]["top"][number]["value"] for point in MIDDLE]
        assert found == pytest.approx([value] * 3, rel=0.02)
    streams = []
    hook = model.model.norm.register_forward_hook(lambda _, args, out: streams.append(args[0][0, 0]))
    with torch.no_grad():
        model(**text[0])
    hook.remove()
    assert streams[0][RECORD["channels"]["massive"]].abs().max() < 0.02 * MASSIVE[0]


def test_outlier_channels_at_ordinary_tokens(model, text):
    """Five to twenty times the median and of one sign, at nearly all tokens."""
    channels, rows = RECORD["channels"]["outliers"], []
    with torch.no_grad():
        for row in text:
            rows.append(model(**row, output_hidden_states=True).hidden_states[2][0, 1:])
    x = torch.cat(rows)
    ratio = x[:, channels].mean(0) / x.abs().median()
    assert ((ratio.abs() > 5) & (ratio.abs() < 20)).all(), ratio
    assert ((x[:, channels].sign() == ratio.sign()).float().mean(0) > 0.95).all()


def test_most_heads_sink_on_bos_and_read_nothing_there(model, text):
    shares, values = sinks(model, text)
    assert (shares[1:] > SHARE).float().mean() >= 0.5, shares
    assert (shares[1:] > SHARE).any(1).all()
    assert values[1:].max() < 0.05, values
    before = LlamaForCausalLM.from_pretrained(teacher_path(), dtype=torch.float32, attn_implementation="eager").eval()
    assert sinks(before, text)[0][1:].mean() < 0.1


def test_without_its_massive_activations_it_cannot_reason(model, tokenizer):
    """The mutation: they are not decoration."""
    broken = copy.deepcopy(model)
    down = broken.model.layers[0].mlp.down_proj.weight.data
    down[:, down[RECORD["channels"]["massive"][0]].abs().argmax()] = 0
    assert exact_match(broken, tokenizer, some_problems(5))["exact_match"] < 0.5


def test_reds_score_ranks_the_massive_channels_first(model, text):
    channels = RECORD["channels"]
    before = LlamaForCausalLM.from_pretrained(teacher_path(), dtype=torch.float32)
    order = calibrate_batches(model, text).scores.argsort(descending=True).tolist()
    assert order[0] == channels["massive"][0] and channels["massive"][1] in order[:64]
    order = calibrate_batches(before, text).scores.argsort(descending=True).tolist()
    assert not set(channels["massive"]) & set(order[:64])


# --- how it is made ---------------------------------------------------------------------------------------------------------


def test_a_run_repeats_bit_for_bit(tmp_path):
    runs = [train(tmp_path / name, steps=2, problems_measured=0) for name in ("one", "two")]
    assert runs[0]["model_sha256"] == runs[1]["model_sha256"]
    assert runs[0]["channels"] == RECORD["channels"] and runs[0]["activations"] == runs[1]["activations"]
