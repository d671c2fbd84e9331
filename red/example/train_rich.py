"""Trains a teacher on the rich corpus: `python -m red.example.train_rich --out DIR --size tiny|small|full`.

A Qwen3 with tied embeddings, normalised queries and keys and grouped heads learns `red.example.rich_corpus` from scratch: Muon for
the hidden matrices, AdamW for the table and the gains, and stages from copying and short chains to the full mix (rich_stream.py).

Chains were learned in the first third and copying before. Look-ups stalled: with relations that lead either always to people or
always to things, every hop between people was right and the thing at the end a guess among those mentioned, for 3000 steps and with
half the text look-ups. 200 steps after documents were mixed in whose relations lead to either (`facts`), both kinds were solved: what
finds people can then learn to find things in two halves, the relation's and the end's.

The text is made in chunks while training, each a function of the seed, its stage and its number alone, and a checkpoint is written
every few minutes: `--resume` goes on from it and, on a CPU, ends with the same bits as a run that was never interrupted. The size
"full" has not been trained yet.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import platform
import sys
import time
from pathlib import Path

import tokenizers
import torch
import transformers
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import GenerationConfig, Qwen3ForCausalLM

from red.report.provenance import commit
from red.report.provenance import device as device_in_words
from red.evaluate import exact_match, forced_exact_match, text_quality
from red.example.corpus import easy_documents, easy_perplexity_limit
from red.example.rich_corpus import KINDS, LEVELS, problems
from red.example.rich_model import SIZES, build_model, build_rich_tokenizer
from red.example.rich_stream import CHUNK_STEPS, Chunks, steps_of
from red.example.train_teacher import ROW, document_mask
from red.files import atomic_write_json

GOAL = 0.95  # validation exact match, mean over the kinds, that makes a teacher


def optimizers(model: Qwen3ForCausalLM, size: str) -> list[tuple[torch.optim.Optimizer, float]]:
    """Each optimizer with its peak learning rate."""
    named = list(model.named_parameters())  # the tied head is not listed again
    hidden = [p for name, p in named if p.dim() == 2 and "layers" in name]
    tables = [p for name, p in named if p.dim() == 2 and "layers" not in name]
    gains = [p for _, p in named if p.dim() == 1]
    shape = SIZES[size]
    muon = torch.optim.Muon(hidden, lr=shape.muon_lr, weight_decay=0.05, momentum=0.95, nesterov=True)
    adamw = torch.optim.AdamW(
        [{"params": tables, "weight_decay": 0.05}, {"params": gains, "weight_decay": 0.0}], lr=shape.lr, betas=(0.9, 0.98)
    )
    return [(muon, shape.muon_lr), (adamw, shape.lr)]


def save(model: Qwen3ForCausalLM, folder: Path) -> None:
    """Writes the model rounded to bf16, with its tokenizer; the model in hand stays fp32."""
    rounded = copy.deepcopy(model).to("cpu", torch.bfloat16)
    rounded.config.dtype = torch.bfloat16
    special = {f"{name}_token_id": getattr(rounded.config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    rounded.generation_config = GenerationConfig(do_sample=False, **special)
    rounded.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes 0600, which an installed package must not have
    build_rich_tokenizer().save_pretrained(folder)


def solved(model: Qwen3ForCausalLM, tokenizer, split: str, kind: str, steps: int, count: int, level: str, *, generate: bool) -> float:
    """The share of `count` held-out problems of a kind and length that the model answers right, greedily."""
    asked = problems(split, kind, steps, count, level=level)
    return (exact_match if generate else forced_exact_match)(model, tokenizer, asked, batch_size=100)["exact_match"]


def measure(folder: Path, level: str, count: int, device: str) -> dict:
    """The saved file, read back and computed with in fp32: exact match by kind and steps, easy text, on both held-out splits."""
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    tokenizer = build_rich_tokenizer()
    found = {"exact_match": {}, "easy": {}, "problems_per_figure": count, "easy_documents_per_figure": 2 * count}
    for split in ("validation", "test"):
        by_kind = {}
        for kind in KINDS:
            fewest, most = LEVELS[level].steps[kind]
            lengths = range(fewest, most + 1, 4 if kind == "copy" else 1)
            by_kind[kind] = {str(n): solved(model, tokenizer, split, kind, n, count, level, generate=True) for n in lengths}
            by_kind[kind]["mean"] = sum(by_kind[kind].values()) / len(lengths)
        by_kind["mean"] = sum(by_kind[kind]["mean"] for kind in KINDS) / len(KINDS)
        found["exact_match"][split] = by_kind
        quality = text_quality(model, tokenizer, easy_documents(split, 2 * count))
        found["easy"][split] = {"accuracy": quality["easy_accuracy"], "perplexity": quality["easy_perplexity"]}
    found["easy"]["perplexity limit"] = easy_perplexity_limit()
    return found


def _write_checkpoint(folder: Path, **state) -> None:
    torch.save(state, folder / "checkpoint.pt.tmp")
    os.replace(folder / "checkpoint.pt.tmp", folder / "checkpoint.pt")


def train(
    folder: Path,
    size: str = "small",
    *,
    seed: int = 1,
    tokens: int | None = None,
    device: str = "cpu",
    bf16: bool = False,
    compiled: bool = False,
    resume: bool = False,
    until: int | None = None,
    checkpoint_every: float = 180.0,
    log_every: int = 200,
    problems_measured: int = 300,
) -> dict | None:
    """Trains one teacher and writes it to `folder` with `training.json`, whose content it returns.

    Args:
        size: a key of `SIZES`.
        tokens: of training text, padding counted; None: the size's own number.
        bf16: compute in bf16 through autocast; parameters, norms and the loss stay fp32.
        compiled: `torch.compile` the model; about 1.5 times as fast with `bf16` on a CPU, after a minute of compiling.
        resume: go on from the checkpoint in `folder`.
        until: stop after this step with a checkpoint, and return None.
        checkpoint_every: seconds.
        log_every: steps between measurements on the validation split; 0 leaves them out.
        problems_measured: for each figure at the end; 0 leaves the measuring out.
    """
    if device == "cpu":
        torch.set_num_threads(1)  # sums in one order: the same bits every time
    shape, level = SIZES[size], SIZES[size].level
    run = {"size": size, "seed": seed, "steps": steps_of(size, tokens), "bf16": bf16}
    steps = run["steps"]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_rich_tokenizer()
    model = build_model(size, tokenizer, seed).to(device)
    pairs = optimizers(model, size)
    first, spent, curve = 0, 0.0, []
    if resume:
        state = torch.load(folder / "checkpoint.pt", map_location=device, weights_only=True)
        if state["run"] != run:
            raise ValueError(f"the checkpoint in {folder} is of {state['run']}, asked for is {run}: give the same settings")
        model.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(pairs, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        first, spent, curve = state["step"], state["seconds"], state["curve"]
    elif (folder / "checkpoint.pt").exists():
        raise ValueError(f"{folder} holds a checkpoint: resume it, or give another folder")
    started = last = time.time()
    forward = torch.compile(model) if compiled else model
    model.train()
    workers = 0 if device == "cpu" else max(1, (os.cpu_count() or 2) - 2)
    loader = DataLoader(Chunks(size, seed, steps, first // CHUNK_STEPS), batch_size=None, num_workers=workers, pin_memory=workers > 0)
    stream = ((chunk, within) for chunk in loader for within in range(CHUNK_STEPS))
    for step, (chunk, within) in enumerate(stream, start=first // CHUNK_STEPS * CHUNK_STEPS):
        if step < first:
            continue
        if step == steps:
            break
        done = step / steps
        factor = min(1.0, (step + 1) / 50) * (1.0 if done < 0.6 else max(0.02, (1 - done) / 0.4))
        for optimizer, peak in pairs:
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        ids, positions, weight = (part[within * shape.rows : (within + 1) * shape.rows] for part in chunk)
        mask = document_mask(positions).to(device, non_blocking=True)
        ids, positions, weight = (part.to(device, non_blocking=True) for part in (ids, positions, weight[:, 1:].flatten()))
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            # with a cache transformers would read packed positions otherwise; see `train_teacher`
            logits = forward(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
        losses = cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in pairs:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        step += 1
        if log_every and (step % log_every == 0 or step == steps):
            point = {"step": step, "seconds": round(spent + time.time() - started), "loss": round(loss.item(), 4)}
            for kind in KINDS:
                fewest, most = LEVELS[level].steps[kind]
                point[kind] = [solved(model, tokenizer, "validation", kind, n, 50, level, generate=False) for n in (fewest, most)]
            curve.append(point)
            print(json.dumps(point), f"of {steps}", flush=True)
        if step == until or step == steps or time.time() - last > checkpoint_every:
            last = time.time()
            state = {"model": model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer, _ in pairs]}
            _write_checkpoint(folder, run=run, step=step, seconds=spent + last - started, curve=curve, **state)
            if step == until:
                return None
    seconds = spent + time.time() - started
    save(model.eval(), folder)
    words = f"{device_in_words(torch.device(device).type)}" + (", 1 thread" if device == "cpu" else "")
    record = {
        "command": " ".join(["python -m red.example.train_rich", *sys.argv[1:]]),
        **run,
        "tokens": steps * shape.rows * ROW,
        "seconds": round(seconds),
        "commit": commit(),
        "device": words,
        "model_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "level": level,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        **(measure(folder, level, problems_measured, device) if problems_measured else {}),
        "curve": curve,
    }
    atomic_write_json(folder / "training.json", record)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a teacher on the rich corpus from scratch.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, its tokenizer, training.json and the checkpoint")
    parser.add_argument("--size", choices=list(SIZES), default="small", help="tiny: for tests; small: one CPU thread; full: a GPU")
    parser.add_argument("--seed", type=int, default=1, help="of the weights and of the text")
    parser.add_argument("--tokens", type=int, help="of training text (default: the size's own number)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="compute in bf16 (default: on a GPU)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the model")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out")
    args = parser.parse_args()
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    bf16 = device != "cpu" if args.bf16 is None else args.bf16
    record = train(
        args.out, args.size, seed=args.seed, tokens=args.tokens, device=device, bf16=bf16, compiled=args.compile, resume=args.resume
    )
    print(json.dumps({key: value for key, value in record.items() if key != "curve"}, indent=2))
    reached = record["exact_match"]["validation"]["mean"]
    if reached < GOAL and args.size != "tiny":
        sys.exit(f"validation exact match {reached:.3f} is below {GOAL}: try another --seed than {args.seed} or more --tokens")


if __name__ == "__main__":
    main()
