"""LoRi in two processes with gloo (DistributedDataParallel) trains what one process trains with the same rows a step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_lori import number_tokenizer, settings_of, table_rows
from tiny_training import run_two_processes

from red.errors import REDError
from red.lori import LoRiConfig

PRESETS = ("lori", "codi_joint")  # the latter reads its rows twice a step, once without the projection
KEYS = ("loss", "grad_norm", "task", "rationale", "anchor", "cot")


def train(folder: Path, preset: str, rows: int):
    """Three steps over 8 rows each in 2 micro-batches, `rows` a process and micro-batch."""
    from tiny_models import build_tiny_model

    import red

    anchor = {"anchor_distance": "mse"} if preset == "lori" else {"anchor_weight": 0.0, "anchor_teacher": "offline"}  # codi's scale is of the micro-batch
    return red.distill(build_tiny_model("qwen2", tied=True), table_rows(24), tokenizer=number_tokenizer(), method="lori", preset=preset, **anchor,
                       **settings_of(folder / preset, max_steps=3, per_device_train_batch_size=rows, gradient_accumulation_steps=2, adam_epsilon=1e-3, max_grad_norm=0.5))


def main(folder: str) -> None:
    """What each worker runs."""
    from red.lori import trajectories

    passes, plain = [], trajectories.stream
    trajectories.stream = lambda *args, **kwargs: (passes.append(1), plain(*args, **kwargs))[1]
    for preset in PRESETS:
        result = train(Path(folder), preset, rows=2)
        trainer = result.trainer
        assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel" and trainer.args.world_size == 2 and (result.path / "lori.json").is_file()
        save_file(weights(result), Path(folder) / f"{preset}-{trainer.args.process_index}.safetensors")
        if trainer.args.process_index == 0:
            (Path(folder) / f"{preset}.json").write_text(json.dumps(logged(result)))
    (Path(folder) / f"passes-{trainer.args.process_index}").write_text(str(len(passes)))


def weights(result) -> dict:
    return {name: value.detach().clone() for name, value in result.model.named_parameters()}


def logged(result) -> list[list[float]]:
    return [[entry[key] for key in KEYS] for entry in result.trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    run_two_processes(__file__, folder)
    return folder


@pytest.mark.parametrize("preset", PRESETS)
def test_two_processes_train_what_one_does(parallel, tmp_path, preset):
    alone = train(tmp_path, preset, rows=4)
    expected, (first, second) = weights(alone), (load_file(parallel / f"{preset}-{rank}.safetensors") for rank in range(2))
    for name, value in expected.items():
        assert (first[name] == second[name]).all(), f"the ranks differ in {name}"
        assert (first[name] - value).abs().max() <= 1e-5 * max(1.0, float(value.abs().max())), name
    for mine, theirs in zip(json.loads((parallel / f"{preset}.json").read_text()), logged(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_one_process_reads_the_teacher(parallel):
    """Twice, for the one preset that needs it; the other process reads what it wrote."""
    assert [(parallel / f"passes-{rank}").read_text() for rank in range(2)] == ["2", "0"]


def test_a_process_that_finds_no_trajectories_says_so(tmp_path, monkeypatch):
    """As on a second node with a disk of its own: it must not compute them, for the processes of a node would write over each other."""
    monkeypatch.setattr(LoRiConfig, "process_index", property(lambda self: 1))
    with pytest.raises(REDError, match="Process 1 does not find the teacher's trajectories in .*trajectories_dir a folder that all processes share"):
        train(tmp_path, "lori", rows=2)
    assert not (tmp_path / "lori" / "trajectories").exists()


if __name__ == "__main__":
    main(sys.argv[1])
