"""linear_kd against autograd through dense float64 logits."""

import pytest
import torch
import torch.nn.functional as F
from op_truth import assert_near, compiled, drawn, errors, leaf
from torch.utils._python_dispatch import TorchDispatchMode

from red_kernels import linear_kd, reference

DIVERGENCES = ("forward", "reverse", "jsd")
NEEDS = ((True, True), (True, False), (False, True), (False, False))


def problem(n=13, v=37, width=8, teacher_width=12, dtype=torch.float32, seed=0, teacher_v=None):
    """Inputs of linear_kd, with labels below 37 if teacher_v is given; the first row is in neither mask, the others in either, both or neither."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    tokens = v if teacher_v is None else 37
    labels = torch.randint(0, tokens, (n,), generator=g)
    labels[torch.rand(n, generator=g) < 0.3] = -100
    kl_mask = torch.rand(n, generator=g) < 0.7
    labels[0], kl_mask[0] = -100, False
    if n > 1:
        labels[-1], kl_mask[-1] = tokens - 1, True
    tensors = draw(n, width), draw(v, width) * 0.5, draw(n, teacher_width), draw(teacher_v or v, teacher_width) * 0.5, labels
    return tensors, kl_mask


def dense(hidden, weight, teacher_hidden, teacher_weight, labels, *, kl_mask=None, temperature=1.0, divergence="forward", beta=0.5,
          ce_weight=1.0, kl_weight=1.0, num_tokens=None, num_kl_tokens=None, ignore_index=-100, vocab_size=None, logit_scale=1.0,
          logit_softcap=None, teacher_top_k=None, chunk_size=None):  # fmt: skip
    """The same by dense logits and autograd: rows outside a mask are never touched, divergences come from F.kl_div.

    The tokens beyond a vocabulary or the top k are not masked but missing: their columns of logits are taken out.
    """
    ce_mask = labels != ignore_index
    kl_mask = ce_mask if kl_mask is None else kl_mask
    weight, teacher_weight = weight[:vocab_size], teacher_weight[:vocab_size]

    def logits(states, head):
        z = states @ head.T
        z = (z if z.dtype == torch.float64 else z.float()) * logit_scale
        return z if logit_softcap is None else logit_softcap * torch.tanh(z / logit_softcap)

    ce = F.cross_entropy(logits(hidden[ce_mask], weight), labels[ce_mask], reduction="sum")
    log_q = F.log_softmax(logits(hidden[kl_mask], weight) / temperature, -1)
    z_teacher = logits(teacher_hidden[kl_mask], teacher_weight) / temperature
    if teacher_top_k is not None:
        z_teacher = torch.where(z_teacher < z_teacher.sort(descending=True).values[:, teacher_top_k - 1, None], -torch.inf, z_teacher)
    log_p = F.log_softmax(z_teacher, -1)

    def kl_div(log_target, log_input):
        """Σ t log t/i, where 0 log 0 = 0."""
        zero = log_target == -torch.inf
        return F.kl_div(log_input.masked_fill(zero, 0), log_target.masked_fill(zero, 0), reduction="none", log_target=True).masked_fill(zero, 0).sum()

    if divergence == "forward":
        kl = kl_div(log_p, log_q)
    elif divergence == "reverse":
        kl = kl_div(log_q, log_p)
    else:
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        kl = beta * kl_div(log_p, log_m) + (1 - beta) * kl_div(log_q, log_m)
    ce = ce / (num_tokens or max(ce_mask.sum().item(), 1))
    kl = kl / (num_kl_tokens or max(kl_mask.sum().item(), 1))
    return ce_weight * ce + kl_weight * kl, ce, kl


def value_and_gradients(function, tensors, **options):
    """[loss, ce, kl, dhidden, dweight]; the incoming gradient is not 1, so that ignoring it shows."""
    hidden, weight = leaf(tensors[0]), leaf(tensors[1])
    values = function(hidden, weight, *tensors[2:], **options)
    (3.0 * values[0]).backward()
    return [*(value.detach() for value in values), hidden.grad, weight.grad]


def doubled(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


def check(tensors, **options):
    truth = value_and_gradients(dense, doubled(tensors), **options)
    eager = value_and_gradients(dense, tensors, **options)
    actual = value_and_gradients(linear_kd, tensors, **options)
    for ours, true, other in zip(actual, truth, eager, strict=True):
        assert_near(ours, true, other)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", (1.0, 2.5))
def test_matches_dense_autograd(dtype, divergence, temperature):
    tensors, kl_mask = problem(dtype=dtype)
    check(tensors, kl_mask=kl_mask, divergence=divergence, temperature=temperature, beta=0.3, ce_weight=0.7, kl_weight=1.9, chunk_size=4)


@drawn(
    16,
    n=(2, 3, 17, 129),
    v=(17, 151, 1003),  # two or three tokens of two random heads may agree so well that the divergence is all rounding
    widths=[(narrow, wide) for narrow in (1, 7, 33) for wide in (1, 8, 65)],
    divergence=DIVERGENCES,
    beta=(0.05, 0.5, 0.9),
    temperature=(0.5, 1.0, 4.0, 40.0),
    chunk_size=(None, 1, 5, 64, 1024),
    seed=range(1001),
)
def test_any_shape(n, v, widths, divergence, beta, temperature, chunk_size, seed):
    tensors, kl_mask = problem(n, v, *widths, seed=seed)
    check(tensors, kl_mask=kl_mask, divergence=divergence, beta=beta, temperature=temperature, chunk_size=chunk_size)


def test_kl_mask_by_default_and_another_ignore_index():
    tensors, kl_mask = problem()
    check(tensors)
    tensors[4][tensors[4] == -100] = 5
    check(tensors, kl_mask=kl_mask, ignore_index=5)


@pytest.mark.parametrize("poison", (float("nan"), float("inf")))
def test_rows_in_neither_mask_are_exactly_nothing(poison):
    (hidden, weight, teacher_hidden, teacher_weight, labels), kl_mask = problem(n=23)
    dead = ~kl_mask & (labels == -100)
    clean = value_and_gradients(linear_kd, (hidden, weight, teacher_hidden, teacher_weight, labels), kl_mask=kl_mask, chunk_size=4)
    hidden, teacher_hidden = hidden.clone(), teacher_hidden.clone()
    hidden[dead], teacher_hidden[~kl_mask] = poison, poison  # the teacher is not read where only the cross-entropy counts
    dirty = value_and_gradients(linear_kd, (hidden, weight, teacher_hidden, teacher_weight, labels), kl_mask=kl_mask, chunk_size=4)
    for ours, same in zip(dirty, clean, strict=True):
        assert torch.equal(ours, same)
    assert dead.sum() > 1 and dirty[3][dead].eq(0).all() and dirty[3][~dead].ne(0).any(-1).all()


@pytest.mark.parametrize("rows", (0, 5))
def test_no_target_at_all_gives_zero(rows):
    tensors, _ = problem(n=6)
    tensors = [t[:rows] if t.shape[0] == 6 else t for t in tensors]
    tensors[4] = torch.full((rows,), -100)
    for count in (None, torch.zeros(())):
        for ours in value_and_gradients(linear_kd, tensors, num_tokens=count, num_kl_tokens=count):
            assert ours.eq(0).all()


@pytest.mark.parametrize("as_tensor", (False, True))
def test_micro_batches_with_the_global_count_add_up(as_tensor):
    tensors, kl_mask = problem(n=29, dtype=torch.float64)
    whole = value_and_gradients(linear_kd, tensors, kl_mask=kl_mask, kl_weight=0.4)
    counts = [float((tensors[4] != -100).sum()), float(kl_mask.sum())]
    if as_tensor:
        counts = [torch.tensor(count) for count in counts]
    parts = []
    for rows in torch.arange(29).tensor_split(4):
        part = (tensors[0][rows], tensors[1], tensors[2][rows], tensors[3], tensors[4][rows])
        options = dict(kl_mask=kl_mask[rows], kl_weight=0.4, num_tokens=counts[0], num_kl_tokens=counts[1])
        parts.append(value_and_gradients(linear_kd, part, **options))
    for index in (0, 1, 2, 4):
        torch.testing.assert_close(sum(part[index] for part in parts), whole[index])
    torch.testing.assert_close(torch.cat([part[3] for part in parts]), whole[3])


def test_loss_is_float32_and_only_it_has_a_gradient():
    tensors, kl_mask = problem(dtype=torch.bfloat16)
    result = linear_kd(leaf(tensors[0]), leaf(tensors[1]), leaf(tensors[2]), leaf(tensors[3]), tensors[4], kl_mask=kl_mask)
    assert [t.dtype for t in result] == [torch.float32] * 3
    assert [t.requires_grad for t in result] == [True, False, False]


@pytest.mark.parametrize("needs", NEEDS)
def test_gradient_work_only_where_needed(needs, monkeypatch):
    tensors, kl_mask = problem()
    full = value_and_gradients(linear_kd, tensors, kl_mask=kl_mask)
    sizes, run = [], reference.linear_kd

    def spy(*args):
        out = run(*args)
        sizes.extend(g.numel() for g in out[3:])
        return out

    monkeypatch.setattr(reference, "linear_kd", spy)
    student = [t.clone().requires_grad_(need) for t, need in zip(tensors[:2], needs, strict=True)]
    loss = linear_kd(*student, *tensors[2:], kl_mask=kl_mask).loss
    assert [size > 0 for size in sizes] == list(needs) and torch.equal(loss.detach(), full[0])
    if any(needs):
        (3.0 * loss).backward()
    for tensor, need, gradient in zip(student, needs, full[3:], strict=True):
        assert torch.equal(tensor.grad, gradient) if need else tensor.grad is None


def test_weight_gradient_accumulates_in_float32():
    """Many chunks, all adding to one gradient: summed in bf16 the small terms would be lost."""
    tensors, _ = problem(n=600, v=11, dtype=torch.bfloat16)
    truth = value_and_gradients(dense, doubled(tensors))[4]
    chunked = value_and_gradients(linear_kd, tensors, chunk_size=2)[4]
    whole = value_and_gradients(linear_kd, tensors, chunk_size=600)[4]
    assert errors(chunked, truth)[0] < 1.5 * errors(whole, truth)[0]


class LargestTensor(TorchDispatchMode):
    """The largest number of elements of any tensor made, also inside linear_kd, whose inner operations a mode does not see."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "red":
            with self:
                return reference.linear_kd(*args)
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)), 0)
        return out


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_logits_are_never_whole(divergence):
    n, v, chunk_size = 96, 257, 16
    tensors, kl_mask = problem(n=n, v=v)
    with LargestTensor() as seen:
        value_and_gradients(linear_kd, tensors, kl_mask=kl_mask, divergence=divergence, temperature=2.0, chunk_size=chunk_size)
    assert chunk_size * v <= seen.elements < n * v and seen.elements == max(chunk_size * v, v * 8)
    with LargestTensor() as seen:
        value_and_gradients(linear_kd, tensors, kl_mask=kl_mask, divergence=divergence, chunk_size=n)
    assert seen.elements == n * v  # the mode sees whole logits when there are some


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence):
    tensors, kl_mask = problem(5, 6, 3, 4, torch.float64)
    options = dict(kl_mask=kl_mask, divergence=divergence, beta=0.3, temperature=1.7, kl_weight=0.6, chunk_size=2)
    options |= dict(logit_scale=0.8, logit_softcap=2.0, vocab_size=5, teacher_top_k=None if divergence == "reverse" else 3)
    tensors[4].clamp_(max=4)
    assert torch.autograd.gradcheck(lambda h, w: linear_kd(h, w, *tensors[2:], **options).loss, (leaf(tensors[0]), leaf(tensors[1])))


