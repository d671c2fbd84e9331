"""A model of the same function in another basis of its residual stream.

An RMSNorm with gain 1 divides by the length of its input, and a rotation keeps lengths. So once every gain stands in the weights that read
the norm, the stream may be turned by any orthogonal `R` (the invariance SliceGPT uses, arXiv 2401.15024; row vectors, `weight` is `[out, in]`):

    stream      x' = x R
    reader      W' = W diag(g) R        q, k, v, gate, up and the head; their biases, q/k norms and rotary embeddings stay
    writer      W' = Rᵀ W,  b' = b R    o and down
    embedding   E' = E R
    norm gain   g' = 1

In the principal basis a few channels carry most of the stream, so a start that selects the strongest keeps about what PCA would keep, and
still is a gather.
"""

from __future__ import annotations

import copy

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedModel

from red import families
from red.calibration import Calibration
from red.errors import REDError

# Of |RᵀR - I|. An fp32 QR or eigh of width 1024 stays below 2e-6; the same matrix rounded to fp16 is off by 8e-5, to bf16 by 6e-4.
ORTHOGONAL = 1e-5


@torch.no_grad()
def rotate(teacher: PreTrainedModel, basis: Tensor, *, untie: bool = False) -> PreTrainedModel:
    """A new model of the teacher's function whose stream is `x @ basis` and whose `2L + 1` norm gains are 1.

    Args:
        teacher: a causal language model of a supported family; it is not changed.
        basis: [d, d] orthogonal, fp32 or fp64; column `j` is the new channel `j` in terms of the old ones.
        untie: give a tied teacher a head of its own (`vocab_size · d` more parameters). A tied head is the embedding itself, so the final
            norm's gain cannot be folded into it, and a gain per channel does not commute with a rotation. Only where that gain is one
            constant is there nothing to fold: the model then stays tied and its final norm keeps the constant.

    Returns:
        A model of the teacher's class, dtypes, device, mode (train or eval) and generation settings. Weights are computed in fp64 and
        rounded once: an fp32 teacher's logits are kept to fp32 rounding, a bf16 teacher's to bf16 rounding of every weight.

    Raises:
        REDError: unsupported family, weights that are not floating or not on one device, a basis that is no orthogonal [d, d], or a tied
            teacher whose final gain is not constant, without `untie`.
    """
    families.check_family(teacher.config)
    device = _check_teacher(teacher)
    turn = _check_basis(basis, teacher.config.hidden_size).to(device)
    tied = families.is_tied(teacher) and not untie
    old = teacher.state_dict()
    final = old["model.norm.weight"]
    if tied and not (final == final[0]).all():
        raise REDError(f"The teacher's head is tied to its embedding, and its final norm's gain is not constant (from {float(final.min()):.4g} to "
                       f"{float(final.max()):.4g}): it cannot be folded into a head that is the embedding too. "
                       "Pass untie=True for a model with a head of its own.")

    norm_of = {f"{tap.path}.weight": families.norm_path_of(tap) for tap in families.taps(teacher.config) if not tap.writes}
    if not tied:
        norm_of["lm_head.weight"] = "model.norm"
    folded = {f"{norm}.weight" for norm in norm_of.values()}
    writers = {f"{tap.path}.{kind}" for tap in families.taps(teacher.config) if tap.writes for kind in ("weight", "bias")}
    state = {}
    for name, value in old.items():
        if name in folded:
            state[name] = torch.ones_like(value)
        elif name in norm_of:
            state[name] = ((value.double() * old[f"{norm_of[name]}.weight"].double()) @ turn).to(value.dtype)
        elif name in writers:  # a bias [d] is a row of its own, and Rᵀb = bR
            state[name] = (turn.T @ value.double()).to(value.dtype)
        elif name == "model.embed_tokens.weight":
            state[name] = (value.double() @ turn).to(value.dtype)
        elif tied and name == "lm_head.weight":
            state[name] = state["model.embed_tokens.weight"]
        else:  # biases of readers, q/k norms, and the constant gain before a tied head
            state[name] = value.clone()
    return _with_weights(teacher, state, tied)


