"""The linear auto-encoder in which RED's paper (arXiv 2605.29327) explains the collapse, on the states of our teacher.

    L(Q, O) = |X - X Q O|² / 2n          X [n, d] states of the teacher, Q [d, d'], O [d', d], Adam

The paper trains it from three starts and reports the loss and the effective rank of the reconstruction `X Q O`: a random start ends with a high loss and
a low rank, an orthogonal one in the middle, the selection of active channels low and high. It does not say which layer's states, how they are scaled, nor
the batches. Here: each of the L + 1 states of the residual stream by itself, divided by its root mean square over everything, full batches, figures as
means over the states, and the loss as the share of the energy that is lost, |X - X Q O|² / |X|².
"""

from __future__ import annotations

import torch
from torch import Tensor

from red.demo.experiment import StudentRun, calibration_rows, run_config, teacher_and_tokenizer
from red.demo.suite import CORPORA, corpus_of
from red.evaluate import encode, evaluating, pad
from red.example import tokenized
from red.prepare import calibration_batches, ready_calibration, start_maps
from red_kernels import erank

NAMES = ("explained", "activation", "pca", "random", "balanced", "random_selection", "orthogonal_shared", "magnitude", "variance", "orthogonal")
TOKENS = 4169  # the paper's
LEARNING_RATE = 1e-4  # the paper's
STEPS = (0, 100, 1000)  # of Adam, at which the figures are taken: the paper's 100 epochs are 100 full batches, or many more small ones
EMBEDDING = "model.embed_tokens.weight"


def states(model, tokenizer, tokens: int = TOKENS, corpus: str = "chains") -> list[Tensor]:
    """L + 1 tensors [tokens, d]: the stream after the embedding and after each layer on held-out text, each of mean square 1."""
    rows = sorted((ids for ids, _ in encode(tokenizer, tokenized(CORPORA[corpus].documents(2, "test", 0.5), tokenizer, tokens))), key=len)
    seen: list[list[Tensor]] = []
    with evaluating(model):
        for place in range(0, len(rows), 64):
            ids, mask = pad(rows[place : place + 64], model, tokenizer.pad_token_id, side="right")
            found: list[Tensor] = []
            layers = model.model.layers
            handles = [layers[0].register_forward_pre_hook(lambda module, args, found=found: found.append(args[0]))]
            handles += [layer.register_forward_hook(lambda module, args, output, found=found: found.append(output)) for layer in layers]
            try:
                model.model(input_ids=ids, attention_mask=mask, use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
            seen.append([state[mask.bool()] for state in found])
    whole = [torch.cat(state)[:tokens].float() for state in zip(*seen, strict=True)]
    return [state / state.square().mean().sqrt() for state in whole]


def pair(start: str, width: int, seed: int, teacher, tokenizer, corpus: str = "chains") -> tuple[Tensor, Tensor]:
    """`(Q [d, d'], O [d', d])` as a start begins: `Q` its embedding's map. `O` is the map of a module of its own where a start has one for each
    (random, orthogonal), `Qᵀ` where the columns of `Q` are orthonormal, else the linear estimate from `X Q`."""
    run = StudentRun(start=start, learning_rate=0.0, seed=seed, hidden_size=width, options={"start_fit": "none"}, corpus=corpus,
                     length=CORPORA[corpus].length)
    config, rows = run_config(run, teacher, "unused", "cpu"), calibration_rows(run, tokenizer)
    calibration = ready_calibration(teacher, config, rows=rows, tokenizer=tokenizer)
    down = start_maps(teacher, config, calibration, calibration_batches(rows, config.calibration_samples)).maps
    q = down[EMBEDDING].double()
    if start in ("random", "orthogonal"):
        o = down["model.layers.0.self_attn.o_proj.weight"].double()  # B [d', d], independent of Q
    elif (q.T @ q - torch.eye(width, dtype=q.dtype)).abs().max() < 1e-6:
        o = q.T
    else:
        covariance = calibration.covariance if calibration.covariance is not None else calibration.point_covariance.double().mean(0)
        o = torch.linalg.solve(q.T @ covariance @ q, q.T @ covariance)
    return q.float(), o.float()


def train(x: Tensor, q: Tensor, o: Tensor, *, steps: tuple[int, ...] = STEPS, learning_rate: float = LEARNING_RATE) -> list[dict]:
    """`{"step", "loss", "erank"}` at each of `steps` of Adam on full batches."""
    second = x.T @ x / len(x)  # |X - XM|² = n tr[(I - M)ᵀ Σ (I - M)]
    total, eye = second.diagonal().sum(), torch.eye(len(second))
    q, o = q.clone().requires_grad_(), o.clone().requires_grad_()
    optimizer = torch.optim.Adam([q, o], lr=learning_rate)
    found = []
    for step in range(max(steps) + 1):
        error = eye - q @ o
        loss = (error * (second @ error)).sum() / 2
        if step in steps:
            with torch.no_grad():
                found.append({"step": step, "loss": float(2 * loss / total), "erank": float(erank(x @ q @ o, invalid="nan"))})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return found


def measure(start: str, width: int, seed: int, teacher_path: str, steps: tuple[int, ...] = STEPS, tokens: int = TOKENS) -> dict:
    """`{"steps", "loss", "erank"}`, each a list with an entry for each of `steps`, means over the states; `teacher_erank`, that of the states themselves."""
    teacher, tokenizer = teacher_and_tokenizer(teacher_path, "cpu")
    corpus = corpus_of(teacher_path)
    layers = states(teacher, tokenizer, tokens, corpus)
    down, up = pair(start, width, seed, teacher, tokenizer, corpus)
    runs = [train(x, down, up, steps=steps) for x in layers]
    return {"steps": list(steps), **{key: [sum(run[place][key] for run in runs) / len(runs) for place in range(len(steps))] for key in ("loss", "erank")},
            "teacher_erank": sum(float(erank(x, invalid="nan")) for x in layers) / len(layers)}
