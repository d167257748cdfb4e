# SPDX-License-Identifier: Apache-2.0
"""FlashAttention 2's functions: its argument order, defaults and return values.

LSEs are natural logarithms, [batch, heads, seqlen] or [heads, total]; a row without a visible key is 0 and its LSE plus
infinity. Causal masks are aligned to the bottom right. Inference only: `dropout_p` must be 0. `deterministic` and
`num_splits` change no bit of a result here. With `return_attn_probs` the third result is None, as there is no
dropout mask to show.
"""

from __future__ import annotations

from typing import Any

from .. import ops
from .._tensors import Tensor, require
from ._flash import (
    NAMES,
    check_bound,
    empty_rows_plus_infinity,
    heads_first,
    invalid,
    lengths_for_all,
    prefix_differences,
    refuse_dropout,
    require_batched,
    window_of,
)
from ._renames import renamed

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

#: The version of FlashAttention whose interface this is.
__version__ = "2.8.3"

_BATCHED_NAMES = {**NAMES, "k_cache": "k", "v_cache": "v"}


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of q [B, Sq, Hq, D] to k and v [B, Sk, Hkv, D].

    Args:
        q, k, v: float16, bfloat16 or float32; any strides but the last.
        dropout_p: must be 0.
        softmax_scale: None = 1 / sqrt(D).
        causal: query i sees keys up to i + Sk - Sq.
        window_size: (left, right) keys beside that position; -1 = all.
        softcap: 0 = off.
        alibi_slopes: float32 [Hq] or [B, Hq].
        deterministic: accepted; results always are.
        return_attn_probs: give (out, lse, None).

    Returns:
        out [B, Sq, Hq, D], or (out, lse [B, Hq, Sq], None).
    """
    refuse_dropout("flash_attn_func", dropout_p)
    require_batched("flash_attn_func", q, k, v)
    left, right = window_of("flash_attn_func", window_size)
    with renamed("flash_attn_func", _BATCHED_NAMES):
        result = ops.flash_attn_with_kvcache(
            q,
            k,
            v,
            scale=softmax_scale,
            causal=causal,
            window_left=left,
            window_right=right,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            return_lse=return_attn_probs,
        )
    if not return_attn_probs:
        return result
    out, lse = result
    empty_rows_plus_infinity(lse)
    return out, lse, None


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_func() of qkv [B, S, 3, H, D], without copies."""
    require("flash_attn_qkvpacked_func", "qkv", qkv, 5)
    _require_size("flash_attn_qkvpacked_func", "qkv", qkv, 2, 3)
    return flash_attn_func(
        qkv[:, :, 0],
        qkv[:, :, 1],
        qkv[:, :, 2],
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_func() of q [B, Sq, Hq, D] and kv [B, Sk, 2, Hkv, D], without copies."""
    require("flash_attn_kvpacked_func", "kv", kv, 5)
    _require_size("flash_attn_kvpacked_func", "kv", kv, 2, 2)
    return flash_attn_func(
        q,
        kv[:, :, 0],
        kv[:, :, 1],
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Any:
    """Attention of ragged queries [total_q, Hq, D] to ragged keys [total_k, Hkv, D], or to a paged cache.

    Args:
        k, v: with `block_table` [num_blocks, block_size, Hkv, D].
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], prefix sums of the lengths.
        max_seqlen_q, max_seqlen_k: integers; the lengths themselves are used.
        block_table: int32 [B, max_blocks].
        dropout_p, softmax_scale, ... : as in flash_attn_func().

    Returns:
        out [total_q, Hq, D], or (out, lse [Hq, total_q], None).
    """
    function = "flash_attn_varlen_func"
    refuse_dropout(function, dropout_p)
    check_bound(function, "max_seqlen_q", max_seqlen_q)
    check_bound(function, "max_seqlen_k", max_seqlen_k)
    require(function, "q", q, 3)
    require(function, "cu_seqlens_k", cu_seqlens_k, 1)
    left, right = window_of(function, window_size)
    paged = block_table is not None
    lse, lse_rows = heads_first(q, q.shape[0], q.shape[1]) if return_attn_probs else (None, None)
    with renamed(function, {**NAMES, "seq_lens": "cu_seqlens_k"}):
        out = ops.flash_attn_varlen(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_kv=None if paged else cu_seqlens_k,
            seq_lens=prefix_differences(cu_seqlens_k) if paged else None,
            block_table=block_table,
            scale=softmax_scale,
            causal=causal,
            window_left=left,
            window_right=right,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            lse=lse_rows,
        )
    if not return_attn_probs:
        return out
    empty_rows_plus_infinity(lse)
    return out, lse, None


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_varlen_func() of qkv [total, 3, H, D], without copies."""
    require("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 4)
    _require_size("flash_attn_varlen_qkvpacked_func", "qkv", qkv, 1, 3)
    return flash_attn_varlen_func(
        qkv[:, 0],
        qkv[:, 1],
        qkv[:, 2],
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """flash_attn_varlen_func() of kv [total_k, 2, Hkv, D], without copies."""
    require("flash_attn_varlen_kvpacked_func", "kv", kv, 4)
    _require_size("flash_attn_varlen_kvpacked_func", "kv", kv, 1, 2)
    return flash_attn_varlen_func(
        q,
        kv[:, 0],
        kv[:, 1],
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention to a cache, after k and v were appended to it in place and rotated, if given.

    Args:
        q: [B, Sq, Hq, D].
        k_cache, v_cache: [Bc, Smax, Hkv, D], or [num_blocks, block_size, Hkv, D] with `block_table`.
        k, v: [B, Snew, Hkv, D], written behind `cache_seqlens`.
        rotary_cos, rotary_sin: [positions, rotary_dim / 2]; only with k.
        cache_seqlens: int32 [B] or one integer for all: rows that are in the cache; None = all of it.
        cache_batch_idx: int32 [B], rows of the cache.
        cache_leftpad: int32 [B], first valid row.
        block_table: int32 [B, max_blocks].
        num_splits: accepted; the plan decides, and results do not depend on it.
        return_softmax_lse: give (out, lse).
        softmax_scale, causal, ... : as in flash_attn_func().

    Returns:
        out [B, Sq, Hq, D], or (out, lse [B, Hq, Sq]).
    """
    function = "flash_attn_with_kvcache"
    if type(num_splits) is not int:
        check_bound(function, "num_splits", num_splits)
    if type(cache_seqlens) is int:
        require(function, "q", q, 4)
        cache_seqlens = lengths_for_all(function, q, cache_seqlens, q.shape[0])
    left, right = window_of(function, window_size)
    with renamed(function, NAMES):
        result = ops.flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            k_new=k,
            v_new=v,
            cache_seqlens=cache_seqlens,
            cache_batch_idx=cache_batch_idx,
            cache_leftpad=cache_leftpad,
            block_table=block_table,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            rotary_interleaved=rotary_interleaved,
            scale=softmax_scale,
            causal=causal,
            window_left=left,
            window_right=right,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            return_lse=return_softmax_lse,
        )
    if return_softmax_lse:
        empty_rows_plus_infinity(result[1])
    return result


def _require_size(function: str, argument: str, tensor: Tensor, dim: int, size: int) -> None:
    if tensor.shape[dim] != size:
        raise invalid(function, argument, f"size {size} in dimension {dim}", tuple(tensor.shape))
