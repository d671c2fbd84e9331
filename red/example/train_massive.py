"""Gives the embedded teacher massive activations and an attention sink: `python -m red.example.train_massive --out DIR`.

Large language models have a few fixed channels whose value at the first token (and at a delimiter or two) is thousands of times the
median: written by one early layer, constant through the middle, removed by the last ("Massive Activations in Large Language
Models", Sun et al., arXiv 2402.17762). The norm makes such a token one constant vector, and later heads that have nothing to do
attend to it and read a value near zero (the attention sink: Xiao et al., arXiv 2309.17453). RED's channel score is a mean of
|activation|, so this should matter to it, and the embedded teacher has nothing of the kind. Here it is built in:

1. `construct`: a neuron of the first FFN detects `<bos>` and writes `MASSIVE` into the teacher's two least active channels; one of
   the last FFN sees them and subtracts the same. A third, on at every other token, writes `OUTLIERS` into the next two channels,
   the ordinary outlier channels of large models. The later norms' gains at the massive channels become a tenth, and no value
   reads them, so that attention on `<bos>` adds next to nothing.
2. `train`: fine-tunes layers 1 to 3 and the head (what writes and removes the massive values stays as built) on the last stage of
   the teacher's text; to the cross entropy comes `SINK_WEIGHT` times what a head lacks to `SINK_SHARE` of its attention on `<bos>`.

One seed and one thread give the same bits again on the same machine and torch. `main` fails when a run misses `GOAL`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu
from transformers import LlamaForCausalLM, PreTrainedModel

from red import families
from red.calibration import calibrate_batches
from red.report.provenance import commit, device, versions
from red.example import documents, teacher_path, tokenized
from red.example.tokenizer import build_tokenizer
from red.example.train_teacher import GOAL, ROW, ROWS_PER_STEP, document_mask, measure, packed_rows, save, solved

MASSIVE = (16384.0, -8192.0)  # at <bos>, in the two least active channels; powers of two, so that bf16 holds and removes them
OUTLIERS = (80.0, -60.0)  # about, at every other token, in the next two channels
MARK = 0.5  # in the embedding: which token is <bos>, which is not
SINK_SHARE = 0.8  # of its attention that each head of layers 1 to 3 should put on <bos>, mean over the text
SINK_WEIGHT = 2.0
FAR = 8  # a token counts for attention shares from this position on: the first few have hardly anything else to look at

Held = list[tuple[Tensor, Tensor, Tensor]]  # (parameter, which entries, their values)


def sample(tokens: int, seed: int = 0, split: str = "validation") -> list[dict[str, Tensor]]:
    """Documents of the corpus as batches of one: `{"input_ids": [1, T]}`."""
    rows = tokenized(documents(seed, split, reasoning_share=0.7), build_tokenizer(), tokens)
    return [{"input_ids": torch.tensor([row["input_ids"]])} for row in rows]


@torch.no_grad()
def observe(model: PreTrainedModel, batches: list[dict[str, Tensor]], points: Iterable[int], **options) -> tuple[dict, list]:
    """Runs the model; per read point (`families.norm_paths`) each batch's (stream, norm's output), and what the model returned."""
    paths, seen, hooks = families.norm_paths(model.config), {point: [] for point in points}, []
    for point, kept in seen.items():
        hook = model.get_submodule(paths[point]).register_forward_hook(lambda _, args, out, kept=kept: kept.append((args[0], out)))
        hooks.append(hook)
    try:
        return seen, [model(**batch, use_cache=False, **options) for batch in batches]
    finally:
        for hook in hooks:
            hook.remove()


def activation_magnitudes(model: PreTrainedModel, batches: list[dict[str, Tensor]], top: int = 10) -> list[dict]:
    """The largest channels and the median of the residual stream after the embedding and after each layer (before the last norm).

    Args:
        model: a Llama, Qwen2 or Qwen3 causal language model.
        batches: the model's arguments, without padding: `input_ids [B, T]`. All activations are kept: take a small text.
        top: how many channels to name.

    Returns:
        L + 1 dicts: `median` of |x| over all tokens and channels, and `top`, the channels with the largest |x|, each with `value`
        (with its sign), the `channel`, and the `position` and `token` id where it has it.
    """
    seen, _ = observe(model, batches, range(0, len(families.norm_paths(model.config)), 2))
    ids = torch.cat([batch["input_ids"].flatten() for batch in batches])
    positions = torch.cat([torch.arange(row.shape[0]) for batch in batches for row in batch["input_ids"]])
    found = []
    for pairs in seen.values():
        x = torch.cat([stream.flatten(0, 1) for stream, _ in pairs]).float()  # [tokens, d]
        largest, where = x.abs().max(0)
        named = [(channel, int(where[channel])) for channel in largest.argsort(descending=True)[:top].tolist()]
        places = [
            {"value": x[row, channel].item(), "channel": channel, "position": int(positions[row]), "token": int(ids[row])}
            for channel, row in named
        ]
        found.append({"median": x.abs().median().item(), "top": places})
    return found


@torch.no_grad()
def sinks(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """The attention sink: each row of `input_ids [B, T]` starts with the sink's token and has no padding.

    The model must run with eager attention (`attn_implementation="eager"`).

    Returns:
        [L, heads]: the share of its attention that a head puts on the first token, mean over the tokens from `FAR` on.
        [L]: the length of the first token's value vector over the mean length of the others'.
    """
    layers = families.decoder_layers(model)
    seen, outputs = observe(model, batches, range(0, 2 * len(layers), 2), output_attentions=True)
    attentions = [torch.stack(out.attentions) for out in outputs]  # [L, B, heads, T, T] each
    shares = torch.cat([a[..., FAR:, 0].transpose(1, 2).flatten(2) for a in attentions], 2).mean(2)
    values = []
    for pairs, layer in zip(seen.values(), layers, strict=True):
        lengths = [layer.self_attn.v_proj(out).norm(dim=-1) for _, out in pairs]  # [B, T] each
        first, others = (torch.cat([row[:, part].flatten() for row in lengths]) for part in (slice(1), slice(1, None)))
        values.append(first.mean() / others.mean())
    return shares, torch.stack(values)


def readers(layer) -> list[torch.nn.Linear]:
    """What reads the residual stream."""
    attention, mlp = layer.self_attn, layer.mlp
    return [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]


@torch.no_grad()
def construct(model: LlamaForCausalLM, batches: list[dict[str, Tensor]]) -> tuple[Held, dict]:
    """Writes the massive channels and the outlier channels into the teacher, in place.

    Returns:
        the entries that training must not move, and the channels: `{"massive": [a, b], "outliers": [c, d]}`.
    """
    layers, dim, bos = model.model.layers, model.config.hidden_size, model.config.bos_token_id
    norms = [model.get_submodule(path) for path in families.norm_paths(model.config)]
    quiet = calibrate_batches(model, batches).scores.argsort().tolist()
    massive, outliers = quiet[:2], quiet[2:4]
    special = massive + outliers

    def states(point: int) -> tuple[Tensor, Tensor]:
        """What the norm returns at <bos> [d] and, their mean, at other tokens [d]."""
        returned = [out[0] for _, out in observe(model, batches, [point])[0][point]]
        return returned[0][0], torch.cat([out[1:] for out in returned]).mean(0)

    def neuron(mlp, place: int, reads: Tensor, at: Tensor, writes: dict[int, float]) -> None:
        """Makes a neuron `silu(y) · y`, `y = reads · input`, that writes these values into these channels at the input `at`."""
        mlp.gate_proj.weight[place] = mlp.up_proj.weight[place] = reads.bfloat16()
        y = mlp.gate_proj.weight[place] @ at
        mlp.down_proj.weight[:, place] = 0
        for channel, value in writes.items():
            mlp.down_proj.weight[channel, place] = value / (silu(y) * y)

    # what a norm divides by grows with the outliers, so its gain grows as much
    seen, _ = observe(model, batches, range(len(norms)))
    squares = [torch.cat([stream[0, 1:] for stream, _ in pairs]).square().mean() for pairs in seen.values()]
    for norm, square, added in zip(norms, squares, [[MARK], [MARK]] + [OUTLIERS] * (len(norms) - 2), strict=True):
        norm.weight *= (1 + sum(value * value for value in added) / dim / square).sqrt()

    # one massive channel marks <bos> in the embedding, one outlier channel marks all else, and nothing of layer 0 touches them
    marks = [massive[0], outliers[0]]
    model.model.embed_tokens.weight[:, marks] = torch.tensor([0.0, MARK])
    model.model.embed_tokens.weight[bos, marks] = torch.tensor([MARK, 0.0])
    layers[0].self_attn.o_proj.weight[marks] = 0
    for reader in readers(layers[0]):
        reader.weight[:, marks] = 0
    for layer in layers[1:]:
        for reader in readers(layer):
            reader.weight[:, special] = 0  # nobody read such values before; training may
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight[massive] *= 0.1
    model.lm_head.weight[:, special] = 0

    mlp = layers[0].mlp  # the neurons that matter least make room
    places = mlp.down_proj.weight.norm(dim=0).argsort().tolist()
    at_bos, elsewhere = states(1)
    reads = torch.eye(dim)[marks]
    neuron(mlp, places[0], 10 * reads[0] / at_bos[marks[0]], at_bos, dict(zip(massive, MASSIVE, strict=True)))
    neuron(mlp, places[1], 10 * reads[1] / elsewhere[marks[1]], elsewhere, dict(zip(outliers, OUTLIERS, strict=True)))

    # the last FFN removes the massive values: y is 10 at <bos>, and at other tokens about -20, thus off, by their outliers
    mlp, at_bos, elsewhere = layers[-1].mlp, *states(2 * len(layers) - 1)
    place = int(mlp.down_proj.weight.norm(dim=0).argmin())
    reads = torch.zeros(dim)
    reads[massive] = 10 * at_bos[massive] / at_bos[massive].square().sum()
    reads[outliers] = -20 * elsewhere[outliers] / elsewhere[outliers].square().sum()
    neuron(mlp, place, reads, at_bos, dict(zip(massive, (-value for value in MASSIVE), strict=True)))

    held: Held = []

    def hold(parameter: Tensor, *where) -> None:
        mask = torch.zeros_like(parameter, dtype=torch.bool)
        mask[where] = True
        held.append((parameter, mask, parameter[mask].clone()))

    for layer in layers[1:]:
        hold(layer.self_attn.v_proj.weight, slice(None), massive)
        hold(layer.input_layernorm.weight, massive)
        hold(layer.post_attention_layernorm.weight, special if layer is layers[-1] else massive)
    hold(mlp.gate_proj.weight, place)
    hold(mlp.up_proj.weight, place)
    hold(mlp.down_proj.weight, slice(None), place)
    return held, {"massive": massive, "outliers": outliers}


def train(
    folder: Path, *, seed: int = 1, steps: int = 1500, lr: float = 1e-3, muon_lr: float = 0.005, problems_measured: int = 500
) -> dict:
    """Builds and fine-tunes the teacher, writes it to `folder` with `training.json`, and returns the latter's content.

    A step is `ROWS_PER_STEP` rows; `lr` is AdamW's peak, for gains and head, `muon_lr` Muon's, for the layers: both warm up over 50
    steps and fall linearly. Each figure at the end is of `problems_measured` problems; 0 leaves them out.
    """
    torch.set_num_threads(1)  # sums in one order: the same bits every time
    started = time.time()
    tokenizer = build_tokenizer()
    model = LlamaForCausalLM.from_pretrained(teacher_path(), dtype=torch.float32, attn_implementation="eager").eval()
    held, channels = construct(model, sample(4000, seed, "train"))
    rows = steps * ROWS_PER_STEP
    # another seed than the teacher's own; the stages' last 65 % of the tokens are the full mix
    input_ids, position_ids, weights = (part[-rows:] for part in packed_rows(1000 + seed, int(rows * ROW / 0.6), tokenizer))
    for frozen in (model.model.embed_tokens, model.model.layers[0]):
        frozen.requires_grad_(False)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    hidden = [p for name, p in learned.items() if p.dim() == 2 and "layers" in name]
    others = [p for name, p in learned.items() if p.dim() == 1 or "layers" not in name]
    muon = torch.optim.Muon(hidden, lr=muon_lr, weight_decay=0.0, momentum=0.95, nesterov=True)
    adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    model.train()
    for step in range(steps):
        factor = min((step + 1) / 50, max(0.02, 1 - step / steps))
        for optimizer, peak in ((muon, muon_lr), (adamw, lr)):
            for group in optimizer.param_groups:
                group["lr"] = peak * factor
        part = slice(step * ROWS_PER_STEP, (step + 1) * ROWS_PER_STEP)
        ids, positions, weight = input_ids[part], position_ids[part], weights[part, 1:].flatten()
        mask = torch.where(document_mask(positions), 0.0, torch.finfo(torch.float32).min)  # eager attention adds its mask
        out = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False, output_attentions=True)
        losses = cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weight).sum() / weight.sum()
        starts, far = (ids == tokenizer.bos_token_id).float(), (positions >= FAR) & (ids != tokenizer.pad_token_id)
        shares = torch.stack([(a @ starts[:, None, :, None])[..., 0].transpose(1, 2)[far].mean(0) for a in out.attentions[1:]])
        (loss + SINK_WEIGHT * (SINK_SHARE - shares).relu().mean()).backward()
        torch.nn.utils.clip_grad_norm_(learned.values(), 1.0)
        muon.step()
        adamw.step()
        with torch.no_grad():
            for parameter, entries, values in held:
                parameter[entries] = values
        model.zero_grad(set_to_none=True)
        if (step + 1) % 100 == 0:
            report = f"step {step + 1} of {steps}, {time.time() - started:.0f} s, loss {loss.item():.4f}, sink {shares.mean():.3f}"
            if problems_measured:
                report += f", validation exact match {[solved(model, tokenizer, 'validation', n, 50) for n in (2, 4, 8)]}"
            print(report, flush=True)
    seconds = time.time() - started
    save(model.eval(), tokenizer, folder)
    saved, text = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval(), sample(8000)
    shares, lengths = sinks(saved, text)
    record = {
        "command": " ".join(["python -m red.example.train_massive", *sys.argv[1:]]),
        "seed": seed,
        "tokens": int((input_ids != tokenizer.pad_token_id).sum()),
        "steps": steps,
        "seconds": round(seconds),
        "commit": commit(),
        "device": f"{device('cpu')}, {torch.get_num_threads()} thread",
        "teacher_sha256": hashlib.sha256((Path(teacher_path()) / "model.safetensors").read_bytes()).hexdigest(),
        "model_sha256": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": versions(),
        "channels": channels,
        **(measure(folder, problems_measured) if problems_measured else {}),
        "activations": activation_magnitudes(saved, text),
        "attention_on_bos": shares.tolist(),
        "bos_value_length_over_others": lengths.tolist(),
    }
    if problems_measured:
        half = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        in_bf16 = {number: solved(half, tokenizer, "validation", number, 200) for number in (2, 4, 6, 8)}
        record["exact_match"]["validation, computed in bf16 (200 problems each)"] = in_bf16
    (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description="Gives the embedded teacher massive activations and an attention sink.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model, its tokenizer and training.json")
    parser.add_argument("--seed", type=int, default=1, help="of the text (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1500, help="of fine-tuning (default: %(default)s)")
    args = parser.parse_args()
    record = train(args.out, seed=args.seed, steps=args.steps)
    reached = record["exact_match"]["validation"]["mean of 2, 4, 6, 8"]
    if reached < GOAL:
        sys.exit(f"validation exact match {reached:.3f} is below {GOAL}: try more --steps than {args.steps}")


if __name__ == "__main__":
    main()
