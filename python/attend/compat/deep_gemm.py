# SPDX-License-Identifier: Apache-2.0
"""DeepGEMM's logits of the indexer under its names, with its argument order: on fp8 codes of 128 elements.

Any number of heads and any block size work. The forms on fp4 codes, with scales of queries, and with logits of
another type than float32 raise Unsupported by name.
"""

from __future__ import annotations

from typing import Any

from .. import ops, threads
from .._tensors import Tensor, dtype_name, require_integer, require_tensor
from ..errors import InvalidType, Unsupported
from ._renames import renamed

__all__ = [
    "fp8_fp4_mqa_logits",
    "fp8_fp4_paged_mqa_logits",
    "fp8_mqa_logits",
    "fp8_paged_mqa_logits",
    "get_num_sms",
    "get_paged_mqa_logits_metadata",
]

_MQA_NAMES = {"k": "kv", "k_scale": "kv", "ks": "cu_seq_len_k_start", "ke": "cu_seq_len_k_end"}
_PAGED_NAMES = {
    "block_size": "block_kv",
    "logits": "max_context_len",
    "max_model_len": "max_context_len",
    "schedule_metadata": "schedule_meta",
}


def get_num_sms() -> int:
    """Processors that a schedule is for: threads of set_num_threads(), else all CPUs of this process."""
    return threads.get_num_threads() or threads.available_cpus()


def _unsupported(function: str, argument: str, expected: str, got: Any) -> Unsupported:
    text = f"[{function}] argument '{argument}': expected {expected}, got {got}"
    return Unsupported(text, [text])


def _pair(function: str, argument: str, value: Any) -> tuple[Any, Any]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise InvalidType(
            f"[{function}] argument '{argument}': expected a tuple of codes and scales, got {type(value).__name__}",
            function,
            argument,
        )
    return value[0], value[1]


def _codes_of_queries(function: str, q: Any) -> Tensor:
    """The first of (codes, None)."""
    codes, scales = _pair(function, "q", q)
    if scales is not None:
        raise _unsupported(function, "q", "no scales of queries (they belong into weights)", type(scales).__name__)
    require_tensor(function, "q", codes)
    if dtype_name(codes) != "float8_e4m3fn":
        raise _unsupported(function, "q", "codes of float8_e4m3fn", dtype_name(codes))
    return codes


def _check_logits_dtype(function: str, logits_dtype: Any) -> None:
    name = logits_dtype if isinstance(logits_dtype, str) else str(getattr(logits_dtype, "__name__", logits_dtype))
    if logits_dtype is not None and name.rsplit(".", 1)[-1] != "float32":
        raise _unsupported(function, "logits_dtype", "float32", logits_dtype)


def fp8_mqa_logits(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
) -> Tensor:
    """logits[i, j] = scale[j] * sum over heads h of weights[i, h] * max(q[i, h] . k[j], 0).

    Args:
        q: float8_e4m3fn [M, H, 128].
        kv: (codes float8_e4m3fn [Nk, 128], scales float32 [Nk]).
        weights: float32 [M, H].
        cu_seq_len_k_start, cu_seq_len_k_end: int32 [M]: row i has the keys [start[i], end[i]).
        clean_logits: other keys get minus infinity; False: what their places hold is undefined.
        max_seqlen_k: 0; logits of rows that begin at their first key are not supported.

    Returns:
        float32 [M, Nk].

    Raises:
        InvalidArgument, InvalidType, Unsupported.
    """
    return _mqa_logits(
        "fp8_mqa_logits", q, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits, max_seqlen_k
    )


def _mqa_logits(
    function: str,
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    start: Tensor,
    end: Tensor,
    clean_logits: bool,
    max_seqlen_k: int,
) -> Tensor:
    k, k_scale = _pair(function, "kv", kv)
    require_integer(function, "max_seqlen_k", max_seqlen_k, 0)
    if max_seqlen_k != 0:
        raise _unsupported(function, "max_seqlen_k", "0", max_seqlen_k)
    with renamed(function, _MQA_NAMES):
        return ops.fp8_mqa_logits(q, k, k_scale, weights, start, end, clean_logits=clean_logits)


