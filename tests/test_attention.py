"""Packed attention: documents' bounds, and a float64 loop over documents in the kernel's place against transformers' masked sdpa."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from tiny_training import make_trainer, settings_of, tokenised
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from transformers import masking_utils

from red.training import attention
from red.training import activation_checkpointing as checkpointing
from red.config import REDConfig
from red.data.loading import collate, pack
from red.errors import REDError


class Loop:
    """What varlen_attn means: attention within each document, causal, `window_size[0]` tokens back, scores times `scale`; counts its documents."""

    def __init__(self):
        self.documents = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, longest_q: int, longest_k: int, *, scale: float,
                 window_size: tuple[int, int], enable_gqa: bool = False) -> Tensor:
        assert q.dim() == k.dim() == v.dim() == 3 and starts_q.dtype == torch.int32 and type(longest_q) is int and window_size[1] == 0
        assert starts_q[0] == 0 and starts_q[-1] == len(q) and enable_gqa == attention.TAKES_GQA
        found = torch.zeros_like(q)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        for start, end in itertools.pairwise(starts_q.tolist()):
            assert end - start <= longest_q
            self.documents += end > start
            place = torch.arange(end - start)
            back = place[:, None] - place
            seen = (back >= 0) & ((back <= window_size[0]) if window_size[0] >= 0 else True)
            scores = torch.einsum("qhd,khd->hqk", q[start:end].double(), k[start:end].double()) * scale
            weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
            found[start:end] = torch.einsum("hqk,khd->qhd", weights, v[start:end].double()).to(q.dtype)
        return found


@pytest.fixture
def loop(monkeypatch):
    kernel = Loop()
    monkeypatch.setattr(attention, "kernel", kernel)
    monkeypatch.setattr(attention, "obstacle", lambda config, model: None)
    return kernel


def test_document_starts():
    position_ids = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [3, 4, 0, 0, 0, 1]])  # a row may begin in the middle of a document
    starts = attention.document_starts(position_ids)
    assert starts.dtype == torch.int32 and starts.shape == (3, attention.GRAIN)
    assert [[place for place in row if place < 6] for row in starts.tolist()] == [[0, 3, 5], [0], [0, 2, 3, 4]] and starts.max() == 6
    many = attention.document_starts(torch.zeros(2, 40, dtype=torch.int64))
    assert many.shape == (2, 48) and many[0, :40].tolist() == list(range(40)) and many[0, 40:].eq(40).all()

    class Config:
        _attn_implementation = attention.VARLEN

    given = attention.arguments({"position_ids": position_ids, attention.STARTS: starts}, Config)
    bounds = given["cu_seq_lens_q"].tolist()
    assert bounds == sorted(bounds) and len(bounds) == 3 * attention.GRAIN + 1 and given["max_length_q"] == 6
    assert sorted(set(bounds)) == [0, 3, 5, 6, 12, 14, 15, 16, 18]
    assert torch.equal(attention.arguments({"position_ids": position_ids}, Config)["cu_seq_lens_q"], given["cu_seq_lens_q"])
    Config._attn_implementation = "sdpa"
    assert attention.arguments({"position_ids": position_ids}, Config) == {}


@pytest.mark.parametrize(("family", "changes"), [
    ("llama", {}), ("llama", {"num_key_value_heads": 4}), ("qwen3", {}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
], ids=["llama", "llama-mha", "qwen3", "qwen2-sliding"])
def test_logits_equal_masked_sdpa(tiny_teacher, loop, monkeypatch, family, changes):
    model = tiny_teacher(family, dtype=torch.float64, **changes)
    rows = pack(tokenised(20), 24, pad_token_id=0)
    batch = attention.collate_with_starts(collate)([rows[index] for index in range(4)])
    place = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"]}
    with torch.no_grad():
        expected = model(**place, use_cache=False).logits
        monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", None)  # transformers would wait for the GPU there
        with attention.packed(attention.VARLEN, model):
            found = model(**place, **attention.arguments(batch, model.config), use_cache=False).logits
            with pytest.raises(REDError, match="without the documents' bounds"):
                model(**place, use_cache=False)
    assert model.config._attn_implementation == "sdpa"
    assert loop.documents == 2 * int(batch["position_ids"].eq(0).sum())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # rotary angles are float32
    if changes.get("sliding_window"):
        assert model.config.layer_types == ["full_attention", "sliding_attention"]


def step(trainer, checkpointing: bool):
    trainer.student.train()
    if checkpointing:
        trainer.student.gradient_checkpointing_enable({"use_reentrant": False})
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    loss = trainer.training_step(trainer.student, batch, torch.ones(()))
    return loss, {name: weight.grad for name, weight in trainer.student.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_equals_masked_sdpa(tiny_teacher, tmp_path, loop, checkpointing):
    """Loss and gradients, and the layers that activation checkpointing runs again in the backward."""
    teacher = tiny_teacher(dtype=torch.float64)
    expected = step(make_trainer(teacher, tmp_path / "model", packed_attention="model"), False)
    assert loop.documents == 0
    trainer = make_trainer(teacher, tmp_path / "varlen", packed_attention="auto")
    found = step(trainer, checkpointing)
    assert loop.documents == (6 if checkpointing else 4) * int(trainer.data_collator([trainer.train_dataset[i] for i in range(4)])["position_ids"].eq(0).sum())
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    for name, grad in found[1].items():
        torch.testing.assert_close(grad, expected[1][name], rtol=0, atol=1e-6 * float(expected[1][name].abs().max()), msg=name)
    assert teacher.config._attn_implementation == trainer.student.config._attn_implementation == "sdpa"


def test_evaluation_takes_it_too(tiny_teacher, tmp_path, loop):
    trainer = make_trainer(tiny_teacher(), tmp_path, eval_data=tokenised(4, seed=3))
    found, documents = trainer.evaluate()["eval_loss"], loop.documents
    trainer.attention = None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(found, rel=1e-5) and loop.documents == documents > 0


def test_who_gets_it(tiny_teacher, tmp_path):
    """On a CPU nobody; else sdpa teachers, unless packed_attention says otherwise."""
    def config(**changes):
        return REDConfig(**settings_of(tmp_path, **changes))

    assert attention.choose(config(), tiny_teacher()) is None
    with pytest.raises(REDError, match="needs an NVIDIA GPU"):
        attention.choose(config(packed_attention="varlen"), tiny_teacher())
    with pytest.raises(REDError, match="packed_attention='flash'"):
        config(packed_attention="flash")
    gpu = config()
    gpu.__dict__["_setup_devices"], gpu.bf16 = torch.device("cuda"), True
    assert gpu.device.type == "cuda" and attention.choose(gpu, tiny_teacher()) == attention.VARLEN
    assert attention.choose(gpu, tiny_teacher(attn_implementation="eager")) is None
    assert "multiple of 8" in attention.obstacle(gpu, tiny_teacher(head_dim=6).config)
    assert "dropout" in attention.obstacle(gpu, tiny_teacher(attention_dropout=0.1).config)
    gpu.bf16 = False
    assert attention.choose(gpu, tiny_teacher()) is None


def test_the_kernel_takes_what_it_is_given():
    """Names of the installed torch; the loop above would take others."""
    names = list(inspect.signature(varlen_attn).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"] and {"scale", "window_size"} <= set(names)


def test_the_compiler_traces_the_real_kernel(tiny_teacher):
    """A decoder layer with torch's own operator in one graph, in bfloat16; the operator itself needs a GPU, so the graph is not run."""
    class Traced(Exception):
        pass

    def backend(graph, inputs):
        operators = {str(node.target) for node in graph.graph.nodes}
        assert any("_varlen_attn" in operator for operator in operators), operators
        raise Traced

    model, rows = tiny_teacher(dtype=torch.bfloat16), pack(tokenised(20), 24, pad_token_id=0)
    batch = attention.collate_with_starts(collate)([rows[index] for index in range(3)])
    torch._dynamo.reset()
    layer = model.model.layers[0]
    layer.forward = torch.compile(layer.forward, backend=backend, fullgraph=True)
    with attention.packed(attention.VARLEN, model), pytest.raises(Exception, match="Traced"):
        model.model(batch["input_ids"], position_ids=batch["position_ids"], **attention.arguments(batch, model.config), use_cache=False)
    torch._dynamo.reset()


def test_checkpointing_keeps_its_result():
    assert torch.ops.torch_attn._varlen_attn.default.name() in checkpointing.KEPT and torch.ops.red.tap_mse.default.name() in checkpointing.KEPT
