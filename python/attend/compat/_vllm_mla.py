# SPDX-License-Identifier: Apache-2.0
"""vLLM's _custom_ops about MLA caches and the indexer; attend.compat.vllm_ops has them."""

from __future__ import annotations

from typing import Any

from .. import ops
from .._tensors import Tensor, dtype_name, is_torch, require_tensor, view_as
from ..errors import InvalidArgument, InvalidType
from ._renames import renamed
from ._vllm_common import cache_as, query_start_loc, refuse, unsupported

_QUANT_BLOCK = 128  # elements of an indexer's key, which share a scale


def concat_and_cache_mla(
    kv_c: Tensor, k_pe: Tensor, kv_cache: Tensor, slot_mapping: Tensor, kv_cache_dtype: str, scale: Tensor
) -> None:
    """Writes new rows into an MLA cache.

    Args:
        kv_c: [T', L]; T' may exceed the length of slot_mapping.
        k_pe: [T', R].
        kv_cache: [num_blocks, block_size, L + R]; uint8 [num_blocks, block_size, 656] for "fp8_ds_mla".
        slot_mapping: int64 [T]; negative = skip that row.
        kv_cache_dtype: as in reshape_and_cache_flash(), or "fp8_ds_mla".
        scale: float32 of 1 element, read for fp8 only.

    Raises:
        InvalidArgument, InvalidType, Unsupported (kv_cache_dtype): before anything is written.
    """
    cache = _cache("concat_and_cache_mla", "kv_cache", kv_cache, kv_cache_dtype)
    ops.concat_and_cache_mla(kv_c, k_pe, cache, slot_mapping, scale=scale)


def concat_and_cache_mla_rope_fused(
    positions: Tensor,
    q_pe: Tensor,
    k_pe: Tensor,
    kv_c: Tensor,
    cos_sin_cache: Tensor,
    is_neox: bool,
    slot_mapping: Tensor,
    kv_cache: Tensor,
    kv_cache_dtype: str,
    kv_cache_scale: Tensor,
) -> None:
    """Rotates queries and keys to their positions, in place, then writes as concat_and_cache_mla() does.

    Args:
        positions: int64, at least T entries.
        q_pe: [T', H, R], rotated in place.
        k_pe: [T', R], rotated in place.
        cos_sin_cache: [max_pos, R], cosines, then sines.
        is_neox: pairs (i, i + R / 2); False: (2i, 2i + 1).
        kv_c, slot_mapping, kv_cache, kv_cache_dtype, kv_cache_scale: as there.

    Raises:
        InvalidArgument, InvalidType, Unsupported (kv_cache_dtype): before anything is written.
    """
    function = "concat_and_cache_mla_rope_fused"
    cache = _cache(function, "kv_cache", kv_cache, kv_cache_dtype)
    with renamed(function, {"scale": "kv_cache_scale"}):
        ops.concat_and_cache_mla_rope_fused(
            positions, q_pe, k_pe, kv_c, cos_sin_cache, is_neox, slot_mapping, cache, scale=kv_cache_scale
        )


def gather_and_maybe_dequant_cache(
    src_cache: Tensor,
    dst: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    token_to_seq: Tensor | None,
    num_tokens: int,
    kv_cache_dtype: str,
    scale: Tensor,
    seq_starts: Tensor | None = None,
) -> None:
    """Reads the rows of requests from an MLA cache as numbers.

    Args:
        src_cache: the cache, as in concat_and_cache_mla().
        dst: [N, L + R], written up to row num_tokens.
        block_table: int32 [B, max_blocks].
        cu_seq_lens: int32 [B + 1]: rows of request b are [cu[b], cu[b + 1]).
        token_to_seq: not needed, cu_seq_lens says it.
        num_tokens: cu_seq_lens[B].
        kv_cache_dtype, scale: as there.
        seq_starts: int32 [B], first token of each request; None = 0.

    Raises:
        InvalidArgument, InvalidType, Unsupported (kv_cache_dtype): before anything is written.
    """
    function = "gather_and_maybe_dequant_cache"
    cache = _cache(function, "src_cache", src_cache, kv_cache_dtype)
    shape = getattr(cu_seq_lens, "shape", ())
    if len(shape) != 1 or shape[0] == 0 or dtype_name(cu_seq_lens) != "int32":
        got = f"{getattr(cu_seq_lens, 'dtype', type(cu_seq_lens).__name__)} {list(shape)}"
        refuse(InvalidArgument, function, "cu_seq_lens", "int32 [B + 1]", got)
    if not isinstance(num_tokens, int) or num_tokens != int(cu_seq_lens[-1]):
        refuse(InvalidArgument, function, "num_tokens", f"{int(cu_seq_lens[-1])}, the end of cu_seq_lens", num_tokens)
    ops.gather_and_maybe_dequant_cache(cache, dst, block_table, cu_seq_lens, seq_starts=seq_starts, scale=scale)


