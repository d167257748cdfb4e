# SPDX-License-Identifier: Apache-2.0
"""attend.compat.vllm_ops: the cache of vLLM's first engine and convert_fp8, compared with torch."""

from __future__ import annotations

import inspect
import math

import ml_dtypes
import numpy
import pytest
import torch
from opsa_helpers import bits, normal

import attend
from attend.compat import vllm_ops

BLOCKS, BLOCK_SIZE, HEADS, DIM = 6, 16, 2, 32
ONE = torch.tensor([1.0])
SLOTS = torch.tensor([3, -1, 40, 95, 3], dtype=torch.int64)  # one row less than there are, one skipped, one twice
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def split_caches(dtype: torch.dtype, stored: torch.dtype, fill: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    x = 16 // dtype.itemsize
    keys = torch.full((BLOCKS, HEADS, DIM // x, BLOCK_SIZE, x), fill).to(stored)
    return keys, torch.full((BLOCKS, HEADS, DIM, BLOCK_SIZE), fill).to(stored)


@pytest.mark.parametrize(
    "name, dtype, stored",
    [
        ("auto", torch.bfloat16, torch.bfloat16),
        ("float", torch.float32, torch.float32),
        ("fp8", E4M3, torch.uint8),
        ("fp8_e4m3", E4M3, E4M3),
        ("fp8_e5m2", E5M2, torch.uint8),
    ],
)
def test_reshape_and_cache(name: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    fp8 = name.startswith("fp8")
    rng = numpy.random.default_rng(1)
    rows = [normal(rng, 6, HEADS, DIM, dtype=torch.bfloat16 if fp8 else dtype) for _ in range(2)]
    scales = [torch.tensor([0.25, 2.0]), torch.tensor([0.5, 1.0])]  # one a head
    caches = split_caches(dtype, stored)
    vllm_ops.reshape_and_cache(*rows, *caches, SLOTS, name, *scales)
    expected = [cache.view(dtype) for cache in split_caches(dtype, stored)]
    x = caches[0].shape[-1]
    coded = [(r.float() / s[:, None]).to(dtype) if fp8 else r for r, s in zip(rows, scales)]
    for row, slot in enumerate(SLOTS.tolist()):
        if slot >= 0:
            block, offset = divmod(slot, BLOCK_SIZE)
            expected[0][block, :, :, offset, :] = coded[0][row].reshape(HEADS, DIM // x, x)
            expected[1][block, :, :, offset] = coded[1][row]
    for cache, wanted in zip(caches, expected):
        assert (bits(cache) == bits(wanted)).all()


def test_reshape_and_cache_of_numpy_and_of_views() -> None:
    """Both planes of one tensor, and a cache whose blocks are every second one."""
    key = numpy.random.default_rng(2).standard_normal((4, HEADS, DIM)).astype(numpy.float32)
    memory = numpy.zeros((2, 2 * BLOCKS, HEADS * DIM * BLOCK_SIZE), numpy.float32)
    keys = memory[0, ::2].reshape(BLOCKS, HEADS, DIM // 4, BLOCK_SIZE, 4)
    planes = memory.reshape(2, 2 * BLOCKS, HEADS, DIM, BLOCK_SIZE)
    scale = numpy.ones(1, numpy.float32)
    vllm_ops.reshape_and_cache(key, -key, keys, planes[1, ::2], SLOTS.numpy()[:4], "auto", scale, scale)
    assert (keys[2, :, :, 8, :].reshape(HEADS, DIM) == key[2]).all() and (planes[1, 4, :, :, 8] == -key[2]).all()
    assert (planes[1, 1::2] == 0).all()


@pytest.mark.parametrize(
    "argument, changes",
    [
        ("key", dict(key=[1.0])),
        ("key", dict(key=torch.ones(6, HEADS))),
        ("key", dict(key=torch.ones(6, HEADS, 0))),
        ("key", dict(key=torch.ones(6, HEADS, DIM).to_sparse())),
        ("value", dict(value=torch.ones(5, HEADS, DIM))),
        ("value", dict(value=torch.ones(6, HEADS, DIM).double())),
        ("key_cache", dict(key_cache=torch.zeros(BLOCKS, HEADS, 3, BLOCK_SIZE, 4))),
        ("key_cache", dict(key_cache=torch.zeros(BLOCKS, 1, DIM // 4, BLOCK_SIZE, 4))),
        ("key_cache", dict(key_cache=torch.zeros(1, HEADS, 8, BLOCK_SIZE, 4).expand(BLOCKS, -1, -1, -1, -1))),
        ("value_cache", dict(value_cache=torch.zeros(BLOCKS, HEADS, DIM, 8))),
        ("value_cache", dict(value_cache=torch.zeros(BLOCKS, HEADS, DIM, BLOCK_SIZE, requires_grad=True))),
        ("slot_mapping", dict(slot_mapping=torch.tensor([0, 1, BLOCKS * BLOCK_SIZE]))),
        ("slot_mapping", dict(slot_mapping=torch.tensor([2**62]))),
        ("slot_mapping", dict(slot_mapping=torch.arange(7))),
        ("slot_mapping", dict(slot_mapping=torch.zeros(2))),
        ("kv_cache_dtype", dict(kv_cache_dtype="nvfp4")),
        ("key_cache", dict(kv_cache_dtype="fp8")),
    ],
)
def test_bad_arguments_of_reshape_and_cache_write_nothing(argument: str, changes: dict) -> None:
    caches = split_caches(torch.float32, torch.float32)
    good = dict(key=torch.ones(6, HEADS, DIM), value=torch.ones(6, HEADS, DIM), key_cache=caches[0])
    good |= dict(value_cache=caches[1], slot_mapping=SLOTS, kv_cache_dtype="auto", k_scale=ONE, v_scale=ONE)
    with pytest.raises(attend.Error, match=rf"^\[reshape_and_cache\] argument '{argument}': expected"):
        vllm_ops.reshape_and_cache(**{**good, **changes})
    assert all((cache == 0).all() for cache in caches)


def test_memory_that_elements_share_is_found_before_any_is_written() -> None:
    memory = torch.zeros(3 * BLOCK_SIZE)
    keys, values = torch.zeros(1, 1, 2, BLOCK_SIZE, 1), memory[BLOCK_SIZE:].view(1, 1, 2, BLOCK_SIZE)
    row, slots = torch.ones(1, 1, 2), SLOTS[:1]
    last_in_values = memory.as_strided((1, 1, 2), (1, 1, 2 * BLOCK_SIZE))
    for argument, call in (
        ("value_cache", (last_in_values, row, keys, values)),
        ("key_cache", (row, row, torch.zeros(1, 1, 1, BLOCK_SIZE, 1).expand(1, 1, 2, BLOCK_SIZE, 1), values)),
        ("value_cache", (row, row, keys, torch.zeros(1, 1, 1, BLOCK_SIZE).expand(1, 1, 2, BLOCK_SIZE))),
        ("value_cache", (row, row, memory[: 2 * BLOCK_SIZE].view(1, 1, 2, BLOCK_SIZE, 1), values)),
    ):
        with pytest.raises(attend.InvalidArgument, match=rf"^\[reshape_and_cache\] argument '{argument}'"):
            vllm_ops.reshape_and_cache(*call, slots, "auto", ONE, ONE)
        assert (memory == 0).all() and (keys == 0).all()


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name, dtype", [("fp8", E4M3), ("fp8_e4m3", E4M3), ("fp8_e5m2", E5M2)])
def test_convert_fp8(kind: torch.dtype, name: str, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = normal(numpy.random.default_rng(3), 5, 3, 16) * 40
    x[0, 0, :3] = torch.tensor([math.inf, -1e30, math.nan])
    x = x.to(kind)
    for output in (torch.zeros(5, 3, 16, dtype=torch.uint8), torch.zeros(5, 3, 16).to(dtype)):
        assert vllm_ops.convert_fp8(output, x, 0.5, name) is None
        expected = (x.float() / 0.5).clamp(-largest, largest).to(dtype)
        numbers = ~x.isnan()
        assert (bits(output.view(dtype))[numbers.numpy()] == bits(expected)[numbers.numpy()]).all()
        assert (output.view(dtype).float().isnan() == x.isnan()).all()
        back = torch.full((16, 3, 5), 7.0, dtype=kind).permute(2, 1, 0)  # other strides
        vllm_ops.convert_fp8(back, output, 0.5, name)
        torch.testing.assert_close(back, (expected.float() * 0.5).to(kind), rtol=0, atol=0, equal_nan=True)


def test_convert_fp8_of_numpy_defaults_and_empty_tensors() -> None:
    x = numpy.random.default_rng(4).standard_normal((4, 8)).astype(numpy.float32)
    codes = numpy.zeros((4, 8), numpy.uint8)
    vllm_ops.convert_fp8(codes, x)
    assert (codes == x.astype(ml_dtypes.float8_e4m3fn).view(numpy.uint8)).all()
    back = numpy.zeros_like(x)
    vllm_ops.convert_fp8(back, codes)
    assert (back == x.astype(ml_dtypes.float8_e4m3fn).astype(numpy.float32)).all()
    vllm_ops.convert_fp8(codes[:0], x[:0])
    assert str(inspect.signature(vllm_ops.convert_fp8)).startswith(
        "(output: 'Tensor', input: 'Tensor', scale: 'float' = 1.0, kv_dtype: 'str' = 'fp8')"
    )


@pytest.mark.parametrize(
    "argument, changes",
    [
        ("output", dict(output=None)),
        ("output", dict(output=torch.zeros(3, 4, dtype=torch.uint8))),
        ("output", dict(output=torch.zeros(4, 4))),
        ("output", dict(output=torch.zeros(4, 4).to(E5M2))),
        ("output", dict(output=torch.zeros(1, 4, dtype=torch.uint8).expand(4, 4))),
        ("output", dict(input=torch.zeros(4, 4, dtype=torch.uint8))),
        ("input", dict(input=torch.zeros(4, 4).double())),
        ("input", dict(input=torch.zeros(4, 4, requires_grad=True))),
        ("scale", dict(scale=0.0)),
        ("scale", dict(scale=math.nan)),
        ("scale", dict(scale=10**400)),
        ("scale", dict(scale=ONE)),
        ("kv_dtype", dict(kv_dtype="auto")),
        ("kv_dtype", dict(kv_dtype=None)),
    ],
)
def test_bad_arguments_of_convert_fp8(argument: str, changes: dict) -> None:
    good = dict(output=torch.full((4, 4), 3, dtype=torch.uint8), input=torch.ones(4, 4))
    with pytest.raises(attend.Error, match=rf"^\[convert_fp8\] argument '{argument}': expected"):
        vllm_ops.convert_fp8(**{**good, **changes})
    assert (good["output"] == 3).all()


def test_copies_between_addresses_are_refused() -> None:
    one = torch.tensor([1])
    with pytest.raises(attend.Unsupported, match=r"^\[swap_blocks_batch\] argument 'src_ptrs': expected tensors") as e:
        vllm_ops.swap_blocks_batch(one, one, one, is_src_access_order_any=True)
    assert "pointers cannot be checked" in str(e.value) and e.value.reasons
