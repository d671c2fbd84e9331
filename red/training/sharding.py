"""FSDP2: teacher, student, projections and their moments are sharded over the ranks; the student stays a plain model of torch's `fully_shard`.

Every tensor is sharded by its rows (dimension 0), so a rank's own rows of a student weight need little from the others:

    reader   W_S[rows] = W_T[rows] A       A is gathered                     dA = Σ_ranks W_T[rows]ᵀ dW_S[rows], reduce-scattered
    writer   W_S[rows] = B[rows] W_T       W_T is gathered (in its dtype)    dB[rows] = dW_S[rows] W_Tᵀ, no reduction

Accelerate's own FSDP2 wants an optimizer over the model's parameters, which red's is not; so red shards, and Trainer and accelerate see a model
that is ready. Files are those of one process: a checkpoint of any number of ranks, sharded or not, resumes on any other.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from red import families
from red.training.launching import Sharding, unheard_by_accelerate
from red.training.projections import Factor, Projections


class ShardedFactor(Factor):
    """A factor whose master, student weight and teacher weight are DTensors, each rank with its rows. `push` and `pull` are collectives."""

    def whole(self, name: str) -> Tensor | None:
        """Gathered; the gradient that flows back into a master is the mean over the ranks, as that of a student's weight."""
        tensor = getattr(self, name)
        if tensor is None:
            return None
        whole = tensor.full_tensor(grad_placements=[Partial()])
        if whole.requires_grad:
            whole.register_hook(lambda grad: grad / tensor.device_mesh.size())
        return whole

    def saved(self, keep: bool = True) -> Tensor | None:
        return _whole(self.master.detach(), keep)

    def load(self, value: Tensor) -> None:
        self.master.copy_(distributed(value.to(self.master.device, self.master.dtype), self.master.device_mesh))

    def push(self) -> None:
        self._rows(self.master.detach().full_tensor() if self.side == "input" else self.master.to_local()).push()

    def pull(self) -> Tensor | None:
        grad = self._rows(self.master.to_local()).pull()
        if grad is None:
            return None
        placement = Partial() if self.side == "input" else Shard(0)
        grad = DTensor.from_local(grad, self.master.device_mesh, [placement], run_check=False, shape=self.master.shape, stride=self.master.stride())
        return grad.redistribute(placements=[Shard(0)])

    def _rows(self, master: Tensor) -> Factor:
        """The plain factor that makes this rank's rows of the student's weight, or their gradients the master's."""
        if self.side == "input":
            return Factor(self.name, self.side, master, _local(self.weight), self.teacher.to_local())
        return Factor(self.name, self.side, master, _local(self.weight), self.whole("teacher"), _local(self.bias), self.whole("teacher_bias"))


def _local(parameter: nn.Parameter | None) -> Tensor | None:
    """This rank's rows with their gradient, in the same memory."""
    if parameter is None:
        return None
    rows = parameter.detach().to_local()
    rows.grad = None if parameter.grad is None else parameter.grad.to_local()
    return rows


def distributed(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's rows of a tensor that every rank holds, in memory of their own; nothing is sent."""
    rows = distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)
    return DTensor.from_local(rows.to_local().clone(), mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=tensor.stride())


def is_sharded(model: PreTrainedModel) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def shard_model(model: PreTrainedModel, mesh: DeviceMesh, *, bf16: bool = False, reshard_after_forward: bool = True) -> None:
    """Shard a model in place: a group a decoder layer, and one of embedding, last norm and head, which its forward leaves gathered.

    bf16: gather the weights in bf16 and reduce their gradients in fp32. (Autocast alone would keep a bf16 copy of every gathered weight.)
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    for layer in families.decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def shard_projections(projections: Projections, teacher: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Shard the masters, and point every factor at the sharded weights of student and teacher. The ranks must hold equal masters."""
    source, target = dict(teacher.named_parameters()), dict(projections.student.named_parameters())

    def sharded(factor: Factor) -> ShardedFactor:
        bias = factor.name.removesuffix("weight") + "bias"
        found: dict[str, Tensor] = {"master": nn.Parameter(distributed(factor.master.detach(), mesh)), "weight": target[factor.name]}
        if factor.teacher is not None:
            found["teacher"] = source[factor.name].detach()
        if factor.bias is not None:
            found |= {"bias": target[bias], "teacher_bias": source[bias].detach()}
        return ShardedFactor(**{field.name: getattr(factor, field.name) for field in fields(Factor)} | found)

    projections.use([sharded(factor) for factor in projections])


def whole_state(model: PreTrainedModel, *, keep: bool = True) -> dict[str, Tensor]:
    """The state dict of a sharded model on the CPU, gathered tensor by tensor; tied tensors stay tied.

    A collective: every rank calls it. keep: False where another rank wants it; the result is empty then.
    """
    seen: dict[int, Tensor] = {}
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen[id(tensor)] = _whole(tensor.detach(), keep)
        state[name] = seen[id(tensor)]
    return state if keep else {}


