# SPDX-License-Identifier: Apache-2.0
"""FlashAttention 3's used lengths of ragged sequences, as the lengths of more and shorter ones."""

from __future__ import annotations

from typing import Any

from .._tensors import Tensor, dtype_name, is_torch, require
from ._flash import int32_like, invalid


def split_used(
    function: str,
    q: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Prefix sums of three requests for each: what is used, the other queries, the other keys.

    The other queries have no keys, so that their rows are those of a row without a visible key, and nobody reads the
    other keys. No key is copied.

    Args:
        q: gives the kind of the result, torch or numpy.
        cu_seqlens_q, cu_seqlens_k: int32 [B + 1].
        seqused_q, seqused_k: int32 [B], None = all.

    Returns:
        cu_seqlens_q and cu_seqlens_k of the 3 B requests, int32 [3 B + 1].
    """
    starts_q = _starts(function, "cu_seqlens_q", cu_seqlens_q)
    starts_k = _starts(function, "cu_seqlens_k", cu_seqlens_k)
    if len(starts_k) != len(starts_q):
        raise invalid(function, "cu_seqlens_k", f"[{len(starts_q)}], as cu_seqlens_q", [len(starts_k)])
    ends_q = _ends(function, "seqused_q", seqused_q, starts_q)
    ends_k = _ends(function, "seqused_k", seqused_k, starts_k)
    split_q, split_k = starts_q[:1], starts_k[:1]
    for end_q, end_k, next_q, next_k in zip(ends_q, ends_k, starts_q[1:], starts_k[1:]):
        split_q += [end_q, next_q, next_q]
        split_k += [end_k, end_k, next_k]
    return int32_like(q, split_q), int32_like(q, split_k)


def repeat_descale(function: str, argument: str, descale: Tensor | None, batch: int) -> Tensor | None:
    """A descale [B, Hkv] for the requests of split_used(): [3 B, Hkv]."""
    if descale is None:
        return None
    require(function, argument, descale, 2)
    if descale.shape[0] != batch:
        raise invalid(function, argument, f"{batch} rows, one for each request", tuple(descale.shape))
    if is_torch(descale):
        return descale.repeat_interleave(3, 0)
    import numpy

    return numpy.repeat(_numpy(function, argument, descale), 3, 0)


def _numpy(function: str, argument: str, tensor: Tensor) -> Any:
    import numpy

    try:
        return tensor if isinstance(tensor, numpy.ndarray) else numpy.from_dlpack(tensor)
    except Exception as e:
        raise invalid(function, argument, "a tensor on the CPU", type(tensor).__name__) from e


def _integers(function: str, argument: str, tensor: Tensor) -> list[int]:
    require(function, argument, tensor, 1)
    if dtype_name(tensor) != "int32":
        raise invalid(function, argument, "int32", tensor.dtype)
    if not is_torch(tensor):
        return _numpy(function, argument, tensor).tolist()
    if tensor.device.type != "cpu":
        raise invalid(function, argument, "a tensor on the CPU", tensor.device)
    return tensor.tolist()


def _starts(function: str, argument: str, cu_seqlens: Tensor) -> list[int]:
    """The prefix sum; its ends are left to the op, which knows the tensors."""
    starts = _integers(function, argument, cu_seqlens)
    if not starts:
        raise invalid(function, argument, "[B + 1]", "[0]")
    for i in range(1, len(starts)):
        if starts[i] < starts[i - 1]:
            raise invalid(function, argument, f">= {starts[i - 1]} at index {i}", starts[i])
    return starts


def _ends(function: str, argument: str, used: Tensor | None, starts: list[int]) -> list[int]:
    """Where the used part of each sequence ends."""
    if used is None:
        return starts[1:]
    lengths = _integers(function, argument, used)
    if len(lengths) != len(starts) - 1:
        raise invalid(function, argument, f"[{len(starts) - 1}], one length for each request", [len(lengths)])
    for i, length in enumerate(lengths):
        if not 0 <= length <= starts[i + 1] - starts[i]:
            raise invalid(function, argument, f"0 to {starts[i + 1] - starts[i]} at index {i}", length)
    return [start + length for start, length in zip(starts, lengths)]
