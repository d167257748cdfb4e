# SPDX-License-Identifier: Apache-2.0
"""vllm_ops: the cache of vLLM's first engine, conversion of whole caches to and from fp8, copies between addresses."""

from __future__ import annotations

from .. import ops
from .._tensors import Tensor, dtype_name, empty, view_as
from ..errors import InvalidArgument, InvalidType
from ._renames import renamed
from ._vllm_common import FP8, cache_as, float32_of, refuse, require_dense, require_number, unsupported


def reshape_and_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    kv_cache_dtype: str,
    k_scale: Tensor,
    v_scale: Tensor,
) -> None:
    """Writes new rows into a paged cache of the layout of vLLM's first engine, whose tokens lie innermost.

    Args:
        key: [T', Hkv, D]; T' may exceed the length of slot_mapping.
        value: [T', Hkv, D].
        key_cache: [num_blocks, Hkv, D / x, block_size, x] with any x.
        value_cache: [num_blocks, Hkv, D, block_size].
        slot_mapping: int64 [T]; negative = skip that row.
        kv_cache_dtype, k_scale, v_scale: as in reshape_and_cache_flash().

    Raises:
        InvalidArgument, InvalidType, Unsupported (kv_cache_dtype): before anything is written; also for a slot behind
            the cache.
    """
    function = "reshape_and_cache"
    ranks = {"key": (key, 3), "value": (value, 3), "key_cache": (key_cache, 5), "value_cache": (value_cache, 4)}
    for name, (tensor, rank) in ranks.items():
        require_dense(function, name, tensor, rank)
    require_dense(function, "slot_mapping", slot_mapping, 1)
    _require_split_shapes(function, key, value, key_cache, value_cache)
    key_cache = cache_as(function, "key_cache", key_cache, kv_cache_dtype)
    value_cache = cache_as(function, "value_cache", value_cache, kv_cache_dtype)
    # The elements of a row are written one by one, below, where what elements share of their memory is not seen.
    for name, caches in (("key_cache", [key_cache]), ("value_cache", [value_cache, key_cache])):
        with renamed(function, {"caches": name}):
            ops.copy_blocks(caches, [])
    skipped = empty(slot_mapping, slot_mapping.shape)
    skipped[...] = -1
    x = key_cache.shape[4]

    def write(d: int, slots: Tensor) -> None:
        """Element d of all rows. The caches then are [num_blocks, block_size, Hkv, 1] whatever their strides."""
        ops.reshape_and_cache_flash(
            key[:, :, d, None],
            value[:, :, d, None],
            key_cache[:, :, d // x, :, d % x].swapaxes(1, 2)[..., None],
            value_cache[:, :, d].swapaxes(1, 2)[..., None],
            slots,
            k_scale=k_scale,
            v_scale=v_scale,
        )

    with renamed(function, {}):
        # Rows may share memory with a cache in a later element only, so all are asked before the first is written.
        # Their slots are the same.
        for d in range(key.shape[2]):
            write(d, skipped)
        for d in range(key.shape[2]):
            write(d, slot_mapping)


def convert_fp8(output: Tensor, input: Tensor, scale: float = 1.0, kv_dtype: str = "fp8") -> None:
    """Converts a whole tensor to fp8 codes of x / scale, or such codes to numbers, code * scale.

    The direction follows from the types: one of the two has codes.

    Args:
        output: any shape, written: codes of `kv_dtype` (of that type or uint8), or float32, float16 or bfloat16.
        input: shape of output: float32, float16 or bfloat16, or codes.
        scale: > 0.
        kv_dtype: "fp8" or "fp8_e4m3", "fp8_e5m2".

    Raises:
        InvalidArgument, InvalidType, Unsupported (kv_dtype): before anything is written.
    """
    function = "convert_fp8"
    require_dense(function, "output", output)
    require_dense(function, "input", input)
    number = require_number(function, "scale", scale)
    if not isinstance(kv_dtype, str):
        refuse(InvalidType, function, "kv_dtype", "a string", type(kv_dtype).__name__)
    if kv_dtype not in FP8:
        unsupported(function, "kv_dtype", ", ".join(FP8), kv_dtype)
    if tuple(output.shape) != tuple(input.shape):
        refuse(InvalidArgument, function, "output", f"the shape of input, {tuple(input.shape)}", tuple(output.shape))
    floats, codes = ("float32", "float16", "bfloat16"), ("uint8", FP8[kv_dtype])
    if dtype_name(input) in codes:
        if dtype_name(output) not in floats:
            refuse(InvalidArgument, function, "output", "float32, float16 or bfloat16", dtype_name(output))
        convert = _decoded
    elif dtype_name(input) in floats:
        if dtype_name(output) not in codes:
            refuse(InvalidArgument, function, "output", f"uint8 or {FP8[kv_dtype]}", dtype_name(output))
        convert = _encoded
    else:
        refuse(InvalidArgument, function, "input", f"float32, float16, bfloat16 or {' or '.join(codes)}", input.dtype)
    names = {"dst": "output", "key": "input", "src_cache": "input", "k_scale": "scale"}
    with renamed(function, names):
        result = convert(input, output, number, FP8[kv_dtype])
        # Checks that output can be written, and writes it whatever its strides.
        ops.swap_blocks(result[None], output[None], [[0, 0]])


def swap_blocks_batch(src_ptrs: Tensor, dst_ptrs: Tensor, sizes: Tensor, is_src_access_order_any: bool = False) -> None:
    """Refused: copies between bare addresses. swap_blocks() copies blocks between tensors.

    Args:
        src_ptrs, dst_ptrs: int64 [n], addresses.
        sizes: int64 [n], bytes.
        is_src_access_order_any: a hint for a GPU.

    Raises:
        Unsupported: always; nobody can check whether memory at an address may be read or written.
    """
    expected = "tensors, as swap_blocks() takes them, because untrusted pointers cannot be checked"
    unsupported("swap_blocks_batch", "src_ptrs", expected, "addresses")


def _require_split_shapes(function: str, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor) -> None:
    _, heads, dim = key.shape
    if dim == 0:
        refuse(InvalidArgument, function, "key", "rows with elements", tuple(key.shape))
    if tuple(value.shape) != tuple(key.shape):
        refuse(InvalidArgument, function, "value", f"the shape of key, {tuple(key.shape)}", tuple(value.shape))
    blocks, cache_heads, chunks, block_size, x = key_cache.shape
    if cache_heads != heads or chunks * x != dim:
        expected = f"[num_blocks, {heads}, {dim} / x, block_size, x]"
        refuse(InvalidArgument, function, "key_cache", expected, tuple(key_cache.shape))
    expected = (blocks, heads, dim, block_size)
    if tuple(value_cache.shape) != expected:
        refuse(InvalidArgument, function, "value_cache", f"{expected}, as key_cache has", tuple(value_cache.shape))


def _encoded(input: Tensor, output: Tensor, scale: float, fp8: str) -> Tensor:
    """Codes of x / scale, of the type of output."""
    codes = empty(output, input.shape, fp8)
    flat, count = codes.reshape(-1), _count(input)
    if count:
        slot = empty(output, (1,), "int64")
        slot[...] = 0
        scales = float32_of(output, (1,), scale)
        row = input.reshape(1, 1, count)
        spare = empty(output, (1, 1, 1, 1), fp8)  # the cache of values, which are not wanted
        cache = flat.reshape(1, 1, 1, count)
        ops.reshape_and_cache_flash(row, row[..., :1], cache, spare, slot, k_scale=scales, v_scale=scales)
    return view_as(codes, "uint8") if dtype_name(output) == "uint8" else codes


def _decoded(input: Tensor, output: Tensor, scale: float, fp8: str) -> Tensor:
    """code * scale, of the type of output."""
    result, count = empty(output, input.shape, dtype_name(output)), _count(input)
    if count:
        table = empty(output, (1, 1), "int32")
        table[...] = 0
        starts = empty(output, (2,), "int32")
        starts[0], starts[1] = 0, 1
        cache = view_as(input.reshape(1, 1, count), fp8)
        rows = result.reshape(1, count)
        ops.gather_and_maybe_dequant_cache(cache, rows, table, starts, scale=float32_of(output, (1,), scale))
    return result


def _count(tensor: Tensor) -> int:
    count = 1
    for size in tensor.shape:
        count *= size
    return count