def whole_student(student: PreTrainedModel, *, keep: bool = True) -> PreTrainedModel | None:
    """A plain copy of a sharded student on the CPU, None where not `keep`; a collective."""
    state = whole_state(student, keep=keep)
    if not keep:
        return None
    with init_empty_weights():  # parameters come from `state`; buffers such as rotary frequencies are computed
        plain = type(student)(student.config)
    plain.load_state_dict(state, strict=True, assign=True)
    plain.tie_weights()
    plain.generation_config = student.generation_config
    return plain.eval()


def whole_optimizer_state(optimizer: torch.optim.Optimizer, *, keep: bool = True) -> dict:
    """The state dict that the same optimizer of one process would have, on the CPU; a collective."""
    state = optimizer.state_dict()
    moments = {index: {key: _whole(value, keep) for key, value in entry.items()} for index, entry in state["state"].items()}
    return {**state, "state": moments}


def shard_optimizer_state(state: dict, parameters: Iterable[nn.Parameter]) -> dict:
    """The way back: moments of the parameters' shapes are cut to this rank's rows."""
    parameters = list(parameters)
    moments = {}
    for index, entry in state["state"].items():
        master = parameters[index]
        moments[index] = {key: value if value.shape != master.shape else distributed(value.to(master.device), master.device_mesh)
                          for key, value in entry.items()}
    return {**state, "state": moments}


def gathered(tensor: Tensor) -> Tensor:
    """All of a DTensor; any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _whole(value, keep: bool):
    """On the CPU, None where not `keep`; what is no DTensor as it is."""
    if not isinstance(value, DTensor):
        return value
    value = value.full_tensor()  # one at a time on the device
    return value.cpu() if keep else None


class ShardedTraining(Trainer):
    """The part of REDTrainer that knows whether it is sharded: `mesh` is None where it is not, and then everything is Trainer's."""

    mesh: DeviceMesh | None = None

    def create_accelerator_and_postprocess(self):
        with unheard_by_accelerate():
            super().create_accelerator_and_postprocess()

    def _shard(self, sharding: Sharding) -> None:
        """After every rank has agreed on the start: shard teacher, student and projections, and tell accelerate that the student is ready."""
        self.mesh = init_device_mesh(self.args.device.type, (self.args.world_size,))
        shard_model(self.teacher, self.mesh)
        shard_model(self.student, self.mesh, bf16=self.accelerator.mixed_precision == "bf16", reshard_after_forward=sharding.reshard_after_forward)
        shard_projections(self.projections, self.teacher, self.mesh)
        # as an evaluated model it gets its autocast and no DistributedDataParallel, and is not prepared again
        self.accelerator.prepare_model(self.student, device_placement=False, evaluation_mode=True)

    def _teacher_hidden(self, place: dict[str, Tensor]) -> Tensor:
        """The teacher's last hidden states [B, T, d]. A sharded teacher's head stays gathered until `_release_heads`."""
        if self.mesh is None:
            return self.teacher.model(**place, use_cache=False).last_hidden_state
        return self.teacher(**place, distil=lambda hidden, head: hidden)  # through its root, which gathers the embedding

    def _release_heads(self) -> None:
        """Where no backward pass follows, nothing else frees what a forward left gathered, and the next push would not reach it."""
        if self.mesh is not None:
            self.teacher.reshard()
            if not torch.is_grad_enabled():
                for module in self.student.modules():
                    if isinstance(module, FSDPModule):
                        module.reshard()

    def training_step(self, model, *args, **kwargs):
        if self.mesh is not None:  # gradients of a step's micro-batches add up unreduced, as in data parallel; accelerate's own switch turns that off
            every = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
            model.set_requires_gradient_sync(every or self.accelerator.sync_gradients)
        return super().training_step(model, *args, **kwargs)

    def save_model(self, output_dir=None, _internal_call=False):
        if self.mesh is None:
            return super().save_model(output_dir, _internal_call)
        state = whole_state(self.model, keep=self.args.should_save)
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=state)

    def _load_best_model(self):
        if self.mesh is None:  # a sharded student follows from its projections alone
            super()._load_best_model()

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.mesh is None:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = whole_optimizer_state(self.optimizer, keep=self.args.should_save)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            with warnings.catch_warnings():  # torch warns that the optimizer's state belongs to it
                warnings.simplefilter("ignore")
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if self.mesh is None or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", mmap=True, weights_only=True)
        masters = [master for group in self.optimizer.param_groups for master in group["params"]]
        self.optimizer.load_state_dict(shard_optimizer_state(state, masters))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / SCHEDULER_NAME, weights_only=True))
