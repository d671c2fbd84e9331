"""LoRiTrainer: transformers' Trainer for a model that thinks in latent steps, and for the baselines it is compared with.

    L = L_task + α L_rat + β L_anchor

L_task is the cross entropy of what follows the latent steps; L_rat aligns their trajectory with the teacher's rationale in the shared subspace; L_anchor the
states just before the answer. The teacher's side was computed before the training began (`red.lori.trajectories`).
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Trainer
from transformers.utils import logging

from red.errors import REDError
from red.files import require_empty_output, sync
from red.lori import files, losses
from red.lori.batch import batch_of
from red.lori.checkpoints import LoRiCheckpoints
from red.lori.config import LoRiConfig
from red.lori.data import Encoded, rows_hash
from red.lori.model import LatentModel
from red.lori.trajectories import Trajectories
from red.data.packing import IGNORE

PARTS = ("task", "rationale", "anchor", "cot")

logger = logging.get_logger(__name__)


class Batches:
    """Numbers of encoded rows into batches (`red.lori.batch.batch_of`), with the teacher's side and the explicit rows where the objective reads them."""

    def __init__(self, rows: Sequence[Encoded], args: LoRiConfig, tokens: dict[str, int | None], trajectories: Trajectories | None = None):
        self.rows, self.args, self.tokens, self.trajectories = rows, args, tokens, trajectories

    def __call__(self, numbers: Sequence[int], stage: int | None = None) -> dict[str, Tensor]:
        """A batch in the curriculum's stage; None: after it."""
        rows = [self.rows[number] for number in numbers]
        batch = batch_of(rows, self.args.target, **self.tokens, hidden_steps=stage)
        if self.trajectories is not None:  # the latent steps stand for the first steps only
            lengths = None if stage is None else [len(row.rationale()) - len(row.rationale(stage)) for row in rows]
            batch |= self.trajectories.batch(numbers, lengths)
        if self.args.cot_weight or (self.args.anchor_weight and self.args.anchor_teacher == "self"):
            batch |= {f"cot_{name}": value for name, value in batch_of(rows, "explicit", **self.tokens).items()}
        return batch


def numbers_only(items: Sequence[int]) -> dict[str, Tensor]:
    """The collator of the training: a batch is made when its step comes, for the curriculum's stage decides what is in it and batches are fetched ahead."""
    return {"number": torch.tensor(items)}


