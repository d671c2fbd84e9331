"""A whole training step on a CPU beside the eager LRC step, both with LRC's objective and from one start; on a GPU `benchmarks/step.py` does more."""

import tempfile

import torch

from benchmarks import ladder, step
from benchmarks.cases import Case, Rival, faster_than
from benchmarks.lrc_step import LRCStep
from benchmarks.roofline import Work
from red.data.packing import collate

SIZES = {"gpu": (), "cpu": (("256", 1), ("256", 8), ("1024", 1)), "tiny": (("tiny", 2),)}  # and micro-steps of an optimiser step


def test_step(measure, case):
    measure(case)


def cases(size: str) -> list[Case]:
    return [case(*one) for one in SIZES[size]]


def case(name: str, micro_steps: int) -> Case:
    size, made = ladder.SIZES[name], []

    def both():
        """The trainer and the peer, made at the first call. A learning rate of 0 costs as much and keeps their losses comparable."""
        if not made:
            teacher, rows = step.build_teacher(size), step.packed_rows(size, size.rows * micro_steps)
            config = step.config_of(size, tempfile.gettempdir(), start="random", lrc_faithful=True, gradient_accumulation_steps=micro_steps, learning_rate=0.0)
            trainer = step.make_trainer(teacher, rows, config)
            trainer.create_optimizer()
            trainer.student.train()
            made.extend((trainer, LRCStep(teacher, size.width, maps={factor.name: factor.master for factor in trainer.projections}, learning_rate=0.0)))
        return made

    def draw():
        rows = step.packed_rows(size, size.rows * micro_steps)
        return tuple(collate([rows[index] for index in range(first, first + size.rows)]) for first in range(0, len(rows), size.rows))

    def ours(*batches):
        """As Trainer's loop does. Cross-entropy, KL and taps of the step."""
        trainer = both()[0]
        trainer.guard.forget_step()
        items = trainer._get_num_items_in_batch(batches, trainer.args.device)
        for batch in batches:
            trainer.training_step(trainer.model, dict(batch), items)
        trainer._clip_grad_norm(trainer.model)
        trainer.optimizer.step()
        return trainer.guard.parts

    def peer(*batches):
        step_of_peer = both()[1]
        parts = sum(torch.stack(step_of_peer.micro_step(batch, micro_steps)) for batch in batches) / micro_steps
        step_of_peer.update()
        return parts

    tokens = size.rows * size.length * micro_steps
    shape = dict(rows=size.rows, length=size.length, d=size.teacher["hidden_size"], kept=size.width, layers=size.teacher["num_hidden_layers"], V=size.teacher["vocab_size"])
    return Case("step", f"{name}, {micro_steps} micro-step{'s' * (micro_steps > 1)}", shape, Work(0, round(step.floor_flops(size)["floor"] * tokens)), draw, ours,
                {"eager LRC": Rival(peer)}, goals=(faster_than("eager LRC", 2),), seconds=0.0, repeats=5, capture=False, interleave=True)  # fmt: skip