@pytest.mark.parametrize("needs", NEEDS)
def test_opcheck(needs):
    tensors, kl_mask = problem()
    student = [t.clone().requires_grad_(need) for t, need in zip(tensors[:2], needs, strict=True)]
    args = (*student, *tensors[2:], kl_mask, 2.0, "jsd", 0.3, 1.0, 0.5, torch.tensor(9.0), torch.tensor(8.0), -100, 37, 1.0, None, None, 4, *needs)
    torch.library.opcheck(torch.ops.red.linear_kd.default, args)


def test_compiles_whole():
    tensors, kl_mask = problem()
    options = dict(kl_mask=kl_mask, temperature=2.0, num_tokens=torch.tensor(7.0), logit_softcap=2.0, teacher_top_k=5)
    actual = value_and_gradients(compiled(linear_kd), tensors, **options)
    for ours, eager in zip(actual, value_and_gradients(linear_kd, tensors, **options), strict=True):
        torch.testing.assert_close(ours, eager)


def test_autocast_runs_the_products_in_its_dtype():
    tensors, kl_mask = problem()
    with torch.autocast("cpu", torch.bfloat16):
        ours = value_and_gradients(linear_kd, tensors, kl_mask=kl_mask)
    cast = value_and_gradients(linear_kd, [t.bfloat16() if t.is_floating_point() else t for t in tensors], kl_mask=kl_mask)
    assert ours[4].dtype == torch.float32
    for mine, same in zip(ours, cast, strict=True):
        assert torch.equal(mine, same.to(mine.dtype))


