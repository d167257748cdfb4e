# SPDX-License-Identifier: Apache-2.0
"""int8 codes of queries, keys and values, compared with numpy written out."""

from __future__ import annotations

import numpy
import pytest
import torch
from opsa_helpers import TORCH_TYPES, normal

import attend
from attend import ops, oracle


def reference(x: numpy.ndarray, axes: tuple[int, ...]) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Codes and scales of float32 numbers that share a scale along `axes`."""
    amax = numpy.abs(x.astype(numpy.float64)).max(axis=axes, keepdims=True)
    scale = numpy.maximum((amax / 127).astype(numpy.float32), numpy.float32(1e-6))
    return numpy.clip(numpy.rint(x / scale), -127, 127).astype(numpy.int8), scale.squeeze(axes)


@pytest.mark.parametrize("dtype", TORCH_TYPES.values(), ids=TORCH_TYPES)
@pytest.mark.parametrize("mode", ["per_token_head", "transposed", "per_channel"])
def test_codes_and_scales(mode: str, dtype: torch.dtype) -> None:
    x = normal(numpy.random.default_rng(1), 13, 3, 40, dtype=dtype)
    x[2, 1] = 0  # nothing but zeros
    x[:, 2, 7] = 0
    codes, scale = ops.scaled_int8_quant_for_attn(
        x, "per_channel" if mode == "per_channel" else "per_token_head", transpose_scale=mode == "transposed"
    )
    expected, expected_scale = reference(x.float().numpy(), (0,) if mode == "per_channel" else (2,))
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and scale.is_contiguous()
    assert (scale.numpy() == (expected_scale.T if mode == "transposed" else expected_scale)).all()
    assert (codes.numpy() == expected).all()


def test_codes_agree_with_the_oracle() -> None:
    x = normal(numpy.random.default_rng(2), 5, 2, 24, dtype=torch.bfloat16)
    codes, scale = ops.scaled_int8_quant_for_attn(x)
    assert (oracle.int8_scale(x) == scale.numpy()).all()
    assert (oracle.int8_code(x, scale[..., None]) == codes.numpy()).all()


def test_static_scales_of_values() -> None:
    rng = numpy.random.default_rng(3)
    x = 3 * normal(rng, 9, 2, 16)
    x[0, 0, 0] = float("inf")
    static = torch.from_numpy(rng.uniform(0.01, 0.03, (2, 16)).astype(numpy.float32))
    codes, scale = ops.scaled_int8_quant_for_attn(x, "per_channel", static_scale=static)
    assert scale is static
    assert (codes.numpy() == numpy.clip(numpy.rint(x.numpy() / static.numpy()), -127, 127)).all()
    assert codes[0, 0, 0] == 127 and (codes.abs() == 127).sum() > 1  # it does saturate


def test_what_shares_a_scale_with_infinity_or_nan_is_nan_and_nothing_else() -> None:
    x = normal(numpy.random.default_rng(4), 6, 2, 8)
    clean = ops.scaled_int8_quant_for_attn(x)
    x[1, 0, 3], x[4, 1, 0] = float("inf"), float("nan")
    codes, scale = ops.scaled_int8_quant_for_attn(x)
    hit = torch.zeros(6, 2, dtype=torch.bool)
    hit[1, 0] = hit[4, 1] = True
    assert scale[hit].isnan().all() and (codes[hit] == 0).all()
    assert (scale[~hit] == clean[1][~hit]).all() and (codes[~hit] == clean[0][~hit]).all()
    with pytest.raises(attend.InvalidArgument, match="'input'.*NaN"):
        ops.scaled_int8_quant_for_attn(x, "per_channel", static_scale=torch.ones(2, 8))


def test_smooth_keys() -> None:
    rng = numpy.random.default_rng(5)
    x = normal(rng, 11, 2, 16) + 20 * normal(rng, 1, 2, 16)
    start = torch.tensor([0, 4, 4, 11], dtype=torch.int32)
    means = ops.channel_mean(x, start)
    expected = torch.stack([x[:4].double().mean(0), torch.zeros(2, 16).double(), x[4:].double().mean(0)])
    assert means.dtype == torch.float32
    torch.testing.assert_close(means, expected.float(), rtol=1e-6, atol=1e-7)
    codes, scale = ops.scaled_int8_quant_for_attn(x[4:], mean=means[2])
    wanted, wanted_scale = reference((x[4:] - means[2]).numpy(), (2,))
    assert (codes.numpy() == wanted).all() and (scale.numpy() == wanted_scale).all()
    assert (scale < ops.scaled_int8_quant_for_attn(x[4:])[1]).all()


def test_results_go_where_the_caller_says_in_any_framework() -> None:
    x = numpy.random.default_rng(6).standard_normal((4, 2, 8)).astype(numpy.float32)
    output, scale = numpy.empty((4, 2, 16), numpy.int8)[..., :8], numpy.empty((2, 4), numpy.float32)
    got = ops.scaled_int8_quant_for_attn(x, transpose_scale=True, output=output, scale=scale)
    assert got[0] is output and got[1] is scale
    expected = ops.scaled_int8_quant_for_attn(torch.from_numpy(x), transpose_scale=True)
    assert (output == expected[0].numpy()).all() and (scale == expected[1].numpy()).all()


@pytest.mark.parametrize(
    "argument, changes",
    [
        ("mode", dict(mode="per_block")),
        ("mode", dict(mode=2)),
        ("transpose_scale", dict(mode="per_channel", transpose_scale=True)),
        ("transpose_scale", dict(transpose_scale=1)),
        ("static_scale", dict(static_scale=torch.ones(2, 8))),
        ("static_scale", dict(mode="per_channel", static_scale=torch.zeros(2, 8))),
        ("static_scale", dict(mode="per_channel", static_scale=torch.ones(8, 2))),
        ("scale", dict(mode="per_channel", static_scale=torch.ones(2, 8), scale=torch.ones(2, 8))),
        ("scale", dict(scale=torch.ones(2, 3))),
        ("mean", dict(mean=torch.ones(2, 7))),
        ("output", dict(output=torch.empty(3, 2, 8))),
        ("input", dict(input=torch.ones(3, 16))),
        ("input", dict(input=torch.ones(3, 2, 8, dtype=torch.float64))),
        ("input", dict(input=[1.0])),
        ("executor", dict(executor=2)),
    ],
)
def test_bad_arguments_are_named(argument: str, changes: dict) -> None:
    with pytest.raises((attend.InvalidArgument, attend.InvalidType)) as error:
        ops.scaled_int8_quant_for_attn(**{"input": torch.ones(3, 2, 8), **changes})
    assert error.value.argument == argument and error.value.function == "scaled_int8_quant_for_attn"


@pytest.mark.parametrize("start", [[0, 5], [1, 4], [0, 3, 2, 4], []])
def test_bad_request_starts_are_named(start: list[int]) -> None:
    with pytest.raises(attend.InvalidArgument) as error:
        ops.channel_mean(torch.ones(4, 2, 8), torch.tensor(start, dtype=torch.int32))
    assert error.value.argument == "start_loc"
    with pytest.raises(attend.InvalidType, match="'executor'"):
        ops.channel_mean(torch.ones(4, 2, 8), torch.tensor([0, 4], dtype=torch.int32), executor=2)