def fp8_fp4_mqa_logits(
    q: tuple[Tensor, Tensor | None],
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
    logits_dtype: Any = None,
    schedule_meta: Tensor | None = None,
) -> Tensor:
    """fp8_mqa_logits() with queries as (codes, None).

    Args:
        q: (codes float8_e4m3fn [M, H, 128], None).
        logits_dtype: float32, or None.
        schedule_meta: None.
        kv, ... : as there.

    Returns:
        float32 [M, Nk].

    Raises:
        InvalidArgument, InvalidType; Unsupported for scales of queries, fp4 codes, another type of logits, a schedule.
    """
    function = "fp8_fp4_mqa_logits"
    codes = _codes_of_queries(function, q)
    _check_logits_dtype(function, logits_dtype)
    if schedule_meta is not None:
        raise _unsupported(function, "schedule_meta", "None", type(schedule_meta).__name__)
    return _mqa_logits(function, codes, kv, weights, cu_seq_len_k_start, cu_seq_len_k_end, clean_logits, max_seqlen_k)


def get_paged_mqa_logits_metadata(
    context_lens: Tensor, block_kv: int, num_sms: int, indices: Tensor | None = None
) -> Tensor:
    """The schedule of paged logits.

    Args:
        context_lens: int32 [B] or [B, next_n]; the last column counts.
        block_kv: tokens of a block of the cache.
        num_sms: how many parts.
        indices: None; requests of varying query lengths are not supported.

    Returns:
        int32 [num_sms + 1, 2].

    Raises:
        InvalidArgument, InvalidType, Unsupported.
    """
    if indices is not None:
        raise _unsupported("get_paged_mqa_logits_metadata", "indices", "None", type(indices).__name__)
    with renamed("get_paged_mqa_logits_metadata", _PAGED_NAMES):
        return ops.get_paged_mqa_logits_metadata(context_lens, block_kv, num_sms)


def fp8_paged_mqa_logits(
    q: Tensor,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor | None,
    max_context_len: int,
    clean_logits: bool = False,
    indices: Tensor | None = None,
) -> Tensor:
    """Logits of next_n query tokens of each request with the keys of the indexer's cache.

    Args:
        q: float8_e4m3fn [B, next_n, H, 128].
        kv_cache: uint8 [num_blocks, block_size, 1, 132]: of each block first all codes, then all scales.
        weights: float32 [B * next_n, H].
        context_lens: int32 [B], tokens of each request with this step's, or [B, next_n], how many each token sees.
        block_table: int32 [B, max_blocks].
        schedule_meta: what get_paged_mqa_logits_metadata() gave for these lengths, others are refused; None = none.
        max_context_len: columns of the logits.
        clean_logits: keys that a row does not see get minus infinity; False: what their places hold is undefined.
        indices: None; requests of varying query lengths are not supported.

    Returns:
        float32 [B * next_n, max_context_len].

    Raises:
        InvalidArgument, InvalidType, Unsupported.
    """
    return _paged_mqa_logits(
        "fp8_paged_mqa_logits",
        q,
        kv_cache,
        weights,
        context_lens,
        block_table,
        schedule_meta,
        max_context_len,
        clean_logits,
        indices,
    )


def _paged_mqa_logits(
    function: str,
    q: Tensor,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor | None,
    max_context_len: int,
    clean_logits: bool,
    indices: Tensor | None,
) -> Tensor:
    if indices is not None:
        raise _unsupported(function, "indices", "None", type(indices).__name__)
    with renamed(function, _PAGED_NAMES):
        return ops.fp8_paged_mqa_logits(
            q,
            kv_cache,
            weights,
            context_lens,
            block_table,
            max_context_len,
            schedule_metadata=schedule_meta,
            clean_logits=clean_logits,
        )


def fp8_fp4_paged_mqa_logits(
    q: tuple[Tensor, Tensor | None],
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Tensor | None,
    max_context_len: int,
    clean_logits: bool = False,
    logits_dtype: Any = None,
    indices: Tensor | None = None,
) -> Tensor:
    """fp8_paged_mqa_logits() with queries as (codes, None).

    Args:
        q: (codes float8_e4m3fn [B, next_n, H, 128], None).
        logits_dtype: float32, or None.
        kv_cache, ... : as there.

    Returns:
        float32 [B * next_n, max_context_len].

    Raises:
        InvalidArgument, InvalidType; Unsupported for scales of queries, fp4 codes, another type of logits, `indices`.
    """
    function = "fp8_fp4_paged_mqa_logits"
    codes = _codes_of_queries(function, q)
    _check_logits_dtype(function, logits_dtype)
    return _paged_mqa_logits(
        function,
        codes,
        kv_cache,
        weights,
        context_lens,
        block_table,
        schedule_meta,
        max_context_len,
        clean_logits,
        indices,
    )
