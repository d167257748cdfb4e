# SPDX-License-Identifier: Apache-2.0
"""References of sparse MLA, of FlashMLA's functions, and of the way from chosen tokens to rows of a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from .. import _native, ops
from .._tensors import Tensor, empty, require_integer
from ._numbers import numbers_of
from .mla import mla_decode
from .result import Result


@dataclass(frozen=True)
class SparseResult(Result):
    """Result, and the largest scaled logit of each row."""

    max_logits: numpy.ndarray  #: float64, shape of the LSE
    max_logits_bound: numpy.ndarray  #: same shape


def sparse_mla_attention(
    q: Tensor,
    kv_cache: Tensor,
    indices: Tensor,
    *,
    scale: float,
    head_dim_v: int | None = None,
    topk_length: Tensor | None = None,
    kv_scale: Tensor | None = None,
    sinks: Tensor | None = None,
) -> SparseResult:
    """attend.ops.sparse_mla_attention() in float64, after its checks.

    Args:
        q, kv_cache, ... : as there.

    Returns:
        SparseResult, out [T, H, L], lse and max_logits [T, H].

    Raises:
        InvalidArgument, InvalidType, Unsupported: as there.
    """
    out, lse = ops.sparse_mla_attention(
        q,
        kv_cache,
        indices,
        scale=scale,
        head_dim_v=head_dim_v,
        topk_length=topk_length,
        kv_scale=kv_scale,
        sinks=sinks,
        return_lse=True,
    )
    return _result(
        _native.oracle_sparse_mla_attention(
            q=q,
            kv_cache=kv_cache,
            indices=indices,
            scale=scale,
            topk_length=topk_length,
            kv_scale=kv_scale,
            sinks=sinks,
            out=out,
            lse=lse,
        ),
        out.shape,
    )


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int = 512,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    topk_length: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
) -> Result:
    """attend.ops.flash_mla_with_kvcache() in float64, after its checks.

    Args:
        q, k_cache, ... : as there.

    Returns:
        Result, out [B, Sq, H, head_dim_v] and lse [B, H, Sq], plus infinity for rows without keys.

    Raises:
        InvalidArgument, InvalidType, Unsupported: as there.
    """
    out, _ = ops.flash_mla_with_kvcache(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        softmax_scale=softmax_scale,
        causal=causal,
        is_fp8_kvcache=is_fp8_kvcache,
        indices=indices,
        topk_length=topk_length,
        attn_sink=attn_sink,
        extra_k_cache=extra_k_cache,
        extra_indices=extra_indices,
        extra_topk_length=extra_topk_length,
    )
    batch, tokens, heads, dim = q.shape
    scale = dim**-0.5 if softmax_scale is None else softmax_scale
    rows = q.reshape(batch * tokens, heads, dim)
    if indices is None:
        starts = empty(q, (batch + 1,), "int32")
        for request in range(batch + 1):
            starts[request] = request * tokens
        r = mla_decode(
            rows,
            k_cache[:, :, 0],
            block_table,
            starts,
            cache_seqlens,
            scale=scale,
            head_dim_v=head_dim_v,
            causal=causal,
        )
    else:
        more = {}
        if extra_k_cache is not None:
            more = dict(
                more_kv_cache=extra_k_cache[:, :, 0],
                more_indices=extra_indices.reshape(batch * tokens, -1),
                more_topk_length=_of_each_token(q, extra_topk_length, tokens),
            )
        r = _result(
            _native.oracle_sparse_mla_attention(
                q=rows,
                kv_cache=k_cache[:, :, 0],
                indices=indices.reshape(batch * tokens, -1),
                scale=scale,
                topk_length=_of_each_token(q, topk_length, tokens),
                sinks=attn_sink,
                out=out.reshape(batch * tokens, heads, head_dim_v),
                **more,
            ),
            (batch * tokens, heads, head_dim_v),
        )
    r = _flash_mla_conventions(r, attn_sink)
    transposed = (batch, tokens, heads)
    return Result(
        out=r.out.reshape(out.shape),
        out_bound=r.out_bound.reshape(out.shape),
        lse=r.lse.reshape(transposed).transpose(0, 2, 1),
        lse_bound=r.lse_bound.reshape(transposed).transpose(0, 2, 1),
    )


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    *,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
) -> SparseResult:
    """attend.ops.flash_mla_sparse_fwd() in float64, after its checks.

    Args:
        q, kv, ... : as there.

    Returns:
        SparseResult, out [T, H, d_v], lse (plus infinity for rows without keys) and max_logits [T, H].

    Raises:
        InvalidArgument, InvalidType, Unsupported: as there.
    """
    out, _, _ = ops.flash_mla_sparse_fwd(q, kv, indices, sm_scale, d_v, attn_sink=attn_sink, topk_length=topk_length)
    r = _result(
        _native.oracle_sparse_mla_attention(
            q=q,
            kv_cache=kv.reshape(kv.shape[0], 1, kv.shape[2]),
            indices=indices[:, 0],
            scale=sm_scale,
            topk_length=topk_length,
            sinks=attn_sink,
            out=out,
        ),
        out.shape,
    )
    return _flash_mla_conventions(r, attn_sink)


def global_index(
    token: int,
    blocks: Sequence[int],
    *,
    block_size: int,
    num_blocks: int,
    block_stride_rows: int = 0,
    world_size: int = 1,
    interleave: int = 1,
    rank: int = 0,
) -> int:
    """The row of one token of a request, as convert_req_index_to_global_index() and filter_and_convert_dcp_index().

    Args:
        token: its index in the request.
        blocks: those of the request.
        block_size, num_blocks, block_stride_rows, world_size, interleave, rank: as there.

    Returns:
        The row; -1 if the rank does not hold the token or the cache has no such row.

    Raises:
        InvalidArgument, InvalidType: as there.
    """
    require_integer("oracle.global_index", "token", token, -(2**31))
    ids = numbers_of("oracle.global_index", "blocks", blocks, int)
    for block in ids:
        require_integer("oracle.global_index", "blocks", block, -(2**31))
    req_id, table, index = numpy.zeros(1, "int32"), numpy.array([ids], "int32"), numpy.array([[token]], "int32")
    ops.filter_and_convert_dcp_index(
        req_id,
        table,
        index,
        block_size=block_size,
        num_blocks=num_blocks,
        block_stride_rows=block_stride_rows,
        world_size=world_size,
        interleave=interleave,
        rank=rank,
    )
    sizes = (num_blocks, block_size, block_stride_rows or block_size, world_size or 1, interleave or 1, rank or 0)
    return _native.oracle_global_index(int(token), ids, tuple(int(n) for n in sizes))


def _result(flat: tuple[Any, ...], shape: tuple[int, ...]) -> SparseResult:
    out, out_bound, lse, lse_bound, max_logits, max_logits_bound = flat
    rows = shape[:2]
    return SparseResult(
        out=out.reshape(shape),
        out_bound=out_bound.reshape(shape),
        lse=lse.reshape(rows),
        lse_bound=lse_bound.reshape(rows),
        max_logits=max_logits.reshape(rows),
        max_logits_bound=max_logits_bound.reshape(rows),
    )


def _of_each_token(like: Tensor, lengths: Tensor | None, tokens: int) -> Tensor | None:
    """Numbers of requests as numbers of their tokens."""
    if lengths is None:
        return None
    each = empty(like, (len(lengths) * tokens,), "int32")
    for i in range(len(lengths) * tokens):
        each[i] = lengths[i // tokens]
    return each


def _flash_mla_conventions(r: Result, attn_sink: Tensor | None) -> Result:
    """The LSE of rows without keys is plus infinity; a sink of plus infinity takes everything."""
    lse = numpy.where(numpy.isneginf(r.lse), numpy.inf, r.lse)
    fields = dict(r.__dict__, lse=lse)
    if attn_sink is not None:
        everything = numpy.isposinf(numpy.array([float(s) for s in attn_sink]))[None, :, None]
        fields["out"] = numpy.where(everything, 0.0, r.out)
        fields["out_bound"] = numpy.where(everything, 0.0, r.out_bound)
    return type(r)(**fields)
