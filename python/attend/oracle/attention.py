# SPDX-License-Identifier: Apache-2.0
"""References of attention over ragged and paged keys and values, and of merging.

The native references trust their arguments. So each function here first runs the one it is the reference of, which
checks them, on copies where that one writes.
"""

from __future__ import annotations

from typing import Any

from .. import _native, ops
from .._tensors import OUT_TYPES, Tensor, copy, empty, require, require_choice
from .result import Bounded, Result, result_of


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
    out_dtype: str | None = None,
) -> Result:
    """Reference of attend.ops.flash_attn_varlen().

    Args:
        out_dtype: type of the output that the bounds are for; None = that which the function makes.
        q, k, ... : as there.

    Raises:
        InvalidArgument, InvalidType, Unsupported: as there.
    """
    arguments: dict[str, Any] = dict(
        q=q,
        k=k,
        v=v,
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
    )
    require("flash_attn_varlen", "q", q, 3)
    require("flash_attn_varlen", "v", v, 3 if block_table is None else 4)
    wanted = None
    if out_dtype is not None:
        require_choice("flash_attn_varlen", "out_dtype", out_dtype, OUT_TYPES)
        wanted = empty(q, (*q.shape[:2], v.shape[-1]), out_dtype)
    out, lse = ops.flash_attn_varlen(**arguments, out=wanted, return_lse=True)
    return result_of(_native.oracle_flash_attn_varlen(**arguments, out=out, lse=lse), out.shape, lse.shape)


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
) -> Result:
    """Reference of attend.ops.flash_attn_with_kvcache(), for caches as they are before that call.

    Raises:
        InvalidArgument, InvalidType, Unsupported: as there.
    """
    arguments: dict[str, Any] = dict(
        q=q,
        k_new=k_new,
        v_new=v_new,
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
    )
    before = _run_with_kvcache(arguments, k_cache, v_cache)
    flat = _native.oracle_flash_attn_with_kvcache(**before)
    return result_of(flat, before["out"].shape, before["lse"].shape)


def appended_keys(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    k_new: Tensor,
    v_new: Tensor,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
) -> Bounded:
    """The keys that attend.ops.flash_attn_with_kvcache() appends, rotated: [B, Snew, Hkv, D].

    Raises:
        InvalidArgument, InvalidType, Unsupported: as there.
    """
    require("appended_keys", "k_new", k_new, 4)
    arguments: dict[str, Any] = dict(
        q=q,
        k_new=k_new,
        v_new=v_new,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
    )
    value, bound = _native.oracle_appended_keys(**_run_with_kvcache(arguments, k_cache, v_cache))
    return Bounded(value.reshape(k_new.shape), bound.reshape(k_new.shape))


def _run_with_kvcache(arguments: dict[str, Any], k_cache: Tensor, v_cache: Tensor) -> dict[str, Any]:
    """Checks them by a call on copies; gives the arguments of the reference: the caches as they were."""
    require("flash_attn_with_kvcache", "k_cache", k_cache, 4)
    require("flash_attn_with_kvcache", "v_cache", v_cache, 4)
    kept = {"k_cache": copy(k_cache), "v_cache": copy(v_cache)}
    out, lse = ops.flash_attn_with_kvcache(**arguments, k_cache=copy(k_cache), v_cache=copy(v_cache), return_lse=True)
    return {**arguments, **kept, "out": out, "lse": lse}


def flash_attn_varlen_int8(
    q: Tensor,
    q_scale: Tensor,
    k: Tensor,
    k_scale: Tensor,
    v: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    v_scale: Tensor | None = None,
    k_mean: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    alibi_sqrt: bool = False,
    sinks: Tensor | None = None,
    lse_includes_sink: bool = False,
    out_dtype: str = "float32",
) -> Result:
    """Reference of attend.ops.flash_attn_varlen_int8(): attention to what the codes stand for.

    Raises:
        InvalidArgument, InvalidType: as there.
    """
    arguments: dict[str, Any] = dict(
        q=q,
        q_scale=q_scale,
        k=k,
        k_scale=k_scale,
        v=v,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_table=block_table,
        v_scale=v_scale,
        k_mean=k_mean,
        scale=scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        alibi_sqrt=alibi_sqrt,
        sinks=sinks,
        lse_includes_sink=lse_includes_sink,
    )
    out, lse = ops.flash_attn_varlen_int8(**arguments, out_dtype=out_dtype, return_lse=True)
    return result_of(_native.oracle_flash_attn_varlen_int8(**arguments, out=out, lse=lse), out.shape, lse.shape)


