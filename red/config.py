"""REDConfig: transformers' TrainingArguments and what distillation adds. Names are TrainingArguments' and TRL's where they have one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from red.errors import REDError
from red.training.launching import requested_sharding

DIVERGENCES = ("forward", "reverse", "jsd")
TAP_TARGETS = ("auto", "gather", "projected", "lrc")


@dataclass
class REDConfig(TrainingArguments):
    """Settings of a distillation; every TrainingArguments field works too.

    Defaults that differ from TrainingArguments are RED's recipe (arXiv 2605.29327): learning rate 1e-4, linear schedule, warm-up .5 % of the steps,
    Adam(.9, .999), clipping at 1, packed length 2048.
    """

    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "Teacher: a name on the hub or a folder."})
    teacher_dtype: str = field(default="auto", metadata={"help": "Dtype the teacher is loaded in; auto is bfloat16 on a GPU, float32 on a CPU."})
    hidden_size: int = field(default=0, metadata={"help": "The student's width d': a multiple of the number of attention heads, below the teacher's."})
    train_file: str | None = field(default=None, metadata={"help": "Training text: .txt, .jsonl or a saved datasets folder."})
    dataset_name: str | None = field(default=None, metadata={"help": "Training text: a data set on the hub (needs the `datasets` package)."})
    dataset_split: str = field(default="train", metadata={"help": "Split of dataset_name."})
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    max_length: int = field(default=2048, metadata={"help": "Tokens per training row."})
    packing: bool = field(default=True, metadata={"help": "Put several documents into one row; they never see each other."})
    assistant_only_loss: bool = field(default=False, metadata={"help": "Of conversations (rows with messages), learn the assistant's turns only."})
    streaming: bool = field(default=False, metadata={"help": "Read, tokenise and pack the training text while training, instead of all of it before; needs max_steps."})
    token_cache_dir: str = field(default="auto", metadata={"help": "Where the tokens of large texts are kept for the next run; auto is red/tokens beside the Hugging Face cache, none keeps nothing."})

    start: str = field(default="fitted", metadata={"help": "How the projections begin: fitted, activation (RED), random (LRC), pca, …; see red.starts.names(); or the start.safetensors of red compress."})
    start_fit: str | None = field(default=None, metadata={"help": "Fit after the start, layer by layer on the calibration text: none, readers (the writing side stays as it is), or full; fitted means full, the others none."})
    fit_sweeps: int = field(default=1, metadata={"help": "Times that a start is fitted: from the second on, documents on which the student is far from its teacher count more (docs/starts.md). Each costs a calibration and a fit."})
    fit_reader_ridge: float = field(default=1e-4, metadata={"help": "Ridge of the fitted readers, relative to the mean square of the student's normalised stream."})
    fit_writer_ridge: float = field(default=1e-4, metadata={"help": "Ridge of the repairing writers, relative to the mean square of what they write."})
    start_std: float = field(default=0.02, metadata={"help": "Standard deviation of the Gaussian start (start=random)."})
    norm_scale: bool = field(default=True, metadata={"help": "Correct the norm gains for the RMS of the kept channels (closed form)."})
    calibration_samples: int = field(default=64, metadata={"help": "Training rows that the channel statistics are taken from."})
    calibration_tap: str = field(default="residual", metadata={"help": "Where activations are read: residual, or norm (after the norms)."})

    temperature: float | None = field(default=None, metadata={"help": "Temperature of the KL term; 1, or 40 with lrc_faithful."})
    divergence: str = field(default="forward", metadata={"help": "forward KL(teacher‖student), reverse, or jsd."})
    jsd_beta: float = field(default=0.5, metadata={"help": "Interpolation of the generalised JSD."})
    ce_weight: float = field(default=1.0, metadata={"help": "Weight of the language modelling cross entropy."})
    kl_weight: float = field(default=1.0, metadata={"help": "Weight of the KL term (no T² factor)."})
    tap_weight: float = field(default=0.2, metadata={"help": "Weight of the summed mean squared errors of the seven taps per layer; 0 turns them off."})
    tap_target: str = field(default="auto", metadata={"help": "Target of the two output taps: gather, projected, lrc, or auto."})
    kl_reduction: str | None = field(default=None, metadata={"help": "token: mean over labelled tokens; sequence: every position, summed, divided by rows only (the public LRC code's); token, but sequence with lrc_faithful."})
    tap_detach: bool | None = field(default=None, metadata={"help": "Keep the gradient of the FFN-output tap out of its target; on, but off with lrc_faithful."})
    tap_normalize: bool | None = field(default=None, metadata={"help": "Divide each tap's error by the mean square of the teacher's output there; on, but off with lrc_faithful."})
    lrc_faithful: bool = field(default=False, metadata={"help": "The public LRC objective: temperature=40, kl_reduction=sequence, tap_detach=false, tap_normalize=false, tap_target=lrc, and taps that count padding."})
    erank_weight: float = field(default=0.0, metadata={"help": "Reward for effective rank: the loss gets -erank_weight · mean over the student's layers of ln eRank (of 256 tokens a micro-batch); 0: none."})
    loss_chunk_size: int | None = field(default=None, metadata={"help": "Tokens whose logits exist at a time; 1024 on a CPU, what fits a GiB on a GPU."})

    student_dtype: str = field(default="auto", metadata={"help": "Dtype of the student's weights: float32, bfloat16, or auto, which is bfloat16 with bf16=True on one GPU. Projections, and the sum of the gradients, are float32 in every case."})
    packed_attention: str = field(default="auto", metadata={"help": "Attention of a training step: varlen (documents without a mask; needs a GPU and bf16=True), model (the model's own), or auto, which is varlen where it can be and the model's own is sdpa."})
    checkpointing: str = field(default="none", metadata={"help": "What the backward computes again to save memory: none, cheap (norms, activations, rotary angles; no product), or full (whole layers, as gradient_checkpointing=True)."})
    compile_layers: bool = field(default=False, metadata={"help": "Compile the decoder layers of teacher and student for the training step: one graph a model. Recomputes what is cheap by itself; not with checkpointing."})
    teacher_fp8: bool = field(default=False, metadata={"help": "Run the teacher's decoder layers in float8 (e4m3, scaled by row) in training steps; needs a GPU of compute capability 9.0. A CPU emulates it."})

    erank_steps: int = field(default=0, metadata={"help": "Steps between checks of the student's effective rank per layer, logged beside the teacher's; 0: none. A check took a seventh of a step on the embedded example: less than 1 % of the time from 20 up."})
    erank_floor: float = field(default=0.25, metadata={"help": "Share of the teacher's effective rank below which a check counts as collapsed."})
    erank_patience: int = field(default=3, metadata={"help": "Checks in a row below erank_floor that make a collapse, which is warned of."})
    erank_stop: bool = field(default=False, metadata={"help": "Stop the training at a collapse."})

    canary_steps: int = field(default=0, metadata={"help": "Steps between reasoning canaries: the student answers canary_samples problems, logged as a share of the teacher's score; 0: none. 64 of the embedded problems took 1.2 steps of 32 rows of 112 tokens: about 1 % of the time at 100."})
    canary_file: str | None = field(default=None, metadata={"help": "The canary's problems: .jsonl of {question, answer}, as GSM8K's, in the form of the training text; or embedded, for the embedded example."})
    canary_samples: int = field(default=64, metadata={"help": "Problems of a canary, from the beginning of the file."})

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate of projections and norm gains."})
    warmup_steps: float = field(default=0.005, metadata={"help": "Warm-up: a number of steps, or below 1 a share of all steps."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Learning-rate schedule."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    max_skipped_steps: int = field(default=10, metadata={"help": "Steps in a row whose loss or gradient may be NaN or infinite; they are skipped, and the last of them ends the run."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Leave False: such steps are skipped and counted, and the filter makes the host wait for every micro-batch."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave False: the packed rows carry a token mask."})

    def __post_init__(self):
        if torch.backends.mps.is_available() and not torch.cuda.is_available():
            self.use_cpu = True  # the ops and the fp64 statistics have no MPS implementation
        if self.deepspeed:  # before transformers looks for the package
            raise REDError(f"deepspeed={self.deepspeed!r}: DeepSpeed owns the optimiser and red's projections live beside it; use fsdp=full_shard (see docs/distributed.md).")
        if self.checkpointing == "full":
            self.gradient_checkpointing = True
        own_copies = self.accelerator_config is None
        self.sharding = requested_sharding(self.fsdp, self.fsdp_config)  # None: not sharded
        self.fsdp = self.fsdp_config = None  # Trainer's FSDP would take the optimizer over, and on a CPU it is silently none
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # pinning serves copies to a GPU, and torch warns where there is none
        elif own_copies and self.dataloader_pin_memory:
            self.accelerator_config.non_blocking = True  # else every batch that goes to the GPU waits for all that was queued before
        self.start = str(self.start)  # a Path of a start file
        if self.temperature is None:
            self.temperature = 40.0 if self.lrc_faithful else 1.0
        if self.kl_reduction is None:
            self.kl_reduction = "sequence" if self.lrc_faithful else "token"
        if self.tap_normalize is None:
            self.tap_normalize = not self.lrc_faithful
        if self.tap_detach is None:
            self.tap_detach = not self.lrc_faithful
        if self.lrc_faithful and self.tap_target == "auto":
            self.tap_target = "lrc"
        if self.checkpointing == "none" and self.gradient_checkpointing:
            self.checkpointing = "full"
        if self.gradient_checkpointing:  # the reentrant kind runs the layers without a graph, so the taps would train nothing
            kwargs = {"use_reentrant": False, **dict(self.gradient_checkpointing_kwargs or {})}
            for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):  # the old and the new name; older transformers lack one
                if hasattr(self, name):
                    setattr(self, name, kwargs)
        self._check()

    def _check(self) -> None:
        """Refuse what can be refused without a model."""
        def require(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise REDError(f"{name}={getattr(self, name)!r}: {expected}.")

        require(self.temperature > 0, "temperature", "must be above 0")
        require(self.divergence in DIVERGENCES, "divergence", f"use one of {', '.join(DIVERGENCES)}")
        require(self.kl_reduction in ("token", "sequence"), "kl_reduction", "use token or sequence")
        if self.sharding and self.world_size == 1:
            raise REDError("fsdp shards over processes, and there is one. Start one per GPU: torchrun --nproc-per-node 8 …, or accelerate launch with "
                           "configs/fsdp2.yaml; or leave fsdp out.")
        require(not (self.sharding and self.erank_steps), "erank_steps", "one rank cannot run a sharded model; set erank_steps=0, or leave fsdp out")
        for name in ("compile_layers", "teacher_fp8"):
            require(not (self.sharding and getattr(self, name)), name, "has not been brought together with sharded layers; leave it or fsdp out")
        require(self.student_dtype in ("auto", "float32", "bfloat16"), "student_dtype", "use auto, float32 or bfloat16")
        require(self.student_dtype != "bfloat16" or self.world_size == 1, "student_dtype", "data parallel would sum the gradients of a bfloat16 student in bfloat16; use auto or float32")
        require(self.packed_attention in ("auto", "varlen", "model"), "packed_attention", "use auto, varlen or model")
        require(self.checkpointing in ("none", "cheap", "full"), "checkpointing", "use none, cheap or full")
        require(self.checkpointing != "cheap" or not self.gradient_checkpointing, "checkpointing", "gradient_checkpointing=True recomputes whole layers; drop one of them")
        require(not (self.compile_layers and self.checkpointing != "none"), "compile_layers", f"compiled layers recompute what is cheap by themselves; drop checkpointing={self.checkpointing!r}")
        require(not self.torch_compile, "torch_compile", "would compile the whole model and break at every tap; use compile_layers=True")
        require(self.tap_target in TAP_TARGETS, "tap_target", f"use one of {', '.join(TAP_TARGETS)}")
        require(0 < self.jsd_beta < 1, "jsd_beta", "must lie between 0 and 1")
        for name in ("ce_weight", "kl_weight", "tap_weight", "erank_weight"):
            require(getattr(self, name) >= 0, name, "must not be negative")
        require(self.ce_weight + self.kl_weight + self.tap_weight > 0, "kl_weight", "all three loss weights are 0; nothing would train")
        require(self.erank_steps >= 0, "erank_steps", "must not be negative; 0 turns the checks off")
        require(0 < self.erank_floor < 1, "erank_floor", "must lie between 0 and 1")
        require(self.erank_patience >= 1, "erank_patience", "must be at least 1")
        require(self.canary_steps >= 0, "canary_steps", "must not be negative; 0 turns the canary off")
        require(self.canary_samples >= 1, "canary_samples", "must be at least 1")
        require(not (self.canary_steps and self.canary_file is None), "canary_steps", "needs canary_file: a .jsonl of {question, answer}, or embedded")
        require(not (self.sharding and self.canary_steps), "canary_steps", "one rank cannot run a sharded model; set canary_steps=0, or leave fsdp out")
        require(not (self.train_file and self.dataset_name), "dataset_name", "train_file is given too; drop one of them")
        require(self.max_skipped_steps >= 1, "max_skipped_steps", "must be at least 1, which ends the run at the first such step")
        require(self.max_length >= 2, "max_length", "a row needs at least 2 tokens")
        for name in ("calibration_samples", "fit_sweeps", "per_device_train_batch_size", "gradient_accumulation_steps"):
            require(getattr(self, name) >= 1, name, "must be at least 1")
        require(self.loss_chunk_size is None or self.loss_chunk_size >= 1, "loss_chunk_size", "must be at least 1; leave it out for what fits")
        require(self.dataloader_num_workers >= 0, "dataloader_num_workers", "must not be negative; 0 loads in the training process")
        require(self.calibration_tap in ("residual", "norm"), "calibration_tap", "use residual or norm")
        require(self.start_std > 0, "start_std", "must be above 0")
        require(self.start_fit in (None, "none", "readers", "full"), "start_fit", "use none, readers or full")
        for name in ("fit_reader_ridge", "fit_writer_ridge"):
            require(getattr(self, name) > 0, name, "must be above 0; 1e-4 is usual")
        require(not (self.gradient_checkpointing and dict(self.gradient_checkpointing_kwargs)["use_reentrant"]), "gradient_checkpointing_kwargs",
                "the taps need use_reentrant=False")
        require(not self.remove_unused_columns, "remove_unused_columns", "must stay False; it would drop the token mask of the packed rows")
        require(self.label_smoothing_factor == 0, "label_smoothing_factor", "must be 0; the teacher's distribution is the smoothing here")
        require(not self.fp16, "fp16", "a gradient scaler would scale the gradients behind the projections' back; use bf16=True")
        require(not self.lrc_faithful or self.tap_target == "lrc", "tap_target", "lrc_faithful=True means tap_target='lrc'; drop one of them")
        require(not (self.lrc_faithful and self.tap_normalize), "tap_normalize", "lrc_faithful=True has plain errors; drop one of them")
