"""The block-scaled format against loops over its tiles, at sizes that are no multiples of 128."""

import itertools

import pytest
import torch
from tiny import relative_error

from pascaline.model import fp8


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    """Numbers of very different size in different places, so that a scale in the wrong place shows."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(shape, generator=generator).cumsum(-1).mul(0.3).exp()
    return torch.randn(shape, generator=generator) * size


def tiles(rows: int, columns: int, height: int):
    """(index of the tile, its place) for every tile of `height` x 128."""
    for i, j in itertools.product(range(-(-rows // height)), range(-(-columns // 128))):
        yield (i, j), (slice(height * i, height * (i + 1)), slice(128 * j, 128 * (j + 1)))


SHAPES = [(128, 128), (256, 384), (1, 1), (127, 129), (130, 300), (300, 40), (513, 257)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("round_scales", [False, True])
def test_blocks(shape, round_scales):
    w = randn(*shape)
    q, scale = fp8.quantise_blocks(w, round_scales)
    assert (q.dtype, q.shape, scale.dtype) == (torch.float8_e4m3fn, w.shape, torch.float32)
    assert scale.shape == fp8.scale_shape(shape) == (-(-shape[0] // 128), -(-shape[1] // 128))
    back = fp8.dequantise_blocks(q, scale)
    for index, place in tiles(*shape, 128):
        expected = w[place].abs().max() / 448
        if round_scales:
            expected = min(2.0**e for e in range(-40, 40) if 2.0**e >= expected)
        assert scale[index] == expected
        assert torch.equal(q[place].float(), (w[place] / expected).to(torch.float8_e4m3fn).float())
        assert torch.equal(back[place], q[place].float() * expected)
    assert ((back - w).abs() <= w.abs() / 16 + scale.max() * 2**-10).all()  # e4m3 has 3 bits of mantissa, and 2^-9 is its least number
    assert torch.equal(fp8.dequantise_blocks(q, scale, torch.bfloat16), back.bfloat16())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("round_scales", [False, True])
def test_rows(shape, round_scales):
    x = randn(*shape)
    q, scale = fp8.quantise_rows(x, round_scales)
    assert (q.dtype, q.shape, scale.dtype, scale.shape) == (torch.float8_e4m3fn, x.shape, torch.float32, (shape[0], -(-shape[1] // 128)))
    back = fp8.dequantise_rows(q, scale)
    for index, place in tiles(*shape, 1):
        expected = x[place].abs().max().clamp(min=1e-4) / 448
        if round_scales:
            expected = min(2.0**e for e in range(-40, 40) if 2.0**e >= expected)
        assert scale[index] == expected
        assert torch.equal(back[place], (x[place] / expected).to(torch.float8_e4m3fn).float() * expected)


def test_rows_of_several_dimensions_and_of_bfloat16():
    x = randn(2, 3, 200).bfloat16()
    q, scale = fp8.quantise_rows(x)
    flat, flat_scale = fp8.quantise_rows(x.float().reshape(6, 200))
    assert torch.equal(q.float(), flat.reshape(2, 3, 200).float()) and torch.equal(scale, flat_scale.reshape(2, 3, 2))
    assert fp8.dequantise_rows(q, scale, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("round_scales", [False, True])
def test_the_smallest_amax_of_an_activation(round_scales):
    """Tokens of zeros (padding) and of next to nothing come back as they are or as zeros, never as NaN."""
    _, scale = fp8.quantise_rows(torch.tensor([[0.0] * 8, [1e-6] * 8]), round_scales)
    assert torch.equal(scale, torch.full((2, 1), 2.0**-22 if round_scales else 1e-4 / 448))  # 1e-4 / 448 is 2^-22.09


@pytest.mark.parametrize("round_scales", [False, True])
@pytest.mark.parametrize("value", [0.0, 1e-40, 1e-30, 3e38])
def test_extreme_blocks(value, round_scales):
    w = torch.zeros(130, 130)
    w[0, 0], w[129, 129] = value, -value
    back = fp8.dequantise_blocks(*fp8.quantise_blocks(w, round_scales))
    assert back.isfinite().all() and relative_error(back, w) < (1e-6 if value in (0.0, 3e38) and not round_scales else 0.07)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows_in_the_scale(value):
    w = torch.ones(130, 130)
    w[0, 129] = value
    for scale in (fp8.quantise_blocks(w)[1], fp8.quantise_blocks(w, True)[1]):
        assert not scale[0, 1].isfinite() and scale[[0, 1, 1], [0, 0, 1]].isfinite().all()


def test_powers_of_two_stay_as_they_are():
    """A rounding error of a logarithm would double them."""
    for exponent in range(-60, 60):
        w = torch.full((1, 1), 448 * 2.0**exponent)
        assert fp8.quantise_blocks(w, round_scales=True)[1] == 2.0**exponent
        _, above = fp8.quantise_blocks(torch.nextafter(w, torch.full_like(w, torch.inf)), round_scales=True)
        assert above == 2.0 ** (exponent + 1) or above == 2.0**exponent  # w / 448 may round down to the power


def test_every_pattern_is_what_torch_makes_of_it():
    q = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(fp8.to_float(q).view(torch.int32)[:127], q.float().view(torch.int32)[:127])  # with the signs of zeros
    assert torch.equal(fp8.to_float(q).nan_to_num(nan=1e9), q.float().nan_to_num(nan=1e9)) and fp8.to_float(q).isnan().sum() == 2
    assert fp8.to_float(q[128:129]).signbit() and fp8.to_float(q[:0]).shape == (0,)
    columns = torch.arange(256, dtype=torch.uint8).view(16, 16).t().view(torch.float8_e4m3fn)
    assert torch.equal(fp8.to_float(columns)[:7], columns.float()[:7])