def cp_gather_cache(
    src_cache: Tensor,
    dst: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    batch_size: int,
    seq_starts: Tensor | None = None,
) -> None:
    """Copies rows of requests out of a cache as they are.

    Args:
        src_cache: [num_blocks, block_size, E].
        dst: [N, E] of that type.
        block_table: int32 [B', max_blocks], B' >= batch_size.
        cu_seq_lens: int32, at least batch_size + 1 entries.
        batch_size: requests.
        seq_starts: int32, at least batch_size entries: first token of each request; None = 0.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    function = "cp_gather_cache"
    ops.cp_gather_cache(
        src_cache,
        dst,
        _first(function, "block_table", block_table, batch_size),
        _first(function, "cu_seq_lens", cu_seq_lens, batch_size, 1),
        seq_starts=None if seq_starts is None else _first(function, "seq_starts", seq_starts, batch_size),
    )


def cp_gather_and_upconvert_fp8_kv_cache(
    src_cache: Tensor,
    dst: Tensor,
    block_table: Tensor,
    workspace_starts: Tensor,
    batch_size: int,
    seq_starts: Tensor | None = None,
    host_cache: Tensor | None = None,
    host_row_ids: Tensor | None = None,
    device_row_ids: Tensor | None = None,
) -> None:
    """Reads rows of 656 bytes as bfloat16 numbers.

    Args:
        src_cache: uint8 [num_blocks, block_size, 656].
        dst: bfloat16 [N, 576].
        block_table: int32 [B', max_blocks], B' >= batch_size.
        workspace_starts: int32, at least batch_size entries: first row of each request; the last one's end at N.
        batch_size: requests.
        seq_starts, host_cache, host_row_ids, device_row_ids: None; there is no such thing here.

    Raises:
        InvalidArgument, InvalidType, Unsupported (the last four): before anything is written.
    """
    function = "cp_gather_and_upconvert_fp8_kv_cache"
    for name, value in (
        ("seq_starts", seq_starts),
        ("host_cache", host_cache),
        ("host_row_ids", host_row_ids),
        ("device_row_ids", device_row_ids),
    ):
        if value is not None:
            unsupported(function, name, "None", "a tensor")
    ops.cp_gather_and_upconvert_fp8_kv_cache(
        src_cache,
        dst,
        _first(function, "block_table", block_table, batch_size),
        _first(function, "workspace_starts", workspace_starts, batch_size),
    )


def mla_decode_kvcache_cpu(
    out: Tensor, query: Tensor, kv_cache: Tensor, scale: float, block_tables: Tensor, seq_lens: Tensor
) -> None:
    """Decodes one token a request over an MLA cache.

    Args:
        out: [B, H, L], written.
        query: [B, H, L + R], absorbed.
        kv_cache: [num_blocks, block_size, L + R], type of query.
        scale: multiplies q.k.
        block_tables: int32 [B, max_blocks].
        seq_lens: int32 [B], keys of each request.

    Raises:
        InvalidArgument, InvalidType, Unsupported: before anything is written.
    """
    function = "mla_decode_kvcache_cpu"
    require_tensor(function, "out", out)
    names = {"q": "query", "block_table": "block_tables", "query_start_loc": "query"}
    starts = query_start_loc(function, "seq_lens", seq_lens)
    with renamed(function, names):
        ops.mla_decode(query, kv_cache, block_tables, starts, seq_lens, scale=scale, out=out)


def indexer_k_quant_and_cache(
    k: Tensor, kv_cache: Tensor, slot_mapping: Tensor, quant_block_size: int, kv_cache_dtype: str
) -> None:
    """Writes new keys into the indexer's cache.

    Args:
        k: [T', 128]; T' may exceed the length of slot_mapping.
        kv_cache: uint8 [num_blocks, block_size, 132]: the codes of a block, then its scales.
        slot_mapping: int64 [T]; negative = skip that row.
        quant_block_size: 128.
        kv_cache_dtype: "ue8m0" rounds scales up to powers of two; "auto", "fp8", "fp8_e4m3" and "" do not.

    Raises:
        InvalidArgument, InvalidType, Unsupported (kv_cache_dtype): before anything is written.
    """
    function = "indexer_k_quant_and_cache"
    if not isinstance(quant_block_size, int) or quant_block_size != _QUANT_BLOCK:
        refuse(InvalidArgument, function, "quant_block_size", _QUANT_BLOCK, quant_block_size)
    if not isinstance(kv_cache_dtype, str):
        refuse(InvalidType, function, "kv_cache_dtype", "a string", type(kv_cache_dtype).__name__)
    if kv_cache_dtype not in ("ue8m0", "auto", "fp8", "fp8_e4m3", ""):
        unsupported(function, "kv_cache_dtype", "ue8m0, auto, fp8 or fp8_e4m3", kv_cache_dtype)
    ops.indexer_k_quant_and_cache(
        k, kv_cache, slot_mapping, scale_fmt="ue8m0" if kv_cache_dtype == "ue8m0" else "unrounded"
    )


def cp_gather_indexer_k_quant_cache(
    kv_cache: Tensor, dst_k: Tensor, dst_scale: Tensor, block_table: Tensor, cu_seq_lens: Tensor
) -> None:
    """Reads codes and scales of requests from the indexer's cache.

    Args:
        kv_cache: uint8 [num_blocks, block_size, 132].
        dst_k: float8_e4m3fn or uint8 [N, 128], written up to row cu_seq_lens[B].
        dst_scale: uint8 [N, 4], the bytes of float32, or float32 [N] or [N, 1]; likewise.
        block_table: int32 [B, max_blocks].
        cu_seq_lens: int32 [B + 1]: rows of request b are [cu[b], cu[b + 1]).

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    function = "cp_gather_indexer_k_quant_cache"
    require_tensor(function, "dst_k", dst_k)
    require_tensor(function, "dst_scale", dst_scale)
    if dtype_name(dst_k) == "uint8":
        dst_k = view_as(dst_k, "float8_e4m3fn")
    if dtype_name(dst_scale) == "uint8":
        if tuple(dst_scale.shape[1:]) != (4,):
            refuse(InvalidArgument, function, "dst_scale", "uint8 [N, 4] or float32 [N]", tuple(dst_scale.shape))
        dst_scale = view_as(dst_scale, "float32")
    if len(dst_scale.shape) == 2 and dst_scale.shape[1] == 1:
        dst_scale = dst_scale[:, 0]
    ops.cp_gather_indexer_k_quant_cache(kv_cache, dst_k, dst_scale, block_table, cu_seq_lens)


def top_k_per_row_prefill(
    logits: Tensor,
    cu_seqlen_ks: Tensor,
    cu_seqlen_ke: Tensor,
    raw_topk_indices: Tensor,
    num_rows: int,
    stride0: int,
    stride1: int,
    topk_tokens: int,
) -> None:
    """The highest logits of each row within its bounds; the indices ascend, -1 behind the last one.

    Args:
        logits: float32 [T', S], T' >= num_rows.
        cu_seqlen_ks, cu_seqlen_ke: int32 [T']: row t has the logits [ks[t], ke[t]).
        raw_topk_indices: int32 [T', topk_tokens], written: indices from the row's start on.
        num_rows: rows that count.
        stride0, stride1: those of logits, in elements.
        topk_tokens: how many indices.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    function = "top_k_per_row_prefill"
    rows, out = _top_k_rows(function, logits, raw_topk_indices, num_rows, (stride0, stride1), topk_tokens)
    names = {"row_starts": "cu_seqlen_ks", "row_ends": "cu_seqlen_ke", "out": "raw_topk_indices"}
    with renamed(function, names):
        ops.top_k_per_row_prefill(
            rows,
            _first(function, "cu_seqlen_ks", cu_seqlen_ks, num_rows),
            _first(function, "cu_seqlen_ke", cu_seqlen_ke, num_rows),
            out=out,
        )


def top_k_per_row_decode(
    logits: Tensor,
    next_n: int,
    seq_lens: Tensor,
    raw_topk_indices: Tensor,
    num_rows: int,
    stride0: int,
    stride1: int,
    topk_tokens: int,
) -> None:
    """The highest logits of next_n query tokens of each request; the indices ascend, -1 behind the last one.

    Args:
        logits: float32 [T', S], T' >= num_rows.
        next_n: query tokens of each request.
        seq_lens: int32 [num_rows / next_n], tokens of each request with this step's.
        raw_topk_indices: int32 [T', topk_tokens], written.
        num_rows, stride0, stride1, topk_tokens: as in top_k_per_row_prefill().

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    function = "top_k_per_row_decode"
    rows, out = _top_k_rows(function, logits, raw_topk_indices, num_rows, (stride0, stride1), topk_tokens)
    with renamed(function, {"out": "raw_topk_indices"}):
        ops.top_k_per_row_decode(rows, seq_lens, next_n=next_n, out=out)


def _cache(function: str, argument: str, cache: Tensor, kv_cache_dtype: str) -> Tensor:
    if not isinstance(kv_cache_dtype, str) or kv_cache_dtype != "fp8_ds_mla":
        return cache_as(function, argument, cache, kv_cache_dtype)
    require_tensor(function, argument, cache)
    if dtype_name(cache) != "uint8" or cache.shape[-1] != 656:
        got = f"{dtype_name(cache)} {list(cache.shape)}"
        refuse(InvalidArgument, function, argument, "uint8 [num_blocks, block_size, 656]", got)
    return cache


def _first(function: str, argument: str, tensor: Tensor, count: int, more: int = 0) -> Tensor:
    """The first count + more entries."""
    require_tensor(function, argument, tensor)
    if isinstance(count, bool) or not isinstance(count, int):
        refuse(InvalidType, function, "num_rows" if "top_k" in function else "batch_size", "an integer", count)
    if len(tensor.shape) == 0 or not 0 <= count <= tensor.shape[0] - more:
        refuse(InvalidArgument, function, argument, f"at least {count + more} entries", tuple(tensor.shape))
    return tensor[: count + more]


def _top_k_rows(
    function: str, logits: Tensor, out: Tensor, num_rows: int, strides: tuple[int, int], topk_tokens: int
) -> tuple[Tensor, Tensor]:
    """The rows of logits and result that count."""
    rows = _first(function, "logits", logits, num_rows)
    result = _first(function, "raw_topk_indices", out, num_rows)
    if len(rows.shape) != 2:
        refuse(InvalidArgument, function, "logits", "[T, S]", tuple(rows.shape))
    if len(result.shape) != 2 or not isinstance(topk_tokens, int) or result.shape[1] != topk_tokens:
        refuse(InvalidArgument, function, "raw_topk_indices", f"[T, {topk_tokens}]", tuple(result.shape))
    for name, given, real in zip(("stride0", "stride1"), strides, _strides(logits)):
        if not isinstance(given, int) or given != real:
            refuse(InvalidArgument, function, name, f"{real}, as logits has", given)
    return rows, result


def _strides(tensor: Any) -> tuple[int, ...]:
    if is_torch(tensor):
        return tensor.stride()
    return tuple(stride // tensor.dtype.itemsize for stride in tensor.strides)
