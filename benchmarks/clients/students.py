"""Make the students that the clients load, and write down what transformers computes for them.

    python -m benchmarks.clients.students FOLDER

FOLDER/llama            the embedded teacher at half its width, by red.compress: it answers questions
FOLDER/qwen2            a random Qwen2 with biases whose head_dim is not hidden_size // heads, as every Qwen2 student's
FOLDER/qwen2_as_llama   the same weights, exported as a Llama
FOLDER/held_out.txt     text that neither teacher nor student was made from
FOLDER/reference.json   prompts, greedy tokens, and logits of the last prompt token
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import red
from red.example import documents, problems, teacher_path
from red import export

NEW = 40  # tokens that are generated: an 8-step answer has 38


def make(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(teacher_path())
    texts = [document.text for document in islice(documents(7), 600)]
    red.compress(teacher_path(), texts, hidden_size=64, output_dir=str(folder / "compressed"), dtype="float32", max_length=256, calibration_samples=64,
                 report_to="none", use_cpu=True)
    (folder / "compressed" / "student").rename(folder / "llama")
    (folder / "held_out.txt").write_text("\n".join(document.text for document in islice(documents(1, "test"), 120)))
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
                         head_dim=64, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, 0.15)
    export(model, None, folder / "qwen2")  # transformers reads every qwen2 folder with its byte-level tokenizer, and this one has words
    tokenizer.save_pretrained(folder / "qwen2")
    export(model, tokenizer, folder / "qwen2_as_llama", as_llama=True)


@torch.no_grad()
def reference(folder: Path) -> dict:
    """What each student says, from transformers, in fp32."""
    questions = [problem.question for steps in (2, 4, 6, 8) for problem in problems("test", steps, 2)]
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    found = {"questions": questions, "prompts": [tokenizer(question)["input_ids"] for question in questions],
             "answers": [problem.answer for steps in (2, 4, 6, 8) for problem in problems("test", steps, 2)]}
    for name in ("llama", "qwen2", "qwen2_as_llama"):
        model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)
        rows = []
        for ids in found["prompts"]:
            prompt = torch.tensor([ids])
            said = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, pad_token_id=0)[0, len(ids):].tolist()
            rows.append({"greedy": said, "logits": model(prompt).logits[0, -1].tolist()})
        found[name] = rows
    return found


if __name__ == "__main__":
    (place,) = map(Path, sys.argv[1:])
    make(place)
    (place / "reference.json").write_text(json.dumps(reference(place)))
    print(f"{place}: {', '.join(sorted(entry.name for entry in place.iterdir()))}")
