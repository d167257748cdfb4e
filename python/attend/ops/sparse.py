# SPDX-License-Identifier: Apache-2.0
"""Sparse MLA: attention to keys that each query token names, and from chosen tokens to rows of a cache."""

from __future__ import annotations

from .. import _native
from .._tensors import Tensor, empty, require, require_integer
from .mla import check_value_dim, new_latents


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
    out: Tensor | None = None,
    lse: Tensor | None = None,
    max_logits: Tensor | None = None,
    return_lse: bool = False,
    isa: str | None = None,
    arithmetic: str | None = None,
    executor: _native.ThreadPool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Absorbed attention of each query token to the rows of a latent cache that it names.

    A token without a key: out 0, LSE and largest logit minus infinity. Rows that nobody names are not read.

    Args:
        q: [T, H, E] of float32, float16 or bfloat16.
        kv_cache: as in mla_decode(), but of any block size.
        indices: int32 [T, topk], slots (block * block_size + offset); a negative one and one beyond the cache name
            nothing, one that is named twice counts twice.
        scale: multiplies the products; that of the model's heads before absorption, so there is no default.
        head_dim_v: L, the first elements of a row that are its value; None = that of `out` or of the cache's format.
        topk_length: int32 [T], how many of the indices of a token count; None = topk.
        kv_scale: as in mla_decode().
        sinks: float32 [H], one more logit a head without a value, not counted in the LSE.
        out: [T, H, L] to write to; None = a new tensor.
        lse: float32 [T, H] to write to, natural logarithm.
        max_logits: float32 [T, H] to write the largest scaled logits to; None = not wanted.
        return_lse: give (out, lse).

    Returns:
        out, or (out, lse).

    Raises:
        InvalidArgument, InvalidType, Unsupported: before anything is written.
    """
    require("sparse_mla_attention", "q", q, 3)
    require("sparse_mla_attention", "kv_cache", kv_cache, 3)
    if out is None:
        out = new_latents("sparse_mla_attention", q, kv_cache, head_dim_v)
    else:
        check_value_dim("sparse_mla_attention", out, head_dim_v)
    if lse is None and return_lse:
        lse = empty(q, q.shape[:2], "float32")
    _native.sparse_mla_attention(
        q=q,
        kv_cache=kv_cache,
        indices=indices,
        topk_length=topk_length,
        out=out,
        lse=lse,
        max_logits=max_logits,
        kv_scale=kv_scale,
        sinks=sinks,
        scale=scale,
        isa=isa,
        arithmetic=arithmetic,
        executor=executor,
    )
    return (out, lse) if return_lse else out


def convert_req_index_to_global_index(
    req_id: Tensor,
    block_table: Tensor,
    token_indices: Tensor,
    *,
    block_size: int,
    num_blocks: int,
    block_stride_rows: int = 0,
    prefill_workspace_request_ids: Tensor | None = None,
    prefill_workspace_starts: Tensor | None = None,
    workspace_rows: int = 0,
    out: Tensor | None = None,
    valid_counts: Tensor | None = None,
    return_valid_counts: bool = False,
    executor: _native.ThreadPool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """From chosen tokens, numbered within their request, to rows of a cache or of a workspace.

    Whatever the indices are, a result is -1 or a row that exists. Duplicates stay.

    Args:
        req_id: int32 [T], request of each query token.
        block_table: int32 [R, max_blocks], blocks of each request.
        token_indices: int32 [T, K].
        block_size: tokens of a block.
        num_blocks: blocks of the cache.
        block_stride_rows: rows from one block to the next where blocks lie apart; 0 = block_size.
        prefill_workspace_request_ids: int32 [T], for query tokens whose keys lie in the workspace the entry of
            prefill_workspace_starts, negative for those that read the cache; None = all read the cache.
        prefill_workspace_starts: int32 [P], row of the workspace that holds token 0; needed with the ids.
        workspace_rows: rows that the workspace has; read with the ids.
        out: int32 [T, K] to write to, may be token_indices itself; None = a new tensor.
        valid_counts: int32 [T] to write to: entries of each row that are not -1.
        return_valid_counts: give (out, valid_counts).

    Returns:
        out, or (out, valid_counts).

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    require("convert_req_index_to_global_index", "token_indices", token_indices, 2)
    require_integer("convert_req_index_to_global_index", "num_blocks", num_blocks, 0)
    out = empty(token_indices, token_indices.shape) if out is None else out
    if valid_counts is None and return_valid_counts:
        valid_counts = empty(token_indices, token_indices.shape[:1])
    _native.convert_req_index_to_global_index(
        req_id=req_id,
        block_table=block_table,
        num_blocks=num_blocks,
        block_size=block_size,
        block_stride_rows=block_stride_rows,
        token_indices=token_indices,
        out=out,
        valid_counts=valid_counts,
        prefill_workspace_request_ids=prefill_workspace_request_ids,
        prefill_workspace_starts=prefill_workspace_starts,
        workspace_rows=workspace_rows,
        executor=executor,
    )
    return (out, valid_counts) if return_valid_counts else out


def filter_and_convert_dcp_index(
    req_id: Tensor,
    block_table: Tensor,
    token_indices: Tensor,
    *,
    block_size: int,
    num_blocks: int,
    block_stride_rows: int = 0,
    world_size: int = 1,
    interleave: int = 1,
    rank: int = 0,
    compact_to_front: bool = False,
    out: Tensor | None = None,
    valid_counts: Tensor | None = None,
    return_valid_counts: bool = False,
    executor: _native.ThreadPool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """convert_req_index_to_global_index() for a cache that ranks share: -1 for tokens of other ranks.

    Position p belongs to rank (p / interleave) mod world_size, which stores its own tokens densely.

    Args:
        req_id, block_table, block_size, num_blocks, block_stride_rows: as there, of this rank.
        token_indices: int32 [T, K], positions in the whole request.
        world_size: ranks.
        interleave: consecutive tokens on one rank.
        rank: this one, in [0, world_size).
        compact_to_front: entries that are not -1 come first, in their order.
        out, valid_counts, return_valid_counts: as there.

    Returns:
        out, or (out, valid_counts).

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    require("filter_and_convert_dcp_index", "token_indices", token_indices, 2)
    require_integer("filter_and_convert_dcp_index", "num_blocks", num_blocks, 0)
    out = empty(token_indices, token_indices.shape) if out is None else out
    if valid_counts is None and return_valid_counts:
        valid_counts = empty(token_indices, token_indices.shape[:1])
    _native.filter_and_convert_dcp_index(
        req_id=req_id,
        block_table=block_table,
        num_blocks=num_blocks,
        block_size=block_size,
        block_stride_rows=block_stride_rows,
        token_indices=token_indices,
        out=out,
        valid_counts=valid_counts,
        world_size=world_size,
        interleave=interleave,
        rank=rank,
        compact_to_front=compact_to_front,
        executor=executor,
    )
    return (out, valid_counts) if return_valid_counts else out
