"""The students as GGUF in llama.cpp, against transformers' greedy tokens and logits; and the Qwen2 trap with its way round.

    python -m benchmarks.clients.gguf_client FOLDER      after benchmarks.clients.students; needs gguf and llama-cpp-python
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import llama_cpp
import numpy as np

from benchmarks.clients.gguf_writer import write


@contextmanager
def captured(path: Path):
    """What llama.cpp prints goes to a file: it writes to the file descriptor, not to sys.stderr."""
    kept = os.dup(2)
    with path.open("w") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def compare(folder: Path, name: str, reference: dict) -> None:
    output = folder / f"{name}.gguf"
    write(folder / name, output)
    log = folder / f"gguf_{name}.log"
    print(f"\n{name}: {output.stat().st_size:,} bytes of GGUF")
    try:
        with captured(log):
            model = llama_cpp.Llama(str(output), n_ctx=256, logits_all=False, n_threads=1, type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32)
    except Exception as error:
        print(f"  does not load: {type(error).__name__}: {error}")
        print(*(f"  | {line}" for line in log.read_text().splitlines() if "error" in line), sep="\n")
        return
    with captured(log):
        same, largest, tokenised = 0, 0.0, 0
        for question, ids, expected in zip(reference["questions"], reference["prompts"], reference[name], strict=True):
            model.reset()
            tokenised += model.tokenize(f" {question}".encode(), add_bos=True) == ids[1:]  # it puts no <bos> in front for this kind of vocabulary
            model.eval(ids)
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), shape=(model.n_vocab(),)).copy()
            largest = max(largest, float(np.abs(logits - np.array(expected["logits"])).max() / np.abs(expected["logits"]).max()))
            given = []
            for token in model.generate(ids, temp=0.0, repeat_penalty=1.0):
                given.append(token)
                if token == model.token_eos() or len(given) == len(expected["greedy"]):
                    break
            same += given == expected["greedy"]
    count = len(reference["prompts"])
    print(f"  loaded; text gives the same ids for {tokenised} of {count} prompts; largest difference of logits over the largest logit {largest:.2g}; "
          f"greedy tokens equal for {same} of {count}")
    if name == "llama":
        for question, ids, answer in list(zip(reference["questions"], reference["prompts"], reference["answers"], strict=True))[::3]:
            with captured(log):
                said = model.create_completion(ids, max_tokens=40, temperature=0.0, repeat_penalty=1.0)["choices"][0]["text"].strip()
            print(f"  {question}\n    -> {said}   [{'right' if said == answer else 'wrong: ' + answer}]")
    with captured(log):
        model.close()


def main(folder: Path) -> None:
    print(f"llama-cpp-python {llama_cpp.__version__}, gguf {version('gguf')}; fp32 weights and cache")
    reference = json.loads((folder / "reference.json").read_text())
    for name in ("llama", "qwen2", "qwen2_as_llama"):
        compare(folder, name, reference)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
