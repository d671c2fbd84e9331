"""Other fits of the same student, untrained: each a change to one piece of red/fitting.

A variation is `(teacher, config, calibration, batches) -> student`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from red import families, starts
from red.config import REDConfig
from red.fitting import fit as fitting
from red.fitting.layers import HalfLayer, Streams, half_layers, normalised, run_block, writer_input
from red.fitting.least_squares import LeastSquares
from red.fitting.massive import MOST, massive_directions
from red.fitting.shared_map import ITERATIONS, LEARNING_RATE, balanced, explained_shares, gauge, most_explained, reader_gramians
from red.data.packing import for_attention
from red.prepare import start_projections
from red.starts.base import StartContext, shared

Variation = Callable[..., PreTrainedModel]


def usual(teacher, config: REDConfig, calibration, batches, **settings) -> PreTrainedModel:
    """The start as `config` says; `settings` are further fields of it."""
    changed = copy.copy(config)
    for name, value in settings.items():
        setattr(changed, name, value)
    return start_projections(teacher, changed, calibration, batches).student


# ---- a second sweep with every document alike ----

def swept_again(teacher, config, calibration, batches, times: int = 2) -> PreTrainedModel:
    """The fit begins again from what it found: its ridge then pulls towards the first sweep's writers."""
    maps = _start(teacher, config, calibration, batches)
    for _ in range(times):
        fit = fitting.fit_student(teacher, maps, batches)
        maps = fit.maps
    return fit.student


def refitted_map(teacher, config, calibration, batches, times: int = 1) -> PreTrainedModel:
    """The map again, each read point counted by how much less of what it hears the fitted student explains than the map could: map and fit in turns."""
    points = calibration.point_covariance.double()
    gramians = torch.stack(list(reader_gramians(teacher, points)))
    totals, heard = (gramians * points).sum((-2, -1)), points @ gramians @ points
    maps = _start(teacher, config, calibration, batches)
    counts = torch.ones(len(points), dtype=torch.float64)
    for turn in range(times + 1):
        explained: list[float] = []

        class Watched(fitting.Fit):
            def estimate(self, norm):
                solver = self.sums()
                solution = solver.solve(self.reader_ridge)
                explained.append(float(((solver.xy / solver.rows) @ gramians[len(explained)] * solution).sum() / totals[len(explained)]))  # noqa: B023 - fitted in this turn
                return super().estimate(norm)

        fit = _fitted(Watched, teacher, maps, batches)
        if turn < times:
            down = torch.linalg.qr(maps["model.embed_tokens.weight"]).Q
            counts = counts * (1 - torch.tensor(explained, dtype=torch.float64)) / (1 - explained_shares(down, points, heard, totals))
            maps = _of_map(teacher, config, calibration, _climbed(down, points, gramians, counts / counts.mean()))
    return fit.student


def fisher_map(teacher, config, calibration, batches, samples: int = 4) -> PreTrainedModel:
    """What the teacher's own prediction hears in place of what its readers hear: `M_i = E[gᵀg]`, `g` the gradient at point i of the log-likelihood of words
    drawn from the teacher (Fisher's information)."""
    points = calibration.point_covariance.double()
    norms, generator = [teacher.get_submodule(path) for path in families.norm_paths(teacher.config)], torch.Generator().manual_seed(0)
    gramians, outputs = torch.zeros_like(points), []

    def keep(_module, _args, output):
        output.retain_grad()
        outputs.append(output)

    for batch in [batch for batch in batches for _ in range(samples)]:
        mask, batch = batch["token_mask"].bool(), for_attention({name: value for name, value in batch.items() if name != "labels"}, teacher.config)
        outputs.clear()
        handles = [norm.register_forward_hook(keep) for norm in norms]
        with torch.enable_grad():
            embedded = teacher.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
            logits = teacher(inputs_embeds=embedded, position_ids=batch.get("position_ids"), use_cache=False).logits.log_softmax(-1)
            words = torch.multinomial(logits.detach().exp().flatten(0, 1), 1, generator=generator).view(*mask.shape, 1)
            (logits.gather(-1, words).squeeze(-1) * mask).sum().backward()
        for handle in handles:
            handle.remove()
        grads = torch.stack([(output.grad * norm.weight.detach())[mask].double() for norm, output in zip(norms, outputs, strict=True)])
        gramians += grads.mT @ grads
        teacher.zero_grad(set_to_none=True)
    gramians /= (gramians * points).sum((-2, -1))[:, None, None]
    pooled = balanced(points.mean(0), gramians.mean(0), config.hidden_size, _massive(config, calibration))
    maps = _of_map(teacher, config, calibration, _climbed(pooled, points, gramians, torch.ones(len(points), dtype=torch.float64)))
    return fitting.fit_student(teacher, maps, batches).student