class LoRiTrainer(LoRiCheckpoints, Trainer):
    """Train a LatentModel.

    Args:
        model: the student with its latent steps.
        args: a LoRiConfig.
        train_dataset, eval_dataset: encoded rows (`red.lori.data.encode_rows`).
        processing_class: the tokenizer, which knows the special tokens (`red.lori.model.add_special_tokens`).
        trajectories: the teacher's, of exactly the training rows; needed where the objective aligns with the offline teacher.
        pad, bot, eot: token ids.

    The other arguments are those of transformers' Trainer.

    `train` resumes, stops at SIGTERM and skips steps that are not finite as `red.training.reliability.Reliable.train` says.

    Raises:
        REDError: trajectories that are missing or not of these rows.
    """

    def __init__(self, model: LatentModel, args: LoRiConfig, train_dataset: Sequence[Encoded], eval_dataset: Sequence[Encoded] | None = None, *,
                 processing_class=None, trajectories: Trajectories | None = None, pad: int = 0, bot: int | None = None, eot: int | None = None, **kwargs):
        if args.n_gpu > 1:
            logger.warning(f"Using 1 of {args.n_gpu} GPUs; start one process per GPU with torchrun or accelerate launch to use all.")
            args._n_gpu = 1
        if args.needs_trajectories and trajectories is None:
            raise REDError(f"preset={args.preset!r} aligns with the teacher's trajectories, and none were given. Pass trajectories=red.lori.collect(...).")
        if trajectories is not None and len(trajectories) != len(train_dataset):
            raise REDError(f"There are trajectories of {len(trajectories)} examples and {len(train_dataset)} training rows. Collect them from these rows.")
        self.trajectories, self.rows_hash = trajectories if args.needs_trajectories else None, rows_hash(train_dataset)
        tokens = dict(pad=pad, bot=bot, eot=eot)
        self._batches = Batches(train_dataset, args, tokens, self.trajectories)
        self._eval_batches = Batches(eval_dataset or (), args, tokens)  # without trajectories: its loss is the task's
        super().__init__(model=model, args=args, data_collator=numbers_only, train_dataset=range(len(train_dataset)),
                         eval_dataset=None if eval_dataset is None else range(len(eval_dataset)), processing_class=processing_class, **kwargs)
        self.model_accepts_loss_kwargs = True  # the losses below divide by global counts
        self.latent_model = model
        self.anchor_layers = args.layers_of("anchor_layers", model.config.num_hidden_layers + 1)
        if self.trajectories is not None:
            self.subspace, self.anchor_std = trajectories.subspace.to(args.device), trajectories.anchor_std.to(args.device)[self.anchor_layers]
        self._counts: Tensor | None = None
        self._stage: int | None = None  # of the curriculum, in the running step
        self._watch_over(PARTS)

    # ---- the objective ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Means over the labels (task, cot) and over the examples (rationale, anchor) of the whole step."""
        args, training = self.args, model.training
        labels, examples = (self._counts if training and self._counts is not None else _counts([inputs])).to(args.device).unbind()
        share = len(inputs["labels"]) / examples
        aligning = training and args.target == "latent" and (args.rationale_weight > 0 or args.anchor_weight > 0)
        thought = model(**_part(inputs), latent_steps=self._stage if training else None, with_states=aligning)
        task = _cross_entropy(thought.logits, inputs["labels"]) / labels
        rationale = anchor = cot = torch.zeros((), device=task.device)
        explicit = None
        if training and "cot_labels" in inputs:
            explicit = model(**_part(inputs, "cot_"), latent_steps=0, with_states=True)
            cot = _cross_entropy(explicit.logits, inputs["cot_labels"]) / labels  # in units of an answer's tokens, as the task
        if aligning and args.rationale_weight:
            g = self.subspace.coordinates(thought.latent_states)
            everything = torch.ones(g.shape[:2], dtype=torch.bool, device=g.device)
            rationale = share * losses.rationale_loss(g, everything, inputs["teacher_g"], inputs["teacher_mask"], self.trajectories.scales,
                                                      second_order_weight=args.second_order_weight, centred=args.centred)
        if aligning and args.anchor_weight:
            student = self._anchors(thought.target_states, inputs["anchor"])
            if args.anchor_teacher == "self":
                teacher = self._anchors(explicit.target_states, inputs["cot_anchor"]).detach()
                std = teacher.float().std(dim=(0, 2)).clamp(min=1e-6)
            else:
                teacher, std = inputs["teacher_anchor"][:, self.anchor_layers], self.anchor_std
            anchor = share * losses.anchor_loss(student, teacher, std, distance=args.anchor_distance)
        loss = task + args.rationale_weight * rationale + args.anchor_weight * anchor + args.cot_weight * cot
        if training:
            self.guard.record(inputs, torch.stack([part.detach() for part in (task, rationale, anchor, cot, loss)]).float())
        return (loss, None) if return_outputs else loss

    def _anchors(self, states: tuple[Tensor, ...], place: Tensor) -> Tensor:
        """[B, A, d]: the states at each row's anchor in the chosen layers."""
        rows = torch.arange(len(place), device=place.device)
        return torch.stack([states[layer][rows, place] for layer in self.anchor_layers], 1)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Make all micro-batches of the coming step and count them, over all ranks; data parallel averages gradients, hence the world size."""
        self._stage = self.args.stage(self.state.global_step, self.state.max_steps)
        batch_samples[:] = [self._batches(batch["number"].tolist(), self._stage) for batch in batch_samples]
        counts = _counts(batch_samples).to(device)
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum") / self.args.world_size
        self._counts = counts.clamp(min=1)
        return self._counts[0]

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def get_eval_dataloader(self, eval_dataset=None):
        training, self.data_collator = self.data_collator, self._eval_batches
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = training

    # ---- files ----

    @property
    def facts(self) -> files.Facts:
        """How the trained model is asked."""
        args = self.args
        return files.Facts(args.target, args.latent_steps, self.latent_model.projection is not None, args.answer_prefix, args.preset)

    def export(self, output_dir: str | Path, *, teacher: str | Path | None = None) -> Path:
        """Write the model as a Hugging Face folder that `red.lori.load` reloads, adapters merged, with the licence of `teacher` (a folder or a name on the hub).

        Raises:
            REDError: `output_dir` is not missing or empty. It appears only when everything is written.
        """
        from red.lori.adapters import merged

        output_dir = require_empty_output(output_dir)
        aside = output_dir.absolute().parent / f".{output_dir.absolute().name}.{secrets.token_hex(4)}.tmp"
        try:
            with merged(self.latent_model.model) as plain:
                files.save(aside, self.latent_model, self.processing_class, self.facts, plain=plain, teacher=teacher)
            aside.replace(output_dir)  # onto nothing or an empty folder: one rename
            sync(output_dir.absolute().parent)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        return output_dir


def _part(inputs: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    return {name: inputs[prefix + name] for name in ("prompt_ids", "prompt_mask", "target_ids", "target_mask")}


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over the labelled tokens, in float32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")


def _counts(batches: Sequence[dict[str, Tensor]]) -> Tensor:
    """[labels, examples] of several batches, float32."""
    return torch.stack([sum((batch["labels"] != IGNORE).sum() for batch in batches), torch.tensor(sum(len(batch["labels"]) for batch in batches),
                        device=batches[0]["labels"].device)]).float()
