"""Trains the example's explicit teacher: `python -m red.lori.demo.train_teacher --out DIR`.

A Llama of two layers learns to follow the table aloud, by the preset explicit_cot of red's own trainer, from random weights. The look-up appears after some 600
steps, all at once; the embedded teacher had 1500, and 700 more with `--start` at a lower learning rate.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from red.lori.demo.problems import ANSWER_PREFIX, build_tokenizer, problems
from red.lori.distillation import distill
from red.lori.evaluate import accuracy
from red.lori.files import load
from red.report.provenance import commit, device, versions, write_json

BATCH = 64


def build_model(tokenizer, seed: int) -> LlamaForCausalLM:
    """An untrained teacher: 2 layers of hidden size 64, 4 heads of 16, untied head."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, head_dim=16,
        max_position_embeddings=128, tie_word_embeddings=False, rms_norm_eps=1e-6, pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, attn_implementation="sdpa"))  # pyrefly: ignore[unexpected-keyword] - of every configuration
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.3 if "embed_tokens" in name else weight.shape[1] ** -0.5)
    return model


def train(folder: Path, *, seed: int, steps: int, learning_rate: float, start: Path | None = None) -> dict:
    """Trains a teacher, from random weights or from those in `start`, writes it to `folder` with `training.json`, whose content it returns."""
    torch.set_num_threads(1)  # sums in one order: the same bits every time
    tokenizer, began = build_tokenizer(), time.time()
    model = build_model(tokenizer, seed) if start is None else load(start, dtype=torch.float32)[0].model
    with tempfile.TemporaryDirectory() as place:
        result = distill(model, problems("train", steps * BATCH // 3, seed), tokenizer=tokenizer, preset="explicit_cot",
                         output_dir=f"{place}/run", answer_prefix=ANSWER_PREFIX, per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=learning_rate, adam_beta2=0.98,
                         weight_decay=0.01, warmup_steps=50, lr_scheduler_type="warmup_stable_decay",
                         lr_scheduler_kwargs={"num_decay_steps": steps * 3 // 10}, logging_steps=100, save_strategy="no", report_to="none", seed=seed, use_cpu=True)
        seconds = time.time() - began
        shutil.copytree(result.path, folder)
    scores = {split: accuracy(result.model, tokenizer, problems(split, 500), result.trainer.facts) for split in ("validation", "test")}
    record = {"command": " ".join(["python -m red.lori.demo.train_teacher", *sys.argv[1:]]), "seed": seed, "steps": steps, "batch": BATCH,
              "learning_rate": learning_rate, "seconds": round(seconds), "problems_per_figure": 500,
              "parameters": sum(p.numel() for p in result.model.parameters()), "scores": scores, "commit": commit(), "device": f"{device('cpu')}, 1 thread", "versions": versions()}
    if start is not None:
        record["started_from"] = json.loads((start / "training.json").read_text())
    write_json(folder / "training.json", record)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains the explicit teacher of LoRi's embedded example on one CPU thread.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, its tokenizer and training.json; must not exist")
    parser.add_argument("--seed", type=int, default=1, help="of the weights and the problems")
    parser.add_argument("--steps", type=int, default=1500, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="AdamW's peak (default: %(default)s)")
    parser.add_argument("--start", type=Path, help="an earlier --out to go on from")
    args = parser.parse_args()
    record = train(args.out, seed=args.seed, steps=args.steps, learning_rate=args.learning_rate, start=args.start)
    print(record["scores"])
    if record["scores"]["validation"]["accuracy"] < 0.98:
        sys.exit("validation accuracy is below .98: try another --seed or more --steps")


if __name__ == "__main__":
    main()
