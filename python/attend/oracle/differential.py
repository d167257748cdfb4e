# SPDX-License-Identifier: Apache-2.0
"""References of differential attention. Each first runs the function it is the reference of, for its checks."""

from __future__ import annotations

from typing import Any

import numpy

from .. import _native, ops
from .._tensors import OUT_TYPES, Tensor, empty, require, require_choice, require_flag
from .result import Bounded, Result, result_of


def differential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start_loc: Tensor,
    *,
    cu_seqlens_kv: Tensor | None = None,
    seq_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    variant: str = "v1",
    pairing: str = "interleaved",
    lambda_: float = 0.0,
    token_lambda: Tensor | None = None,
    norm: bool = True,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    out_scale: float = 1.0,
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
    return_maps: bool = False,
    out_dtype: str | None = None,
) -> Result:
    """Reference of attend.ops.differential_attention(). `out` is that of the maps with `return_maps`.

    Args:
        out_dtype: type of the output that the bounds are for; None = that which the function makes. Maps are float32.
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
        variant=variant,
        pairing=pairing,
        token_lambda=token_lambda,
        norm=norm,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        out_scale=out_scale,
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
    )
    require("differential_attention", "q", q, 3)
    tokens, heads, head_size = q.shape
    require_choice("differential_attention", "variant", variant, ("v1", "v2"))
    require_flag("differential_attention", "return_maps", return_maps)
    wanted = None
    if out_dtype is not None:
        require_choice("differential_attention", "out_dtype", out_dtype, OUT_TYPES)
    if out_dtype is not None and not return_maps:
        wanted = empty(q, (tokens, heads // 2 if variant == "v2" else heads, head_size), out_dtype)
    out, lse = ops.differential_attention(
        **arguments, lambda_=lambda_, out=wanted, return_maps=return_maps, return_lse=True
    )
    target = {"maps": out} if return_maps else {"out": out}
    flat = _native.oracle_differential_attention(**arguments, **target, lse=lse, **{"lambda": lambda_})
    return result_of(flat, out.shape, lse.shape)


def differential_combine(
    maps: Tensor,
    *,
    variant: str = "v1",
    pairing: str = "interleaved",
    lambda_: float = 0.0,
    token_lambda: Tensor | None = None,
    norm: bool = True,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    out_scale: float = 1.0,
) -> Result:
    """Reference of attend.ops.differential_combine(). It has no LSE.

    Raises:
        InvalidArgument, InvalidType, Unsupported: as there.
    """
    arguments: dict[str, Any] = dict(
        maps=maps,
        variant=variant,
        pairing=pairing,
        token_lambda=token_lambda,
        norm=norm,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        out_scale=out_scale,
    )
    out = ops.differential_combine(**arguments, lambda_=lambda_)
    flat = _native.oracle_differential_combine(**arguments, out=out, **{"lambda": lambda_})
    return result_of(flat, out.shape, None)


def differential_lambda(
    lambda_q1: Tensor,
    lambda_k1: Tensor,
    lambda_q2: Tensor,
    lambda_k2: Tensor,
    lambda_init: float,
    *,
    round_to: str | None = None,
) -> Bounded:
    """Reference of attend.ops.differential_lambda(): arrays without dimensions.

    Raises:
        InvalidArgument, InvalidType: as there.
    """
    arguments: dict[str, Any] = dict(
        lambda_q1=lambda_q1,
        lambda_k1=lambda_k1,
        lambda_q2=lambda_q2,
        lambda_k2=lambda_k2,
        lambda_init=lambda_init,
        round_to=round_to,
    )
    ops.differential_lambda(**arguments)
    value, bound = _native.oracle_differential_lambda(**arguments)
    return Bounded(numpy.asarray(value), numpy.asarray(bound))
