# SPDX-License-Identifier: Apache-2.0
"""FlashMLA's functions under its names, with its argument order, layouts and conventions.

LSEs are natural logarithms, without the sink; plus infinity for a row without keys, whose output is 0. Beyond
FlashMLA, float16 and float32 work, any number of heads, other head sizes than 576 and 512, and indices into caches
that are not of bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .. import ops, threads
from .._tensors import Tensor, dtype_name, empty, require, require_integer, view_as
from ..errors import InvalidArgument, InvalidType
from ._flash import refuse_dropout
from ._renames import renamed

__all__ = [
    "FlashMLASchedMeta",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
]


@dataclass
class FlashMLASchedMeta:
    """A schedule that the first call of flash_mla_with_kvcache() makes and later calls of the same step reuse."""

    @dataclass
    class Config:
        """What the schedule was made for."""

        b: int
        s_q: int
        h_q: int
        page_block_size: int
        h_k: int
        causal: bool
        is_fp8_kvcache: bool
        topk: int | None
        extra_page_block_size: int | None
        extra_topk: int | None

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: Any = None
    num_splits: Any = None


def get_mla_metadata(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """The schedule of a batch, in FlashMLA's present form or in its old one.

    Without arguments: (FlashMLASchedMeta(), None), which the first flash_mla_with_kvcache() fills. With the arguments
    of old releases: their tensors.

    Args:
        cache_seqlens: int32 [B], keys of each request.
        num_q_tokens_per_head_k: query tokens times query heads over key heads.
        num_heads_k: heads of keys.
        num_heads_q: heads of queries, a divisor of num_q_tokens_per_head_k * num_heads_k; None = that product, one
            query token.
        is_fp8_kvcache: True or False; the schedule is the same.
        topk: indices of each token, if there are any: every request has as many keys.

    Returns:
        (FlashMLASchedMeta, None), or (tile_scheduler_metadata int32 [parts, 8], num_splits int32 [B + 1]).

    Raises:
        InvalidArgument, InvalidType.
    """
    if not args and not kwargs:
        return FlashMLASchedMeta(), None
    return _metadata(*args, **kwargs)


def _metadata(
    cache_seqlens: Tensor,
    num_q_tokens_per_head_k: int,
    num_heads_k: int,
    num_heads_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[Tensor, Tensor]:
    if not isinstance(is_fp8_kvcache, bool):
        raise InvalidType(
            f"[get_mla_metadata] argument 'is_fp8_kvcache': expected True or False, got {is_fp8_kvcache!r}",
            "get_mla_metadata",
            "is_fp8_kvcache",
        )
    function = "get_mla_metadata"
    require_integer(function, "num_q_tokens_per_head_k", num_q_tokens_per_head_k, 1)
    require_integer(function, "num_heads_k", num_heads_k, 1)
    rows = num_q_tokens_per_head_k * num_heads_k
    if num_heads_q is not None:
        require_integer(function, "num_heads_q", num_heads_q, 1)
    if num_heads_q is not None and rows % num_heads_q != 0:
        raise InvalidArgument(
            f"[get_mla_metadata] argument 'num_heads_q': expected a divisor of {rows}, the query rows of a request, "
            f"got {num_heads_q}",
            "get_mla_metadata",
            "num_heads_q",
        )
    processors = threads.get_num_threads() or threads.available_cpus()
    heads = rows if num_heads_q is None else num_heads_q
    with renamed("get_mla_metadata", {}):
        parts = ops.mla_num_sm_parts(processors, heads, num_heads_k, rows // heads)
        return ops.get_mla_metadata(_lengths(cache_seqlens, topk), parts)


def _lengths(cache_seqlens: Tensor, topk: int | None) -> Tensor:
    """Keys of each request: with indices as many as there are of these."""
    if topk is None:
        return cache_seqlens
    require("get_mla_metadata", "cache_seqlens", cache_seqlens, 1)
    require_integer("get_mla_metadata", "topk", topk, 1)
    lengths = empty(cache_seqlens, cache_seqlens.shape, "int32")
    lengths[...] = topk
    return lengths


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | Tensor,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Decodes against a latent cache, all of a request's keys or those that `indices` name.

    Args:
        q: [B, Sq, H, D].
        k_cache: [num_blocks, 64, 1, D]; with `is_fp8_kvcache` bytes (uint8, int8 or float8_e4m3fn) of 656 or 584 a
            row.
        block_table: int32 [B, max_blocks]; None with indices.
        cache_seqlens: int32 [B]; None with indices.
        head_dim_v: the first elements of a key that are its value.
        tile_scheduler_metadata: what get_mla_metadata() gave. A FlashMLASchedMeta that has been used takes calls of
            the same shapes and lengths only.
        num_splits: the second tensor of the old get_mla_metadata(); None with a FlashMLASchedMeta.
        softmax_scale: None = 1 / sqrt(D).
        causal: bottom-right; not with indices.
        is_fp8_kvcache: the cache is of bytes.
        indices: int32 [B, Sq, topk], block * 64 + offset; -1 names nothing.
        attn_sink: float32 [H], not counted in the LSE; only with indices, as all that follow.
        extra_k_cache: more keys, of any block size.
        extra_indices_in_kvcache: int32 [B, Sq, extra_topk] into them.
        topk_length, extra_topk_length: int32 [B], how many of the indices count.

    Returns:
        (out [B, Sq, H, head_dim_v], lse float32 [B, H, Sq]).

    Raises:
        InvalidArgument, InvalidType, Unsupported: before anything is written.
    """
    function = "flash_mla_with_kvcache"
    require(function, "q", q, 4)
    require(function, "k_cache", k_cache, 4)
    if is_fp8_kvcache:
        k_cache = _as_bytes(k_cache)
        extra_k_cache = None if extra_k_cache is None else _as_bytes(extra_k_cache)
    schedule = tile_scheduler_metadata
    if isinstance(schedule, FlashMLASchedMeta):
        if num_splits is not None:
            raise InvalidArgument(
                f"[{function}] argument 'num_splits': expected None with a FlashMLASchedMeta, got "
                f"{type(num_splits).__name__}",
                function,
                "num_splits",
            )
        config = _config(q, k_cache, causal, is_fp8_kvcache, indices, extra_k_cache, extra_indices_in_kvcache)
        if schedule.have_initialized and schedule.config != config:
            raise InvalidArgument(
                f"[{function}] argument 'tile_scheduler_metadata': expected one made for {config}, got one made for "
                f"{schedule.config}",
                function,
                "tile_scheduler_metadata",
            )
        metadata, num_splits = schedule.tile_scheduler_metadata, schedule.num_splits
    else:
        require(function, "tile_scheduler_metadata", schedule, 2)
        require(function, "num_splits", num_splits, 1)
        metadata = schedule
    with renamed(function, {"extra_indices": "extra_indices_in_kvcache"}):
        out, lse = ops.flash_mla_with_kvcache(
            q,
            k_cache,
            block_table,
            cache_seqlens,
            head_dim_v,
            tile_scheduler_metadata=metadata,
            num_splits=num_splits,
            softmax_scale=softmax_scale,
            causal=causal,
            is_fp8_kvcache=is_fp8_kvcache,
            indices=indices,
            topk_length=topk_length,
            attn_sink=attn_sink,
            extra_k_cache=extra_k_cache,
            extra_indices=extra_indices_in_kvcache,
            extra_topk_length=extra_topk_length,
        )
    if isinstance(schedule, FlashMLASchedMeta) and not schedule.have_initialized:
        lengths = empty(q, q.shape[:1], "int32") if indices is not None else cache_seqlens
        rows = max(config.s_q, 1) * config.h_q
        schedule.tile_scheduler_metadata, schedule.num_splits = _metadata(
            lengths, rows // config.h_k, config.h_k, config.h_q, is_fp8_kvcache, config.topk
        )
        schedule.config, schedule.have_initialized = config, True
    return out, lse


