# SPDX-License-Identifier: Apache-2.0
"""Attention over ragged or paged keys and values, and merging of partial results."""

from __future__ import annotations

from .. import _native
from .._tensors import Tensor, empty, require, result_dtype


def flash_attn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start_loc: Tensor,
    *,
    cu_seqlens_kv: Tensor | None = None,
    seq_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    alibi_sqrt: bool = False,
    sinks: Tensor | None = None,
    lse_includes_sink: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    k_token_scale: Tensor | None = None,
    v_token_scale: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
    isa: str | None = None,
    arithmetic: str | None = None,
    executor: _native.ThreadPool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of ragged queries.

    Query i of a request stands at position i + seq_len - query_len (bottom-right alignment). A row without a
    visible key is 0, its LSE minus infinity.

    Args:
        q: [T, Hq, D] of float32, float16, bfloat16; over fp8 caches also fp8.
        k: [S, Hkv, D] with `cu_seqlens_kv`, or [num_blocks, block_size, Hkv, D] with `seq_lens` and `block_table`.
        v: like k, with Dv.
        query_start_loc: int32 [B + 1], prefix sum of the query lengths.
        cu_seqlens_kv: int32 [B + 1], prefix sum of the key lengths.
        seq_lens: int32 [B], keys per request.
        block_table: int32 [B, max_blocks].
        scale: multiplies q.k; None = 1 / sqrt(D).
        causal: a key is visible up to the query's position.
        window_left, window_right: keys visible to the left and right of the position; -1 = all.
        softcap: logits become softcap * tanh(logits / softcap); 0 = off.
        alibi_slopes: float32 [Hq] or [B, Hq]; the bias is -slope * |distance|, with `alibi_sqrt` of its root.
        sinks: float32 [Hq], one more logit a head without a value.
        lse_includes_sink: the LSE counts the sink.
        q_descale, k_descale, v_descale: float32 [B, Hkv], what an fp8 code is multiplied with.
        k_token_scale, v_token_scale: float32, shape of k without its last dimension, for int8 and fp8 caches.
        out: [T, Hq, Dv] to write to; None = a new tensor.
        lse: float32 [T, Hq] to write to.
        return_lse: give (out, lse), natural logarithm.

    Returns:
        out, or (out, lse).

    Raises:
        InvalidArgument, InvalidType, Unsupported: before anything is written.
    """
    require("flash_attn_varlen", "q", q, 3)
    require("flash_attn_varlen", "v", v, 3 if block_table is None else 4)
    if out is None:
        out = empty(q, (*q.shape[:2], v.shape[-1]), result_dtype(q))
    if lse is None and return_lse:
        lse = empty(q, q.shape[:2], "float32")
    _native.flash_attn_varlen(
        q=q,
        k=k,
        v=v,
        out=out,
        lse=lse,
        query_start_loc=query_start_loc,
        cu_seqlens_kv=cu_seqlens_kv,
        seq_lens=seq_lens,
        block_table=block_table,
        scale=scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        alibi_sqrt=alibi_sqrt,
        sinks=sinks,
        lse_includes_sink=lse_includes_sink,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        k_token_scale=k_token_scale,
        v_token_scale=v_token_scale,
        isa=isa,
        arithmetic=arithmetic,
        executor=executor,
    )
    return (out, lse) if return_lse else out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k_new: Tensor | None = None,
    v_new: Tensor | None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    scale: float | None = None,
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
    """Sq query tokens of each request against a cache, after appending new rows and rotating, if asked for.

    Args:
        q: [B, Sq, Hq, D].
        k_cache: [Bc, Smax, Hkv, D], or [num_blocks, block_size, Hkv, D] with `block_table`; written with `k_new`.
        v_cache: like k_cache, with Dv.
        k_new, v_new: [B, Snew, Hkv, D] and with Dv: rows to append at `cache_seqlens`.
        cache_seqlens: int32 [B], rows in the cache before the append; None = the whole dense cache.
        cache_batch_idx: int32 [B], rows of the dense cache.
        cache_leftpad: int32 [B], first valid row of the dense cache.
        block_table: int32 [B, max_blocks].
        rotary_cos, rotary_sin: [positions, rotary_dim / 2], type of q; only with `k_new`.
        rotary_interleaved: pairs (0, 1), (2, 3); False: (0, D / 2).
        out: [B, Sq, Hq, Dv] to write to.
        lse: float32 [B, Hq, Sq] to write to.
        return_lse: give (out, lse).
        scale, causal, ... : as in flash_attn_varlen().

    Returns:
        out, or (out, lse).

    Raises:
        InvalidArgument, InvalidType, Unsupported: before anything is written.
    """
    require("flash_attn_with_kvcache", "q", q, 4)
    require("flash_attn_with_kvcache", "v_cache", v_cache, 4)
    if out is None:
        out = empty(q, (*q.shape[:3], v_cache.shape[3]))
    if lse is None and return_lse:
        lse = empty(q, (q.shape[0], q.shape[2], q.shape[1]), "float32")
    _native.flash_attn_with_kvcache(
        q=q,
        k_cache=k_cache,
        v_cache=v_cache,
        k_new=k_new,
        v_new=v_new,
        out=out,
        lse=lse,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
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


def merge_attn_states(
    prefix_out: Tensor,
    prefix_lse: Tensor,
    suffix_out: Tensor,
    suffix_lse: Tensor,
    *,
    prefill_tokens_with_context: int = -1,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    return_lse: bool = False,
    executor: _native.ThreadPool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Merges two partial results over disjoint keys by their LSE.

    An LSE of plus or minus infinity or NaN means "no visible key"; its row is never read as a number.

    Args:
        prefix_out, suffix_out: [T, H, D].
        prefix_lse, suffix_lse: float32 [T, H], natural logarithm.
        prefill_tokens_with_context: tokens that have a prefix, the first ones; -1 = all.
        out: [T, H, D] to write to; may be one of the inputs.
        lse: float32 [T, H] to write to; may be one of the inputs.
        return_lse: give (out, lse).

    Returns:
        out, or (out, lse).

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    require("merge_attn_states", "suffix_out", suffix_out, 3)
    if out is None:
        out = empty(suffix_out, suffix_out.shape)
    if lse is None and return_lse:
        lse = empty(suffix_out, suffix_out.shape[:2], "float32")
    _native.merge_attn_states(
        prefix_out=prefix_out,
        prefix_lse=prefix_lse,
        suffix_out=suffix_out,
        suffix_lse=suffix_lse,
        prefill_tokens_with_context=prefill_tokens_with_context,
        out=out,
        lse=lse,
        executor=executor,
    )
    return (out, lse) if return_lse else out
