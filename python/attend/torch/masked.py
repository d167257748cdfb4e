# SPDX-License-Identifier: Apache-2.0
"""Attention under masks that no kernel knows: padding, any boolean mask, lists of keys.

The kernels know causal and windowed requests. A mask is cut into such requests: rows one after the other that see the
same keys, or that see one key more each (at the end of one list), or whose range of keys moves by one, share a
request; any other row is a request of its own. The keys of a request are listed in a block table of blocks of one
key, so that no key is copied; a request alone with a contiguous range reads its slice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._tensors import require_integer
from ..errors import InvalidArgument, InvalidType
from ..ops import flash_attn_varlen, flash_attn_with_kvcache

_FUNCTION = "masked_attention"
#: Entries of one call's block table (16 MiB); more requests are several calls.
_TABLE_ENTRIES = 1 << 22
_SAME, _GROW, _SLIDE = 1, 2, 3


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    indices: Tensor | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Softmax attention of a padded batch, query i at position i + T - S. A row that sees no key is 0.

    Args:
        q: [B, S, Hq, D] of float32, float16 or bfloat16.
        k: [B, T, Hkv, D], any strides but the last.
        v: [B, T, Hkv, Dv].
        mask: bool. [B, T]: which keys are tokens; with `causal` the rows of padding are 0. Or [B or 1, Hq or 1, S, T]:
            which keys a row sees; then it alone decides, `causal` and the window stay off. None = all.
        indices: int32 or int64 [B, S, N], different keys of each row; those below 0 or hidden by mask, `causal` or
            window do not count. None = all keys.
        causal: a key is visible up to the query's position.
        window_left, window_right: keys visible to the left and right of the position; -1 = all.
        scale: multiplies q.k; None = 1 / sqrt(D).
        softcap: logits become softcap * tanh(logits / softcap); 0 = off.
        sinks: [Hq], one more logit a head without a value.

    Returns:
        [B, S, Hq, Dv].

    Raises:
        InvalidArgument, InvalidType, Unsupported.
    """
    _check_types(q=q, k=k, v=v, mask=mask, indices=indices, sinks=sinks)
    require_integer(_FUNCTION, "window_left", window_left, -1)
    require_integer(_FUNCTION, "window_right", window_right, -1)
    _check(q, k, v, mask, indices, banded=causal or window_left >= 0 or window_right >= 0)
    options = {"scale": scale, "softcap": softcap, "sinks": None if sinks is None else sinks.detach().float()}
    band = {"causal": causal, "window_left": window_left, "window_right": window_right}
    if indices is None and (mask is None or mask.dim() == 2):
        out = _padded(q, k, v, mask, band, options)
        if out is not None:
            return out
    dense = mask if mask is not None and mask.dim() == 4 else _dense(q, k, mask, **band)
    if indices is None:
        return _each_head(q, k, v, dense, options)
    return _indexed(q, k, v, dense, indices, options)


def _check_types(**arguments: Tensor | None) -> None:
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor) and (tensor is not None or name in ("q", "k", "v")):
            got = "None" if tensor is None else type(tensor).__name__
            raise InvalidType(f"[{_FUNCTION}] argument '{name}': expected a torch tensor, got {got}", _FUNCTION, name)
        if tensor is not None and not tensor.is_cpu:
            raise _bad(name, "a tensor on the CPU", tensor.device)


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, indices: Tensor | None, banded: bool) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise _bad(name, "[batch, length, heads, head_dim]", tuple(tensor.shape))
    batch, rows, heads = q.shape[:3]
    keys = k.shape[1]
    if k.shape[0] != batch:
        raise _bad("k", f"a batch of {batch}", tuple(k.shape))
    if v.shape[:3] != k.shape[:3]:
        raise _bad("v", f"shape {tuple(k.shape[:3])} and a head size", tuple(v.shape))
    if k.shape[2] < 1 or heads % k.shape[2] != 0:
        raise _bad("k", f"a number of heads that divides {heads}", k.shape[2])
    if mask is not None:
        if mask.dtype != torch.bool:
            raise InvalidType(f"[{_FUNCTION}] argument 'mask': expected bool, got {mask.dtype}", _FUNCTION, "mask")
        batches = (1, batch)
        full = mask.dim() == 4 and mask.shape[0] in batches and mask.shape[1] in (1, heads)
        if not (tuple(mask.shape) == (batch, keys) or (full and tuple(mask.shape[2:]) == (rows, keys))):
            raise _bad("mask", f"({batch}, {keys}) or ({batch}, 1, {rows}, {keys})", tuple(mask.shape))
        if full and banded:
            raise _bad("mask", "no causal and no window beside a mask of rows", "causal or a window")
    if indices is not None:
        if indices.dtype not in (torch.int32, torch.int64):
            raise InvalidType(
                f"[{_FUNCTION}] argument 'indices': expected int32 or int64, got {indices.dtype}", _FUNCTION, "indices"
            )
        if indices.dim() != 3 or tuple(indices.shape[:2]) != (batch, rows):
            raise _bad("indices", f"({batch}, {rows}, keys per row)", tuple(indices.shape))
        if mask is not None and mask.dim() == 4 and mask.shape[1] != 1:
            raise _bad("mask", "one mask for all heads beside indices", tuple(mask.shape))
        if indices.numel() and int(indices.max()) >= keys:
            raise _bad("indices", f"keys below {keys}", int(indices.max()))


