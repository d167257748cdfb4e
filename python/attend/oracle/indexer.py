# SPDX-License-Identifier: Apache-2.0
"""References of the indexer of sparse MLA and of the choice of the highest logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from .. import _native, ops
from .._tensors import Tensor, require_integer
from ..errors import InvalidArgument
from ._numbers import numbers_of
from .result import Bounded


@dataclass(frozen=True)
class PreparedIndexer:
    """Queries [T, H, 128] before their codes, and keys [T, 128]."""

    q: Bounded
    k: Bounded


def fp8_mqa_logits(q: Tensor, k: Tensor, k_scale: Tensor, weights: Tensor, ks: Tensor, ke: Tensor) -> Bounded:
    """attend.ops.fp8_mqa_logits() in float64, after its checks.

    Args:
        q, k, ... : as there.

    Returns:
        Bounded [M, Nk]; minus infinity where a row does not see the key.

    Raises:
        InvalidArgument, Unsupported: as there.
    """
    arguments = dict(q=q, k=k, k_scale=k_scale, weights=weights, ks=ks, ke=ke)
    logits = ops.fp8_mqa_logits(**arguments)
    return _logits(_native.oracle_fp8_mqa_logits(**arguments, logits=logits), logits.shape)


def fp8_paged_mqa_logits(
    q: Tensor, kv_cache: Tensor, weights: Tensor, context_lens: Tensor, block_table: Tensor, max_model_len: int
) -> Bounded:
    """attend.ops.fp8_paged_mqa_logits() in float64, after its checks.

    Args:
        q, kv_cache, ... : as there.

    Returns:
        Bounded [B * next_n, max_model_len]; minus infinity where a row does not see the key.

    Raises:
        InvalidArgument, Unsupported: as there.
    """
    arguments = dict(q=q, kv_cache=kv_cache, weights=weights, context_lens=context_lens, block_table=block_table)
    logits = ops.fp8_paged_mqa_logits(**arguments, max_model_len=max_model_len)
    return _logits(_native.oracle_fp8_paged_mqa_logits(**arguments, logits=logits), logits.shape)


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
) -> PreparedIndexer:
    """What attend.ops.prepare_indexer() computes before it encodes, in float64, after its checks.

    Args:
        q, k, ... : as there.

    Returns:
        PreparedIndexer.

    Raises:
        InvalidArgument: as there.
    """
    arguments = dict(
        q=q,
        k=k,
        weights=weights,
        positions=positions,
        cos_sin_cache=cos_sin_cache,
        k_norm_weight=k_norm_weight,
        k_norm_bias=k_norm_bias,
        is_neox=is_neox,
        k_norm_eps=k_norm_eps,
        hadamard=hadamard,
    )
    q_codes, weights_out, k_out = ops.prepare_indexer(**arguments)
    queries, q_bound, keys, k_bound = _native.oracle_prepare_indexer(
        **arguments, q_codes=q_codes, weights_out=weights_out, k_out=k_out
    )
    return PreparedIndexer(
        q=Bounded(queries.reshape(q_codes.shape), q_bound.reshape(q_codes.shape)),
        k=Bounded(keys.reshape(k_out.shape), k_bound.reshape(k_out.shape)),
    )


def indexer_codes(
    rows: Tensor, *, scale_fmt: str = "unrounded", queries: bool = False
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Codes and scales of keys, or of queries, which only differ in their smallest scale.

    Args:
        rows: float32 [N, 128].
        scale_fmt: "unrounded" or "ue8m0" (powers of two).
        queries: as prepare_indexer() encodes queries; False: as indexer_k_quant_and_cache() encodes keys.

    Returns:
        (codes, scales): uint8 [N, 128], bits of float8_e4m3fn, and float32 [N].

    Raises:
        InvalidArgument.
    """
    codes, scales = _native.oracle_indexer_codes(rows=rows, scale_fmt=scale_fmt, queries=queries)
    return codes.astype(numpy.uint8).reshape(-1, 128), scales.astype(numpy.float32)


def top_k(values: Sequence[float], k: int) -> list[int]:
    """The indices of the k highest values, ascending, and then -1, by sorting all of them.

    Args:
        values: of one row.
        k: how many indices, >= 1.

    Returns:
        k indices; the lower one first among equal values, NaN below every number.

    Raises:
        InvalidArgument: k is below 1.
    """
    require_integer("oracle.top_k", "k", k, 1)
    return _native.oracle_top_k(numbers_of("oracle.top_k", "values", values, float), k)


def may_be_top_k(logits: Sequence[float], bounds: Sequence[float], indices: Sequence[int]) -> bool:
    """True if `indices` may be the choice from logits that are off by no more than their bounds.

    Args:
        logits, bounds: of one row, no NaN.
        indices: the choice, as attend.ops.top_k_per_row_prefill() and _decode() give it.

    Returns:
        Whether as many as there can be are chosen, ascending, then -1, and none that is surely below one left out.

    Raises:
        InvalidArgument: logits and bounds differ in size, or a logit is NaN.
    """
    function = "oracle.may_be_top_k"
    logits, bounds = numbers_of(function, "logits", logits, float), numbers_of(function, "bounds", bounds, float)
    chosen = numbers_of(function, "indices", indices, int)
    if len(logits) != len(bounds):
        raise InvalidArgument(
            f"[{function}] argument 'bounds': expected {len(logits)} numbers, got {len(bounds)}", function, "bounds"
        )
    if any(x != x for x in logits):
        raise InvalidArgument(f"[{function}] argument 'logits': expected numbers, got a NaN", function, "logits")
    if any(not -(2**31) <= i < 2**31 for i in chosen):
        raise InvalidArgument(
            f"[{function}] argument 'indices': expected integers of 32 bits, got others", function, "indices"
        )
    return _native.oracle_may_be_top_k(logits, bounds, chosen)


def _logits(flat: tuple[Any, Any], shape: tuple[int, ...]) -> Bounded:
    return Bounded(value=flat[0].reshape(shape), bound=flat[1].reshape(shape))
