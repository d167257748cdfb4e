# SPDX-License-Identifier: Apache-2.0
"""Writing keys and values to a paged cache, and moving its blocks."""

from __future__ import annotations

from collections.abc import Sequence

from .. import _native
from .._tensors import Tensor


def reshape_and_cache_flash(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    executor: _native.ThreadPool | None = None,
) -> None:
    """Writes T new rows into a cache.

    Into a cache of the rows' type they are copied bit for bit. Into an fp8 cache goes x / scale, rounded to the
    nearest code, saturating; NaN gives the NaN code. If a slot occurs twice the later row wins.

    Args:
        key: [T', Hkv, D] of float32, float16 or bfloat16, T' >= T.
        value: [T', Hkv, Dv], type of key.
        key_cache: [num_blocks, block_size, Hkv, D], type of key, float8_e4m3fn or float8_e5m2; any strides but that of
            the last dimension, so views of caches with heads before tokens work.
        value_cache: likewise with Dv.
        slot_mapping: int64 [T], block * block_size + offset of each row; negative = skip that row.
        k_scale, v_scale: float32 of 1 element or [Hkv], > 0: an fp8 code stands for code * scale. Needed by fp8
            caches, not read by others.

    Raises:
        InvalidArgument, InvalidType: before anything is written; also for a slot behind the cache.
    """
    _native.reshape_and_cache_flash(
        key=key,
        value=value,
        key_cache=key_cache,
        value_cache=value_cache,
        slot_mapping=slot_mapping,
        k_scale=k_scale,
        v_scale=v_scale,
        executor=executor,
    )


def swap_blocks(src: Tensor, dst: Tensor, moves: Tensor | Sequence[Sequence[int]], *, block_dim: int = 0) -> None:
    """Copies blocks from one cache to another, for example to a swap space.

    Args:
        src: the cache that is read, any type.
        dst: the cache that is written: type of src and the shape of its blocks.
        moves: int64 [n, 2] or a list of pairs: (block of src, block of dst), done in order.
        block_dim: the dimension that counts blocks.

    Raises:
        InvalidArgument, InvalidType: before anything is written; also if the caches share memory.
    """
    _native.swap_blocks(src=src, dst=dst, moves=moves, block_dim=block_dim)


def copy_blocks(caches: Sequence[Tensor], moves: Tensor | Sequence[Sequence[int]], *, block_dim: int = 0) -> None:
    """Copies blocks inside each cache, the same moves for all of them.

    Args:
        caches: a list of caches that share no memory, any types.
        moves: int64 [n, 2] or a list of pairs: (from, to), done in order.
        block_dim: the dimension that counts blocks.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    _native.copy_blocks(caches=caches, moves=moves, block_dim=block_dim)
