# SPDX-License-Identifier: Apache-2.0
"""The functions of vllm.vllm_flash_attn, whose order of arguments is its own.

LSEs are natural logarithms, [heads, total]. A row without a visible key is 0; its LSE is plus infinity with
`fa_version` 2 and minus infinity with 3, as in those kernels, and with sinks (version 3) the LSE counts them. Causal
masks are aligned to the bottom right. `scheduler_metadata` and `num_splits` change no bit of a result here.
"""

from __future__ import annotations

from typing import Any

from .. import ops
from .._tensors import Tensor, dtype_name, require
from ..errors import Unsupported
from ._flash import (
    NAMES,
    check_bound,
    empty_rows_plus_infinity,
    heads_first,
    invalid,
    refuse_dropout,
    refuse_given,
    require_default,
    unsupported,
    window_of,
)
from ._renames import renamed
from .flash_attn_3 import get_scheduler_metadata as _fa3_scheduler_metadata

__all__ = [
    "DEFAULT_FA_VERSION",
    "fa_version_unsupported_reason",
    "flash_attn_varlen_func",
    "get_scheduler_metadata",
    "is_fa_version_supported",
]

DEFAULT_FA_VERSION = 2
_VERSIONS = (2, 3)


def is_fa_version_supported(fa_version: int, device: Any = None) -> bool:
    """Whether flash_attn_varlen_func() knows the conventions of that version: 2 and 3, on the CPU."""
    return fa_version_unsupported_reason(fa_version, device) is None


def fa_version_unsupported_reason(fa_version: int, device: Any = None) -> str | None:
    """Why not; None if it is."""
    if not isinstance(fa_version, int) or fa_version not in _VERSIONS:
        return f"attend has the conventions of FA versions 2 and 3, not of {fa_version}"
    if device is not None and not str(device).startswith("cpu"):
        return f"attend runs on the CPU, not on {device}"
    return None


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
    has_softcap: bool = False,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
) -> None:
    """None: attend plans inside of a call, and a plan changes no bit."""
    return _fa3_scheduler_metadata(
        batch_size,
        max_seqlen_q,
        max_seqlen_k,
        num_heads_q,
        num_heads_kv,
        headdim,
        cache_seqlens,
        headdim_v=headdim_v,
        num_splits=num_splits,
        sm_margin=sm_margin,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    max_seqlen_q: int,
    cu_seqlens_q: Tensor,
    max_seqlen_k: int,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    q_v: Tensor | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Any = None,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    scheduler_metadata: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    num_splits: int = 0,
    fa_version: int = DEFAULT_FA_VERSION,
    s_aux: Tensor | None = None,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_tot_seqused_k: Tensor | None = None,
) -> Any:
    """Attention of ragged queries to ragged keys or to a paged cache.

    Args:
        q: [total_q, Hq, D].
        k, v: [total_k, Hkv, D], or with `block_table` and `seqused_k` [num_blocks, block_size, Hkv, D].
        max_seqlen_q, max_seqlen_k: integers; the lengths themselves are used.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1], prefix sums of the lengths.
        seqused_k: int32 [B], keys of each request.
        window_size: list or tuple (left, right); None or -1 = all.
        alibi_slopes: float32 [Hq] or [B, Hq]; version 2 only.
        block_table: int32 [B, max_blocks].
        return_softmax_lse: give (out, lse).
        out: [total_q, Hq, D] to write to.
        q_descale, k_descale, v_descale: float32 [B, Hkv], of fp8 tensors; version 3 only.
        s_aux: float32, float16 or bfloat16 [Hq], logits of sinks; version 3 only.
        fa_version: 2 or 3, whose rules hold.
        q_v, return_attn_probs, cp_world_size, cp_rank, cp_tot_seqused_k: only their defaults.

    Returns:
        out, or (out, lse [Hq, total_q]).
    """
    function = "flash_attn_varlen_func"
    _check_version(function, fa_version, alibi_slopes, s_aux, num_splits, (q_descale, k_descale, v_descale))
    refuse_dropout(function, dropout_p)
    refuse_given(function, q_v=q_v, cp_tot_seqused_k=cp_tot_seqused_k)
    for name, value, default in (
        ("return_attn_probs", return_attn_probs, False),
        ("cp_world_size", cp_world_size, 1),
        ("cp_rank", cp_rank, 0),
    ):
        require_default(function, name, value, default)
    if (cu_seqlens_k is None) == (seqused_k is None):
        raise invalid(
            function, "seqused_k", "one of cu_seqlens_k and seqused_k", "both" if seqused_k is not None else "neither"
        )
    if block_table is not None and seqused_k is None:
        raise invalid(function, "seqused_k", "the keys of each request, as there is a block_table", "None")
    check_bound(function, "max_seqlen_q", max_seqlen_q)
    check_bound(function, "max_seqlen_k", max_seqlen_k)
    require(function, "q", q, 3)
    left, right = window_of(function, window_size)
    lse, lse_rows = heads_first(q, q.shape[0], q.shape[1]) if return_softmax_lse else (None, None)
    with renamed(function, NAMES):
        out = ops.flash_attn_varlen(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_kv=cu_seqlens_k,
            seq_lens=seqused_k,
            block_table=block_table,
            scale=softmax_scale,
            causal=causal,
            window_left=left,
            window_right=right,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=_as_float32(s_aux),
            lse_includes_sink=s_aux is not None,
            q_descale=q_descale,
            k_descale=k_descale,
            v_descale=v_descale,
            out=out,
            lse=lse_rows,
        )
    if not return_softmax_lse:
        return out
    if fa_version == 2:
        empty_rows_plus_infinity(lse)
    return out, lse


def _check_version(
    function: str, fa_version: int, alibi_slopes: Any, s_aux: Any, num_splits: int, descales: tuple[Any, ...]
) -> None:
    reason = fa_version_unsupported_reason(fa_version)
    if reason is not None:
        raise Unsupported(f"[{function}] argument 'fa_version': {reason}", [reason])
    if fa_version == 3:
        if alibi_slopes is not None:
            raise unsupported(function, "alibi_slopes", "None with fa_version 3", "a tensor")
        return
    if s_aux is not None:
        raise unsupported(function, "s_aux", "None with fa_version 2", "a tensor")
    check_bound(function, "num_splits", num_splits)
    if num_splits is not None and num_splits > 1:
        raise unsupported(function, "num_splits", "at most 1 with fa_version 2", num_splits)
    if all(d is not None for d in descales):
        raise unsupported(function, "q_descale", "no descales with fa_version 2", "tensors")


def _as_float32(sinks: Tensor | None) -> Tensor | None:
    """Models keep sinks in their own type; the op takes float32."""
    if sinks is None or not hasattr(sinks, "dtype") or dtype_name(sinks) == "float32":
        return sinks
    return sinks.float() if hasattr(sinks, "float") else sinks.astype("float32")
