# SPDX-License-Identifier: Apache-2.0
"""FlashAttention 3's functions (module flash_attn_interface): its argument order, defaults and return values.

LSEs are natural logarithms, [batch, heads, seqlen] or [heads, total]; a row without a visible key is 0 and its LSE
minus infinity. Causal masks are aligned to the bottom right. fp8 tensors have descales [batch, kv heads]. What only
says how a GPU shall run (num_splits, pack_gqa, sm_margin, deterministic, scheduler_metadata) changes no bit of a result
here. `qv` and `attention_chunk` raise Unsupported.
"""

from __future__ import annotations

import math
from typing import Any

from .. import ops
from .._tensors import Tensor, empty, is_torch, require, require_integer, result_dtype
from ..errors import InvalidType
from ._flash import (
    NAMES,
    check_bound,
    heads_first,
    int32_like,
    invalid,
    lengths_for_all,
    refuse_given,
    require_batched,
    require_default,
    unsupported,
    window_of,
)
from ._renames import renamed
from ._seqused import repeat_descale, split_used

__all__ = [
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "get_scheduler_metadata",
]

_BATCHED_NAMES = {**NAMES, "cu_seqlens_kv": "k"}


def _refuse_chunks(function: str, attention_chunk: int, qv: Tensor | None) -> None:
    refuse_given(function, qv=qv)
    require_default(function, "attention_chunk", attention_chunk, 0)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q [B, Sq, Hq, D] to k [B, Sk, Hkv, D] and v [B, Sk, Hkv, Dv].

    Args:
        q, k, v: float16, bfloat16 or float32; or all fp8, contiguous, then the result is bfloat16.
        softmax_scale: None = 1 / sqrt(D).
        causal: query i sees keys up to i + Sk - Sq.
        q_descale, k_descale, v_descale: float32 [B, Hkv], fp8 only.
        window_size: (left, right) keys beside that position; -1 = all.
        softcap: 0 = off.
        return_attn_probs: give (out, lse).

    Returns:
        out [B, Sq, Hq, Dv], or (out, lse [B, Hq, Sq]).
    """
    function = "flash_attn_func"
    _refuse_chunks(function, attention_chunk, qv)
    require_batched(function, q, k, v)
    left, right = window_of(function, window_size)
    options = {"scale": softmax_scale, "causal": causal, "window_left": left, "window_right": right, "softcap": softcap}
    if result_dtype(q) is None:
        for name, descale in (("q_descale", q_descale), ("k_descale", k_descale), ("v_descale", v_descale)):
            if descale is not None:
                raise invalid(function, name, "None: the tensors are not fp8", "a tensor")
        with renamed(function, {**NAMES, "k_cache": "k", "v_cache": "v"}):
            return ops.flash_attn_with_kvcache(q, k, v, return_lse=return_attn_probs, **options)
    with renamed(function, _BATCHED_NAMES):
        result = ops.flash_attn_varlen(
            _rows(q),
            _rows(k),
            _rows(v),
            _starts(q, q.shape[1]),
            cu_seqlens_kv=_starts(q, k.shape[1]),
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            return_lse=return_attn_probs,
            **options,
        )
    out, lse = result if return_attn_probs else (result, None)
    out = out.reshape(*q.shape[:3], v.shape[3])
    if lse is None:
        return out
    return out, lse.reshape(q.shape[:3]).swapaxes(1, 2)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: Tensor | None = None,
    seqused_k: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of ragged queries [total_q, Hq, D] to ragged keys [total_k, Hkv, D].

    Args:
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], prefix sums of the lengths.
        max_seqlen_q, max_seqlen_k: integers; the lengths themselves are used.
        seqused_q, seqused_k: int32 [B], how many of the first queries and keys of each are used; None = all. A row of
            the result that belongs to no used query is 0, its LSE minus infinity.
        q, k, v, softmax_scale, ... : as in flash_attn_func().

    Returns:
        out [total_q, Hq, Dv], or (out, lse [Hq, total_q]).
    """
    function = "flash_attn_varlen_func"
    _refuse_chunks(function, attention_chunk, qv)
    check_bound(function, "max_seqlen_q", max_seqlen_q)
    check_bound(function, "max_seqlen_k", max_seqlen_k)
    require(function, "q", q, 3)
    left, right = window_of(function, window_size)
    descales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    if seqused_q is not None or seqused_k is not None:
        cu_seqlens_q, cu_seqlens_k = split_used(function, q, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
        batch = cu_seqlens_q.shape[0] // 3
        descales = {name: repeat_descale(function, name, descale, batch) for name, descale in descales.items()}
    lse, lse_rows = heads_first(q, q.shape[0], q.shape[1]) if return_attn_probs else (None, None)
    with renamed(function, NAMES):
        out = ops.flash_attn_varlen(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_kv=cu_seqlens_k,
            scale=softmax_scale,
            causal=causal,
            window_left=left,
            window_right=right,
            softcap=softcap,
            lse=lse_rows,
            **descales,
        )
    return (out, lse) if return_attn_probs else out


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    qv: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_table: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Tensor | None = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention to a cache, after k and v were appended to it in place and rotated, if given.

    Args:
        q: [B, Sq, Hq, D]; with `cu_seqlens_q` ragged, [total_q, Hq, D], over a paged cache without appending.
        k_cache, v_cache: [Bc, Smax, Hkv, D], or [num_blocks, block_size, Hkv, D] with `page_table`.
        k, v: [B, Snew, Hkv, D], written behind `cache_seqlens`.
        cache_seqlens: int32 [B] or one integer for all.
        page_table: int32 [B, max_blocks].
        q_descale, k_descale, v_descale: float32 [B, Hkv]; fp8 only, which needs `cu_seqlens_q` and `page_table`.
        cu_seqlens_k_new, rotary_seqlens: not supported; None.
        rotary_cos, ..., return_softmax_lse: as in FlashAttention 2 (attend.compat.flash_attn).

    Returns:
        out, or (out, lse): lse [B, Hq, Sq], or [Hq, total_q] with `cu_seqlens_q`.
    """
    function = "flash_attn_with_kvcache"
    _refuse_chunks(function, attention_chunk, qv)
    refuse_given(function, cu_seqlens_k_new=cu_seqlens_k_new, rotary_seqlens=rotary_seqlens)
    left, right = window_of(function, window_size)
    options = {"scale": softmax_scale, "causal": causal, "window_left": left, "window_right": right, "softcap": softcap}
    names = {**NAMES, "block_table": "page_table", "seq_lens": "cache_seqlens"}
    require(function, "q", q, 4 if cu_seqlens_q is None else 3)
    if type(cache_seqlens) is int:
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        cache_seqlens = lengths_for_all(function, q, cache_seqlens, batch)
    if cu_seqlens_q is not None:
        refuse_given(function, k=k, v=v, rotary_cos=rotary_cos, rotary_sin=rotary_sin, cache_batch_idx=cache_batch_idx)
        refuse_given(function, cache_leftpad=cache_leftpad)
        if page_table is None:
            raise unsupported(function, "cu_seqlens_q", "None without a page_table", "a tensor")
        lse, lse_rows = heads_first(q, q.shape[0], q.shape[1]) if return_softmax_lse else (None, None)
        descales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
        with renamed(function, {**names, "k": "k_cache", "v": "v_cache"}):
            out = ops.flash_attn_varlen(
                q,
                k_cache,
                v_cache,
                cu_seqlens_q,
                seq_lens=cache_seqlens,
                block_table=page_table,
                lse=lse_rows,
                **descales,
                **options,
            )
        return (out, lse) if return_softmax_lse else out
    refuse_given(function, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
    with renamed(function, names):
        return ops.flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            k_new=k,
            v_new=v,
            cache_seqlens=cache_seqlens,
            cache_batch_idx=cache_batch_idx,
            cache_leftpad=cache_leftpad,
            block_table=page_table,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            rotary_interleaved=rotary_interleaved,
            return_lse=return_softmax_lse,
            **options,
        )


def get_scheduler_metadata(
    batch_size: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_heads_q: int,
    num_heads_kv: int,
    headdim: int,
    cache_seqlens: Tensor,
    qkv_dtype: Any = None,
    headdim_v: int | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k_new: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    page_size: int | None = None,
    max_seqlen_k_new: int = 0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> None:
    """None, the default of `scheduler_metadata`: attend plans inside of a call, and a plan changes no bit."""
    function = "get_scheduler_metadata"
    require_default(function, "attention_chunk", attention_chunk, 0)
    for name, value in (
        ("batch_size", batch_size),
        ("max_seqlen_q", max_seqlen_q),
        ("max_seqlen_k", max_seqlen_k),
        ("num_heads_q", num_heads_q),
        ("num_heads_kv", num_heads_kv),
        ("headdim", headdim),
    ):
        require_integer(function, name, value, 0)
    require(function, "cache_seqlens", cache_seqlens, 1)


def flash_attn_combine(
    out_partial: Tensor, lse_partial: Tensor, out: Tensor | None = None, out_dtype: Any = None
) -> tuple[Tensor, Tensor]:
    """Merges the results of splits along the keys.

    Args:
        out_partial: float32 [splits, B, S, H, D] or [splits, total, H, D].
        lse_partial: float32 [splits, B, S, H] or [splits, total, H], any strides.
        out: tensor to write to.
        out_dtype: type of a new one; None = that of out_partial.

    Returns:
        (out, lse) without the dimension of the splits; LSE [B, S, H] or [total, H].
    """
    function = "flash_attn_combine"
    rank = len(getattr(out_partial, "shape", ())) if hasattr(out_partial, "dtype") else 0
    require(function, "out_partial", out_partial, 5 if rank == 5 else 4)
    require(function, "lse_partial", lse_partial, rank - 1)
    if out_partial.shape[0] < 1:
        raise invalid(function, "out_partial", "at least one split", tuple(out_partial.shape))
    if tuple(lse_partial.shape) != tuple(out_partial.shape[:-1]):
        raise invalid(function, "lse_partial", tuple(out_partial.shape[:-1]), tuple(lse_partial.shape))
    heads, dim = out_partial.shape[-2:]
    merged = empty(out_partial, (_count(out_partial.shape[1:-2]), heads, dim))
    lse = empty(lse_partial, merged.shape[:2])
    with renamed(function, {"prefix_out": "out_partial", "suffix_out": "out_partial", "suffix_lse": "lse_partial"}):
        merged[...] = 0
        lse[...] = -math.inf  # a merge reads no row without keys, nor does it copy one
        for split in range(out_partial.shape[0]):
            ops.merge_attn_states(
                merged,
                lse,
                out_partial[split].reshape(merged.shape),
                lse_partial[split].reshape(lse.shape),
                out=merged,
                lse=lse,
            )
    merged = merged.reshape(out_partial.shape[1:])
    if out is not None:
        if not isinstance(out, type(merged)):
            text = f"[{function}] argument 'out': expected a {type(merged).__name__}, got {type(out).__name__}"
            raise InvalidType(text, function, "out")
        if tuple(out.shape) != tuple(merged.shape):
            raise invalid(function, "out", tuple(merged.shape), tuple(out.shape))
        out[...] = merged
    elif out_dtype is not None:
        try:
            out = merged.to(dtype=out_dtype) if is_torch(merged) else merged.astype(out_dtype)
        except (TypeError, ValueError) as e:
            text = f"[{function}] argument 'out_dtype': expected a type of elements, got {type(out_dtype).__name__}"
            raise InvalidType(text, function, "out_dtype") from e
    else:
        out = merged
    return out, lse.reshape(lse_partial.shape[1:])


def _count(shape: Any) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


def _rows(t: Tensor) -> Tensor:
    """[B, S, H, D] as [B * S, H, D]."""
    return t.reshape(t.shape[0] * t.shape[1], *t.shape[2:])


def _starts(q: Tensor, length: int) -> Tensor:
    return int32_like(q, [length * i for i in range(q.shape[0] + 1)])