def principal_basis(calibration: Calibration) -> Tensor:
    """[d, d] fp64: the principal directions of the normalised stream, strongest first, for `rotate`.

    Eigenvectors of the calibration's second moment `E[zᵀz]` pooled over the `2L + 1` read points (not centred: a norm does not centre
    either). The entry of largest magnitude of each column is positive, so one calibration gives one basis.

    Raises:
        REDError: the calibration was made without covariance.
    """
    if calibration.covariance is None:
        raise REDError("principal_basis needs a calibration with covariance, and this one has none. Calibrate with covariance=True.")
    basis = torch.linalg.eigh(calibration.covariance.double()).eigenvectors.flip(1)  # eigh sorts ascending
    largest = basis.abs().argmax(0, keepdim=True)
    return basis * basis.gather(0, largest).sign()


def random_basis(width: int, seed: int = 0) -> Tensor:
    """[width, width] fp64 orthogonal, Haar distributed: QR of a Gaussian with the signs of R's diagonal divided out.

    Raises:
        REDError: `width` is not a positive integer.
    """
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise REDError(f"width={width!r} is no width of a residual stream. Give the teacher's hidden_size, a positive integer.")
    q, r = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    return q * r.diagonal().sign()


def _check_teacher(teacher: PreTrainedModel) -> torch.device:
    """The one device of all parameters; REDError for weights that cannot be multiplied where they are."""
    devices = sorted({str(parameter.device) for parameter in teacher.parameters()})
    if len(devices) > 1 or devices == ["meta"]:
        raise REDError(f"The teacher's weights are on {', '.join(devices)}; rotate needs all of them on one device that holds values. "
                       "Load the teacher without device_map and move it to one device.")
    packed = {str(parameter.dtype): name for name, parameter in teacher.named_parameters()
              if not parameter.is_floating_point() or parameter.element_size() < 2}
    if packed:
        dtype, name = next(iter(packed.items()))
        raise REDError(f"The teacher's {name} is of {dtype}: quantised weights cannot be rotated. Load the teacher in fp32 or bf16.")
    return torch.device(devices[0])


def _check_basis(basis: Tensor, width: int) -> Tensor:
    """The basis in fp64; REDError unless it is orthogonal of that width."""
    shape = list(basis.shape) if isinstance(basis, Tensor) else type(basis).__name__
    if shape != [width, width] or not basis.is_floating_point():
        dtype = f" of {basis.dtype}" if isinstance(basis, Tensor) else ""
        raise REDError(f"basis is {shape}{dtype}; expected a floating tensor [{width}, {width}], the teacher's hidden_size={width} on both sides. "
                       "Make one with red.principal_basis(calibration) or red.random_basis(width).")
    basis = basis.detach().double()
    if not basis.isfinite().all():
        row, column = (~basis.isfinite()).nonzero()[0].tolist()
        raise REDError(f"basis[{row}, {column}] is {float(basis[row, column])}; an orthogonal matrix has finite entries. "
                       "Check what the basis was computed from.")
    deviation = float((basis.T @ basis - torch.eye(width, dtype=basis.dtype, device=basis.device)).abs().max())
    if deviation > ORTHOGONAL:
        raise REDError(f"basis is not orthogonal: the largest entry of |basisᵀ basis - I| is {deviation:.2g}, allowed is {ORTHOGONAL:g}. Orthonormalise "
                       "it in fp64 (torch.linalg.qr(basis.double()).Q), and keep it in fp32 or fp64: bf16 and fp16 round too much.")
    return basis


def _with_weights(teacher: PreTrainedModel, state: dict[str, Tensor], tied: bool) -> PreTrainedModel:
    """A model of the teacher's class and settings around `state`, which it takes over without a copy."""
    config = copy.deepcopy(teacher.config)
    config.tie_word_embeddings = tied
    with init_empty_weights():  # no second set of weights, and the caller's generator stays where it is
        model = type(teacher)(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    # the teacher's own frequencies: it may hold them in another dtype, on another device, or stretched by a long text
    model.model.rotary_emb = copy.deepcopy(teacher.model.rotary_emb, {id(teacher.config): config})
    model.generation_config = copy.deepcopy(teacher.generation_config)
    return model.train(teacher.training)
