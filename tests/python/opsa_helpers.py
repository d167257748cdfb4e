# SPDX-License-Identifier: Apache-2.0
"""Problems and references written out in numpy and torch, for the tests of caches, int8 and differential attention."""

from __future__ import annotations

import math

import numpy
import torch

TORCH_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def normal(rng: numpy.random.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape)).to(dtype)


def prefix_sum(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *numpy.cumsum(lengths)], dtype=torch.int32)


def block_table_of(rng: numpy.random.Generator, seq_lens: list[int], block_size: int, num_blocks: int) -> torch.Tensor:
    """Blocks in random order, no one twice; entries behind the last one of a request are -1, which nobody may read."""
    needed = [-(-n // block_size) for n in seq_lens]
    blocks = rng.permutation(num_blocks)[: sum(needed)].tolist()
    table = torch.full((len(seq_lens), max(max(needed), 1)), -1, dtype=torch.int32)
    for row, n in enumerate(needed):
        table[row, :n] = torch.tensor(blocks[:n], dtype=torch.int32)
        blocks = blocks[n:]
    return table


def slots_of(table: torch.Tensor, row: int, positions: range, block_size: int) -> list[int]:
    return [int(table[row, p // block_size]) * block_size + p % block_size for p in positions]


def visible(query_len: int, key_len: int, causal: bool, left: int = -1, right: int = -1) -> torch.Tensor:
    """bool [query_len, key_len], queries aligned to the end of the keys."""
    position = torch.arange(query_len)[:, None] + key_len - query_len
    key = torch.arange(key_len)[None, :]
    mask = torch.ones(query_len, key_len, dtype=torch.bool)
    if causal:
        mask &= key <= position
    elif right >= 0:
        mask &= key <= position + right
    if left >= 0:
        mask &= key >= position - left
    return mask


def attention64(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float | None = None,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 (out [T, Hq, Dv], lse [T, Hq]) of q [T, Hq, D] over k [S, Hkv, D] and v [S, Hkv, Dv]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    logits = torch.einsum("thd,shd->hts", q.double(), k) * (1 / math.sqrt(q.shape[2]) if scale is None else scale)
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -math.inf)
    lse = torch.logsumexp(logits, -1)
    weights = torch.exp(logits - torch.where(torch.isfinite(lse), lse, 0.0)[..., None])
    return torch.einsum("hts,shd->thd", weights, v), lse.T


def bits(tensor: torch.Tensor) -> numpy.ndarray:
    """The bytes of a tensor, for comparisons that NaN does not disturb."""
    return tensor.detach().contiguous().view(torch.uint8).numpy().copy()
