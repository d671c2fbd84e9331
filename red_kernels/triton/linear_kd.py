"""Output heads, cross-entropy and divergence of linear_kd (see red_kernels/linear_kd.py for the mathematics), a chunk of tokens at a time.

Of each chunk: two matrix products make the logits of student and teacher; one program a row turns them into the loss of the row and,
in place of the student's logits, their gradient; two more products make the gradients of hidden states and head. A row reads both rows
of logits twice (three times for the gradient of jsd) and writes one: first its maxima and sums, kept per lane so that threads meet only
at the row's end; then value and gradient, from the row's end backwards, where the cache still holds it. A row in no mask is not read.

The head's gradient sums up in one float32 buffer, in the epilogue of the product; at the end that buffer is narrowed to the head's dtype
within itself. What exists beside inputs and results: half of that buffer, and the logits of a chunk, whose rows `launch.linear_kd_rows`
fits to a budget. float32 arithmetic; per-row losses are added in a fixed order, so a run repeats bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from red_kernels.triton import launch
from red_kernels.triton.divergences import divergence_term, student_ratio, tanh
from red_kernels.triton.head_gradient import add_product, narrowed

FINISH_BLOCK = 1024
NOTHING = tl.constexpr(-1e20)  # a logit of probability 0: finite, so that 0 · log 0 is 0
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def bent(z, inner, CAPPED: tl.constexpr):
    return tanh(z * inner) if CAPPED else z


@triton.jit
def load_logits(
    student_ptr, teacher_ptr, start, vocabulary, stride, in_kl, last, inner,
    CAPPED: tl.constexpr, TOP_K: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Columns, and both models' logits there. Outside the divergence any teacher does: a uniform one.

    A row's padding, up to a stride that 16 bytes divide, is read and written too, so that every access may be 16 bytes wide.
    """
    column = start + tl.arange(0, DEPTH)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    inside = column < vocabulary
    z = bent(tl.load(student_ptr + column, mask=column < stride, other=0.0).to(tl.float32), inner, CAPPED)
    raw = tl.load(teacher_ptr + column, mask=(column < stride) & in_kl, other=0.0).to(tl.float32)
    kept = inside & (raw != float("-inf"))
    if TOP_K:
        kept = kept & (raw >= last)
    return column, tl.where(inside, z, NOTHING), tl.where(kept, bent(raw, inner, CAPPED), NOTHING)


@triton.jit
def store_gradient(student_ptr, column, stride, z, slope, at_one, kl_factor, ce_factor, target, CAPPED: tl.constexpr):
    """d loss / d (hidden · weight): slope is the divergence's, at_one the student's probability at temperature 1."""
    grad = kl_factor * slope + ce_factor * (at_one - (column == target).to(tl.float32))
    if CAPPED:
        grad *= 1 - z * z
    tl.store(student_ptr + column, grad.to(student_ptr.dtype.element_ty), mask=column < stride)


