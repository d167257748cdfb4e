# SPDX-License-Identifier: Apache-2.0
"""The tokens with the highest logits of each row, as the indexer of sparse MLA chooses them.

Among equal logits the lower index wins; NaN is below every number. The chosen indices ascend; a row with fewer logits
than k has all of them and then -1.
"""

from __future__ import annotations

from .. import _native
from .._tensors import Tensor, empty, require, require_integer


def _result(function: str, logits: Tensor, k: int | None, out: Tensor | None) -> Tensor:
    """`out`, or a new tensor for k indices of each row."""
    require(function, "logits", logits, 2)
    if out is None:
        require_integer(function, "k", k, 1)
        return empty(logits, (logits.shape[0], k), "int32")
    require(function, "out", out, 2)
    if k is not None:
        require_integer(function, "k", k, out.shape[1], out.shape[1])
    return out


def top_k_per_row_prefill(
    logits: Tensor,
    row_starts: Tensor,
    row_ends: Tensor,
    k: int | None = None,
    *,
    out: Tensor | None = None,
    executor: _native.ThreadPool | None = None,
) -> Tensor:
    """The k highest logits of each row within its bounds.

    Args:
        logits: float32 [T, S].
        row_starts, row_ends: int32 [T]: row t has the logits [row_starts[t], row_ends[t]), others are not read.
        k: how many indices; needed without `out`.
        out: int32 [T, k] to write to; None = a new tensor.

    Returns:
        out, indices from the row's start on.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    out = _result("top_k_per_row_prefill", logits, k, out)
    _native.top_k_per_row_prefill(logits=logits, row_starts=row_starts, row_ends=row_ends, out=out, executor=executor)
    return out


def top_k_per_row_decode(
    logits: Tensor,
    seq_lens: Tensor,
    k: int | None = None,
    *,
    next_n: int = 1,
    out: Tensor | None = None,
    executor: _native.ThreadPool | None = None,
) -> Tensor:
    """The k highest logits of next_n query tokens of each request.

    Args:
        logits: float32 [B * next_n, S].
        seq_lens: int32 [B], tokens of each request with this step's: row b * next_n + n has the first
            seq_lens[b] - next_n + n + 1 logits.
        k: how many indices; needed without `out`.
        next_n: query tokens of each request.
        out: int32 [B * next_n, k] to write to; None = a new tensor.

    Returns:
        out.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    out = _result("top_k_per_row_decode", logits, k, out)
    _native.top_k_per_row_decode(logits=logits, seq_lens=seq_lens, next_n=next_n, out=out, executor=executor)
    return out
