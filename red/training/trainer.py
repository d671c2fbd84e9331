"""REDTrainer: transformers' Trainer with the projections on the optimiser's side.

The order of one optimiser step, and where each part hangs in Trainer:
    micro-batches   teacher forward (no grad, taps) · student forward + backward        compute_loss
    once            pull_back, then clip the projections' gradients                     _clip_grad_norm / _get_grad_norm
    once            AdamW on projections and gains                                      create_optimizer
    once            push_forward, forget the gradients                                  the optimiser's post-hook
"""

from __future__ import annotations

import contextlib
import functools
import time
import types

import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from transformers import PreTrainedModel, ProgressCallback
from transformers.utils import logging

from red.training import attention
from red.training import activation_checkpointing as checkpointing
from red.training import float8
from red.training import losses
from red.calibration import Calibration, model_hash
from red.training.erank_callback import ERankCallback
from red.training.canary import CanaryCallback, canary_problems
from red.training.checkpoints import Checkpoints
from red.training.compiled import CompiledLayers
from red.config import REDConfig
from red.data.loading import collate, for_attention
from red.errors import REDError
from red.sharing.export import export
from red.planning.memory_advice import explained
from red.prepare import calibration_batches, check_request, pack_rows, ready_calibration, start_projections, training_rows
from red.training.progress import RateAndLosses
from red.training.projections import Projections
from red.training.rehearsal import rehearse
from red.training.rank_bonus import RankBonus
from red.training.sharding import ShardedTraining, gathered, is_sharded, whole_student
from red.data.streaming import StreamLoading, require_steps
from red.training.taps import Taps
from red_kernels import linear_kd

TAP_FLOOR = 1e-6  # of the mean over all taps

logger = logging.get_logger(__name__)


