"""Two processes with gloo, sharded by FSDP2, train what one process trains with the same rows a step; checkpoints go from two to one and back."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build_tiny_model, build_tiny_tokenizer
from tiny_training import make_trainer, masters, run_two_processes, settings_of, tokenised
from transformers import AutoModelForCausalLM, TrainerCallback

from red.errors import REDError

TESTS = Path(__file__).parent
KEYS = ("loss", "grad_norm", "ce", "kl", "tap_mse")
LLAMA = dict(family="llama", attention_bias=True, mlp_bias=True, intermediate_size=47, vocab_size=65)  # odd widths: one rank has more rows
QWEN = dict(family="qwen2", tied=True)
EVERY_BATCH = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
BEST = dict(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True)
CASES = {  # (the teacher, settings of both, settings of the two sharded processes)
    "selection": (LLAMA, dict(start="activation", erank_weight=0.1, max_grad_norm=0.5, **BEST), {}),
    "dense": (QWEN, dict(start="random", tap_target="projected", max_grad_norm=0.0), dict(accelerator_config=EVERY_BATCH)),
    "faithful": (LLAMA, dict(start="random", lrc_faithful=True), {}),
    "checkpointed": (dict(family="qwen3"), dict(start="pca", gradient_checkpointing=True), dict(fsdp_config={"reshard_after_forward": False})),
}
STEPS = dict(max_steps=4, save_strategy="steps", save_steps=2, adam_epsilon=1e-3, lr_scheduler_type="linear")


def make(folder: Path, case: str, *, sharded: bool, callbacks=None):
    """Four steps over the same 4 micro-batches of 2 rows: one process takes all, each of two takes 2."""
    model, settings, of_sharded = CASES[case]
    settings = copy.deepcopy({**STEPS, **settings, **({"fsdp": "full_shard", **of_sharded} if sharded else {})})  # Trainer writes into them
    return make_trainer(build_tiny_model(**model), folder, tokenised(48), eval_data=tokenised(6, seed=3), callbacks=callbacks,
                        gradient_accumulation_steps=2 if sharded else 4, **settings)


def found(trainer) -> dict:
    lines = [[entry[key] for key in KEYS] for entry in trainer.state.log_history if "loss" in entry]
    return {"lines": lines, "eval_loss": trainer.evaluate()["eval_loss"]}


# ---- what each of the two processes runs ----


def main(folder: str) -> None:
    folder, rank = Path(folder), int(os.environ["RANK"])
    distil_as_launched(folder)
    for case, (_, _, settings) in CASES.items():
        reduced = Reduced()
        trainer = reduced.trainer = make(folder / case, case, sharded=True, callbacks=[reduced])
        trainer.train()
        assert reduced.seen == ["accelerator_config" in settings] * 4, "gradients are reduced once a step, or at every micro-batch if asked"
        report(trainer, folder / f"{case}.json", rank)
    resumed = make(folder / "from-one", "dense", sharded=True)
    resumed.train(resume_from_checkpoint=True)
    report(resumed, folder / "resumed.json", rank)
    with pytest.raises(REDError, match="sharded by an earlier trainer.*Load it anew"):
        make_trainer(resumed.teacher, folder / "again")
    torch.distributed.destroy_process_group()


def distil_as_launched(folder: Path) -> None:
    """The command that `accelerate launch --config_file configs/fsdp2.yaml -m red.cli` runs, with the environment that it makes."""
    from red.cli import main as red

    said = launch_environment("fsdp2")
    os.environ.update(said)
    settings = {**settings_of(folder / "run", max_steps=2, save_strategy="steps", save_steps=2), "teacher_model_name_or_path": folder / "teacher",
                "train_file": folder / "corpus.txt"}
    assert red(["distill", *(f"--{name}={value}" for name, value in settings.items())]) == 0
    assert os.environ["ACCELERATE_USE_FSDP"] == "true", "what accelerate said is left as it was"
    for name in said:
        del os.environ[name]


def launch_environment(config: str) -> dict[str, str]:
    """What accelerate launch tells its processes about a config file."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    arguments = launch_command_parser().parse_args(["--config_file", str(TESTS.parent / "configs" / f"{config}.yaml"), "-m", "red.cli", "distill"])
    arguments, _, _ = _validate_launch_command(arguments)
    made = prepare_multi_gpu_env(arguments)
    assert str(arguments.nproc_per_node) == "8"
    return {name: value for name, value in made.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


class Reduced(TrainerCallback):
    """Between two micro-batches: whether gradients of the first were reduced to the ranks' rows already. Checks the shards while it is there."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, **kwargs):
        assert_sharded(self.trainer)

    def on_substep_end(self, args, state, control, **kwargs):
        self.seen.append(self.trainer.student.get_input_embeddings().weight.grad is not None)

    def on_step_end(self, args, state, control, **kwargs):
        assert_sharded(self.trainer)


def assert_sharded(trainer) -> None:
    """Teacher, student, masters and moments are DTensors, each rank with its rows and no more."""
    from torch.distributed.tensor import DTensor, Shard

    assert trainer.args.world_size == 2 and type(trainer.model_wrapped).__name__.startswith("FSDP")
    tensors = {**{f"teacher.{name}": value for name, value in trainer.teacher.named_parameters()},
               **{f"student.{name}": value for name, value in trainer.student.named_parameters()},
               **{f"master.{factor.name}": factor.master for factor in trainer.projections}}
    for index, moments in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"moment.{index}.{key}": value for key, value in moments.items() if key != "step"}
    assert trainer.state.global_step == 0 or sum(name.startswith("moment") for name in tensors) == 2 * len(trainer.projections.factors)
    for name, tensor in tensors.items():
        assert isinstance(tensor, DTensor) and tensor.placements == (Shard(0),), name
        half = -(-len(tensor) // 2) * tensor[0].numel()
        assert tensor.to_local().numel() in (half, tensor.numel() - half), name
        assert tensor.to_local().untyped_storage().nbytes() <= half * tensor.element_size(), f"{name}: the whole is still in memory"


def report(trainer, path: Path, rank: int) -> None:
    facts = found(trainer)
    state = {name: value.full_tensor() for name, value in masters(trainer).items()}
    weights = {name: value.detach().full_tensor().contiguous() for name, value in trainer.student.named_parameters()}
    if rank == 0:
        save_file(state, path.with_suffix(".masters"))
        save_file(weights, path.with_suffix(".weights"))
        path.write_text(json.dumps(facts))


# ---- and what is asked of it ----


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same trainings in this process: case -> (trainer, what was found)."""
    folder = tmp_path_factory.mktemp("one")
    results = {}
    for case in CASES:
        trainer = make(folder / case, case, sharded=False)
        trainer.train()
        results[case] = (trainer, found(trainer))
    return results


@pytest.fixture(scope="module")
def two(tmp_path_factory, one):
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(Path(one["dense"][0].args.output_dir) / "checkpoint-2", folder / "from-one" / "checkpoint-2")
    build_tiny_model(tied=True).save_pretrained(folder / "teacher")
    build_tiny_tokenizer().save_pretrained(folder / "teacher")
    (folder / "corpus.txt").write_text("\n".join(f"w{4 + line % 60} w{4 + line * 7 % 60} w{4 + line * 11 % 60} w5" for line in range(80)))
    run_two_processes(__file__, folder)
    return folder


def assert_equal(found: dict, expected: dict) -> None:
    assert len(found["lines"]) == len(expected["lines"]) == 4
    for line, other in zip(found["lines"], expected["lines"], strict=True):
        assert line == pytest.approx(other, rel=1e-5, abs=1e-6)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)


