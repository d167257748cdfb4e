# SPDX-License-Identifier: Apache-2.0
"""Writing paged caches."""

from __future__ import annotations

import torch

from ... import ops
from ..._tensors import require, require_integer
from .._flash import invalid
from .._renames import renamed
from .common import Pages, check_indptr, check_last_page_len, check_layout, int32, split_pages


def get_seq_lens(kv_indptr: torch.Tensor, kv_last_page_len: torch.Tensor, page_size: int) -> torch.Tensor:
    """Keys of each request, int32 [B], from its pages."""
    function = "get_seq_lens"
    require_integer(function, "page_size", page_size, 1)
    indptr = check_indptr(function, "kv_indptr", kv_indptr)
    last = int32(function, "kv_last_page_len", kv_last_page_len)
    if last.numel() != indptr.numel() - 1:
        raise invalid(function, "kv_last_page_len", f"{indptr.numel() - 1} entries", last.numel())
    counts = indptr[1:] - indptr[:-1]
    check_last_page_len(function, "kv_last_page_len", last, counts, page_size)
    return torch.where(counts > 0, (counts - 1) * page_size + last, 0).to(torch.int32)


def get_batch_indices_positions(
    append_indptr: torch.Tensor,
    seq_lens: torch.Tensor,
    nnz: int,
    batch_indices: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Request and position of each appended token, int32 [nnz] each; seq_lens [B] count the appended tokens.

    `batch_indices` and `positions` are tensors to write them to; None = new ones.
    """
    function = "get_batch_indices_positions"
    require_integer(function, "nnz", nnz, 0)
    indptr = check_indptr(function, "append_indptr", append_indptr)
    lengths = int32(function, "seq_lens", seq_lens)
    counts = indptr[1:] - indptr[:-1]
    if lengths.numel() != counts.numel() or bool((lengths < counts).any()):
        raise invalid(function, "seq_lens", "the keys of each request, those appended included", lengths.tolist()[:8])
    if nnz != int(indptr[-1]):
        raise invalid(function, "nnz", int(indptr[-1]), nnz)
    requests = torch.repeat_interleave(torch.arange(counts.numel(), dtype=torch.int32), counts.long())
    places = torch.arange(nnz, dtype=torch.int32) - indptr[requests.long()]
    results = (requests, (lengths - counts)[requests.long()] + places)
    given = {"batch_indices": batch_indices, "positions": positions}
    for name, tensor in given.items():
        if tensor is not None:
            _check_target(function, name, tensor, nnz)
    return tuple(r if t is None else t.copy_(r) for r, t in zip(results, given.values()))


def _check_target(function: str, argument: str, tensor: torch.Tensor, count: int) -> None:
    require(function, argument, tensor, 1)
    dense = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not dense or tensor.dtype != torch.int32 or not tensor.is_contiguous():
        raise invalid(
            function, argument, "a contiguous int32 tensor of torch on the CPU", getattr(tensor, "dtype", None)
        )
    if tensor.numel() != count:
        raise invalid(function, argument, f"{count} entries", tensor.numel())


def append_paged_kv_cache(
    append_key: torch.Tensor,
    append_value: torch.Tensor,
    batch_indices: torch.Tensor,
    positions: torch.Tensor,
    paged_kv_cache: Pages,
    kv_indices: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Writes append_key and append_value [nnz, Hkv, D] to the positions of their requests, in place.

    Args:
        batch_indices, positions: int32 [nnz], see get_batch_indices_positions().
        kv_indices, kv_indptr, kv_last_page_len: pages of the requests after the append.
    """
    function = "append_paged_kv_cache"
    check_layout(function, kv_layout)
    require(function, "append_key", append_key, 3)
    k, v = split_pages(function, paged_kv_cache, kv_layout)
    page_size = k.shape[1]
    indices = int32(function, "kv_indices", kv_indices)
    indptr = check_indptr(function, "kv_indptr", kv_indptr, indices.numel())
    lengths = get_seq_lens(indptr, kv_last_page_len, page_size)
    requests = int32(function, "batch_indices", batch_indices).long()
    places = int32(function, "positions", positions).long()
    if requests.numel() != append_key.shape[0] or places.numel() != append_key.shape[0]:
        raise invalid(function, "positions", f"{append_key.shape[0]} entries, as batch_indices", places.numel())
    if bool(((requests < 0) | (requests >= lengths.numel())).any()):
        raise invalid(function, "batch_indices", f"requests below {lengths.numel()}", requests.tolist()[:8])
    if bool(((places < 0) | (places >= lengths[requests])).any()):
        raise invalid(function, "positions", "positions on the pages of their requests", places.tolist()[:8])
    slots = indices[indptr[requests].long() + places // page_size].long() * page_size + places % page_size
    if bool((slots < 0).any()):
        raise invalid(function, "kv_indices", "pages >= 0", int(indices.min()))
    names = {"key": "append_key", "value": "append_value", "key_cache": "paged_kv_cache", "slot_mapping": "kv_indices"}
    with renamed(function, {**names, "value_cache": "paged_kv_cache"}):
        ops.reshape_and_cache_flash(append_key, append_value, k, v, slots)