def _config(
    q: Tensor,
    k_cache: Tensor,
    causal: bool,
    is_fp8_kvcache: bool,
    indices: Tensor | None,
    extra_k_cache: Tensor | None,
    extra_indices: Tensor | None,
) -> FlashMLASchedMeta.Config:
    """What a schedule of these arguments is good for."""

    def size(name: str, tensor: Tensor | None, rank: int, dim: int) -> int | None:
        if tensor is None:
            return None
        require("flash_mla_with_kvcache", name, tensor, rank)
        return tensor.shape[dim]

    return FlashMLASchedMeta.Config(
        b=q.shape[0],
        s_q=q.shape[1],
        h_q=q.shape[2],
        page_block_size=k_cache.shape[1],
        h_k=k_cache.shape[2],
        causal=causal,
        is_fp8_kvcache=is_fp8_kvcache,
        topk=size("indices", indices, 3, 2),
        extra_page_block_size=size("extra_k_cache", extra_k_cache, 4, 1),
        extra_topk=size("extra_indices_in_kvcache", extra_indices, 3, 2),
    )


def _as_bytes(cache: Tensor) -> Tensor:
    """FlashMLA takes rows of bytes under any type of one byte."""
    return view_as(cache, "uint8") if dtype_name(cache) in ("int8", "float8_e4m3fn") else cache


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each query token to the rows that it names, without a batch.

    Args:
        q: [T, H, D].
        kv: [S, 1, D].
        indices: int32 [T, 1, topk], rows of kv; -1 and rows from S on name nothing.
        sm_scale: multiplies the products.
        d_v: the first elements of a row that are its value.
        attn_sink: float32 [H], not counted in lse and max_logits.
        topk_length: int32 [T], how many of the indices count.

    Returns:
        (out [T, H, d_v], max_logits, lse), float32 [T, H].

    Raises:
        InvalidArgument, InvalidType, Unsupported: before anything is written.
    """
    return ops.flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v, attn_sink=attn_sink, topk_length=topk_length)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """Prefill over ragged keys and values.

    Args:
        q: [T, H, D].
        k: [S, Hkv, D].
        v: [S, Hkv, Dv].
        cu_seqlens_qo: int32 [B + 1], prefix sum of the query lengths.
        cu_seqlens_kv: int32 [B + 1], prefix sum of the key lengths.
        max_seqlen_qo, max_seqlen_kv: at least the largest lengths.
        dropout_p: 0.
        softmax_scale: None = 1 / sqrt(D).
        causal: bottom-right.
        deterministic: True or False; bits are always the same.
        is_varlen: False: every length is the largest one.

    Returns:
        (out [T, H, Dv], lse float32 [T, H]).

    Raises:
        InvalidArgument, InvalidType, Unsupported: before anything is written.
    """
    function = "flash_attn_varlen_func"
    refuse_dropout(function, dropout_p)
    if not isinstance(deterministic, bool):
        raise InvalidType(
            f"[{function}] argument 'deterministic': expected True or False, got {deterministic!r}",
            function,
            "deterministic",
        )
    require_integer(function, "max_seqlen_qo", max_seqlen_qo, 0)
    require_integer(function, "max_seqlen_kv", max_seqlen_kv, 0)
    with renamed(function, {"query_start_loc": "cu_seqlens_qo", "scale": "softmax_scale"}):
        out, lse = ops.flash_attn_varlen(
            q, k, v, cu_seqlens_qo, cu_seqlens_kv=cu_seqlens_kv, scale=softmax_scale, causal=causal, return_lse=True
        )
    _check_lengths("cu_seqlens_qo", cu_seqlens_qo, "max_seqlen_qo", max_seqlen_qo, is_varlen)
    _check_lengths("cu_seqlens_kv", cu_seqlens_kv, "max_seqlen_kv", max_seqlen_kv, is_varlen)
    lse[lse == -float("inf")] = float("inf")
    return out, lse


def _check_lengths(name: str, cu_seqlens: Tensor, max_name: str, max_seqlen: int, is_varlen: bool) -> None:
    """No length of a valid prefix sum is above what the largest one is said to be; is_varlen = False: all are that."""
    function = "flash_attn_varlen_func"
    ends = cu_seqlens.tolist()
    lengths = [b - a for a, b in zip(ends, ends[1:])]
    if lengths and max(lengths) > max_seqlen:
        raise InvalidArgument(
            f"[{function}] argument '{max_name}': expected at least {max(lengths)}, got {max_seqlen}",
            function,
            max_name,
        )
    if not is_varlen and any(length != max_seqlen for length in lengths):
        raise InvalidArgument(
            f"[{function}] argument 'is_varlen': expected True for lengths of {name} other than {max_seqlen}, got "
            f"{is_varlen!r}",
            function,
            "is_varlen",
        )


def _require_packed(function: str, argument: str, tensor: Tensor) -> None:
    """A tensor of three dimensions that can be sliced."""
    require(function, argument, tensor, 3)
    if not hasattr(type(tensor), "__getitem__"):
        got = type(tensor).__name__
        text = f"[{function}] argument '{argument}': expected a tensor that can be sliced, got {got}"
        raise InvalidType(text, function, argument)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """flash_attn_varlen_func() of keys and values in one tensor.

    Args:
        kv: [S, Hkv, head_dim_qk + Dv].
        head_dim_qk: D.
        q, ... : as there.

    Returns:
        (out, lse) as there.

    Raises:
        InvalidArgument, InvalidType, Unsupported: as there.
    """
    _require_packed("flash_attn_varlen_kvpacked_func", "kv", kv)
    require_integer("flash_attn_varlen_kvpacked_func", "head_dim_qk", head_dim_qk, 1, kv.shape[2])
    return flash_attn_varlen_func(
        q,
        kv[:, :, :head_dim_qk],
        kv[:, :, head_dim_qk:],
        cu_seqlens_qo,
        cu_seqlens_kv,
        max_seqlen_qo,
        max_seqlen_kv,
        dropout_p,
        softmax_scale,
        causal,
        deterministic,
        is_varlen,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """flash_attn_varlen_func() of queries, keys and values in one tensor.

    Args:
        qkv: [T, H, 2 * head_dim_qk + Dv].
        cu_seqlens: int32 [B + 1], prefix sum of the lengths.
        max_seqlen: at least the largest length.
        head_dim_qk: D.
        dropout_p, ... : as there.

    Returns:
        (out, lse) as there.

    Raises:
        InvalidArgument, InvalidType, Unsupported: as there.
    """
    _require_packed("flash_attn_varlen_qkvpacked_func", "qkv", qkv)
    require_integer("flash_attn_varlen_qkvpacked_func", "head_dim_qk", head_dim_qk, 1, qkv.shape[2] // 2)
    return flash_attn_varlen_func(
        qkv[:, :, :head_dim_qk],
        qkv[:, :, head_dim_qk : 2 * head_dim_qk],
        qkv[:, :, 2 * head_dim_qk :],
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        deterministic,
        is_varlen,
    )
