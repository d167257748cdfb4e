# SPDX-License-Identifier: Apache-2.0
"""Multi-head latent attention (MLA): absorbed decode, and its cache.

A row of the cache is the latent (L elements) and then the rotated key (R elements), one for all heads. A cache is
[num_blocks, block_size, L + R] of float32, float16, bfloat16, float8_e4m3fn or float8_e5m2, or uint8
[num_blocks, block_size, bytes] in one of row_formats().
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .. import _native
from .._tensors import Tensor, dtype_name, empty, require, require_integer
from ..errors import InvalidArgument


class RowFormat(NamedTuple):
    """A format of cache rows that are bytes: a latent as e4m3 codes with scales, and rotated elements as bfloat16."""

    name: str  #: "fp8_ds_mla" or "fp8_ds_v4"
    latent: int  #: elements that are codes
    rope: int  #: elements that are bfloat16
    tile: int  #: elements of the latent that share a scale
    value_dim: int  #: first elements of a row that are its value
    power_of_two_scales: bool  #: scales are exponents of one byte; False: float32
    scales_apart: bool  #: scales of a block lie behind all of its rows
    row_bytes: int  #: bytes of a row with its scales

    @property
    def dim(self) -> int:
        """Elements of a row."""
        return self.latent + self.rope


def row_formats() -> tuple[RowFormat, ...]:
    """All formats; their rows differ in size, so that the last dimension of a cache says which one it has."""
    return tuple(RowFormat(*fields) for fields in _native.row_formats())


def new_latents(function: str, q: Tensor, kv_cache: Tensor, head_dim_v: int | None) -> Tensor:
    """A result for q [T, H, E]; the size of a value is what the caller or the format of a cache of bytes says."""
    formats = [f for f in row_formats() if dtype_name(kv_cache) == "uint8" and f.row_bytes == kv_cache.shape[-1]]
    if head_dim_v is None and formats:
        head_dim_v = formats[0].value_dim
    elif head_dim_v is None:
        raise InvalidArgument(
            f"[{function}] argument 'head_dim_v': expected a number, or `out`, for a cache of {dtype_name(kv_cache)} "
            f"{tuple(kv_cache.shape)}, got None",
            function,
            "head_dim_v",
        )
    else:
        require_integer(function, "head_dim_v", head_dim_v, 1, q.shape[2])
    return empty(q, (*q.shape[:2], head_dim_v))


def check_value_dim(function: str, out: Tensor, head_dim_v: int | None) -> None:
    """A size that is given has to be that of `out`."""
    require(function, "out", out, 3)
    if head_dim_v is not None:
        require_integer(function, "head_dim_v", head_dim_v, out.shape[2], out.shape[2])


def mla_decode(
    q: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    *,
    scale: float,
    head_dim_v: int | None = None,
    kv_scale: Tensor | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    alibi_sqrt: bool = False,
    sinks: Tensor | None = None,
    lse_includes_sink: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
    isa: str | None = None,
    arithmetic: str | None = None,
    executor: _native.ThreadPool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Absorbed attention: every head attends to the rows of a latent cache, whose first elements are its values.

    Args:
        q: [T, H, E] of float32, float16 or bfloat16: absorbed part, then rotated part.
        kv_cache: [num_blocks, block_size, E] of q's type, float8_e4m3fn or float8_e5m2; or of bytes, then q is
            bfloat16. block_size is 1, 4, 8 or a multiple of 16.
        block_table: int32 [B, max_blocks].
        query_start_loc: int32 [B + 1], prefix sum of the query lengths.
        seq_lens: int32 [B], keys per request.
        scale: multiplies the products; that of the model's heads before absorption, so there is no default.
        head_dim_v: L, the first elements of a row that are its value; None = that of `out` or of the cache's format.
        kv_scale: float32, 1 element, what an fp8 code is multiplied with; only and always for fp8 caches.
        causal, window_left, window_right, softcap, alibi_slopes, alibi_sqrt, sinks, lse_includes_sink: as in
            flash_attn_varlen().
        out: [T, H, L] to write to; None = a new tensor.
        lse: float32 [T, H] to write to.
        return_lse: give (out, lse), natural logarithm.

    Returns:
        out, or (out, lse).

    Raises:
        InvalidArgument, InvalidType, Unsupported: before anything is written.
    """
    require("mla_decode", "q", q, 3)
    require("mla_decode", "kv_cache", kv_cache, 3)
    if out is None:
        out = new_latents("mla_decode", q, kv_cache, head_dim_v)
    else:
        check_value_dim("mla_decode", out, head_dim_v)
    if lse is None and return_lse:
        lse = empty(q, q.shape[:2], "float32")
    _native.mla_decode(
        q=q,
        kv_cache=kv_cache,
        block_table=block_table,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        out=out,
        lse=lse,
        kv_scale=kv_scale,
        scale=scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        alibi_sqrt=alibi_sqrt,
        sinks=sinks,
        lse_includes_sink=lse_includes_sink,
        isa=isa,
        arithmetic=arithmetic,
        executor=executor,
    )
    return (out, lse) if return_lse else out