def _bad(argument: str, expected: str, got: object) -> InvalidArgument:
    return InvalidArgument(f"[{_FUNCTION}] argument '{argument}': expected {expected}, got {got}", _FUNCTION, argument)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, band: dict[str, Any], options: dict[str, Any]
) -> Tensor | None:
    """No padding, or padding at the ends alone: a dense cache whose rows begin and end somewhere. None = another."""
    keys = k.shape[1]
    if mask is None or bool(mask.all()):
        return flash_attn_with_kvcache(q, k, v, **band, **options)
    at = torch.arange(keys)
    count = mask.sum(1)
    first = torch.where(count > 0, mask.to(torch.uint8).argmax(1), keys)
    end = torch.where(count > 0, torch.where(mask, at, -1).amax(1) + 1, keys)
    windowed = band["window_left"] >= 0 or band["window_right"] >= 0
    if bool((count != end - first).any()) or (windowed and not band["causal"]):
        return None
    if not band["causal"]:
        end = end.to(torch.int32)
        return flash_attn_with_kvcache(q, k, v, cache_seqlens=end, cache_leftpad=first.to(torch.int32), **options)
    # No row of a token sees the padding behind it: the cache may end with the tensor, and positions stay.
    out = flash_attn_with_kvcache(q, k, v, cache_leftpad=first.to(torch.int32), **band, **options)
    if bool((end < keys).any()):
        out.masked_fill_(~_row_tokens(mask, q.shape[1])[:, :, None, None], 0.0)
    return out


def _row_tokens(mask: Tensor, rows: int) -> Tensor:
    """[B, S]: which rows are tokens, row i being key i + T - S; rows before the first key are none."""
    tokens = mask[:, max(mask.shape[1] - rows, 0) :]
    return torch.nn.functional.pad(tokens, (rows - tokens.shape[1], 0))


def _dense(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, window_left: int, window_right: int) -> Tensor:
    """The mask of rows, [B or 1, 1, S, T]."""
    rows, keys = q.shape[1], k.shape[1]
    distance = torch.arange(keys) - torch.arange(keys - rows, keys)[:, None]
    visible = torch.ones(rows, keys, dtype=torch.bool)
    if causal:
        visible &= distance <= 0
    if window_left >= 0:
        visible &= distance >= -window_left
    if window_right >= 0:
        visible &= distance <= window_right
    visible = visible[None, None]
    if mask is None:
        return visible
    visible = visible & mask[:, None, None, :]
    return visible & _row_tokens(mask, rows)[:, None, :, None] if causal else visible