def assert_near(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert state.keys() == expected.keys() and len(state) > 10
    for name, value in state.items():
        assert value.dtype == expected[name].dtype and float((value - expected[name]).abs().max()) <= 1e-5, name


@pytest.mark.parametrize("case", sorted(CASES))
def test_two_sharded_processes_equal_one(two, one, case):
    """Losses with their parts, gradient norms, evaluation, masters, and the student's weights."""
    trainer, expected = one[case]
    assert_equal(json.loads((two / f"{case}.json").read_text()), expected)
    assert_near(load_file(two / f"{case}.masters"), masters(trainer))
    assert_near(load_file(two / f"{case}.weights"), {name: value.detach() for name, value in trainer.student.named_parameters()})


@pytest.mark.parametrize("case", sorted(CASES))
def test_checkpoints_are_those_of_one_process(two, one, case):
    """The same files with the same tensors: projections, student and moments."""
    folder, other = two / case / "checkpoint-4", Path(one[case][0].args.output_dir) / "checkpoint-4"
    ranks = {"rng_state.pth", "rng_state_0.pth", "rng_state_1.pth"}
    assert {path.name for path in folder.iterdir()} - ranks == {path.name for path in other.iterdir()} - ranks
    for name in ("projections.safetensors", "model.safetensors"):
        assert_near(load_file(folder / name), load_file(other / name))
    states = [torch.load(path / "optimizer.pt", weights_only=True) for path in (folder, other)]
    assert states[0]["param_groups"] == states[1]["param_groups"] and states[0]["state"].keys() == states[1]["state"].keys()
    for index, moments in states[1]["state"].items():
        of_two = states[0]["state"][index]
        for key, value in moments.items():
            assert type(of_two[key]) is torch.Tensor and torch.allclose(of_two[key], value, rtol=1e-4, atol=1e-6), (index, key)
    assert json.loads((folder / "config.json").read_text()) == json.loads((other / "config.json").read_text())


def test_from_two_to_one(two, one):
    """One process goes on from the checkpoint that two sharded ones wrote at step 2."""
    shutil.copytree(two / "dense" / "checkpoint-2", two / "to-one" / "checkpoint-2")
    trainer = make(two / "to-one", "dense", sharded=False)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4 and len(trainer.seen) == 2 * 4, "two of four steps"
    assert_equal(found(trainer), one["dense"][1])
    assert_near(masters(trainer), masters(one["dense"][0]))


def test_from_one_to_two(two, one):
    assert_equal(json.loads((two / "resumed.json").read_text()), one["dense"][1])
    assert_near(load_file(two / "resumed.masters"), masters(one["dense"][0]))


def test_the_launched_command_exports_the_whole_student(two):
    """In bf16, as configs/fsdp2.yaml says: fp32 masters, one exported model, that of the last checkpoint."""
    student, weights = AutoModelForCausalLM.from_pretrained(two / "run" / "student"), load_file(two / "run" / "checkpoint-2" / "model.safetensors")
    assert student.config.hidden_size == 16 and student.config.architectures == ["LlamaForCausalLM"]
    assert weights.keys() == {name for name, _ in student.named_parameters()}, "a tied head is written once"
    for name, value in student.named_parameters():
        assert value.equal(weights[name]), name
    lines = [entry for entry in json.loads((two / "run" / "checkpoint-2" / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
    assert len(lines) == 2 and all(math.isfinite(entry[key]) for entry in lines for key in KEYS)
    assert {value.dtype for value in load_file(two / "run" / "checkpoint-2" / "projections.safetensors").values()} <= {torch.float32, torch.int64}


if __name__ == "__main__":
    main(sys.argv[1])