def concat_and_cache_mla(
    kv_c: Tensor,
    k_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    scale: Tensor | None = None,
    executor: _native.ThreadPool | None = None,
) -> None:
    """Writes new rows into an MLA cache. If a slot occurs twice the later row wins.

    Args:
        kv_c: [T', L], T' >= T, of float32, float16 or bfloat16.
        k_pe: [T', R], type of kv_c.
        kv_cache: written; of bytes only for bfloat16 kv_c.
        slot_mapping: int64 [T], block * block_size + offset of each row; negative = skip that row.
        scale: float32, 1 element, what an fp8 code is multiplied with; needed by fp8 caches, not read by others.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    _native.concat_and_cache_mla(
        kv_c=kv_c, k_pe=k_pe, kv_cache=kv_cache, slot_mapping=slot_mapping, scale=scale, executor=executor
    )


def concat_and_cache_mla_rope_fused(
    positions: Tensor,
    q_pe: Tensor,
    k_pe: Tensor,
    kv_c: Tensor,
    cos_sin_cache: Tensor,
    is_neox: bool,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    *,
    scale: Tensor | None = None,
    executor: _native.ThreadPool | None = None,
) -> None:
    """Rotates queries and keys to their positions, in place, and does what concat_and_cache_mla() does.

    Args:
        positions: int64, at least T entries.
        q_pe: [T', H, R], rotated in place.
        k_pe: [T', R], rotated in place.
        kv_c: [T', L].
        cos_sin_cache: [max_pos, R], cosines of the pairs, then sines; type of kv_c or float32.
        is_neox: pairs (i, i + R / 2); False: (2i, 2i + 1).
        slot_mapping: int64 [T]; rows that are skipped are rotated nevertheless.
        kv_cache: written.
        scale: as in concat_and_cache_mla().

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    _native.concat_and_cache_mla_rope_fused(
        positions=positions,
        q_pe=q_pe,
        k_pe=k_pe,
        kv_c=kv_c,
        cos_sin_cache=cos_sin_cache,
        is_neox=is_neox,
        slot_mapping=slot_mapping,
        kv_cache=kv_cache,
        scale=scale,
        executor=executor,
    )


def gather_and_maybe_dequant_cache(
    src_cache: Tensor,
    dst: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    *,
    seq_starts: Tensor | None = None,
    scale: Tensor | None = None,
    executor: _native.ThreadPool | None = None,
) -> None:
    """Reads the rows of requests from an MLA cache as numbers.

    Args:
        src_cache: the cache.
        dst: [N, L + R] of float32, float16 or bfloat16, written up to row cu_seq_lens[B]; type of a cache that is
            neither fp8 nor of bytes.
        block_table: int32 [B, max_blocks].
        cu_seq_lens: int32 [B + 1]: rows of request b are [cu[b], cu[b + 1]) of dst.
        seq_starts: int32 [B], first token of each request; None = 0.
        scale: float32, 1 element; needed by fp8 caches, not read by others.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    _native.gather_and_maybe_dequant_cache(
        src_cache=src_cache,
        dst=dst,
        block_table=block_table,
        cu_seq_lens=cu_seq_lens,
        seq_starts=seq_starts,
        scale=scale,
        executor=executor,
    )


def cp_gather_cache(
    src_cache: Tensor,
    dst: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    *,
    seq_starts: Tensor | None = None,
    executor: _native.ThreadPool | None = None,
) -> None:
    """Copies rows of requests out of a cache as they are, bit for bit.

    Args:
        src_cache: [num_blocks, block_size, E] of any type; not rows of fp8_ds_v4.
        dst: [N, E] of that type, written up to row cu_seq_lens[B].
        block_table, cu_seq_lens, seq_starts: as in gather_and_maybe_dequant_cache().

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    _native.cp_gather_cache(
        src_cache=src_cache,
        dst=dst,
        block_table=block_table,
        cu_seq_lens=cu_seq_lens,
        seq_starts=seq_starts,
        executor=executor,
    )


def cp_gather_and_upconvert_fp8_kv_cache(
    src_cache: Tensor,
    dst: Tensor,
    block_table: Tensor,
    workspace_starts: Tensor,
    *,
    executor: _native.ThreadPool | None = None,
) -> None:
    """Reads rows of bytes as bfloat16 numbers.

    Args:
        src_cache: a cache of bytes.
        dst: bfloat16 [N, L + R]; rows from workspace_starts[0] on are written.
        block_table: int32 [B, max_blocks].
        workspace_starts: int32 [B], ascending: rows of request b, from its token 0 on, are [starts[b], starts[b + 1])
            of dst; those of the last one end at N.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    _native.cp_gather_and_upconvert_fp8_kv_cache(
        src_cache=src_cache, dst=dst, block_table=block_table, workspace_starts=workspace_starts, executor=executor
    )


def copy_blocks_mla(caches: Sequence[Tensor], moves: Tensor | Sequence[Sequence[int]]) -> None:
    """Copies blocks inside each MLA cache, one a layer, the same moves for every cache, in order.

    Args:
        caches: a list of caches of 3 dimensions.
        moves: int64 [n, 2] or a list of pairs: (from, to), done in order.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    _native.copy_blocks_mla(caches=caches, moves=moves)