def heard_behind_blocks(teacher, config, calibration, batches, probes: int = 4, **settings) -> PreTrainedModel:
    """Half of what counts as heard at a read point is what its block puts out: `M_i = E[gᵀg]`, `g` the gradient at the normalised stream of a random sum of
    the block's outputs, relative to the stream behind it. So softmax, gates and products have a say, a sink's key above all."""
    points = calibration.point_covariance.double()
    gramians = torch.stack(list(reader_gramians(teacher, points)))
    streams, generator = Streams(teacher, batches), torch.Generator().manual_seed(0)
    streams.teacher = [teacher.get_input_embeddings()(batch["input_ids"]).detach() for batch in streams.batches]
    for half in half_layers(teacher.config):
        norm, block, sums, behind = teacher.get_submodule(half.norm), teacher.get_submodule(half.block), torch.zeros_like(points[0]), []
        for place, stream in enumerate(streams.teacher):
            arguments, mask = streams.arguments(half, place), streams.mask(place)
            with torch.enable_grad():
                z = normalised(stream, teacher.config.rms_norm_eps).requires_grad_()
                out = block(hidden_states=z * norm.weight.detach(), **arguments)[0] if half.attention else block(z * norm.weight.detach())
                behind.append((stream + out).detach())
                relative = behind[-1].square().mean(-1, keepdim=True).rsqrt() * mask[..., None]
                for _ in range(probes):
                    (grad,) = torch.autograd.grad(out, z, torch.randn(out.shape, generator=generator) * relative, retain_graph=True)
                    sums += grad[mask].double().T @ grad[mask].double()
        streams.teacher = behind
        both = [gramian / (gramian * points[half.point]).sum() for gramian in (gramians[half.point], sums)]
        gramians[half.point] = (both[0] + both[1]) / 2
    fixed = _massive(config, calibration)
    traces = gramians.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
    begin = balanced(points.mean(0), (gramians / traces).sum(0), config.hidden_size, fixed)
    maps = _of_map(teacher, config, calibration, most_explained(begin, points, gramians, fixed=fixed))
    return fitting.fit_student(teacher, maps, batches, **settings).student


def without_massive_directions(teacher, config, calibration, batches) -> PreTrainedModel:
    """The usual start of a calibration that found no token longer than others."""
    calibration = copy.copy(calibration)
    calibration.longest = torch.zeros_like(calibration.longest)
    return usual(teacher, config, calibration, batches)


# ---- what a student of another class could hold ----

def with_biases(teacher, config, calibration, batches, everywhere: bool = True) -> PreTrainedModel:
    """Readers (of attention only, as Qwen2's, or everywhere) and then writers too with a constant fitted beside the map: the student is a Llama with
    `attention_bias` and `mlp_bias`, the teacher the same function with biases of zero."""
    teacher = _biased(teacher)

    class Affine(fitting.Fit):
        def readers(self, half: HalfLayer):
            found, report = super().readers(half)
            if not (everywhere or half.attention):
                return found, report
            solver = LeastSquares(self.hidden_size + 1, self.width)
            for place, source, student in self.streams:
                mask = self.streams.mask(place)
                y = normalised(student[mask], self.eps)
                solver.add(torch.cat([y, torch.ones_like(y[:, :1])], 1), normalised(source[mask], self.eps))
            solution = solver.solve(self.reader_ridge) * self.teacher.get_submodule(half.norm).weight.detach().double()
            for path in half.readers:
                found[f"{path}.weight"] = solution[:-1].T / self.scale
                self.parameters[f"{path}.bias"].copy_(self.weights[f"{path}.weight"].double() @ solution[-1])
            self.take(found)
            return found, report

        def writer(self, half: HalfLayer):
            if not everywhere:
                return super().writer(half)
            before, u, error, _ = _written(self, half)
            constant = torch.cat([u, error.new_ones(len(u), 1)], 1)
            solver = LeastSquares(self.width + 1, self.hidden_size)
            solver.add(constant, error)
            solution = solver.solve(self.writer_ridge)
            self.constants[half.writer] = solution[-1]
            return {f"{half.writer}.weight": (before + solution[:-1]).T.contiguous()}

        def take(self, found):
            super().take(found)
            for path, value in self.constants.items():
                self.parameters[f"{path}.bias"].copy_(value)

    Affine.constants = {}
    return _fitted(Affine, teacher, _start(teacher, config, calibration, batches), batches).student


