# SPDX-License-Identifier: Apache-2.0
"""`flash_attn.bert_padding`: rows of padded batches to packed ones and back. For tensors of torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._tensors import require, require_integer
from ._flash import invalid

if TYPE_CHECKING:
    import torch

__all__ = [
    "index_first_axis",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def _require_torch(function: str, **tensors: Any) -> None:
    import torch

    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise invalid(function, name, "a torch.Tensor", type(tensor).__name__)
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized:
            raise invalid(
                function, name, "a dense tensor on the CPU", f"{tensor.layout} {tensor.dtype} {tensor.device}"
            )


def _require_rows(function: str, indices: torch.Tensor, rows: int) -> None:
    import torch

    require(function, "indices", indices, 1)
    if indices.dtype not in (torch.int64, torch.int32):
        raise invalid(function, "indices", "int64 or int32", indices.dtype)
    if len(indices) and (int(indices.min()) < 0 or int(indices.max()) >= rows):
        raise invalid(function, "indices", f"rows in [0, {rows})", f"{int(indices.min())} to {int(indices.max())}")


def _require_mask(function: str, argument: str, mask: torch.Tensor) -> None:
    import torch

    require(function, argument, mask, 2)
    if mask.dtype not in (torch.bool, torch.uint8, torch.int8, torch.int32, torch.int64):
        raise invalid(function, argument, "bool or integers", mask.dtype)


def index_first_axis(input: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Rows of a tensor.

    Args:
        input: [rows, ...], at least two dimensions.
        indices: int64 or int32 [n], each in [0, rows).

    Returns:
        [n, ...], new.
    """
    _require_torch("index_first_axis", input=input, indices=indices)
    if input.ndim < 2:
        raise invalid("index_first_axis", "input", "at least 2 dimensions", tuple(input.shape))
    _require_rows("index_first_axis", indices, input.shape[0])
    return input.index_select(0, indices)


def index_put_first_axis(values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int) -> torch.Tensor:
    """The inverse of index_first_axis: rows that no index names are zero.

    Args:
        values: [n, ...], at least two dimensions.
        indices: int64 or int32 [n], each in [0, first_axis_dim), without duplicates.
        first_axis_dim: rows of the result.

    Returns:
        [first_axis_dim, ...], new.
    """
    _require_torch("index_put_first_axis", values=values, indices=indices)
    if values.ndim < 2:
        raise invalid("index_put_first_axis", "values", "at least 2 dimensions", tuple(values.shape))
    require_integer("index_put_first_axis", "first_axis_dim", first_axis_dim, 0)
    _require_rows("index_put_first_axis", indices, first_axis_dim)
    if len(indices) != len(values):
        raise invalid("index_put_first_axis", "indices", f"[{len(values)}], one for each row of values", len(indices))
    output = values.new_zeros((first_axis_dim, *values.shape[1:]))
    return output.index_copy_(0, indices.long(), values)


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """Packed rows back to where unpad_input took them from; the rest is zero.

    Args:
        hidden_states: [n, ...], at least two dimensions.
        indices: int64 or int32 [n]: batch index * seqlen + position, as unpad_input gives them.
        batch: number of sequences.
        seqlen: padded length of each.

    Returns:
        [batch, seqlen, ...], new.
    """
    _require_torch("pad_input", hidden_states=hidden_states, indices=indices)
    require_integer("pad_input", "batch", batch, 0)
    require_integer("pad_input", "seqlen", seqlen, 0)
    if hidden_states.ndim < 2 or len(hidden_states) != indices.numel():
        raise invalid("pad_input", "hidden_states", f"[{indices.numel()}, ...], as indices", tuple(hidden_states.shape))
    _require_rows("pad_input", indices, batch * seqlen)
    output = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return output.unflatten(0, (batch, seqlen))


def _unpad(function: str, hidden_states: torch.Tensor, kept: torch.Tensor, used: torch.Tensor) -> tuple:
    """Rows that are kept, their indices, prefix sum of `kept` by sequence, the largest count, counts of `used`."""
    import torch

    if hidden_states.ndim < 3 or tuple(hidden_states.shape[:2]) != tuple(kept.shape):
        shape = f"[{kept.shape[0]}, {kept.shape[1]}, ...], as attention_mask"
        raise invalid(function, "hidden_states", shape, tuple(hidden_states.shape))
    kept = kept != 0
    counts = kept.sum(dim=-1, dtype=torch.int32)
    indices = kept.flatten().nonzero().flatten()
    starts = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(counts.max()) if len(counts) else 0
    return hidden_states.flatten(0, 1).index_select(0, indices), indices, starts, longest, used


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """The rows of a padded batch that are not padding, one after another.

    Args:
        hidden_states: [batch, seqlen, ...].
        attention_mask: bool or integers [batch, seqlen], 1 = a token.
        unused_mask: the same for rows that are kept in memory, but not counted as used; None = none.

    Returns:
        (rows [n, ...], indices int64 [n], cu_seqlens int32 [batch + 1], the longest sequence, seqused int32 [batch]).
        `cu_seqlens` counts unused rows as well, `seqused` does not.
    """
    import torch

    _require_torch("unpad_input", hidden_states=hidden_states, attention_mask=attention_mask)
    _require_mask("unpad_input", "attention_mask", attention_mask)
    kept = attention_mask
    if unused_mask is not None:
        _require_torch("unpad_input", unused_mask=unused_mask)
        _require_mask("unpad_input", "unused_mask", unused_mask)
        if unused_mask.shape != attention_mask.shape:
            raise invalid("unpad_input", "unused_mask", tuple(attention_mask.shape), tuple(unused_mask.shape))
        kept = (attention_mask != 0) | (unused_mask != 0)
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    return _unpad("unpad_input", hidden_states, kept, used)


def unpad_input_for_concatenated_sequences(
    hidden_states: torch.Tensor, attention_mask_in_length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """unpad_input() of rows that hold several sequences each.

    Args:
        hidden_states: [batch, seqlen, ...].
        attention_mask_in_length: integers [batch, seqlen]: the lengths of the sequences of each row, then zeros.

    Returns:
        (rows [n, ...], indices int64 [n], cu_seqlens int32 [sequences + 1], the longest sequence).
    """
    import torch

    name = "unpad_input_for_concatenated_sequences"
    _require_torch(name, hidden_states=hidden_states, attention_mask_in_length=attention_mask_in_length)
    _require_mask(name, "attention_mask_in_length", attention_mask_in_length)
    seqlen = attention_mask_in_length.shape[1]
    tokens = attention_mask_in_length.sum(dim=-1)
    if len(tokens) and (int(attention_mask_in_length.min()) < 0 or int(tokens.max()) > seqlen):
        raise invalid(
            name, "attention_mask_in_length", f"lengths that add up to at most {seqlen} a row", tokens.tolist()
        )
    kept = torch.arange(seqlen) < tokens[:, None]
    rows, indices, _, _, _ = _unpad(name, hidden_states, kept, tokens)
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths != 0]
    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return rows, indices, starts, int(lengths.max()) if len(lengths) else 0
