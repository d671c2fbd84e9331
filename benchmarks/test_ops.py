"""Each op beside its eager equivalent: `pytest benchmarks/ --benchmark-only`.

Small shapes on a CPU, those of the targets on a GPU. `extra_info` holds the device, the shape, and the bytes and FLOPs that
the *operation needs* (not what an implementation happens to move), so two rows of a group compare by time alone.
GB/s and GFLOP/s are those counts over the median time.
"""

import platform

import pytest
import torch
import torch.nn.functional as F

import red_kernels as rk

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DTYPE = torch.bfloat16 if GPU else torch.float32  # bf16 products are several times slower on a CPU
SIZE = DTYPE.itemsize


def draw(*shape, requires_grad=False):
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE).requires_grad_(requires_grad)


def measure(benchmark, function, *, shape, bytes_needed, flops_needed=0, rounds=7):
    def run():
        function()
        if GPU:
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=rounds, warmup_rounds=2)
    info = dict(
        device=torch.cuda.get_device_name() if GPU else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        torch=torch.__version__, dtype=str(DTYPE), shape=shape, bytes=bytes_needed, flops=flops_needed,
    )  # fmt: skip
    if benchmark.stats is not None:  # None under --benchmark-disable
        seconds = benchmark.stats.stats.median
        info["gb_per_s"] = round(bytes_needed / seconds / 1e9, 3)
        if flops_needed:
            info["gflop_per_s"] = round(flops_needed / seconds / 1e9, 2)
    benchmark.extra_info.update(info)


def both(*names):
    """Run the test for the op and for what eager PyTorch offers instead."""
    return pytest.mark.parametrize("which", names or ("red", "eager"))


@both()
@pytest.mark.benchmark(group="channel_stats")
def test_channel_stats(benchmark, which):
    batch, length, width, segments = (8, 2048, 4096, 16) if GPU else (4, 512, 256, 8)
    x = draw(batch, length, width)
    ids = torch.arange(batch * length, device=DEVICE).view(batch, length) * segments // (batch * length)
    ids[:, -length // 8 :] = -1

    def eager():
        values = x.float().abs()
        return torch.stack([torch.where((ids == s)[..., None], values, 0).sum((0, 1)) for s in range(segments)])

    function = {"red": lambda: rk.channel_stats(x, ids, segments), "eager": eager}[which]
    measure(benchmark, function, shape=[batch, length, width], bytes_needed=x.numel() * SIZE + ids.numel() * 8)


@both("red", "index_select", "one_hot_product")
@pytest.mark.parametrize("backward", (False, True), ids=("forward", "forward_backward"))
@pytest.mark.benchmark(group="gather")
def test_gather(benchmark, which, backward):
    rows, width, k = (6144, 3072, 1536) if GPU else (2048, 512, 256)
    x, grad = draw(rows, width, requires_grad=backward), draw(rows, k)
    index = torch.randperm(width, device=DEVICE)[:k]
    selection = F.one_hot(index, width).T.to(DTYPE)
    forward = {
        "red": lambda: rk.gather(x, index),
        "index_select": lambda: x.index_select(-1, index),
        "one_hot_product": lambda: x @ selection,
    }[which]
    function = (lambda: torch.autograd.grad(forward(), x, grad)) if backward else forward
    bytes_forward, bytes_backward = 2 * rows * k * SIZE, rows * (k + width) * SIZE
    measure(benchmark, function, shape=[rows, width, k], bytes_needed=bytes_forward + backward * bytes_backward)


@both()
@pytest.mark.parametrize("divergence", ("forward", "reverse", "jsd"))
@pytest.mark.benchmark(group="linear_kd")
def test_linear_kd(benchmark, which, divergence):
    """Forward and backward."""
    n, v, teacher_width, width = (6144, 128256, 3072, 1536) if GPU else (256, 4096, 256, 128)
    hidden, weight = draw(n, width, requires_grad=True), (draw(v, width) / width**0.5).requires_grad_()
    teacher_hidden, teacher_weight = draw(n, teacher_width), draw(v, teacher_width) / teacher_width**0.5
    labels = torch.randint(0, v, (n,), device=DEVICE)

    def red():
        return rk.linear_kd(hidden, weight, teacher_hidden, teacher_weight, labels, divergence=divergence, chunk_size=1024 if GPU else 64).loss

    def eager():
        z = (hidden @ weight.T).float()
        log_q, log_p = z.log_softmax(-1), (teacher_hidden @ teacher_weight.T).float().log_softmax(-1)
        if divergence == "forward":
            kl = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        elif divergence == "reverse":
            kl = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        else:
            log_m = torch.logaddexp(log_p, log_q) - 0.6931471805599453
            kl = (F.kl_div(log_m, log_p, reduction="batchmean", log_target=True) + F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)) / 2
        return F.cross_entropy(z, labels) + kl

    loss = {"red": red, "eager": eager}[which]
    measure(
        benchmark,
        lambda: torch.autograd.grad(loss(), (hidden, weight)),
        shape=[n, v, teacher_width, width],
        bytes_needed=((n + v) * (teacher_width + 2 * width)) * SIZE + n * 8,
        flops_needed=2 * n * v * (teacher_width + width) + 4 * n * v * width,
        rounds=5,
    )
    if GPU:
        benchmark.extra_info["peak_gib"] = round(peak_gib(lambda: torch.autograd.grad(loss(), (hidden, weight))), 3)


def peak_gib(function) -> float:
    """Memory beyond what is allocated before, at its peak."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


@both()
@pytest.mark.parametrize("indexed", (False, True), ids=("same_width", "indexed"))
@pytest.mark.benchmark(group="tap_mse")
def test_tap_mse(benchmark, which, indexed):
    """Forward and backward to the student."""
    tokens, teacher_width, width = (6144, 3072, 1536) if GPU else (1024, 512, 256)
    student = draw(tokens, width, requires_grad=True)
    teacher = draw(tokens, teacher_width if indexed else width)
    index = torch.randperm(teacher_width, device=DEVICE)[:width] if indexed else None
    mask = torch.rand(tokens, device=DEVICE) < 0.9

    def eager():
        target = teacher[:, index] if indexed else teacher
        per_token = F.mse_loss(student.float(), target.float(), reduction="none").mean(-1)
        return torch.where(mask, per_token, 0).sum() / mask.sum()

    loss = {"red": lambda: rk.tap_mse(student, teacher, mask, index=index), "eager": eager}[which]
    function = lambda: torch.autograd.grad(loss(), student)  # noqa: E731
    measure(benchmark, function, shape=[tokens, teacher_width, width], bytes_needed=3 * tokens * width * SIZE + tokens)


@both("red", "svdvals")
@pytest.mark.benchmark(group="erank")
def test_erank(benchmark, which):
    layers, n, d = (29, 4169, 3072) if GPU else (4, 512, 128)
    x = draw(layers, n, d)

    def by_svdvals():
        for matrix in x.float():
            rows = F.normalize(matrix - matrix.mean(0), dim=-1)
            eigenvalues = torch.linalg.svdvals(rows) ** 2
            r = eigenvalues / eigenvalues.sum()
            (-torch.special.xlogy(r, r).sum()).exp()

    function = {"red": lambda: rk.erank(x), "svdvals": by_svdvals}[which]
    small, large = min(n, d), max(n, d)
    measure(
        benchmark, function, shape=[layers, n, d], bytes_needed=x.numel() * SIZE,
        flops_needed=layers * (2 * small * small * large + 4 * small**3 // 3), rounds=1 if GPU else 5,
    )  # fmt: skip
