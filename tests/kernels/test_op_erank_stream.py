"""ERankStream against the in-memory value of all rows."""

import pytest
import torch

from red_kernels import ERankStream, erank, erank_spectrum


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def streamed(batches, width, masks=None):
    stream = ERankStream(width)
    masks = masks or [None] * len(batches)
    for x, mask in zip(batches, masks, strict=True):
        stream.add_to_mean(x, mask)
    for x, mask in reversed(list(zip(batches, masks, strict=True))):
        stream.add(x, mask)
    return stream


def rows(count=120, width=14):
    """Rows far from the origin, where the mean matters, with one that is the mean of its neighbours."""
    return draw(count, width) * torch.arange(1, width + 1) ** -0.8 + 3 * draw(1, width, seed=1)


@pytest.mark.parametrize("sizes", ((120,), (1, 119), (50, 30, 40)))
def test_equals_the_value_in_memory(sizes):
    x = rows()
    stream = streamed(x.split(sizes), 14)
    torch.testing.assert_close(stream.erank(), erank(x), rtol=1e-11, atol=0)
    torch.testing.assert_close(stream.spectrum(), erank_spectrum(x), rtol=0, atol=1e-10)
    alone = ERankStream(14)
    alone.add_to_mean(torch.zeros(120, 14))
    for part in x.split(sizes):
        alone.add(part)
    assert abs(alone.erank() - erank(x)) > 0.05 * erank(x), "the mean matters here"


def test_float32_and_bfloat16_rows_differ_by_their_products_only():
    for dtype in (torch.float32, torch.bfloat16):
        x = rows().to(dtype)
        torch.testing.assert_close(streamed(x.split(40), 14).erank(), erank(x), rtol=1e-5, atol=0)  # 1e-6 of noise times -ln r


def test_masked_rows_may_hold_anything():
    x, mask = rows().view(4, 30, 14), draw(4, 30, seed=4) > -0.5
    poisoned = x.masked_fill(~mask[..., None], float("nan"))
    found = streamed(list(poisoned), 14, list(mask)).erank()
    torch.testing.assert_close(found, erank(x[mask]), rtol=1e-11, atol=0)


def test_fewer_rows_than_channels_and_rows_at_the_mean():
    x = torch.cat([draw(4, 9), -draw(4, 9), torch.zeros(1, 9)])
    torch.testing.assert_close(streamed([x[:3], x[3:]], 9).erank(), erank(x), rtol=1e-11, atol=0)


def test_parts_merge_after_each_pass():
    x = rows()
    parts = x[:70], x[70:]
    first = [ERankStream(14), ERankStream(14)]
    for stream, part in zip(first, parts, strict=True):
        stream.add_to_mean(part)
    first[0].merge(first[1])
    second = [first[0].fork(), first[0].fork()]
    for stream, part in zip(second, parts, strict=True):
        stream.add(part)
    with pytest.raises(ValueError, match="the first pass had 120 rows and the second 70"):
        second[0].erank()
    second[0].merge(second[1])
    torch.testing.assert_close(second[0].erank(), erank(x), rtol=1e-11, atol=0)


def test_memory_does_not_grow():
    stream = ERankStream(14)
    size = sum(value.numel() for value in vars(stream).values())
    for _ in range(3):
        stream.add_to_mean(rows())
    assert sum(value.numel() for value in vars(stream).values()) == size == 14 * 14 + 14 + 3


@pytest.mark.parametrize("x", (torch.full((6, 4), 0.1), torch.zeros(3, 4), draw(1, 4), torch.full((3, 4), float("nan"))), ids=("equal", "zero", "one", "NaN"))
def test_without_a_spectrum(x):
    assert streamed([x], 4).erank().isnan() and erank(x, invalid="nan").isnan()


def test_errors_name_the_fault():
    x, stream = draw(5, 4), ERankStream(4)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        ERankStream(0)
    with pytest.raises(ValueError, match="the mean is not known yet"):
        stream.add(x)
    with pytest.raises(ValueError, match=r"x must have shape \[..., 4\], got \[5, 3\]"):
        stream.add_to_mean(x[:, :3])
    with pytest.raises(TypeError, match="x must have a floating dtype"):
        stream.add_to_mean(x.int())
    with pytest.raises(ValueError, match="mask must have shape"):
        stream.add_to_mean(x, torch.ones(4).bool())
    stream.add_to_mean(x)
    stream.add(x)
    with pytest.raises(ValueError, match="second pass has begun"):
        stream.add_to_mean(x)
    other = streamed([x + 1], 4)
    with pytest.raises(ValueError, match="centred by different means"):
        stream.merge(other)
    with pytest.raises(ValueError, match="widths 4 and 5 cannot be merged"):
        stream.merge(ERankStream(5))
