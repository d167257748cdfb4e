# SPDX-License-Identifier: Apache-2.0
"""What the modules of the flash-attn family share: arguments in their words, their LSE."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any

from .._tensors import Tensor, empty, is_torch, require, require_integer
from ..errors import InvalidArgument, InvalidType, Unsupported

#: Names that attend.ops gives to arguments of this family.
NAMES = {
    "k_new": "k",
    "v_new": "v",
    "scale": "softmax_scale",
    "window_left": "window_size",
    "window_right": "window_size",
    "query_start_loc": "cu_seqlens_q",
    "cu_seqlens_kv": "cu_seqlens_k",
    "seq_lens": "seqused_k",
    "sinks": "s_aux",
}


def invalid(function: str, argument: str, expected: str, got: Any) -> InvalidArgument:
    text = f"[{function}] argument '{argument}': expected {expected}, got {got}"
    return InvalidArgument(text, function, argument)


def unsupported(function: str, argument: str, expected: str, got: Any) -> Unsupported:
    text = f"[{function}] argument '{argument}': expected {expected}, got {got}"
    return Unsupported(text, [text])


def refuse_given(function: str, **arguments: Any) -> None:
    """Unsupported for each argument that is not None."""
    for name, value in arguments.items():
        if value is not None:
            raise unsupported(function, name, "None", type(value).__name__)


def require_default(function: str, argument: str, value: Any, default: Any) -> None:
    """Unsupported unless the value is the default."""
    if not isinstance(value, (bool, int, float)) or value != default:
        raise unsupported(function, argument, default, value if isinstance(value, (bool, int, float)) else type(value))


def refuse_dropout(function: str, dropout_p: float) -> None:
    require_default(function, "dropout_p", dropout_p, 0.0)


def window_of(function: str, window_size: Any) -> tuple[int, int]:
    """(left, right) with -1 for all; None counts as -1, as a tuple or in it."""
    if window_size is None:
        return -1, -1
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        text = f"[{function}] argument 'window_size': expected a tuple (left, right), got {window_size!r}"
        raise InvalidType(text, function, "window_size")
    left, right = (-1 if side is None else side for side in window_size)
    return left, right


def check_bound(function: str, argument: str, value: Any) -> None:
    """max_seqlen_q and max_seqlen_k: bounds that the lengths themselves make needless."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
        text = f"[{function}] argument '{argument}': expected an integer, got {type(value).__name__}"
        raise InvalidType(text, function, argument)


def heads_first(q: Tensor, tokens: int, heads: int) -> tuple[Tensor, Tensor]:
    """Memory [heads, tokens] of an LSE, and the view [tokens, heads] to write it through."""
    lse = empty(q, (heads, tokens), "float32")
    return lse, lse.T


def empty_rows_plus_infinity(lse: Tensor) -> None:
    """The convention of FlashAttention 2 and FlashMLA for rows without keys, in place."""
    if is_torch(lse):
        lse.masked_fill_(lse == -math.inf, math.inf)
    else:
        lse[lse == -math.inf] = math.inf


def prefix_differences(cu_seqlens: Tensor) -> Tensor:
    """Lengths of a prefix sum."""
    return cu_seqlens[1:] - cu_seqlens[:-1]


def lengths_for_all(function: str, q: Tensor, length: int, batch: int) -> Tensor:
    """`cache_seqlens` that is one integer."""
    require_integer(function, "cache_seqlens", length, 0)
    return int32_like(q, [length] * batch)


def int32_like(q: Tensor, values: list[int]) -> Tensor:
    if is_torch(q):
        import torch

        return torch.tensor(values, dtype=torch.int32)
    import numpy

    return numpy.array(values, numpy.int32)


def require_qkv(function: str, q: Tensor, k: Tensor, v: Tensor, rank: int) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        require(function, name, tensor, rank)


def require_batched(function: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """q, k and v of four dimensions and one batch; a cache, which they go to, may have more rows."""
    require_qkv(function, q, k, v, 4)
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] != q.shape[0]:
            raise invalid(function, name, f"a batch of {q.shape[0]}, as q has", tuple(tensor.shape))
