"""An independent, plain implementation of what `red` trains: the student as a chain of products, and the two objectives with whole logits.

Written from LRC (arXiv 2505.12781) and its public code's reductions, with torch and transformers only; imports nothing of `red` or
`red_kernels`. Slow and obvious on purpose.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM

MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def plain_student(teacher, hidden_size: int):
    """An ordinary model of the teacher's class and width `hidden_size`; only its shapes and buffers are used."""
    config = type(teacher.config)(**{**teacher.config.to_dict(), "hidden_size": hidden_size,
                                     "head_dim": teacher.model.layers[0].self_attn.head_dim})
    model = AutoModelForCausalLM.from_config(config).to(teacher.dtype).train()
    model.get_input_embeddings().padding_idx = None  # else torch zeroes that row's gradient, and the product has no such rule
    return model


class Chained:
    """The student as products of frozen teacher weights and leaf maps: what LRC wraps its modules in.

    `maps[name]`: `A [d, d']`, `B [d', d]` or a gain `[d']` by the name of the student's parameter; each a leaf that requires a gradient.
    """

    def __init__(self, teacher, maps: dict[str, Tensor]):
        self.teacher = teacher
        self.maps = {name: value.detach().clone().requires_grad_() for name, value in maps.items()}
        self.shell = plain_student(teacher, self.maps["model.norm.weight"].numel())

    def weights(self) -> dict[str, Tensor]:
        """Every parameter of the student; those that the residual width does not touch are the teacher's."""
        weights = {}
        for name, source in self.teacher.named_parameters():
            module, kind = name.rsplit(".", 1)
            own = self.maps.get(f"{module}.weight")
            if module.endswith(WRITERS):
                weights[name] = own @ source.detach()  # B @ W_T, and B @ b_T
            elif kind == "bias" or own is None:
                weights[name] = source.detach()
            elif source.dim() == 1:
                weights[name] = own
            else:
                weights[name] = source.detach() @ own
        return weights

    def __call__(self, weights: dict[str, Tensor] | None = None, **inputs):
        return functional_call(self.shell, self.weights() if weights is None else weights, args=(), kwargs=inputs)


@contextmanager
def watching(model):
    """While open: {(layer, module): (input, output)} of the last forward pass."""
    seen, handles = {}, []
    for index, layer in enumerate(model.model.layers):
        for name in MODULES:
            def hook(_module, args, output, key=(index, name)):
                seen[key] = (args[0], output)
            handles.append(layer.get_submodule(name).register_forward_hook(hook))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def run_both(chained: Chained, batch: dict[str, Tensor]):
    """(teacher logits, teacher taps, student logits, student taps, cross entropy)"""
    # without a cache: with one, transformers takes a packed row for one document
    place = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    with torch.no_grad(), watching(chained.teacher) as teacher_taps:
        teacher_logits = chained.teacher(**place).logits
    with watching(chained.shell) as student_taps:
        output = chained(**place, labels=batch["labels"])
    ce = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    # transformers' own loss is this one, but for its cast of the logits to float32
    torch.testing.assert_close(output.loss.detach().double(), ce.detach().double(), rtol=1e-6, atol=0)
    return teacher_logits, teacher_taps, output.logits, student_taps, ce


def lrc_objective(chained: Chained, batch: dict[str, Tensor], temperature: float = 40.0) -> dict[str, Tensor]:
    """The public LRC code's three terms: ce, kl and taps (to be summed with weights 1, 1, .2)."""
    teacher_logits, teacher_taps, logits, student_taps, ce = run_both(chained, batch)
    kl = F.kl_div(F.log_softmax(logits / temperature, -1), F.softmax(teacher_logits / temperature, -1), reduction="batchmean")
    taps = torch.zeros((), dtype=teacher_logits.dtype)
    for (layer, name), (_, teacher_out) in teacher_taps.items():
        student_in, student_out = student_taps[layer, name]
        path = f"model.layers.{layer}.{name}"
        if name == "self_attn.o_proj":  # compared at the teacher's width, before B is applied
            module = chained.teacher.get_submodule(path)
            student_out = F.linear(student_in, module.weight.detach(), None if module.bias is None else module.bias.detach())
        elif name == "mlp.down_proj":  # not detached: B gets a gradient from its own target
            teacher_out = teacher_out @ chained.maps[f"{path}.weight"].T
        taps = taps + F.mse_loss(student_out, teacher_out)
    return {"ce": ce, "kl": kl, "tap": taps}


