"""Does a checkpoint mean to others what it meant to us? Run as `python -m red.sharing.preflight FOLDER REFERENCE` in a fresh process.

The process knows only the folder: it loads tokenizer and model as any user of transformers does, without remote code, and compares
logits with those the student gave in memory. It prints one JSON line: what was found, or `{"error": …}`. `red.sharing.export` reads it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

PROBE_ROWS, PROBE_LENGTH, PROMPT, GENERATED = 2, 16, 4, 4
# Largest |difference of logits| over largest |logit|. Both sides do the same sums in the same dtype on one machine, so it is 0 as a
# rule; another number of threads may round differently, by a few units in the last place of the dtype.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def probe_ids(vocab_size: int, max_positions: int) -> Tensor:
    """The fixed random ids `[2, ≤ 16]` on which logits are compared."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (PROBE_ROWS, min(PROBE_LENGTH, max_positions)), generator=generator)


@torch.no_grad()
def probe(model) -> dict[str, Tensor]:
    """`ids` and the model's fp32 `logits` on them."""
    ids = probe_ids(model.config.vocab_size, model.config.max_position_embeddings).to(model.device)
    return {"ids": ids.cpu(), "logits": model(input_ids=ids, use_cache=False).logits.float().cpu()}


def probe_tokenizer(tokenizer) -> dict:
    """What a reloaded tokenizer must agree in: its hash, and the ids it reads a text as that was made of its own vocabulary."""
    from red.data.loading import tokenizer_hash

    text = "The answer: 4 + 7 = 11.\n" + tokenizer.decode(probe_ids(len(tokenizer), PROBE_LENGTH)[0], skip_special_tokens=True)
    return {"class": type(tokenizer).__name__, "hash": tokenizer_hash(tokenizer), "text": text, "ids": tokenizer(text)["input_ids"]}


def run_preflight(folder: Path, reference: Path) -> dict:
    """Start the fresh process and return what it found; never raises for what it finds."""
    package_parent = str(Path(__file__).resolve().parents[2])
    paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    # on the CPU whatever the training ran on, and without a network: only the folder may answer
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
                   "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads()), "TOKENIZERS_PARALLELISM": "false"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):  # it is no worker of the caller's group
        environment.pop(name, None)
    done = subprocess.run([sys.executable, "-m", "red.sharing.preflight", str(folder), str(reference)], env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    try:
        return json.loads(lines[-1])
    except (IndexError, json.JSONDecodeError):
        return {"error": f"the fresh process ended with {done.returncode}: {done.stderr.strip()[-1500:] or 'no message'}"}


def check(folder: str, reference: str) -> dict:
    """What the fresh process does. The reference holds `ids`, `logits` and, as metadata, what the folder must say of itself."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with safe_open(reference, "pt") as file:
        expected, ids, logits = file.metadata(), file.get_tensor("ids"), file.get_tensor("logits")

    if "tokenizer" in expected:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        wanted, given = json.loads(expected["tokenizer"]), probe_tokenizer(tokenizer)
        if given["hash"] != wanted["hash"]:
            return {"error": "the reloaded tokenizer has another vocabulary or other special tokens"}
        # transformers takes its own Qwen2Tokenizer for every qwen2 folder, whatever class the folder names
        if tokenizer(wanted["text"])["input_ids"] != wanted["ids"]:
            return {"error": f"the reloaded tokenizer, a {type(tokenizer).__name__}, reads text otherwise than the {wanted['class']} in memory; "
                             "export without it (tokenizer=None), or a Qwen2 student with as_llama=True"}
    model, loading = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False, output_loading_info=True)
    model.eval()
    wrong = {kind: sorted(map(str, loading[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if loading.get(kind)}
    if wrong:
        return {"error": f"the weights do not fit the config: {wrong}"}
    facts = {"dtype": str(model.dtype), "tied": str(model.get_input_embeddings().weight is model.get_output_embeddings().weight)}
    for name, value in facts.items():
        if expected[name] != value:
            return {"error": f"{name} is {value} after reloading; it was {expected[name]}"}

    difference = (probe(model)["logits"] - logits).abs().max().item()
    allowed = TOLERANCE[model.dtype] * max(logits.abs().max().item(), 1.0)
    if not difference <= allowed:  # NaN fails too
        return {"error": f"the reloaded model's logits differ by {difference:.3g} (allowed {allowed:.3g})"}
    generated = model.generate(ids[:1, :PROMPT], attention_mask=torch.ones(1, PROMPT, dtype=torch.long), max_new_tokens=GENERATED,
                               min_new_tokens=GENERATED, do_sample=False, pad_token_id=0)
    return {"max_abs_logit_difference": difference, "generated": generated[0, PROMPT:].tolist()}


def main(arguments: list[str]) -> int:
    try:
        found = check(*arguments)
    except Exception as error:  # noqa: BLE001 - whatever stops another tool from loading it is the answer
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