def _each_head(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: dict[str, Any]) -> Tensor:
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    group = q.shape[2] // k.shape[2]
    for h in range(mask.shape[1]):
        one = mask.shape[1] > 1
        heads = slice(h, h + 1) if one else slice(None)
        shared = slice(h // group, h // group + 1) if one else slice(None)
        sinks = options["sinks"]
        kept = options | {"sinks": None if sinks is None else sinks[heads].contiguous()}
        for b in range(q.shape[0]):
            rows = mask[b if mask.shape[0] > 1 else 0, h]
            _by_runs(q[b, :, heads], k[b, :, shared], v[b, :, shared], rows, out[b, :, heads], kept)
    return out


def _by_runs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, out: Tensor, options: dict[str, Any]) -> None:
    """q [S, H, D] under mask [S, T] to out."""
    begin, end, kind, width, seen = _runs(mask)
    for key in sorted(set(zip(kind, width))):
        members = [r for r in range(len(begin)) if (kind[r], width[r]) == key]
        band = {"causal": key[0] != _SAME, "window_left": key[1] - 1 if key[0] == _SLIDE else -1}
        step = max(1, _TABLE_ENTRIES // max(1, mask.shape[1]))
        for part in (members[i : i + step] for i in range(0, len(members), step)):
            rows = torch.cat([torch.arange(begin[r], end[r]) for r in part])
            lengths = torch.tensor([end[r] - begin[r] for r in part])
            result = _call(q.index_select(0, rows), k, v, lengths, seen[part], band | options)
            out.index_copy_(0, rows, result)


def _runs(mask: Tensor) -> tuple[list[int], list[int], list[int], list[int], Tensor]:
    """First row, row after the last, kind, width of a sliding range (else 0) and [R, T] keys of each request."""
    rows, keys = mask.shape
    at = torch.arange(keys, dtype=torch.int32)  # several times as fast as int64
    count = mask.sum(1, dtype=torch.int32)
    last = torch.where(mask, at, -1).amax(1) if keys else count - 1
    first = last - count + 1
    whole = (count > 0) & (torch.where(mask, at, keys).amin(1) == first) if keys else count > 0
    changed = mask[1:] != mask[:-1]
    changes = changed.sum(1, dtype=torch.int32)
    newest = torch.where(changed, at, -1).amax(1) if keys else changes
    step = torch.zeros(max(rows - 1, 0), dtype=torch.int64)
    step[whole[1:] & whole[:-1] & (first[1:] == first[:-1] + 1) & (last[1:] == last[:-1] + 1)] = _SLIDE
    step[(changes == 1) & (newest > last[:-1])] = _GROW
    step[changes == 0] = _SAME
    begin, end, kind = _cut(step.tolist(), rows)
    seen = mask[[e - 1 for e in end]].clone()
    width = [0] * len(begin)
    for r, (b, e) in enumerate(zip(begin, end)):
        if kind[r] == _SLIDE:
            width[r] = int(count[b])
            seen[r, int(first[b]) : int(last[e - 1]) + 1] = True
    return begin, end, kind, width, seen


def _cut(step: list[int], rows: int) -> tuple[list[int], list[int], list[int]]:
    """Runs of rows whose steps are of one kind; a row alone counts as rows that see the same."""
    begin, end, kind = [], [], []
    start, current = 0, 0
    for row in range(1, rows + 1):
        taken = step[row - 1] if row < rows else 0
        if taken and current in (0, taken):
            current = taken
            continue
        begin.append(start)
        end.append(row)
        kind.append(current or _SAME)
        start, current = row, 0
    return (begin, end, kind) if rows else ([], [], [])


def _call(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, seen: Tensor, options: dict[str, Any]) -> Tensor:
    """Requests of `lengths` rows one after the other, each with the keys that its row of `seen` marks."""
    counts = seen.sum(1)
    entries = seen.nonzero()[:, 1]
    starts = _prefix_sums(lengths)
    total = len(entries)
    if len(seen) == 1 and (total == 0 or int(entries[-1] - entries[0]) == total - 1):
        begin = int(entries[0]) if total else 0
        piece = slice(begin, begin + total)
        return flash_attn_varlen(q, k[piece], v[piece], starts, cu_seqlens_kv=_prefix_sums(counts), **options)
    return _from_table(q, k, v, starts, _table(entries, counts), counts, options)


def _table(entries: Tensor, counts: Tensor) -> Tensor:
    table = torch.zeros(len(counts), max(1, int(counts.max())), dtype=torch.int32)
    table[torch.arange(table.shape[1]) < counts[:, None]] = entries.to(torch.int32)
    return table


def _prefix_sums(lengths: Tensor) -> Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _from_table(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, table: Tensor, counts: Tensor, options: dict[str, Any]
) -> Tensor:
    return flash_attn_varlen(
        q, k[:, None], v[:, None], starts, seq_lens=counts.to(torch.int32), block_table=table, **options
    )


def _indexed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, indices: Tensor, options: dict[str, Any]) -> Tensor:
    batch, rows, width = indices.shape
    out = q.new_empty((*q.shape[:3], v.shape[3]))
    step = max(1, _TABLE_ENTRIES // max(1, width))
    for b in range(batch):
        visible = mask[b if mask.shape[0] > 1 else 0, 0]
        for i in range(0, rows, step):
            listed = indices[b, i : i + step].to(torch.int64)
            kept = listed >= 0
            if visible.shape[1] > 0:
                kept &= visible[i : i + step].gather(1, listed.clamp_min(0))
            counts = kept.sum(1)
            starts = torch.arange(len(listed) + 1, dtype=torch.int32)
            out[b, i : i + step] = _from_table(
                q[b, i : i + step], k[b], v[b], starts, _table(listed[kept], counts), counts, options
            )
    return out