def paged_attention_int8(
    q: Tensor,
    q_scale: Tensor,
    key_cache: Tensor,
    key_scale_cache: Tensor,
    value_cache: Tensor,
    v_scale: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    k_mean: Tensor | None = None,
    save_key: Tensor | None = None,
    save_value: Tensor | None = None,
    save_key_scale: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    alibi_sqrt: bool = False,
    sinks: Tensor | None = None,
    lse_includes_sink: bool = False,
    out_dtype: str = "float32",
) -> Result:
    """Reference of attend.ops.paged_attention_int8(), for caches as they are before that call.

    Raises:
        InvalidArgument, InvalidType: as there.
    """
    shared: dict[str, Any] = dict(
        q=q,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_table=block_table,
        v_scale=v_scale,
        k_mean=k_mean,
        scale=scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        alibi_sqrt=alibi_sqrt,
        sinks=sinks,
        lse_includes_sink=lse_includes_sink,
    )
    for name, cache, rank in (
        ("key_cache", key_cache, 4),
        ("key_scale_cache", key_scale_cache, 3),
        ("value_cache", value_cache, 4),
    ):
        require("paged_attention_int8", name, cache, rank)
    keys, scales, values = copy(key_cache), copy(key_scale_cache), copy(value_cache)
    out, lse = ops.paged_attention_int8(
        **shared,
        q_scale=q_scale,
        key_cache=keys,
        key_scale_cache=scales,
        value_cache=values,
        save_key=save_key,
        save_value=save_value,
        save_key_scale=save_key_scale,
        out_dtype=out_dtype,
        return_lse=True,
    )
    # The copies have the saved rows now.
    flat = _native.oracle_flash_attn_varlen_int8(
        **shared, q_scale=q_scale.T, k=keys, k_scale=scales, v=values, out=out, lse=lse
    )
    return result_of(flat, out.shape, lse.shape)


def paged_attention_mix(
    q: Tensor,
    q_scale: Tensor,
    key_cache: Tensor,
    key_scale_cache: Tensor,
    value_cache: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    *,
    k_mean: Tensor | None = None,
    save_key: Tensor | None = None,
    save_value: Tensor | None = None,
    save_key_scale: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    alibi_sqrt: bool = False,
    sinks: Tensor | None = None,
    lse_includes_sink: bool = False,
    out_dtype: str | None = None,
) -> Result:
    """Reference of attend.ops.paged_attention_mix(), for caches as they are before that call.

    Raises:
        InvalidArgument, InvalidType: as there.
    """
    shared: dict[str, Any] = dict(
        q=q,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_table=block_table,
        k_mean=k_mean,
        scale=scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        alibi_sqrt=alibi_sqrt,
        sinks=sinks,
        lse_includes_sink=lse_includes_sink,
    )
    for name, cache, rank in (
        ("key_cache", key_cache, 4),
        ("key_scale_cache", key_scale_cache, 3),
        ("value_cache", value_cache, 4),
    ):
        require("paged_attention_mix", name, cache, rank)
    keys, scales, values = copy(key_cache), copy(key_scale_cache), copy(value_cache)
    out, lse = ops.paged_attention_mix(
        **shared,
        q_scale=q_scale,
        key_cache=keys,
        key_scale_cache=scales,
        value_cache=values,
        save_key=save_key,
        save_value=save_value,
        save_key_scale=save_key_scale,
        out_dtype=out_dtype,
        return_lse=True,
    )
    # The copies have the saved rows now.
    flat = _native.oracle_flash_attn_varlen_int8(
        **shared, q_scale=q_scale.T, k=keys, k_scale=scales, v=values, out=out, lse=lse
    )
    return result_of(flat, out.shape, lse.shape)


def merge_attn_states(
    prefix_out: Tensor,
    prefix_lse: Tensor,
    suffix_out: Tensor,
    suffix_lse: Tensor,
    *,
    prefill_tokens_with_context: int = -1,
) -> Result:
    """Reference of attend.ops.merge_attn_states().

    Raises:
        InvalidArgument, InvalidType: as there.
    """
    arguments: dict[str, Any] = dict(
        prefix_out=prefix_out,
        prefix_lse=prefix_lse,
        suffix_out=suffix_out,
        suffix_lse=suffix_lse,
        prefill_tokens_with_context=prefill_tokens_with_context,
    )
    out, lse = ops.merge_attn_states(**arguments, return_lse=True)
    return result_of(_native.oracle_merge_attn_states(**arguments, out=out, lse=lse), out.shape, lse.shape)
