# SPDX-License-Identifier: Apache-2.0
"""The indexer of sparse MLA: which tokens a query attends to.

Its cache is uint8 [num_blocks, block_size, 132], whose last two dimensions only count the bytes of a block: first the
codes of all its tokens, 128 each, then their scales as float32.
"""

from __future__ import annotations

from .. import _native
from .._tensors import Tensor, empty, require, require_integer, require_tensor

_DIM = 128


def prepare_indexer(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    k_norm_weight: Tensor,
    k_norm_bias: Tensor,
    *,
    is_neox: bool = True,
    k_norm_eps: float = 1e-6,
    hadamard: bool = False,
    q_scale_fmt: str = "ue8m0",
    softmax_scale: float | None = None,
    q_codes: Tensor | None = None,
    weights_out: Tensor | None = None,
    k_out: Tensor | None = None,
    executor: _native.ThreadPool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the projections of T tokens to what the logits are made of: norm of keys, rotation, codes of queries.

    Args:
        q: [T', H, 128] or [T', H * 128] of float32, float16 or bfloat16.
        k: [T', 128] of q's type, before its norm.
        weights: [T', H] of float32 or q's type.
        positions: int64 [T]; rows from T on are neither read nor written.
        cos_sin_cache: [max_pos, 64], cosines of 32 pairs, then sines; type of q or float32.
        k_norm_weight, k_norm_bias: float32 [128], LayerNorm of the keys.
        is_neox: pairs (i, i + 32); False: (2i, 2i + 1).
        k_norm_eps: of the LayerNorm.
        hadamard: multiplies queries and keys by the orthonormal Hadamard matrix, after the rotation.
        q_scale_fmt: scales of queries, "ue8m0" (powers of two) or "unrounded".
        softmax_scale: part of the weights; None = 128 ** -0.5.
        q_codes: float8_e4m3fn [T', H, 128] to write to; None = a new tensor.
        weights_out: float32 [T', H] to write to; None = a new tensor.
        k_out: [T', 128] of q's type to write to, may be k itself; None = a new tensor.

    Returns:
        (q_codes, weights_out, k_out); new tensors have T rows. The scales of queries are in the weights.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    require_tensor("prepare_indexer", "q", q)
    require("prepare_indexer", "weights", weights, 2)
    require("prepare_indexer", "positions", positions, 1)
    tokens, heads = positions.shape[0], weights.shape[1]
    q_codes = empty(q, (tokens, heads, _DIM), "float8_e4m3fn") if q_codes is None else q_codes
    weights_out = empty(q, (tokens, heads), "float32") if weights_out is None else weights_out
    k_out = empty(q, (tokens, _DIM)) if k_out is None else k_out
    _native.prepare_indexer(
        q=q,
        k=k,
        weights=weights,
        positions=positions,
        cos_sin_cache=cos_sin_cache,
        is_neox=is_neox,
        k_norm_weight=k_norm_weight,
        k_norm_bias=k_norm_bias,
        k_norm_eps=k_norm_eps,
        hadamard=hadamard,
        q_scale_fmt=q_scale_fmt,
        softmax_scale=softmax_scale,
        q_codes=q_codes,
        weights_out=weights_out,
        k_out=k_out,
        executor=executor,
    )
    return q_codes, weights_out, k_out


def indexer_short_rows(lengths: Tensor, out: Tensor, *, executor: _native.ThreadPool | None = None) -> int:
    """Writes 0, 1, ... and then -1 for every row that sees no more tokens than are chosen; others are not touched.

    Args:
        lengths: int32 [T], how many tokens each query token sees.
        out: int32 [T, k].

    Returns:
        How many rows were not touched; 0 = nobody needs logits.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    return _native.indexer_short_rows(lengths=lengths, out=out, executor=executor)


def indexer_k_quant_and_cache(
    k: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    scale_fmt: str = "unrounded",
    executor: _native.ThreadPool | None = None,
) -> None:
    """Writes new keys into the indexer's cache. If a slot occurs twice the later row wins.

    Args:
        k: [T', 128], T' >= T, of float32, float16 or bfloat16.
        kv_cache: written.
        slot_mapping: int64 [T], block * block_size + offset of each row; negative = skip that row.
        scale_fmt: "unrounded" or "ue8m0" (powers of two).

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    _native.indexer_k_quant_and_cache(
        k=k, kv_cache=kv_cache, slot_mapping=slot_mapping, scale_fmt=scale_fmt, executor=executor
    )


def cp_gather_indexer_k_quant_cache(
    kv_cache: Tensor,
    dst_k: Tensor,
    dst_scale: Tensor,
    block_table: Tensor,
    cu_seq_lens: Tensor,
    *,
    executor: _native.ThreadPool | None = None,
) -> None:
    """Reads codes and scales of requests from the indexer's cache, bit for bit.

    Args:
        kv_cache: the cache.
        dst_k: float8_e4m3fn [N, 128], written up to row cu_seq_lens[B].
        dst_scale: float32 [N] likewise.
        block_table: int32 [B, max_blocks].
        cu_seq_lens: int32 [B + 1]: rows of request b are [cu[b], cu[b + 1]).

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    _native.cp_gather_indexer_k_quant_cache(
        kv_cache=kv_cache,
        dst_k=dst_k,
        dst_scale=dst_scale,
        block_table=block_table,
        cu_seq_lens=cu_seq_lens,
        executor=executor,
    )


def fp8_mqa_logits(
    q: Tensor,
    k: Tensor,
    k_scale: Tensor,
    weights: Tensor,
    ks: Tensor,
    ke: Tensor,
    *,
    clean_logits: bool = True,
    logits: Tensor | None = None,
    isa: str | None = None,
    executor: _native.ThreadPool | None = None,
) -> Tensor:
    """logits[i, j] = k_scale[j] * sum over heads h of weights[i, h] * max(q[i, h] . k[j], 0).

    Args:
        q: float8_e4m3fn [M, H, 128].
        k: float8_e4m3fn [Nk, 128].
        k_scale: float32 [Nk].
        weights: float32 [M, H], the scales of queries in them.
        ks, ke: int32 [M]: row i has the keys [ks[i], ke[i]).
        clean_logits: other keys get minus infinity; False: their places are not touched.
        logits: float32 [M, Nk] to write to; None = a new tensor.

    Returns:
        logits.

    Raises:
        InvalidArgument, InvalidType, Unsupported: before anything is written.
    """
    require("fp8_mqa_logits", "q", q, 3)
    require("fp8_mqa_logits", "k", k, 2)
    logits = empty(q, (q.shape[0], k.shape[0]), "float32") if logits is None else logits
    _native.fp8_mqa_logits(
        q=q,
        k=k,
        k_scale=k_scale,
        weights=weights,
        ks=ks,
        ke=ke,
        logits=logits,
        clean_logits=clean_logits,
        isa=isa,
        executor=executor,
    )
    return logits


def fp8_paged_mqa_logits(
    q: Tensor,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    max_model_len: int | None = None,
    *,
    schedule_metadata: Tensor | None = None,
    clean_logits: bool = True,
    logits: Tensor | None = None,
    isa: str | None = None,
    executor: _native.ThreadPool | None = None,
) -> Tensor:
    """fp8_mqa_logits() of next_n query tokens of each request with the keys of the indexer's cache.

    Args:
        q: float8_e4m3fn [B, next_n, H, 128].
        kv_cache: the cache, or with a dimension of 1 before the last.
        weights: float32 [B * next_n, H].
        context_lens: int32 [B], tokens of each request with this step's: query token n sees the first
            context_lens[b] - next_n + n + 1. Or [B, next_n]: how many each sees.
        block_table: int32 [B, max_blocks].
        max_model_len: columns of the logits; needed without `logits`.
        schedule_metadata: what get_paged_mqa_logits_metadata() gave for these lengths, others are refused; does not
            change any bit.
        clean_logits: as in fp8_mqa_logits().
        logits: float32 [B * next_n, max_model_len] to write to; None = a new tensor.

    Returns:
        logits.

    Raises:
        InvalidArgument, InvalidType, Unsupported: before anything is written.
    """
    require("fp8_paged_mqa_logits", "q", q, 4)
    if logits is None:
        require_integer("fp8_paged_mqa_logits", "max_model_len", max_model_len, 1)
        logits = empty(q, (q.shape[0] * q.shape[1], max_model_len), "float32")
    else:
        require("fp8_paged_mqa_logits", "logits", logits, 2)
        if max_model_len is not None:
            require_integer("fp8_paged_mqa_logits", "max_model_len", max_model_len, logits.shape[1], logits.shape[1])
    _native.fp8_paged_mqa_logits(
        q=q,
        kv_cache=kv_cache,
        weights=weights,
        context_lens=context_lens,
        block_table=block_table,
        schedule_metadata=schedule_metadata,
        logits=logits,
        clean_logits=clean_logits,
        isa=isa,
        executor=executor,
    )
    return logits


def get_paged_mqa_logits_metadata(context_lens: Tensor, block_size: int, num_sms: int) -> Tensor:
    """DeepGEMM's schedule of paged logits: the keys of all requests in segments of 4 blocks, cut into equal parts.

    Args:
        context_lens: int32 [B] or [B, next_n]; the last column counts.
        block_size: tokens of a block of the cache.
        num_sms: how many parts.

    Returns:
        int32 [num_sms + 1, 2], request and segment where each part begins, and the end.

    Raises:
        InvalidArgument, InvalidType.
    """
    require_integer("get_paged_mqa_logits_metadata", "num_sms", num_sms, 1)
    require_tensor("get_paged_mqa_logits_metadata", "context_lens", context_lens)
    schedule_metadata = empty(context_lens, (num_sms + 1, 2), "int32")
    _native.get_paged_mqa_logits_metadata(
        context_lens=context_lens, block_size=block_size, schedule_metadata=schedule_metadata
    )
    return schedule_metadata
