# SPDX-License-Identifier: Apache-2.0
"""References of MLA: absorbed decode, rows of bytes, and the products with a layer's weights."""

from __future__ import annotations

from typing import Any

import numpy

from .. import _native, ops
from .._tensors import Tensor, empty
from ..errors import InvalidArgument
from .result import Bounded, Result, result_of


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
) -> Result:
    """attend.ops.mla_decode() in float64, after its checks.

    Args:
        q, kv_cache, ... : as there.

    Returns:
        Result, out [T, H, L] and lse [T, H].

    Raises:
        InvalidArgument, InvalidType, Unsupported: as there.
    """
    arguments: dict[str, Any] = dict(
        q=q,
        kv_cache=kv_cache,
        block_table=block_table,
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        scale=scale,
        kv_scale=kv_scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        alibi_sqrt=alibi_sqrt,
        sinks=sinks,
        lse_includes_sink=lse_includes_sink,
    )
    out, lse = ops.mla_decode(**arguments, head_dim_v=head_dim_v, return_lse=True)
    return result_of(_native.oracle_mla_decode(**arguments, out=out, lse=lse), out.shape, lse.shape)


def mla_rows(kv_cache: Tensor) -> numpy.ndarray:
    """What the rows of a cache of bytes mean.

    Args:
        kv_cache: uint8 [num_blocks, block_size, bytes] of a format of attend.ops.row_formats().

    Returns:
        float64 [num_blocks, block_size, elements], exactly the bfloat16 numbers that the ops read.

    Raises:
        InvalidArgument, InvalidType.
    """
    known = [
        f for f in ops.row_formats() if len(getattr(kv_cache, "shape", ())) == 3 and f.row_bytes == kv_cache.shape[2]
    ]
    if not known:
        names = " or ".join(f"{f.row_bytes} bytes ({f.name})" for f in ops.row_formats())
        got = tuple(kv_cache.shape) if hasattr(kv_cache, "shape") else type(kv_cache).__name__
        raise InvalidArgument(
            f"[oracle.mla_rows] argument 'kv_cache': expected uint8 [num_blocks, block_size, bytes], rows of {names}, "
            f"got {got}",
            "oracle.mla_rows",
            "kv_cache",
        )
    blocks, block_size = kv_cache.shape[:2]
    table, starts = empty(kv_cache, (1, blocks), "int32"), empty(kv_cache, (1,), "int32")
    for block in range(blocks):
        table[0, block] = block
    starts[0] = 0
    scratch = empty(kv_cache, (blocks * block_size, known[0].dim), "bfloat16")
    ops.cp_gather_and_upconvert_fp8_kv_cache(kv_cache, scratch, table, starts)
    return _native.oracle_mla_rows(kv_cache=kv_cache).reshape(blocks, block_size, known[0].dim)


def mla_up_project(
    weight: Tensor,
    kv_c: Tensor,
    *,
    num_heads: int,
    kv_lora_rank: int,
    qk_nope_head_dim: int,
    qk_rope_head_dim: int,
    v_head_dim: int,
    dtype: str | None = None,
    weight_scale: Tensor | None = None,
) -> tuple[Bounded, Bounded]:
    """MlaWeights.up_project() in float64, after its checks.

    Args:
        weight, num_heads, ... : as attend.MlaWeights takes them.
        kv_c: [N, L].

    Returns:
        Bounded k_nope [N, H, P] and v [N, H, V].

    Raises:
        InvalidArgument, InvalidType, Unsupported: as there.
    """
    layer, arguments = _layer(
        weight, num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, dtype, weight_scale
    )
    k_nope, v = layer.up_project(kv_c)
    return (
        _product("up_project_keys", arguments, kv_c, k_nope.shape),
        _product("up_project_values", arguments, kv_c, v.shape),
    )


def mla_absorb_query(
    weight: Tensor,
    q_nope: Tensor,
    *,
    num_heads: int,
    kv_lora_rank: int,
    qk_nope_head_dim: int,
    qk_rope_head_dim: int,
    v_head_dim: int,
    dtype: str | None = None,
    weight_scale: Tensor | None = None,
) -> Bounded:
    """MlaWeights.absorb_query() in float64, after its checks.

    Args:
        weight, num_heads, ... : as attend.MlaWeights takes them.
        q_nope: [T, H, P].

    Returns:
        Bounded [T, H, L].

    Raises:
        InvalidArgument, InvalidType, Unsupported: as there.
    """
    layer, arguments = _layer(
        weight, num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, dtype, weight_scale
    )
    return _product("absorb_query", arguments, q_nope, layer.absorb_query(q_nope).shape)


def mla_v_up_project(
    weight: Tensor,
    latents: Tensor,
    *,
    num_heads: int,
    kv_lora_rank: int,
    qk_nope_head_dim: int,
    qk_rope_head_dim: int,
    v_head_dim: int,
    dtype: str | None = None,
    weight_scale: Tensor | None = None,
) -> Bounded:
    """MlaWeights.v_up_project() in float64, after its checks.

    Args:
        weight, num_heads, ... : as attend.MlaWeights takes them.
        latents: [T, H, L].

    Returns:
        Bounded [T, H, V].

    Raises:
        InvalidArgument, InvalidType, Unsupported: as there.
    """
    layer, arguments = _layer(
        weight, num_heads, kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, dtype, weight_scale
    )
    return _product("v_up_project", arguments, latents, layer.v_up_project(latents).shape)


def _layer(
    weight: Tensor,
    num_heads: int,
    kv_lora_rank: int,
    qk_nope_head_dim: int,
    qk_rope_head_dim: int,
    v_head_dim: int,
    dtype: str | None,
    weight_scale: Tensor | None,
) -> tuple[ops.MlaWeights, dict[str, Any]]:
    """The layer, which makes the checks, and the arguments that the reference takes."""
    arguments = dict(
        weight=weight,
        weight_scale=weight_scale,
        num_heads=num_heads,
        kv_lora_rank=kv_lora_rank,
        qk_nope_head_dim=qk_nope_head_dim,
        qk_rope_head_dim=qk_rope_head_dim,
        v_head_dim=v_head_dim,
    )
    layer = ops.MlaWeights(**arguments, dtype=dtype)
    return layer, dict(arguments, dtype=layer.dtype)


def _product(name: str, arguments: dict[str, Any], factor: Tensor, shape: tuple[int, ...]) -> Bounded:
    out, bound = _native.oracle_mla_product(**arguments, input=factor, product=name)
    return Bounded(value=out.reshape(shape), bound=bound.reshape(shape))
