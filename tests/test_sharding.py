"""Two processes with gloo, sharded by FSDP2, train what one process trains with the same rows a step; checkpoints go from two to one and back."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny_model, build_tiny_tokenizer
from tiny_training import make_trainer, masters, settings_of, tokenised
from transformers import AutoModelForCausalLM

TESTS = Path(__file__).parent
KEYS = ("loss", "grad_norm", "ce", "kl", "tap_mse")
# odd widths: the ranks' rows differ in number
LLAMA = dict(family="llama", attention_bias=True, mlp_bias=True, intermediate_size=47, vocab_size=65)
QWEN = dict(family="qwen2", tied=True)
CASES = {
    "selection": (LLAMA, dict(start="activation", max_grad_norm=0.5)),
    "dense": (QWEN, dict(start="random", tap_target="projected", max_grad_norm=0.0)),
    "faithful": (LLAMA, dict(start="random", lrc_faithful=True)),
    "checkpointed": (dict(family="qwen3"), dict(start="pca", gradient_checkpointing=True, fsdp_config={"reshard_after_forward": False})),
}
STEPS = dict(max_steps=4, save_strategy="steps", save_steps=2, gradient_accumulation_steps=2, adam_epsilon=1e-3, lr_scheduler_type="linear")


def make(folder: Path, case: str, rows: int, **changes):
    model, settings = CASES[case]
    settings = {**STEPS, **settings, **changes}
    if "fsdp" not in settings:
        settings.pop("fsdp_config", None)
    return make_trainer(build_tiny_model(**model), folder, tokenised(48), eval_data=tokenised(6, seed=3), per_device_train_batch_size=rows, **settings)


def found(trainer) -> dict:
    lines = [[entry[key] for key in KEYS] for entry in trainer.state.log_history if "loss" in entry]
    return {"lines": lines, "eval_loss": trainer.evaluate()["eval_loss"]}


# ---- what each of the two processes runs ----


def main(folder: str) -> None:
    folder, rank = Path(folder), int(os.environ["RANK"])
    for case in CASES:
        trainer = make(folder / case, case, 2, fsdp="full_shard")
        assert_sharded(trainer)
        trainer.train()
        assert_sharded(trainer)
        report(trainer, folder / f"{case}.json", rank)
    resumed = make(folder / "from-one", "dense", 2, fsdp="full_shard")
    resumed.train(resume_from_checkpoint=True)
    report(resumed, folder / "resumed.json", rank)
    torch.distributed.destroy_process_group()


def assert_sharded(trainer) -> None:
    """Teacher, student, masters and moments are DTensors, each rank with its rows only."""
    from torch.distributed.tensor import DTensor, Shard

    tensors = {**{f"teacher.{name}": value for name, value in trainer.teacher.named_parameters()},
               **{f"student.{name}": value for name, value in trainer.student.named_parameters()},
               **{f"master.{factor.name}": factor.master for factor in trainer.projections}}
    if trainer.optimizer is not None:
        moments = trainer.optimizer.state_dict()["state"]
        assert len(moments) == len(trainer.projections.factors)
        tensors |= {f"moment.{index}.{key}": value for index, entry in moments.items() for key, value in entry.items() if key != "step"}
    for name, tensor in tensors.items():
        assert isinstance(tensor, DTensor) and tensor.placements == (Shard(0),), name
        assert abs(2 * tensor.to_local().numel() - tensor.numel()) <= tensor.numel() // len(tensor), f"{name}: not half"
        assert tensor.to_local().untyped_storage().nbytes() <= 4 * (tensor.numel() // 2 + tensor.numel() // len(tensor)), f"{name}: the whole is still there"
    assert type(trainer.model_wrapped).__name__.startswith("FSDP") and trainer.args.world_size == 2


def report(trainer, path: Path, rank: int) -> None:
    facts = found(trainer)
    state = {name: value.full_tensor() for name, value in masters(trainer).items()}
    weights = {name: value.detach().full_tensor().contiguous() for name, value in trainer.student.named_parameters()}
    if rank == 0:
        save_file(state, path.with_suffix(".masters"))
        save_file(weights, path.with_suffix(".weights"))
        path.write_text(json.dumps(facts))


# ---- and what is asked of it ----


def launch(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    paths = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command], env=environment,
                          capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same trainings in this process: case -> (trainer, what was found, masters)."""
    folder = tmp_path_factory.mktemp("one")
    results = {}
    for case in CASES:
        trainer = make(folder / case, case, 4)
        trainer.train()
        results[case] = (trainer, found(trainer), masters(trainer))
    return results


@pytest.fixture(scope="module")
def two(tmp_path_factory, one):
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(Path(one["dense"][0].args.output_dir) / "checkpoint-2", folder / "from-one" / "checkpoint-2")
    done = launch(folder, __file__, str(folder))
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def assert_equal(path: Path, expected: dict, state: dict, steps=slice(None)) -> None:
    facts = json.loads(path.read_text())
    assert len(facts["lines"]) == len(expected["lines"]) == 4
    for line, other in zip(facts["lines"][steps], expected["lines"][steps], strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert facts["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    for name, value in load_file(path.with_suffix(".masters")).items():
        assert float((value - state[name]).abs().max()) <= 1e-5, name


@pytest.mark.parametrize("case", sorted(CASES))
def test_two_sharded_processes_equal_one(two, one, case):
    trainer, expected, state = one[case]
    assert_equal(two / f"{case}.json", expected, state)
    for name, value in load_file(two / f"{case}.weights").items():
        assert float((value - dict(trainer.student.named_parameters())[name]).abs().max()) <= 1e-5, name


if __name__ == "__main__":
    main(sys.argv[1])
