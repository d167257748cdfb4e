# SPDX-License-Identifier: Apache-2.0
"""Writing caches and moving their blocks, compared with torch's indexing and conversions."""

from __future__ import annotations

import ml_dtypes
import numpy
import pytest
import torch
from opsa_helpers import bits, normal

import attend
from attend import ops

NUM_BLOCKS, BLOCK_SIZE, HEADS, DIM, DIM_V = 5, 4, 2, 24, 16
SLOTS = torch.tensor([7, -1, 0, 19, 12, 7], dtype=torch.int64)  # one skipped, one slot twice


def caches(dtype: torch.dtype, hnd: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    result = []
    for dim in (DIM, DIM_V):
        shape = (NUM_BLOCKS, HEADS, BLOCK_SIZE, dim) if hnd else (NUM_BLOCKS, BLOCK_SIZE, HEADS, dim)
        cache = torch.full(shape, 0x7F, dtype=torch.uint8).to(torch.float32).to(dtype)
        result.append(cache.transpose(1, 2) if hnd else cache)
    return result[0], result[1]


def written(cache: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The cache after the rows have gone to SLOTS one by one."""
    expected = cache.clone()
    for row, slot in enumerate(SLOTS.tolist()):
        if slot >= 0:
            expected[slot // BLOCK_SIZE, slot % BLOCK_SIZE] = rows[row]
    return expected


@pytest.mark.parametrize("hnd", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_are_copied_bit_for_bit(dtype: torch.dtype, hnd: bool) -> None:
    rng = numpy.random.default_rng(1)
    key, value = normal(rng, 8, HEADS, DIM, dtype=dtype), normal(rng, 8, HEADS, DIM_V, dtype=dtype)
    key[0, 0, 0] = float("nan")
    key_cache, value_cache = caches(dtype, hnd)
    expected = written(key_cache, key), written(value_cache, value)
    ops.reshape_and_cache_flash(key, value, key_cache, value_cache, SLOTS)
    assert (bits(key_cache) == bits(expected[0])).all()
    assert (bits(value_cache) == bits(expected[1])).all()


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_codes_are_those_of_torch(fp8: torch.dtype, per_head: bool) -> None:
    rng = numpy.random.default_rng(2)
    key, value = 30 * normal(rng, 6, HEADS, DIM), normal(rng, 6, HEADS, DIM_V)
    scale = torch.tensor([0.5, 0.17] if per_head else [0.3], dtype=torch.float32)
    key_cache, value_cache = caches(fp8)
    largest = torch.finfo(fp8).max
    coded = [(x / s.reshape(1, -1, 1)).clamp(-largest, largest).to(fp8) for x, s in ((key, scale), (value, 2 * scale))]
    expected = [written(key_cache, coded[0]), written(value_cache, coded[1])]
    ops.reshape_and_cache_flash(key, value, key_cache, value_cache, SLOTS, k_scale=scale, v_scale=2 * scale)
    assert (bits(key_cache) == bits(expected[0])).all()
    assert (bits(value_cache) == bits(expected[1])).all()


def test_numpy_with_ml_dtypes() -> None:
    rng = numpy.random.default_rng(3)
    key = rng.standard_normal((2, HEADS, DIM)).astype(ml_dtypes.bfloat16)
    cache = numpy.zeros((2, NUM_BLOCKS, BLOCK_SIZE, HEADS, DIM), dtype=ml_dtypes.bfloat16)
    ops.reshape_and_cache_flash(key, key, cache[0], cache[1], numpy.array([3, 9], dtype=numpy.int64))
    expected = numpy.zeros_like(cache)
    expected[:, 0, 3], expected[:, 2, 1] = key[0], key[1]
    assert (cache.view(numpy.uint16) == expected.view(numpy.uint16)).all()


def test_bad_arguments_of_writes_are_named_and_nothing_is_written() -> None:
    key, value = torch.ones(3, HEADS, DIM), torch.ones(3, HEADS, DIM_V)
    key_cache, value_cache = caches(torch.float32)
    before = bits(key_cache)

    def refused(argument: str, **changes: object) -> None:
        arguments: dict[str, object] = dict(
            key=key, value=value, key_cache=key_cache, value_cache=value_cache, slot_mapping=torch.tensor([0, 1, 2])
        )
        with pytest.raises((attend.InvalidArgument, attend.InvalidType)) as error:
            ops.reshape_and_cache_flash(**{**arguments, **changes})
        assert error.value.argument == argument
        assert "[reshape_and_cache_flash]" in str(error.value) and "expected" in str(error.value)

    refused("slot_mapping", slot_mapping=torch.tensor([0, 1, NUM_BLOCKS * BLOCK_SIZE]))
    refused("slot_mapping", slot_mapping=torch.tensor([0, 1, 2], dtype=torch.int32))
    refused("slot_mapping", slot_mapping=[0, 1, 2])
    refused("value", value=value.half())
    refused("key", key=None)
    refused("key_cache", key_cache=caches(torch.float16)[0])
    refused("k_scale", key_cache=caches(torch.float8_e5m2)[0], value_cache=caches(torch.float8_e5m2)[1])
    refused("executor", executor="all")
    assert (bits(key_cache) == before).all()


def test_read_only_caches_are_refused() -> None:
    cache = numpy.zeros((NUM_BLOCKS, BLOCK_SIZE, HEADS, DIM), dtype=numpy.float32)
    cache.flags.writeable = False
    key = numpy.ones((1, HEADS, DIM), dtype=numpy.float32)
    with pytest.raises(attend.InvalidArgument, match="'key_cache'.*writable"):
        ops.reshape_and_cache_flash(key, key, cache, cache.copy(), numpy.array([0], dtype=numpy.int64))


MOVES = [(0, 3), (1, 0), (3, 2)]  # in order: block 2 becomes what block 0 was


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("dtype", [torch.int8, torch.bfloat16, torch.float8_e4m3fn])
def test_blocks_move_inside_caches(dtype: torch.dtype, as_tensor: bool) -> None:
    rng = numpy.random.default_rng(4)
    moves = torch.tensor(MOVES, dtype=torch.int64) if as_tensor else MOVES
    for block_dim in (0, 1):
        layers = []
        for _ in range(2):
            cache = torch.from_numpy(rng.integers(0, 120, (6, 4, 3, 8), dtype=numpy.uint8)).to(torch.float32).to(dtype)
            layers.append(cache.transpose(0, 1) if block_dim == 1 else cache)
        expected = [layer.clone() for layer in layers]
        for layer in expected:
            blocks = layer.transpose(0, block_dim)
            for source, target in MOVES:
                blocks[target] = blocks[source].clone()
        ops.copy_blocks(layers, moves, block_dim=block_dim)
        for layer, reference in zip(layers, expected):
            assert (bits(layer) == bits(reference)).all()


def test_blocks_move_between_caches() -> None:
    rng = numpy.random.default_rng(5)
    src = torch.from_numpy(rng.integers(-100, 100, (2, 6, 3, 8), dtype=numpy.int8))
    dst = torch.full((2, 9, 3, 8), 101, dtype=torch.int8)
    expected = dst.clone()
    expected[:, 8], expected[:, 0] = src[:, 5], src[:, 2]
    ops.swap_blocks(src, dst, torch.tensor([[5, 8], [2, 0]]), block_dim=1)
    assert (dst == expected).all()
    ops.swap_blocks(src, dst, [], block_dim=1)
    ops.swap_blocks(src, dst, [[numpy.int64(5), numpy.int32(8)]], block_dim=1)
    assert (dst == expected).all()


def test_bad_moves_are_named() -> None:
    cache, other = torch.zeros(4, 2), torch.zeros(5, 2)
    for moves in (
        [(0, 4)],
        [(-1, 0)],
        [(0, 1, 2)],
        [0, 1],
        [(0, 1.0)],
        [(0, True)],
        [("0", 1)],
        None,
        7,
        torch.tensor([[0, 1]], dtype=torch.int32),
        torch.tensor([0, 1]),
        [(2**70, 0)],
    ):
        with pytest.raises((attend.InvalidArgument, attend.InvalidType)) as error:
            ops.copy_blocks([cache], moves)
        assert error.value.argument == "moves"
    for arguments, name in (
        ((cache, cache, [(0, 1)]), "dst"),
        ((cache, other.double(), [(0, 1)]), "dst"),
        ((cache, other[:, :1], [(0, 1)]), "dst"),
        ((None, other, [(0, 1)]), "src"),
    ):
        with pytest.raises((attend.InvalidArgument, attend.InvalidType)) as error:
            ops.swap_blocks(*arguments)
        assert error.value.argument == name
    with pytest.raises(attend.InvalidArgument) as error:
        ops.copy_blocks([cache], [(0, 1)], block_dim=2)
    assert error.value.argument == "block_dim"
    with pytest.raises(attend.InvalidArgument) as error:
        ops.copy_blocks([cache, cache[1:]], [(0, 1)])
    assert error.value.argument == "caches"
    with pytest.raises(attend.InvalidType) as error:
        ops.copy_blocks(cache, [(0, 1)])
    assert error.value.argument == "caches"
