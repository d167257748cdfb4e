# SPDX-License-Identifier: Apache-2.0
"""Latent attention with FlashMLA's layouts and conventions: the LSE of a row without keys is plus infinity.

attend.compat.flash_mla has FlashMLA's own signatures; mla_decode() and sparse_mla_attention() do the same in the
conventions of this library.
"""

from __future__ import annotations

from .. import _native
from .._tensors import Tensor, empty, require, require_integer


def mla_num_sm_parts(num_processors: int, num_heads_q: int, num_heads_k: int = 1, num_q_tokens: int = 1) -> int:
    """Rows of tile_scheduler_metadata for so many processors.

    Args:
        num_processors: what FlashMLA calls streaming multiprocessors.
        num_heads_q, num_heads_k: heads of queries and keys; the second divides the first.
        num_q_tokens: query tokens of a request.

    Raises:
        InvalidArgument: a number is below 1 or num_heads_k no divisor.
    """
    return _native.mla_num_sm_parts(
        num_processors=num_processors, num_heads_q=num_heads_q, num_heads_k=num_heads_k, num_q_tokens=num_q_tokens
    )


def get_mla_metadata(cache_seqlens: Tensor, num_sm_parts: int) -> tuple[Tensor, Tensor]:
    """FlashMLA's schedule of a batch: its blocks of 64 keys, cut into parts of equal cost.

    Args:
        cache_seqlens: int32 [B], keys of each request.
        num_sm_parts: how many parts, see mla_num_sm_parts().

    Returns:
        (tile_scheduler_metadata, num_splits), int32 [num_sm_parts, 8] and [B + 1].

    Raises:
        InvalidArgument, InvalidType.
    """
    require("get_mla_metadata", "cache_seqlens", cache_seqlens, 1)
    require_integer("get_mla_metadata", "num_sm_parts", num_sm_parts, 1)
    tile_scheduler_metadata = empty(cache_seqlens, (num_sm_parts, 8), "int32")
    num_splits = empty(cache_seqlens, (cache_seqlens.shape[0] + 1,), "int32")
    _native.get_mla_metadata(
        cache_seqlens=cache_seqlens, tile_scheduler_metadata=tile_scheduler_metadata, num_splits=num_splits
    )
    return tile_scheduler_metadata, num_splits


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int = 512,
    *,
    tile_scheduler_metadata: Tensor | None = None,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    topk_length: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    isa: str | None = None,
    arithmetic: str | None = None,
    executor: _native.ThreadPool | None = None,
) -> tuple[Tensor, Tensor]:
    """Sq query tokens of each request against a latent cache: all of its keys, or those that `indices` name.

    Args:
        q: [B, Sq, H, D] of float32, float16 or bfloat16.
        k_cache: [num_blocks, 64, 1, D] of q's type; with `is_fp8_kvcache` uint8 [num_blocks, 64, 1, bytes] of a
            format of row_formats(), then q is bfloat16.
        block_table: int32 [B, max_blocks]; not read with indices.
        cache_seqlens: int32 [B], keys, those of the Sq tokens included; not read with indices.
        head_dim_v: the first elements of a key that are its value.
        tile_scheduler_metadata, num_splits: what get_mla_metadata() gave for these lengths (with indices: for topk
            keys of every request), others are refused; both or neither. They do not change any bit.
        softmax_scale: None = 1 / sqrt(D).
        causal: token i sees the keys up to cache_seqlens - Sq + i; not with indices.
        is_fp8_kvcache: the cache is of bytes.
        indices: int32 [B, Sq, topk], slots (block * 64 + offset) of each token's keys; negative ones and those beyond
            the cache name nothing. None = all keys, then the following are None, too.
        topk_length: int32 [B], how many of the indices count; None = topk.
        attn_sink: float32 [H], one more logit a head without a value, not counted in the LSE.
        extra_k_cache: [num_blocks, block_size, 1, D or bytes], more keys, of any block size.
        extra_indices: as indices, into extra_k_cache; given if and only if it is.
        extra_topk_length: as topk_length.
        out: [B, Sq, H, head_dim_v] to write to; None = a new tensor.
        lse: float32 [B, H, Sq] to write to; None = a new tensor.

    Returns:
        (out, lse), natural logarithm; a row without keys is 0, its LSE plus infinity.

    Raises:
        InvalidArgument, InvalidType, Unsupported: before anything is written.
    """
    require("flash_mla_with_kvcache", "q", q, 4)
    require_integer("flash_mla_with_kvcache", "head_dim_v", head_dim_v, 1, q.shape[3])
    if out is None:
        out = empty(q, (*q.shape[:3], head_dim_v))
    if lse is None:
        lse = empty(q, (q.shape[0], q.shape[2], q.shape[1]), "float32")
    _native.flash_mla_with_kvcache(
        q=q,
        k_cache=k_cache,
        block_table=block_table,
        cache_seqlens=cache_seqlens,
        head_dim_v=head_dim_v,
        tile_scheduler_metadata=tile_scheduler_metadata,
        num_splits=num_splits,
        softmax_scale=softmax_scale,
        causal=causal,
        is_fp8_kvcache=is_fp8_kvcache,
        indices=indices,
        topk_length=topk_length,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices=extra_indices,
        extra_topk_length=extra_topk_length,
        out=out,
        lse=lse,
        isa=isa,
        arithmetic=arithmetic,
        executor=executor,
    )
    return out, lse


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    *,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    out: Tensor | None = None,
    max_logits: Tensor | None = None,
    lse: Tensor | None = None,
    isa: str | None = None,
    arithmetic: str | None = None,
    executor: _native.ThreadPool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each query token to the rows that it names.

    Args:
        q: [T, H, D] of float32, float16 or bfloat16.
        kv: [S, 1, D] of q's type.
        indices: int32 [T, 1, topk], rows of kv; below 0 or from S on names nothing, twice named counts twice.
        sm_scale: multiplies the products.
        d_v: the first elements of a row that are its value.
        attn_sink: float32 [H], one more logit a head without a value, not counted in the LSE; plus infinity makes
            the head's output 0.
        topk_length: int32 [T], how many of the indices count; None = topk.
        out: [T, H, d_v] to write to; None = a new tensor.
        max_logits, lse: float32 [T, H] to write to; None = new tensors.

    Returns:
        (out, max_logits, lse), natural logarithm; a row without keys is 0, its largest logit minus infinity, its LSE
        plus infinity.

    Raises:
        InvalidArgument, InvalidType, Unsupported: before anything is written.
    """
    require("flash_mla_sparse_fwd", "q", q, 3)
    require_integer("flash_mla_sparse_fwd", "d_v", d_v, 1, q.shape[2])
    out = empty(q, (*q.shape[:2], d_v)) if out is None else out
    max_logits = empty(q, q.shape[:2], "float32") if max_logits is None else max_logits
    lse = empty(q, q.shape[:2], "float32") if lse is None else lse
    _native.flash_mla_sparse_fwd(
        q=q,
        kv=kv,
        indices=indices,
        sm_scale=sm_scale,
        d_v=d_v,
        attn_sink=attn_sink,
        topk_length=topk_length,
        out=out,
        max_logits=max_logits,
        lse=lse,
        isa=isa,
        arithmetic=arithmetic,
        executor=executor,
    )
    return out, max_logits, lse