def test_float16_teacher_only():
    tensors, _ = problem()
    half = [*tensors[:2], tensors[2].half(), tensors[3].half(), tensors[4]]
    assert all(t.isfinite().all() for t in value_and_gradients(linear_kd, half))
    with pytest.raises(TypeError, match="float16 student would underflow"):
        linear_kd(leaf(tensors[0].half()), tensors[1].half(), *tensors[2:])


def replace(position, change):
    """The tuple with what `change` makes of the entry at `position`."""
    return lambda entries: (*entries[:position], change(entries[position]), *entries[position + 1 :])


MUTATIONS = {
    "zero loss": lambda run, args: replace(0, torch.zeros_like)(run(*args)),
    "zero kl": lambda run, args: replace(2, torch.zeros_like)(run(*args)),
    "zero dhidden": lambda run, args: replace(3, torch.zeros_like)(run(*args)),
    "zero dweight": lambda run, args: replace(4, torch.zeros_like)(run(*args)),
    "kl mask ignored": lambda run, args: run(*replace(5, torch.ones_like)(args)),
    "label mask ignored": lambda run, args: run(*replace(4, lambda labels: labels.clamp(min=0))(args)),
    "temperature ignored": lambda run, args: run(*replace(6, lambda _: 1.0)(args)),
    "padding counted": lambda run, args: run(*replace(14, lambda _: 45)(args)),
    "scale ignored": lambda run, args: run(*replace(15, lambda _: 1.0)(args)),
    "softcap ignored": lambda run, args: run(*replace(16, lambda _: None)(args)),
    "top k ignored": lambda run, args: run(*replace(17, lambda _: None)(args)),
    "last chunk forgotten": lambda run, args: run(*replace(4, lambda labels: labels.index_fill(0, torch.tensor(12), -100))(args)),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_caught(name, monkeypatch):
    tensors, kl_mask = problem(v=45, teacher_v=45)
    options = dict(kl_mask=kl_mask, temperature=2.0, chunk_size=4, logit_scale=0.7, logit_softcap=2.0, teacher_top_k=9, vocab_size=37)
    check(tensors, **options)
    run = reference.linear_kd
    monkeypatch.setattr(reference, "linear_kd", lambda *args: MUTATIONS[name](run, args))
    with pytest.raises(AssertionError):
        check(tensors, **options)
