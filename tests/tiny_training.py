"""What the tests of the trainer share: tiny ragged data, a trainer on it, and a record of the micro-batches it really saw."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import TrainerCallback

from red.config import REDConfig
from red.training.trainer import REDTrainer

NARROW = 16
VARIANTS = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tied": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tied": True}),
    "qwen3": ("qwen3", {}),
}


def tokenised(count: int = 24, seed: int = 0, vocab: int = 64) -> list[dict]:
    """Tokenised documents of 3 to 14 tokens; every second one has a prompt without labels, so rows differ in their number of labels."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for index in range(count):
        ids = torch.randint(3, vocab, (int(torch.randint(3, 15, (), generator=generator)),), generator=generator).tolist()
        hidden = len(ids) // 2 if index % 2 else 0
        examples.append({"input_ids": ids, "labels": [-100] * hidden + ids[hidden:]})
    return examples


def settings_of(output_dir, **changes) -> dict:
    """REDConfig's fields for a tiny, quiet run on the CPU with a constant learning rate."""
    return {**dict(output_dir=str(output_dir), hidden_size=NARROW, start="activation", max_length=16, per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2,
                   lr_scheduler_type="constant", warmup_steps=0, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
                   use_cpu=True, calibration_samples=4), **changes}


class RecordingTrainer(REDTrainer):
    """A REDTrainer that keeps a copy of every training micro-batch."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen: list[dict[str, torch.Tensor]] = []

    def compute_loss(self, model, inputs, **kwargs):
        if model.training:
            self.seen.append({key: value.clone() for key, value in inputs.items()})
        return super().compute_loss(model, inputs, **kwargs)


class Interrupt(TrainerCallback):
    """Ends the process' training like Ctrl-C, in the middle of step `at`."""

    def __init__(self, at: int):
        self.at = at

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.at - 1:
            raise KeyboardInterrupt


def make_trainer(teacher, output_dir, data=None, *, eval_data=None, trainer_class=RecordingTrainer, callbacks=None, **changes) -> REDTrainer:
    """A trainer of `teacher` on `data` (tokenised examples); `changes` are settings."""
    return trainer_class(teacher, REDConfig(**settings_of(output_dir, **changes)), train_dataset=tokenised() if data is None else data,
                         eval_dataset=eval_data, callbacks=callbacks)


def masters(trainer_or_projections) -> dict[str, torch.Tensor]:
    """A copy of every trainable tensor by name."""
    projections = getattr(trainer_or_projections, "projections", trainer_or_projections)
    return {factor.name: factor.master.detach().clone() for factor in projections}


@torch.no_grad()
def shake(projections, scale: float = 0.1, seed: int = 7) -> None:
    """Move every master off its start, so that nothing is orthonormal, sparse or one by chance."""
    generator = torch.Generator().manual_seed(seed)
    for factor in projections:
        factor.master += scale * torch.randn(factor.master.shape, generator=generator, dtype=torch.float64).to(factor.master.dtype)
    projections.push_forward()


def run_two_processes(script: str | Path, folder: Path) -> None:
    """`script` as two gloo processes on the CPU with the argument `folder`; fails with what they said."""
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)]), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), str(folder)],
                          env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-5000:]


def fork_two_processes(run: Callable[[Path], None], folder: Path, seconds: float = 300) -> None:
    """`run(folder)` as two gloo processes, with the environment that torchrun makes; fails with what they said.

    Forks of this process, which has imported everything: a third of torchrun's time. tests/test_sharding.py goes through torchrun itself.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [_forked(run, folder, rank, port) for rank in range(2)]
    ends, until = {}, time.monotonic() + seconds
    while len(ends) < 2:
        for child in children:
            if child not in ends and (state := os.waitpid(child, os.WNOHANG))[0]:
                ends[child] = os.waitstatus_to_exitcode(state[1])
        if any(ends.values()) or time.monotonic() > until:  # the other one would wait for it
            for child in set(children) - set(ends):
                os.kill(child, signal.SIGKILL)
                ends[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.02)
    said = "\n".join(f"rank {rank}: {(folder / f'said-{rank}.txt').read_text()[-3000:]}" for rank in range(2))
    assert list(ends.values()) == [0, 0], said


def _forked(run: Callable[[Path], None], folder: Path, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for end, file in ((1, os.open(folder / f"said-{rank}.txt", os.O_WRONLY | os.O_CREAT)), (2, 1)):
            os.dup2(file, end)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # pytest's own have gone to files
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        AcceleratorState._reset_state(reset_partial_state=True)  # what the parent's trainers found: a single process
        GradientState._reset_state()
        run(folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # never into the parent's tests
