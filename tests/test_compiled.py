"""Compiled decoder layers: the same losses and gradients, one graph for all layers of a model, and nothing left behind."""

from __future__ import annotations

import pytest
import torch
from tiny_training import make_trainer, masters, settings_of
from torch._dynamo.backends.debugging import aot_eager

from red.training import compiled
from red.config import REDConfig
from red.errors import REDError

STARTS = {"gather": dict(start="activation"), "faithful": dict(start="random", lrc_faithful=True)}


class Counting:
    """aot_eager (the compiler's front end and its joint backward graph, no code generation), counting graphs."""

    def __init__(self):
        self.graphs, self.backend = 0, aot_eager

    def __call__(self, graph, inputs):
        self.graphs += 1
        return self.backend(graph, inputs)


@pytest.fixture
def counting(monkeypatch):
    torch._dynamo.reset()
    backend = Counting()
    monkeypatch.setattr(compiled, "BACKEND", backend)
    yield backend
    torch._dynamo.reset()


def trained(teacher, folder, **settings):
    trainer = make_trainer(teacher, folder, max_steps=2, gradient_accumulation_steps=2, adam_epsilon=1e-3, **settings)
    trainer.train()
    return trainer, [entry[key] for entry in trainer.state.log_history for key in ("loss", "kl", "tap_mse", "grad_norm") if key in entry]


@pytest.mark.parametrize(("family", "case"), [("llama", "gather"), ("qwen3", "faithful")])
def test_the_same_training(tiny_teacher, tmp_path, counting, family, case):
    teacher = tiny_teacher(family, num_hidden_layers=3)
    plain, expected = trained(teacher, tmp_path / "plain", **STARTS[case])
    assert counting.graphs == 0
    found, logs = trained(teacher, tmp_path / "compiled", compile_layers=True, **STARTS[case])
    assert counting.graphs == 2, "one for the teacher's layers, one for the student's"
    assert logs == pytest.approx(expected, rel=1e-5)
    for name, value in masters(found).items():
        torch.testing.assert_close(value, masters(plain)[name], rtol=0, atol=1e-6, msg=name)
    for model in (teacher, found.student):
        assert not any(module._forward_hooks for module in model.modules())
        assert not any("forward" in layer.__dict__ for layer in model.model.layers)


def test_another_batch_shape_compiles_once_more(tiny_teacher, tmp_path, counting):
    """The last batch of an epoch is smaller; every shape after it shares a graph."""
    counting.backend = lambda graph, inputs: graph.forward
    trainer = make_trainer(tiny_teacher(), tmp_path, compile_layers=True)
    for rows in (4, 3, 2, 5):
        batch = trainer.data_collator([trainer.train_dataset[index] for index in range(rows)])
        loss = trainer.training_step(trainer.model, batch, torch.ones(()))
        assert loss > 0
    assert counting.graphs == 4


def test_refused(tmp_path):
    for settings, match in ((dict(compile_layers=True, checkpointing="cheap"), "drop checkpointing='cheap'"),
                            (dict(compile_layers=True, gradient_checkpointing=True), "drop checkpointing='full'"),
                            (dict(torch_compile=True), "use compile_layers=True")):
        with pytest.raises(REDError, match=match):
            REDConfig(**settings_of(tmp_path, **settings))