class REDTrainer(Checkpoints, StreamLoading, ShardedTraining):
    """Distil a teacher into a student of width `args.hidden_size`.

    Args:
        teacher: the frozen teacher; moved to the training device and set to eval mode. With `fsdp` it is sharded in place, for this run alone.
        args: a REDConfig.
        train_dataset, eval_dataset: what `red.data.loading.load_examples` reads (a path, a Dataset, texts or tokenised examples), or a PackedDataset;
            with `streaming`, or as an IterableDataset, the training text is read as `red.data.streaming` says.
        processing_class: the teacher's tokenizer; may be missing where the examples are tokenised.
        calibration: channel statistics; None takes them on the first training rows.
        projections: ready ones, of a student and start of your own; None starts them as `args` says.

    The other arguments are those of transformers' Trainer.

    Raises:
        REDError: bad input, before any training.
    """

    def __init__(self, teacher: PreTrainedModel, args: REDConfig, train_dataset=None, eval_dataset=None, processing_class=None,
                 calibration: Calibration | None = None, projections: Projections | None = None, **kwargs):
        if args.n_gpu > 1:
            logger.warning(f"Using 1 of {args.n_gpu} GPUs; start one process per GPU with torchrun or accelerate launch to use all.")
            args._n_gpu = 1  # DataParallel would replicate the student behind its projections
        if kwargs.get("optimizers", (None, None))[0] is not None:
            raise REDError("optimizers=... holds the student's weights, and red trains projections beside them, whose optimizer it makes itself. "
                           "Choose one by its name in args (optim, optim_args), or pass optimizer_cls_and_kwargs.")
        if is_sharded(teacher):
            raise REDError("This teacher was sharded by an earlier trainer, and a start needs whole weights. Load it anew.")
        rehearse(args, held_out=eval_dataset is not None, own_metrics=kwargs.get("compute_metrics") is not None)
        canary = canary_problems(args.canary_file, args.canary_samples) if args.canary_steps else ()  # a broken file is refused first
        self.teacher = teacher.eval().to(args.device)
        check_request(teacher, args)
        rows = [source if source is None else read(source, processing_class, teacher, args)
                for source, read in ((train_dataset, training_rows), (eval_dataset, pack_rows))]
        require_steps(rows[0], args.max_steps)
        began = time.perf_counter()
        if calibration is not None or rows[0] is not None:
            calibration = ready_calibration(self.teacher, args, rows=rows[0], calibration=calibration, tokenizer=processing_class)
        batches = None if rows[0] is None else calibration_batches(rows[0], args.calibration_samples)
        folder = args.output_dir if args.process_index == 0 else None
        self.projections = projections or start_projections(self.teacher, args, calibration, batches, folder)
        self.start_seconds = time.perf_counter() - began  # for the report, as are the channels' statistics
        self.importance = None if calibration is None else {"scores": calibration.scores, "mean_square": calibration.mean_square}
        mean_square = calibration.tap_square if args.tap_normalize and calibration else None
        if mean_square is not None:  # a tap whose teacher says next to nothing must not outweigh all others
            mean_square = mean_square.clamp(min=TAP_FLOOR * mean_square.mean().item() or 1.0)
        self.taps = Taps(self.teacher, self.student, self.projections, target=args.tap_target, detach_target=args.tap_detach,
                         mean_square=mean_square) if args.tap_weight else None
        self.rank_bonus = RankBonus(self.student, args.erank_weight) if args.erank_weight else None
        self.attention = attention.choose(args, self.teacher)
        if args.teacher_fp8:
            float8.check(self.teacher, args.device)
        self.compiled = CompiledLayers() if args.compile_layers else None
        checkpointing.enable(self.student, args.checkpointing)
        bind_training_forward(self.student)
        self.teacher_hash = model_hash(self.teacher)  # now, while the teacher is whole
        super().__init__(model=self.student, args=args, train_dataset=rows[0], eval_dataset=rows[1], processing_class=processing_class,
                         data_collator=attention.collate_with_starts(kwargs.pop("data_collator", collate)), **kwargs)
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise REDError("DeepSpeed owns the optimiser, and red's projections live beside it; so does an Accelerator with FSDP of your own. "
                           "Use fsdp=full_shard, or accelerate launch with configs/fsdp2.yaml.")
        self._agree()
        if args.sharding:
            bind_training_forward(self.teacher)
            self._shard(args.sharding)
        # the losses below divide by global counts, so Trainer must not divide by the accumulation steps again
        self.model_accepts_loss_kwargs = True
        self._counts: losses.Counts | None = None  # of the step, a rank's mean
        if args.erank_steps:
            held_out = rows[1] if rows[1] is not None else rows[0] if rows[0] is not None else ()
            self.add_callback(ERankCallback(self, held_out, steps=args.erank_steps, floor=args.erank_floor, patience=args.erank_patience, stop=args.erank_stop))
        if args.canary_steps:
            self.add_callback(CanaryCallback(self, canary, steps=args.canary_steps))
        if self.pop_callback(ProgressCallback):
            self.add_callback(RateAndLosses(self))
        self._watch_over(("ce", "kl", "tap_mse"))

    def _agree(self) -> None:
        """Every rank goes on from rank 0's start: one of its own could differ in a bit, or in a channel, and drift from there."""
        if self.args.world_size == 1:
            return
        start = {name: tensor.to(self.args.device) for name, tensor in self.projections.state_dict().items()}
        self.projections.load_state_dict(broadcast(start))
        if self.taps and self.taps.mean_square is not None:
            self.taps.mean_square = broadcast(self.taps.mean_square.to(self.args.device)).cpu()

    @property
    def student(self) -> PreTrainedModel:
        """The plain Hugging Face model that is being trained; with `fsdp` its parameters are DTensors."""
        return self.projections.student

    # ---- the objective ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        counts = self._counts if model.training and self._counts is not None else losses.count([inputs], self.args.device)
        documents = attention.arguments(inputs, self.teacher.config)
        inputs = for_attention(inputs, self.teacher.config)
        place = {"input_ids": inputs["input_ids"], "position_ids": inputs["position_ids"], **documents}
        with torch.no_grad(), self.accelerator.autocast(), self._recording():
            teacher_hidden = self._teacher_hidden(place)

        padded = self.args.lrc_faithful  # the public code's taps count padding too
        with self._comparing(None if padded else inputs["token_mask"], counts.positions if padded else counts.tokens), self._watching():
            loss, ce, kl = model(**place, distil=functools.partial(self._kd, teacher_hidden, inputs["labels"], counts))
        self._release_heads()
        tap = self.taps.loss() if self.taps else torch.zeros((), device=loss.device)
        loss = loss + self.args.tap_weight * tap
        if self.rank_bonus:  # a micro-batch weighs as many tokens as it has
            loss = loss + self.rank_bonus.loss(inputs["token_mask"]) * inputs["token_mask"].sum() / counts.tokens
        if model.training:
            self.guard.record(inputs, torch.stack([ce, kl, tap.detach(), loss.detach()]).float())
        return (loss, None) if return_outputs else loss

    def _kd(self, teacher_hidden: Tensor, labels: Tensor, counts: losses.Counts, hidden: Tensor, head: Tensor):
        """CE + KL from both models' last hidden states; runs inside the (possibly wrapped) student's forward."""
        args, flat = self.args, lambda x: x.flatten(0, 1)
        labels = flat(losses.next_labels(labels))
        by_sequence = args.kl_reduction == "sequence"
        every = torch.ones_like(labels, dtype=torch.bool) if by_sequence else None
        return linear_kd(flat(hidden), head, flat(teacher_hidden), self.teacher.get_output_embeddings().weight, labels, kl_mask=every,
                         temperature=args.temperature, divergence=args.divergence, beta=args.jsd_beta, ce_weight=args.ce_weight,
                         kl_weight=args.kl_weight, num_tokens=counts.labels, num_kl_tokens=counts.rows if by_sequence else counts.labels,
                         chunk_size=args.loss_chunk_size)

    def _recording(self):
        return self.taps.recording() if self.taps else contextlib.nullcontext()

    def _comparing(self, mask, num_tokens):
        return self.taps.comparing(mask, num_tokens) if self.taps else contextlib.nullcontext()

    @contextlib.contextmanager
    def _within_a_step(self):
        """What a step does to the models, and takes back after its backward."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(attention.packed(self.attention, self.teacher, self.student))
            if self.args.teacher_fp8:
                stack.enter_context(float8.layers(self.teacher))
            if self.compiled:
                stack.enter_context(self.compiled.running(self.teacher, self.student, self.taps))
            yield

    def _watching(self):
        return self.rank_bonus.watching() if self.rank_bonus else contextlib.nullcontext()

    def train(self, resume_from_checkpoint=None, **kwargs):  # pyrefly: ignore[bad-override] - of Trainer's, not of nn.Module's
        """As `red.training.reliability.Reliable.train`; out of memory it raises a REDError that says what to lower."""
        with explained(self):
            return super().train(resume_from_checkpoint, **kwargs)

    def training_step(self, *args, **kwargs):
        try:
            with self._within_a_step():
                return super().training_step(*args, **kwargs)
        finally:
            if self.taps:
                self.taps.release()

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        """Count all micro-batches of the coming step, over all ranks; data parallel averages gradients, hence the world size."""
        counts = losses.count(batch_samples, device).stacked()
        if self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, "sum") / self.args.world_size
        self._counts = losses.Counts(*counts.clamp(min=1e-6).unbind())
        return self._counts.labels

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager(), attention.packed(self.attention, self.teacher, self.student):
            return self.compute_loss(model, inputs).detach(), None, None

    # ---- the step ----

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            gains = [factor.master for factor in self.projections if factor.side == "gain"]
            maps = [factor.master for factor in self.projections if factor.side != "gain"]
            optimizer_class, settings = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = optimizer_class([{"params": maps, "weight_decay": self.args.weight_decay},
                                              {"params": gains, "weight_decay": 0.0}], **settings)
            self.optimizer.register_step_pre_hook(lambda *_: self._pull_back())
            self.optimizer.register_step_post_hook(lambda *_: self.projections.push_forward())
        return self.optimizer

    def _pull_back(self) -> None:
        """Once per step. What reached a master directly (LRC's undetached target) did so beside the data-parallel wrapper: average it here."""
        if self.args.world_size > 1 and self.mesh is None and not self.projections.pulled:
            for master in self.projections.parameters():
                if master.grad is not None:
                    master.grad = self.accelerator.reduce(master.grad, "mean")
        self.projections.pull_back()

    def _clip_grad_norm(self, model):
        self._pull_back()
        return gathered(self.accelerator.clip_grad_norm_(self.projections.parameters(), self.args.max_grad_norm))

    def _get_grad_norm(self, model, grad_norm=None):
        if grad_norm is None:  # max_grad_norm=0: report the norm, clip nothing
            self._pull_back()
            grad_norm = gathered(nn.utils.get_total_norm([p.grad for p in self.projections.parameters() if p.grad is not None]))
        return super()._get_grad_norm(model, grad_norm)

    def gradients(self):
        return {factor.name: factor.weight.grad for factor in self.projections if factor.weight.grad is not None}

    def forget_gradients(self) -> None:
        for master in self.projections.parameters():
            master.grad = None

    def export(self, output_dir, **kwargs):
        """Write the student as a plain Hugging Face checkpoint, reloaded and compared; see `red.sharing.export`. With several processes all of them call it,
        and the first one writes; the others get None."""
        student = self.student if self.mesh is None else whole_student(self.student, keep=self.is_world_process_zero())
        kwargs.setdefault("teacher", self.teacher.name_or_path)
        return export(student, self.processing_class, output_dir, **kwargs) if self.is_world_process_zero() else None


def bind_training_forward(student: PreTrainedModel) -> None:
    """Give this instance a forward that, called with `distil=f`, returns `f(hidden [B, T, d'], head [V, d'])` and is itself otherwise.

    The loss must run inside the module that DDP or FSDP wraps: calling `student.model(...)` beneath the wrapper would skip its gradient
    reduction. A bound method, so that a deep copy of the student is bound to the copy.
    """
    plain = type(student).forward

    @functools.wraps(plain)
    def forward(self, *args, distil=None, **kwargs):
        if distil is None:
            return plain(self, *args, **kwargs)
        return distil(self.model(*args, **kwargs, use_cache=False).last_hidden_state, self.get_output_embeddings().weight)

    student.forward = types.MethodType(forward, student)