def default_objective(chained: Chained, batch: dict[str, Tensor], *, temperature: float = 1.0, divergence: str = "forward", beta: float = 0.5,
                      channels: Tensor | None = None, squares: dict | None = None) -> dict[str, Tensor]:
    """red's default terms: CE and divergence over the labelled tokens, taps over the tokens that are not padding.

    `channels`: compare o and down with the teacher's at these channels; None compares them with `B · teacher`, detached.
    `squares`: from `tap_squares`; each tap is divided by its own.
    """
    teacher_logits, teacher_taps, logits, student_taps, ce = run_both(chained, batch)
    labels = batch["labels"][:, 1:]
    log_q = F.log_softmax(logits[:, :-1] / temperature, -1)[labels != -100]
    log_p = F.log_softmax(teacher_logits[:, :-1] / temperature, -1)[labels != -100]
    if divergence == "forward":
        kl = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    elif divergence == "reverse":
        kl = F.kl_div(log_p, log_q, log_target=True, reduction="batchmean")
    else:
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        kl = beta * F.kl_div(log_m, log_p, log_target=True, reduction="batchmean") + (1 - beta) * F.kl_div(
            log_m, log_q, log_target=True, reduction="batchmean")
    taps = torch.zeros((), dtype=teacher_logits.dtype)
    for (layer, name), (_, teacher_out) in teacher_taps.items():
        student_out = student_taps[layer, name][1]
        if name in WRITERS:
            if channels is None:
                teacher_out = teacher_out @ chained.maps[f"model.layers.{layer}.{name}.weight"].detach().T
            else:
                teacher_out = teacher_out[..., channels]
        error = F.mse_loss(student_out[batch["token_mask"]], teacher_out[batch["token_mask"]])
        taps = taps + (error if squares is None else error / squares[layer, name])
    return {"ce": ce, "kl": kl, "tap": taps}


@torch.no_grad()
def tap_squares(teacher, batch: dict[str, Tensor]) -> dict[tuple[int, str], float]:
    """The mean square of each tapped module's output over the tokens that are not padding."""
    with watching(teacher) as seen:
        teacher(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False)
    return {key: float(output[batch["token_mask"]].double().square().mean()) for key, (_, output) in seen.items()}


def random_batch(rows: int = 3, length: int = 10, vocab: int = 64, seed: int = 0) -> dict[str, Tensor]:
    """A packed batch as `red.data.loading.collate` makes it, with what can go wrong: two documents in a row, a prompt without labels, padding at the
    end of some rows, and unequal numbers of labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (rows, length), generator=generator)
    labels, positions = ids.clone(), torch.arange(length).repeat(rows, 1)
    mask = torch.ones(rows, length, dtype=torch.bool)
    for row in range(rows):
        cut = int(torch.randint(3, length - 3, (), generator=generator))
        positions[row, cut:] = torch.arange(length - cut)  # a second document begins ...
        labels[row, cut] = -100  # ... whose first token nobody predicts
        labels[row, : row % 3] = -100  # a prompt
        padding = row % 3
        if padding:
            ids[row, -padding:], labels[row, -padding:], mask[row, -padding:] = 0, -100, False
            positions[row, -padding:] = torch.arange(padding)  # as red.data.packing: a document of its own
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "token_mask": mask}


def documents(batch: dict[str, Tensor]) -> list[Tensor]:
    """The documents of a packed batch, one by one and without padding: [T_i] ids each."""
    found = []
    for ids, positions, mask in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), batch["token_mask"].tolist(), strict=True):
        previous = None
        for token, position, real in zip(ids, positions, mask, strict=True):
            if real:
                if previous is None or position != previous + 1:
                    found.append([])
                found[-1].append(token)
            previous = position
    return [torch.tensor(document) for document in found]


@torch.no_grad()
def streams(teacher, document: Tensor) -> list[Tensor]:
    """The residual stream [T, d] of one document, alone in its batch, at the 2L + 1 places where a norm reads it; float64."""
    attention, last = [], []
    handles = [layer.self_attn.register_forward_hook(lambda _m, _a, output: attention.append(output[0])) for layer in teacher.model.layers]
    handles.append(teacher.model.layers[-1].register_forward_hook(
        lambda _m, _a, output: last.append(output[0] if isinstance(output, tuple) else output)))
    states = teacher(document[None], output_hidden_states=True).hidden_states  # its last entry is the one after the final norm
    for handle in handles:
        handle.remove()
    points = []
    for state, attended in zip(states[:-1], attention, strict=True):
        points += [state, state + attended]
    return [point.reshape(len(document), -1).double() for point in [*points, last[0]]]


def normalised(x: Tensor) -> Tensor:
    """Rows divided by their root mean square."""
    return x / x.square().mean(-1, keepdim=True).sqrt()


def use_exact_norms(monkeypatch) -> None:
    """transformers computes RMSNorm in float32 even for a float64 model; for comparisons below 1e-7 it must not."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
    from transformers.models.smollm3.modeling_smollm3 import SmolLM3RMSNorm

    def forward(self, hidden_states):
        return self.weight * hidden_states * torch.rsqrt(hidden_states.square().mean(-1, keepdim=True) + self.variance_epsilon)

    for norm in (LlamaRMSNorm, MistralRMSNorm, Qwen2RMSNorm, Qwen3RMSNorm, SmolLM3RMSNorm):
        monkeypatch.setattr(norm, "forward", forward)
