"""red.evaluate and red.erank against crafted models, float64 truth, and their own other way to the same number."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from red.erank import erank_table, hidden_erank
from red.errors import REDError
from red.evaluate import exact_match, forced_exact_match, generate_answers, text_quality
from red_kernels import erank


def problem(question: str, answer: str, steps: int = 2):
    return SimpleNamespace(question=question, answer=answer, steps=steps)


@pytest.fixture()
def counter(tiny_model):
    """A model that counts: after w10 it says w11 …, after w19 `<eos>`; it reads only the last token."""
    model = tiny_model(hidden_size=64, num_attention_heads=4, head_dim=16, num_hidden_layers=1)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.zero_()  # attention and FFN add nothing: the stream is the embedding
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(64))
        head = torch.zeros(64, 64)
        for token in range(4, 60):
            head[2 if token % 10 == 9 else token + 1, token] = 1.0
        head[2, 2] = 1.0
        model.lm_head.weight.copy_(head)
    return model


RIGHT = [problem("w5 w10", "w11 w12 w13 w14 w15 w16 w17 w18 w19"), problem("w17", "w18 w19"), problem("w4 w4 w28", "w29", 4)]
WRONG = [problem("w16", "w17 w18"),  # the model goes on where it should stop
         problem("w18", "w19 w20", 4),  # and stops where it should go on
         problem("w20", "w21 w22 w33 w24 w25 w26 w27 w28 w29", 4)]


@pytest.mark.parametrize("measure", [exact_match, forced_exact_match])
@pytest.mark.parametrize("batch_size", [1, 2, 256])
def test_exact_match_counts_whole_answers(counter, tiny_tokenizer, measure, batch_size):
    found = measure(counter, tiny_tokenizer, RIGHT + WRONG, batch_size=batch_size)
    assert found["exact_match_by_steps"] == {"2": 2 / 3, "4": 1 / 3}
    assert found["exact_match"] == pytest.approx(0.5)
    assert measure(counter, tiny_tokenizer, RIGHT)["exact_match"] == 1.0
    assert measure(counter, tiny_tokenizer, WRONG)["exact_match"] == 0.0


def test_answers_are_text_up_to_the_end_token(counter, tiny_tokenizer):
    counter.generation_config.temperature, counter.generation_config.do_sample = 0.3, True  # greedy all the same
    assert generate_answers(counter, tiny_tokenizer, RIGHT) == [item.answer for item in RIGHT]


def test_generation_and_forcing_agree_on_random_models(family, tiny_model, tiny_tokenizer):
    """Mixed lengths in one batch: left padding must not change what a prompt is answered."""
    model = tiny_model(family)
    with torch.no_grad():
        model.lm_head.weight[2] *= 2.5  # ends come up
    questions = [" ".join(f"w{(7 * i + j) % 60 + 4}" for j in range(2 + i % 5)) for i in range(40)]
    alone = [generate_answers(model, tiny_tokenizer, [problem(question, "w4 w5 w6 w7")])[0] for question in questions]
    together = generate_answers(model, tiny_tokenizer, [problem(question, "w4 w5 w6 w7") for question in questions])
    assert alone == together
    # ask for what the model says, every other time spoiled by one word more
    asked = [problem(question, text if i % 2 else f"{text} w9", 2 + i % 2) for i, (question, text) in enumerate(zip(questions, alone, strict=True))]
    found = exact_match(model, tiny_tokenizer, asked)
    assert found == forced_exact_match(model, tiny_tokenizer, asked)
    assert found["exact_match_by_steps"]["2"] == 0.0 and found["exact_match_by_steps"]["3"] > 0.0


def test_a_special_token_in_an_answer_is_wrong(counter, tiny_tokenizer):
    with torch.no_grad():
        counter.lm_head.weight[:, 11] = 0.0
        counter.lm_head.weight[3, 11] = 1.0  # after w11 comes <unk> …
        counter.lm_head.weight[2, 3] = 1.0  # … and the end
    asked = [problem("w10", "w11")]
    assert generate_answers(counter, tiny_tokenizer, asked) == ["w11 <unk>"]
    assert exact_match(counter, tiny_tokenizer, asked) == forced_exact_match(counter, tiny_tokenizer, asked)


def test_no_problems_is_an_error(counter, tiny_tokenizer):
    with pytest.raises(REDError, match="at least one problem"):
        exact_match(counter, tiny_tokenizer, [])


TEXTS = ["w4 w9 w33", "w50", "w7 w8 w9 w10 w11 w12 w13 w14", "w60 w61", "w20 w20 w20 w20 w20"]


def test_text_quality_equals_a_dense_float64_computation(family, tiny_model, tiny_tokenizer):
    model = tiny_model(family)
    right, losses = [], []
    dense = tiny_model(family).double()
    for text in TEXTS:
        ids = torch.tensor([tiny_tokenizer(text)["input_ids"]])
        scores = dense(input_ids=ids).logits[0, :-1].log_softmax(-1)
        losses += (-scores.gather(1, ids[0, 1:, None])).flatten().tolist()
        right += (scores.argmax(-1) == ids[0, 1:]).tolist()
    for batch_size in (1, 3, 32):
        found = text_quality(model, tiny_tokenizer, TEXTS, batch_size=batch_size)
        assert found["easy_perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
        assert found["easy_accuracy"] == pytest.approx(sum(right) / len(right))


def test_text_quality_notices_another_model(tiny_model, tiny_tokenizer):
    one, other = (text_quality(tiny_model(seed=seed), tiny_tokenizer, TEXTS) for seed in (0, 1))
    assert abs(one["easy_perplexity"] - other["easy_perplexity"]) > 1e-3


def test_texts_without_a_token_to_predict_are_refused(tiny_model, tiny_tokenizer):
    with pytest.raises(REDError, match="two tokens"):
        text_quality(tiny_model(), tiny_tokenizer, ["w4", "w5"])


def test_measuring_leaves_modes_and_generators_alone(tiny_model, tiny_tokenizer):
    model = tiny_model(attention_dropout=0.5).train()
    model.lm_head.eval()  # one module of another mode than the rest
    state = torch.get_rng_state()
    first = text_quality(model, tiny_tokenizer, TEXTS)
    hidden_erank(model, tiny_tokenizer, TEXTS)
    exact_match(model, tiny_tokenizer, RIGHT)
    assert first == text_quality(model, tiny_tokenizer, TEXTS)  # no dropout
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and model.model.layers[0].training and not model.lm_head.training


def test_hidden_erank_reads_the_stream_before_the_final_norm(family, tiny_model, tiny_tokenizer):
    model = tiny_model(family)
    found = hidden_erank(model, tiny_tokenizer, TEXTS)
    rows = [[] for _ in range(3)]
    for text in TEXTS:
        stream = model.model.embed_tokens(torch.tensor([tiny_tokenizer(text)["input_ids"]]))
        positions = torch.arange(stream.shape[1])[None]
        rows[0].append(stream[0])
        for layer in (1, 2):
            stream = model.model.layers[layer - 1](stream, position_embeddings=model.model.rotary_emb(stream, positions), attention_mask=None)
            stream = stream[0] if isinstance(stream, tuple) else stream
            rows[layer].append(stream[0])
    assert len(found) == model.config.num_hidden_layers + 1
    for value, states in zip(found, rows, strict=True):
        assert value == pytest.approx(float(erank(torch.cat(states).detach())), rel=1e-4)


def test_hidden_erank_counts_only_labelled_and_wanted_tokens(tiny_model):
    model = tiny_model()
    ids = [list(range(4 + i, 16 + i)) for i in range(8)]
    whole = hidden_erank(model, None, ids)
    half = hidden_erank(model, None, [{"input_ids": row, "labels": [-100] * 6 + row[6:]} for row in ids])
    assert whole != half
    # embeddings do not depend on what stands before: the unlabelled half can be left out by hand
    assert half[0] == pytest.approx(hidden_erank(model, None, [row[6:] for row in ids])[0])
    assert hidden_erank(model, None, ids, max_tokens=24) == pytest.approx(hidden_erank(model, None, ids[:2]))


def test_collapsed_states_are_nan_and_said_so(tiny_model, tiny_tokenizer):
    model = tiny_model()
    nn.init.zeros_(model.model.embed_tokens.weight)
    found = hidden_erank(model, tiny_tokenizer, TEXTS)
    assert math.isnan(found[0])
    with torch.no_grad():
        model.model.embed_tokens.weight[4] = math.nan
    assert math.isnan(hidden_erank(model, tiny_tokenizer, TEXTS)[0])
    text = erank_table("a model", [math.nan, 16.0, 8.0], 32, 100)
    assert "collapsed" in text and "50.0%" in text and "25.0%" in text
    with pytest.raises(REDError, match="at least 2"):
        hidden_erank(model, tiny_tokenizer, [])
