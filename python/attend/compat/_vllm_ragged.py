# SPDX-License-Identifier: Apache-2.0
"""vllm_ops: ragged rows to padded ones and back, and the merge of partial results whose LSE has base 2."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from .. import ops
from .._tensors import Tensor, dtype_name, empty, require_flag
from ..errors import InvalidArgument, InvalidType
from ._renames import renamed
from ._vllm_common import refuse, require_dense

_LN2 = math.log(2.0)


def pack_seq_triton(
    x: Tensor, lengths: Tensor, pad_value: float | int = -math.inf, block_t: int = 64, block_d: int = 64
) -> Tensor:
    """Ragged rows, one request behind the other, as a padded tensor.

    Args:
        x: [N, ...] of two dimensions or more: float32, float16, bfloat16 or uint8.
        lengths: int32 or int64 [B], rows of each request, B > 0; rows of x behind the last one are left out.
        pad_value: what follows the rows of a request; of uint8 an integer from 0 to 255.
        block_t, block_d: not needed.

    Returns:
        [B, longest, ...], type of x.

    Raises:
        InvalidArgument, InvalidType.
    """
    function = "pack_seq_triton"
    require_dense(function, "x", x)
    if len(x.shape) < 2:
        refuse(InvalidArgument, function, "x", "[N, ...] of two dimensions or more", tuple(x.shape))
    if dtype_name(x) not in ("float32", "float16", "bfloat16", "uint8"):
        refuse(InvalidArgument, function, "x", "float32, float16, bfloat16 or uint8", x.dtype)
    pad = _pad_value(function, pad_value, dtype_name(x) == "uint8")
    counts = _lengths(function, lengths)
    if not counts:
        refuse(InvalidArgument, function, "lengths", "one length or more", "none")
    if sum(counts) > x.shape[0]:
        refuse(InvalidArgument, function, "lengths", f"a sum of at most {x.shape[0]}, the rows of x", sum(counts))
    packed = empty(x, (len(counts), max(counts), *x.shape[1:]))
    start = 0
    for request, count in enumerate(counts):
        packed[request, :count] = x[start : start + count]
        packed[request, count:] = pad
        start += count
    return packed


def unpack_seq_triton(packed_tensor: Tensor, lengths: Tensor, block_t: int = 64, block_d: int = 64) -> Tensor:
    """The rows of a padded tensor, one request behind the other, without its padding.

    Args:
        packed_tensor: [B, longest, ...] of three dimensions or more, any type.
        lengths: int32 or int64 [B], rows of each request.
        block_t, block_d: not needed.

    Returns:
        [sum of lengths, ...], type of packed_tensor.

    Raises:
        InvalidArgument, InvalidType.
    """
    function = "unpack_seq_triton"
    require_dense(function, "packed_tensor", packed_tensor)
    shape = tuple(packed_tensor.shape)
    if len(shape) < 3:
        refuse(InvalidArgument, function, "packed_tensor", "[B, longest, ...] of three dimensions or more", shape)
    counts = _lengths(function, lengths)
    if len(counts) != shape[0]:
        refuse(InvalidArgument, function, "lengths", f"{shape[0]}, one a request of packed_tensor", len(counts))
    if counts and max(counts) > shape[1]:
        refuse(InvalidArgument, function, "lengths", f"at most {shape[1]}, the rows of a request", max(counts))
    rows = empty(packed_tensor, (sum(counts), *shape[2:]))
    start = 0
    for request, count in enumerate(counts):
        rows[start : start + count] = packed_tensor[request, :count]
        start += count
    return rows


def merge_attn_states_base2(
    prefix_output: Tensor,
    prefix_lse: Tensor,
    suffix_output: Tensor,
    suffix_lse: Tensor,
    output: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """merge_attn_states() of ixformer: LSEs are logarithms to base 2, and `output` comes last.

    Args:
        prefix_output, suffix_output: [T, H, D] of float32, float16 or bfloat16.
        prefix_lse, suffix_lse: float32 [H, T], base 2; plus and minus infinity mean "no keys".
        output: [T, H, D] to write to; may be one of the inputs; None = a new tensor.
        return_lse: give the LSE of the result, too.

    Returns:
        output, or (output, lse): float32 [H, T], base 2.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    function = "merge_attn_states_base2"
    require_flag(function, "return_lse", return_lse)
    require_dense(function, "prefix_output", prefix_output, 3)
    require_dense(function, "suffix_output", suffix_output, 3)
    natural = []
    for name, lse in (("prefix_lse", prefix_lse), ("suffix_lse", suffix_lse)):
        require_dense(function, name, lse, 2)
        if dtype_name(lse) != "float32":
            refuse(InvalidArgument, function, name, "float32 [H, T]", lse.dtype)
        natural.append(lse.T * _LN2)
    names = {"prefix_out": "prefix_output", "suffix_out": "suffix_output", "out": "output"}
    with renamed(function, names):
        merged, lse = ops.merge_attn_states(
            prefix_output, natural[0], suffix_output, natural[1], out=output, return_lse=True
        )
    return (merged, lse.T / _LN2) if return_lse else merged


def _lengths(function: str, lengths: Tensor) -> Sequence[int]:
    require_dense(function, "lengths", lengths, 1)
    if dtype_name(lengths) not in ("int32", "int64"):
        refuse(InvalidArgument, function, "lengths", "int32 or int64 [B]", lengths.dtype)
    counts = lengths.tolist()
    if counts and min(counts) < 0:
        refuse(InvalidArgument, function, "lengths", "no negative length", min(counts))
    return counts


def _pad_value(function: str, value: Any, byte: bool) -> float | int:
    if isinstance(value, bool) or not isinstance(value, int if byte else Real):
        refuse(InvalidType, function, "pad_value", "an integer" if byte else "a number", type(value).__name__)
    if byte and not 0 <= value <= 255:
        refuse(InvalidArgument, function, "pad_value", "an integer from 0 to 255 for uint8", value)
    try:
        return value if byte else float(value)
    except OverflowError:
        refuse(InvalidArgument, function, "pad_value", "a number that a float can hold", "a larger one")