# No load is wider for knowing these: one kernel serves every vocabulary, and every chunk, wherever its labels begin.
@triton.jit(
    do_not_specialize=["vocabulary", "ignore_index"],
    do_not_specialize_on_alignment=["label_ptr", "kl_mask_ptr", "last_ptr", "num_tokens_ptr", "num_kl_tokens_ptr", "ce_ptr", "kl_ptr"],
)
def linear_kd_row_kernel(
    student_ptr, teacher_ptr, stride,
    label_ptr, kl_mask_ptr, last_ptr, hidden_ptr, hidden_stride, clean_ptr,
    num_tokens_ptr, num_kl_tokens_ptr, ce_ptr, kl_ptr,
    vocabulary, width, ignore_index,
    inner, unit, sharp, flat, natural, beta, ce_weight, kl_weight,
    DIVERGENCE: tl.constexpr, AT_ONE: tl.constexpr, CAPPED: tl.constexpr, TOP_K: tl.constexpr,
    KEEP: tl.constexpr, CLEAN: tl.constexpr, DEPTH: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * stride
    teacher_ptr += row * stride
    label = tl.load(label_ptr + row)
    in_kl = tl.load(kl_mask_ptr + row) != 0
    in_ce = label != ignore_index
    lane = tl.arange(0, LANES)
    if CLEAN:  # the head's gradient multiplies every hidden state, also those by zero
        for start in range(0, width, LANES):
            channel = start + lane
            h = tl.load(hidden_ptr + row * hidden_stride + channel, mask=(channel < width) & (in_ce | in_kl), other=0.0)
            tl.store(clean_ptr + row * width + channel, h, mask=channel < width)

    ce = 0.0
    kl = 0.0
    if in_ce | in_kl:
        last = 0.0
        if TOP_K:
            last = tl.load(last_ptr + row).to(tl.float32)
        # Read before anything is written over it: the sums below are a barrier.
        z_label = bent(tl.load(student_ptr + label, mask=in_ce & (label >= 0) & (label < vocabulary), other=0.0).to(tl.float32), inner, CAPPED)
        target = label.to(tl.int32)
        top = tl.full([LANES], NOTHING, tl.float32)
        teacher_top = tl.full([LANES], NOTHING, tl.float32)
        total = tl.zeros([LANES], tl.float32)
        teacher_total = tl.zeros([LANES], tl.float32)
        total_at_one = tl.zeros([LANES], tl.float32)
        mean = tl.zeros([LANES], tl.float32)
        for start in range(0, vocabulary, DEPTH * LANES):
            column, z, z_teacher = load_logits(student_ptr, teacher_ptr, start, vocabulary, stride, in_kl, last, inner, CAPPED, TOP_K, DEPTH, LANES)
            higher = tl.maximum(top, tl.max(z, 0))
            weight = tl.exp2((z - higher[None, :]) * flat)
            shrink = tl.exp2((top - higher) * flat)
            total = total * shrink + tl.sum(weight, 0)
            if DIVERGENCE == "reverse":
                mean = mean * shrink + tl.sum(weight * (z - z_teacher), 0)
            if not AT_ONE:
                total_at_one = total_at_one * tl.exp2((top - higher) * sharp) + tl.sum(tl.exp2((z - higher[None, :]) * sharp), 0)
            top = higher
            higher = tl.maximum(teacher_top, tl.max(z_teacher, 0))
            teacher_total = teacher_total * tl.exp2((teacher_top - higher) * flat) + tl.sum(tl.exp2((z_teacher - higher[None, :]) * flat), 0)
            teacher_top = higher

        highest = tl.max(top, 0)
        shrink = tl.exp2((top - highest) * flat)
        sum_total = tl.sum(total * shrink, 0)
        norm = tl.log2(sum_total)
        norm_at_one = norm
        if not AT_ONE:
            norm_at_one = tl.log2(tl.sum(total_at_one * tl.exp2((top - highest) * sharp), 0))
        teacher_highest = tl.max(teacher_top, 0)
        teacher_norm = tl.log2(tl.sum(teacher_total * tl.exp2((teacher_top - teacher_highest) * flat), 0))
        # log p/q = (z' - z) · natural + offset; the difference of logits comes first, where nothing has rounded yet
        offset = (highest - teacher_highest) * natural + (norm - teacher_norm) * LN_2
        shift = highest * flat + norm  # q = 2^(z · flat - shift)
        shift_at_one = highest * sharp + norm_at_one
        teacher_shift = teacher_highest * flat + teacher_norm
        expected = 0.0
        if DIVERGENCE == "reverse":
            expected = tl.sum(mean * shrink, 0) / sum_total * natural - offset

        kl_factor = 0.0
        ce_factor = 0.0
        if KEEP:
            kl_factor = tl.where(in_kl, kl_weight / tl.load(num_kl_tokens_ptr), 0.0)
            ce_factor = tl.where(in_ce, ce_weight / tl.load(num_tokens_ptr), 0.0)
        ce = tl.where(in_ce, (highest - z_label) * unit + norm_at_one * LN_2, 0.0)
        value = tl.zeros([LANES], tl.float32)
        mean = tl.zeros([LANES], tl.float32)
        blocks = tl.cdiv(vocabulary, DEPTH * LANES)
        for turn in range(blocks):
            start = (blocks - 1 - turn) * DEPTH * LANES
            column, z, z_teacher = load_logits(student_ptr, teacher_ptr, start, vocabulary, stride, in_kl, last, inner, CAPPED, TOP_K, DEPTH, LANES)
            q = tl.exp2(z * flat - shift)
            p = tl.exp2(z_teacher * flat - teacher_shift)
            ratio = (z_teacher - z) * natural + offset
            slope = q - p
            if DIVERGENCE == "forward":
                value += tl.sum(divergence_term(p, q, ratio), 0)
            elif DIVERGENCE == "reverse":
                value += tl.sum(divergence_term(q, p, -ratio), 0)
                slope = q * (-ratio - expected)
            else:
                m = beta * p + (1 - beta) * q
                ratio_q = student_ratio(ratio, beta)
                value += tl.sum(beta * divergence_term(p, m, ratio + ratio_q) + (1 - beta) * divergence_term(q, m, ratio_q), 0)
                mean += tl.sum(q * ratio_q, 0)
            if KEEP and DIVERGENCE != "jsd":
                at_one = q if AT_ONE else tl.exp2(z * sharp - shift_at_one)
                store_gradient(student_ptr, column, stride, z, slope, at_one, kl_factor, ce_factor, target, CAPPED)

        if KEEP and DIVERGENCE == "jsd":
            expected = tl.sum(mean, 0)
            for start in range(0, vocabulary, DEPTH * LANES):
                column, z, z_teacher = load_logits(
                    student_ptr, teacher_ptr, start, vocabulary, stride, in_kl, last, inner, CAPPED, TOP_K, DEPTH, LANES
                )
                q = tl.exp2(z * flat - shift)
                slope = (1 - beta) * q * (student_ratio((z_teacher - z) * natural + offset, beta) - expected)
                at_one = q if AT_ONE else tl.exp2(z * sharp - shift_at_one)
                store_gradient(student_ptr, column, stride, z, slope, at_one, kl_factor, ce_factor, target, CAPPED)

        kl = tl.where(in_kl, tl.sum(value, 0), 0.0)
    elif KEEP:
        for start in range(0, stride, LANES):
            tl.store(student_ptr + start + lane, tl.zeros([LANES], student_ptr.dtype.element_ty), mask=start + lane < stride)
    tl.store(ce_ptr + row, ce)
    tl.store(kl_ptr + row, kl)


@triton.jit
def linear_kd_finish_kernel(
    ce_ptr, kl_ptr, rows, num_tokens_ptr, num_kl_tokens_ptr, ce_weight, kl_weight, loss_out_ptr, ce_out_ptr, kl_out_ptr, BLOCK: tl.constexpr
):  # fmt: skip
    ce_total = tl.zeros([BLOCK], tl.float32)
    kl_total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        ce_total += tl.load(ce_ptr + row, mask=row < rows, other=0.0)
        kl_total += tl.load(kl_ptr + row, mask=row < rows, other=0.0)
    ce = tl.sum(ce_total, 0) / tl.load(num_tokens_ptr)
    kl = tl.sum(kl_total, 0) / tl.load(num_kl_tokens_ptr)
    tl.store(loss_out_ptr, ce_weight * ce + kl_weight * kl)
    tl.store(ce_out_ptr, ce)
    tl.store(kl_out_ptr, kl)


def linear_kd(
    hidden: Tensor,  # [N, d']
    weight: Tensor,  # [>= vocab_size, d']
    teacher_hidden: Tensor,  # [N, d]
    teacher_weight: Tensor,  # [>= vocab_size, d]
    labels: Tensor,  # [N] int64
    kl_mask: Tensor,  # [N] bool
    temperature: float,
    divergence: str,
    beta: float,
    ce_weight: float,
    kl_weight: float,
    num_tokens: Tensor,  # 0-dim fp32
    num_kl_tokens: Tensor,  # 0-dim fp32
    ignore_index: int,
    vocab_size: int,
    logit_scale: float,
    logit_softcap: float | None,
    teacher_top_k: int | None,
    chunk_size: int | None,
    need_grad_hidden: bool,
    need_grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference.linear_kd`."""
    n, width = hidden.shape
    keep = need_grad_hidden or need_grad_weight
    size, stride = hidden.element_size(), 64 * triton.cdiv(vocab_size, 64)  # rows of logits start where wide loads may
    if chunk_size is None:
        top_k_bytes = (teacher_top_k or 0) * (teacher_hidden.element_size() + 8)
        held = weight.numel() * (4 - size) if need_grad_weight else 0
        chunk_size = launch.linear_kd_rows(n, stride * (size + teacher_hidden.element_size()) + top_k_bytes, held)
    chunk = max(min(chunk_size, n), 1)

    hidden, labels, kl_mask = launch.unit_stride(hidden), labels.contiguous(), kl_mask.contiguous()
    logits = hidden.new_empty(chunk, stride)[:, :vocab_size]
    teacher_logits = teacher_hidden.new_empty(chunk, stride)[:, :vocab_size]
    largest, where, last = None, None, None
    if teacher_top_k is not None:
        largest, last = teacher_logits.new_empty(chunk, teacher_top_k), teacher_logits.new_empty(chunk)
        where = torch.empty(chunk, teacher_top_k, dtype=torch.int64, device=hidden.device)
    clean = hidden.new_empty(chunk, width) if need_grad_weight else None
    row_ce, row_kl = (torch.empty(n, dtype=torch.float32, device=hidden.device) for _ in range(2))
    loss, ce, kl = (torch.empty((), dtype=torch.float32, device=hidden.device) for _ in range(3))
    grad_hidden = hidden.new_empty(hidden.shape if need_grad_hidden else 0)
    # One chunk needs no sum of products, so its only product may round to the head's dtype.
    total_dtype = torch.float32 if n > chunk else weight.dtype
    grad_weight = torch.empty(weight.shape if need_grad_weight else 0, dtype=total_dtype, device=weight.device)
    if need_grad_weight:
        grad_weight[vocab_size if n else 0 :].zero_()
    weight_shown, teacher_weight = weight[:vocab_size], teacher_weight[:vocab_size]
    # logit = unit · z, or unit · tanh(inner · z); 2^(sharp · z) = e^logit, 2^(flat · z) = e^(logit / T), natural · z = logit / T
    capped = logit_softcap is not None
    inner, unit = (logit_scale / logit_softcap, logit_softcap) if capped else (1.0, logit_scale)
    chosen = launch.pick("linear_kd", default=0 if vocab_size > 4096 else 1)

    with launch.on_device_of(hidden):
        for start in range(0, n, chunk):
            rows, count = slice(start, start + chunk), min(chunk, n - start)
            z, z_teacher = logits[:count], teacher_logits[:count]
            torch.mm(hidden[rows], weight_shown.T, out=z)
            torch.mm(teacher_hidden[rows], teacher_weight.T, out=z_teacher)
            if teacher_top_k is not None:
                torch.topk(z_teacher, teacher_top_k, sorted=False, out=(largest[:count], where[:count]))
                torch.amin(largest[:count], -1, out=last[:count])
            linear_kd_row_kernel[(count,)](
                z, z_teacher, stride, labels[rows], kl_mask[rows], last, hidden[rows], hidden.stride(0), clean,
                num_tokens, num_kl_tokens, row_ce[rows], row_kl[rows], vocab_size, width, ignore_index,
                inner, unit, unit * LOG2_E.value, unit * LOG2_E.value / temperature, unit / temperature, beta,
                ce_weight * logit_scale, kl_weight * logit_scale / temperature,
                DIVERGENCE=divergence, AT_ONE=temperature == 1.0, CAPPED=capped, TOP_K=teacher_top_k is not None,
                KEEP=keep, CLEAN=need_grad_weight, **chosen.options,
            )  # fmt: skip
            if need_grad_hidden:
                torch.mm(z, weight_shown, out=grad_hidden[rows])
            if need_grad_weight:
                add_product(grad_weight[:vocab_size], z.T, clean[:count], beta=int(start > 0))
        linear_kd_finish_kernel[(1,)](
            row_ce, row_kl, n, num_tokens, num_kl_tokens, ce_weight, kl_weight, loss, ce, kl, BLOCK=FINISH_BLOCK, num_warps=4
        )  # fmt: skip
        if grad_weight.dtype != weight.dtype:
            grad_weight = narrowed(grad_weight, weight.dtype)
    return loss, ce, kl, grad_hidden, grad_weight
