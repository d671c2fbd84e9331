"""LoRiConfig: transformers' TrainingArguments and what latent reasoning adds; and the methods it can be compared with, as presets of the same settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import TrainingArguments

from red.errors import REDError
from red.lori.data import TARGETS
from red.lori.losses import DISTANCES

_LATENT = dict(target="latent", latent_steps=5, projection=True, rationale_weight=0.0, second_order_weight=1.0, anchor_weight=0.0, cot_weight=0.0,
               anchor_teacher="offline", curriculum=0.0)
PRESETS = {  # name -> the settings it stands for; any that is given wins
    "lori": {**_LATENT, "rationale_weight": 1.0, "anchor_weight": 1.0},
    "lori_no_anchor": {**_LATENT, "rationale_weight": 1.0},
    "lori_no_second_order": {**_LATENT, "rationale_weight": 1.0, "second_order_weight": 0.0, "anchor_weight": 1.0},
    "codi": {**_LATENT, "anchor_weight": 1.0},  # the anchor alone, against LoRi's fixed teacher
    "codi_joint": {**_LATENT, "anchor_weight": 1.0, "cot_weight": 1.0, "anchor_teacher": "self"},  # the student is its own teacher; as published with drop_last_step too
    "coconut": {**_LATENT, "projection": False, "curriculum": 0.5},  # feeds the state back as it is
    "explicit_cot": {**_LATENT, "target": "explicit", "latent_steps": 0},
    "no_cot": {**_LATENT, "target": "none", "latent_steps": 0},
}


@dataclass
class LoRiConfig(TrainingArguments):
    """Settings of latent reasoning; every TrainingArguments field works too.

    The objective is `L_task + rationale_weight · L_rat + anchor_weight · L_anchor`. Settings whose default is None take the preset's.
    """

    teacher_model_name_or_path: str | None = field(default=None, metadata={"help": "The explicit teacher: a model that writes its chain of thought; a name on the hub or a folder."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "What the student starts from; the teacher's weights if not given."})
    teacher_dtype: str = field(default="auto", metadata={"help": "Dtype the teacher is loaded in; auto is bfloat16 on a GPU, float32 on a CPU."})
    train_file: str | None = field(default=None, metadata={"help": "Problems: .jsonl with question, steps and answer, or a saved datasets folder."})
    dataset_name: str | None = field(default=None, metadata={"help": "Problems: a data set on the hub (needs the `datasets` package)."})
    dataset_split: str = field(default="train", metadata={"help": "Split of dataset_name."})
    question_column: str = field(default="question", metadata={"help": "Column of the question."})
    steps_column: str = field(default="steps", metadata={"help": "Column of the steps: a list of texts, or one text with <<a*b=c>> or a step a line."})
    answer_column: str = field(default="answer", metadata={"help": "Column of the answer; answers are compared as numbers."})
    answer_prefix: str = field(default="The answer is:", metadata={"help": "What stands between the reasoning and the answer; the anchor is its last token."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of question, steps and answer together; a longer row is refused."})
    drop_last_step: bool = field(default=False, metadata={"help": "Leave the last step out of every rationale, as CODI does, so that the anchor state cannot copy the result."})

    trajectories_dir: str | None = field(default=None, metadata={"help": "Folder of the teacher's trajectories, which runs on the same rows can share; output_dir/trajectories if not given."})

    preset: str = field(default="lori", metadata={"help": f"The method: {', '.join(PRESETS)}."})
    target: str | None = field(default=None, metadata={"help": "What stands between question and answer: latent, explicit or none."})
    latent_steps: int | None = field(default=None, metadata={"help": "Latent steps K."})
    projection: bool | None = field(default=None, metadata={"help": "Put a trained projection between the hidden state and the next input."})
    projection_dropout: float = field(default=0.0, metadata={"help": "Dropout of the projection."})
    curriculum: float | None = field(default=None, metadata={"help": "COCONUT's stages: over this share of the training 1, 2, … K-1 latent steps replace as many steps, the others are said in words; 0: none."})
    rationale_weight: float | None = field(default=None, metadata={"help": "α: weight of the alignment with the rationale's trajectory."})
    second_order_weight: float | None = field(default=None, metadata={"help": "λ: weight of the second moments in it; 0 aligns means alone."})
    centred: bool = field(default=True, metadata={"help": "The second moment is the covariance; false: not centred."})
    anchor_weight: float | None = field(default=None, metadata={"help": "β: weight of the match of the states just before the answer."})
    anchor_distance: str = field(default="l1", metadata={"help": "l1 or mse, in units of the teacher's standard deviation per layer."})
    anchor_layers: str = field(default="all", metadata={"help": "Layers of the anchor: all, or numbers such as 4,8,12 (0 is the embedding)."})
    anchor_teacher: str | None = field(default=None, metadata={"help": "offline: the fixed teacher; self: the student's own explicit chain of thought, without gradient (CODI)."})
    cot_weight: float | None = field(default=None, metadata={"help": "Weight of the cross entropy of the explicit chain of thought through the student (CODI); 0: none."})
    rationale_layers: str = field(default="all", metadata={"help": "Layers whose states the rationale's trajectory is made of: all, or numbers such as 1,2 (0 is the embedding)."})
    energy: float = field(default=0.9, metadata={"help": "Share of the trajectories' energy that the subspace keeps in each mode, where no rank is given."})
    rank_layers: int | None = field(default=None, metadata={"help": "r_L, the subspace's rank across layers."})
    rank_channels: int | None = field(default=None, metadata={"help": "r_d, its rank across channels."})
    normalize_layers: bool = field(default=True, metadata={"help": "Divide each layer's states by the teacher's RMS there before the subspace is taken."})

    lora_rank: int = field(default=0, metadata={"help": "Train LoRA adapters of this rank instead of all weights (needs the `peft` package); 0: all weights."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's scale."})
    lora_target_modules: str = field(default="all-linear", metadata={"help": "Modules that get adapters: all-linear, or names such as q_proj,v_proj."})

    learning_rate: float = field(default=1e-4, metadata={"help": "Peak learning rate."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up: a number of steps, or below 1 a share of all steps."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule."})
    max_skipped_steps: int = field(default=10, metadata={"help": "Steps in a row that may be skipped because loss or gradient is not finite; the run then ends, its micro-batches on the disk."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between log lines."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Leave False: rows are not columns of the model."})

    def __post_init__(self):
        if self.preset not in PRESETS:
            raise REDError(f"preset={self.preset!r} is no method; use one of {', '.join(PRESETS)}.")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # pinning serves copies to a GPU, and torch warns where there is none
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every step uses all; looking for unused ones fails where a step reads its rows twice (codi_joint)
        self._check()

    @property
    def needs_trajectories(self) -> bool:
        """Does the objective read the offline teacher?"""
        return self.rationale_weight > 0 or (self.anchor_weight > 0 and self.anchor_teacher == "offline")

    def stage(self, step: int, max_steps: int) -> int | None:
        """How many latent steps there are after `step` optimiser steps while the curriculum lasts; None: all, for the whole rationale."""
        if self.target != "latent" or self.latent_steps < 2 or step >= self.curriculum * max_steps:
            return None
        return 1 + int(step / (self.curriculum * max_steps) * (self.latent_steps - 1))

    def layers_of(self, name: str, depth: int) -> list[int]:
        """Indices among `depth` = L + 1 states of the layers that the setting `name`, `anchor_layers` or `rationale_layers`, stands for.

        Raises:
            REDError: it names none, or one that is not there.
        """
        given = getattr(self, name)
        if given == "all":
            return list(range(depth))
        chosen = [int(part) for part in given.split(",") if part.strip().isdigit()]
        if not chosen or max(chosen) >= depth or len(set(chosen)) != len(given.split(",")):
            raise REDError(f"{name}={given!r}: use all, or numbers from 0 (the embedding) to {depth - 1} with commas, each once.")
        return chosen

    def _check(self) -> None:
        """Refuse what can be refused without a model."""
        def require(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise REDError(f"{name}={getattr(self, name)!r}: {expected}.")

        require(self.target in TARGETS, "target", f"use one of {', '.join(TARGETS)}")
        require(self.latent_steps >= 0, "latent_steps", "must not be negative")
        require((self.latent_steps > 0) == (self.target == "latent"), "latent_steps", "must be above 0 with target=latent, and 0 with the others")
        for name in ("rationale_weight", "second_order_weight", "anchor_weight", "cot_weight"):
            require(getattr(self, name) >= 0, name, "must not be negative")
        for name in ("rationale_weight", "anchor_weight", "cot_weight"):
            require(self.target == "latent" or not getattr(self, name), name, f"aligns latent steps, and target={self.target!r} has none; use 0")
        require(self.anchor_distance in DISTANCES, "anchor_distance", f"use one of {', '.join(DISTANCES)}")
        require(self.anchor_teacher in ("offline", "self"), "anchor_teacher", "use offline or self")
        require(0 <= self.curriculum <= 1, "curriculum", "is a share of the training, from 0 to 1")
        require(0 < self.energy <= 1, "energy", "must lie above 0 and not above 1")
        require(0 <= self.projection_dropout < 1, "projection_dropout", "must lie between 0 and 1")
        require(self.max_length >= 2, "max_length", "a row needs at least 2 tokens")
        require(self.lora_rank >= 0, "lora_rank", "must not be negative; 0 trains all weights")
        require(self.max_skipped_steps >= 1, "max_skipped_steps", "must be at least 1")
        require(not self.fp16, "fp16", "a gradient scaler makes gradients infinite by design, and such steps are skipped and counted here; use bf16=True")
        require(not self.fsdp, "fsdp", "latent steps under FSDP are not supported yet; use one GPU, or data parallel (torchrun)")
        require(not self.deepspeed, "deepspeed", "latent steps under DeepSpeed are not supported yet; use one GPU, or data parallel (torchrun)")
        require(not self.gradient_checkpointing, "gradient_checkpointing",
                "it turns off the key/value cache that latent steps live on; use a smaller micro-batch")
        require(not self.remove_unused_columns, "remove_unused_columns", "must stay False; rows are not columns of the model")
        require(self.label_smoothing_factor == 0, "label_smoothing_factor", "must be 0; the losses are red's own")