def free_writers(teacher, config, calibration, batches) -> PreTrainedModel:
    """A writer's weight of its own, `[d', heads·head_dim or FFN width]`, fitted to what it multiplies, in place of a projection of the teacher's."""
    class Free(fitting.Fit):
        def writer(self, half: HalfLayer):
            before, u, error, inner = _written(self, half)
            solver = LeastSquares(inner.shape[1], self.hidden_size)
            solver.add(inner, error)
            self.own[half.writer] = solver.solve(self.writer_ridge).T
            return {f"{half.writer}.weight": before.T.contiguous()}

        def take(self, found):
            super().take(found)
            for path, value in self.own.items():
                if f"{path}.weight" in found:
                    self.parameters[f"{path}.weight"].add_(value)

    Free.own = {}
    if families.is_tied(teacher):
        raise ValueError("a tied student is turned at the end, which its own weights would not be")
    return _fitted(Free, teacher, _start(teacher, config, calibration, batches), batches).student


def later_targets(teacher, config, calibration, batches) -> PreTrainedModel:
    """Behind each half layer the writer aims at the map that explains what is still to be read, turned as near as can be to the map before."""
    points = calibration.point_covariance.double()
    gramians = torch.stack(list(reader_gramians(teacher, points)))
    maps = _start(teacher, config, calibration, batches)
    first = maps["model.embed_tokens.weight"]

    class Retargeting(fitting.Fit):
        def writer(self, half: HalfLayer):
            later = slice(half.point + 1, None)
            down = _climbed(torch.linalg.qr(first).Q, points[later], gramians[later], torch.ones(len(points) - half.point - 1, dtype=torch.float64))
            down, _ = gauge(down, points[later].mean(0))
            left, _, right = torch.linalg.svd(down.T @ points[half.point] @ self.down)
            self.down = down @ left @ right
            return super().writer(half)

    return _fitted(Retargeting, teacher, maps, batches).student


# ---- pieces ----

@torch.no_grad()
def _start(teacher, config, calibration, batches) -> dict[str, Tensor]:
    return starts.get(config.start).build(StartContext(teacher, config.hidden_size, calibration, config.seed, batches=batches)).maps


def _massive(config, calibration) -> Tensor:
    return massive_directions(calibration.longest, calibration.mean_log_rms, min(MOST, config.hidden_size // 4))


@torch.no_grad()
def _fitted(kind: type[fitting.Fit], teacher, maps, batches) -> fitting.Fit:
    """`red.fitting.fit_student` with another class of fit."""
    plain = fitting.Fit
    try:
        fitting.Fit = kind
        return fitting.fit_student(teacher, maps, batches)
    finally:
        fitting.Fit = plain


def _of_map(teacher, config, calibration, down: Tensor) -> dict[str, Tensor]:
    down, estimate = gauge(down, calibration.covariance)
    return shared(StartContext(teacher, config.hidden_size, calibration), down, estimate).maps


def _climbed(down: Tensor, points: Tensor, gramians: Tensor, counts: Tensor) -> Tensor:
    """`most_explained` with a count for each point; massive directions may be given up, which teachers without them do not notice."""
    heard, totals = points @ gramians @ points, (gramians * points).sum((-2, -1))
    free = torch.linalg.qr(down).Q.clone().requires_grad_()
    optimizer = torch.optim.Adam([free], lr=LEARNING_RATE)
    for iteration in range(ITERATIONS):
        with torch.enable_grad():
            loss = 1e3 * (counts * (1 - explained_shares(torch.linalg.qr(free).Q, points, heard, totals)).square()).mean()
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - iteration / ITERATIONS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.linalg.qr(free.detach()).Q


def _written(fit: fitting.Fit, half: HalfLayer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`B`, and of all tokens, relative to the token's RMS: `u`, what is left of the target, and what the writer multiplies."""
    weight, before = fit.weights[f"{half.writer}.weight"].detach().double(), fit.maps[f"{half.writer}.weight"].T
    parts = []
    for place, teacher, student in fit.streams:
        arguments, mask = fit.streams.arguments(half, place), fit.streams.mask(place)
        after = (teacher + run_block(fit.teacher, half, teacher, arguments))[mask].double()
        inner = writer_input(fit.student, half, student, arguments)[mask].double()
        u, relative = inner @ weight.T, after.square().mean(-1, keepdim=True).rsqrt()
        parts.append([part * relative for part in (u, after @ fit.down - student[mask].double() - u @ before, inner)])
    return before, *(torch.cat(part) for part in zip(*parts, strict=True))


def _biased(teacher: PreTrainedModel) -> PreTrainedModel:
    """The same function as a Llama that has biases, all of them zero."""
    config = LlamaConfig.from_dict({**teacher.config.to_dict(), "attention_bias": True, "mlp_bias": True})
    config._attn_implementation = teacher.config._attn_implementation
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        nn.init.zeros_(parameter) if name.endswith("bias") else parameter.data.copy_(teacher.get_parameter(name))
    return model.eval()
