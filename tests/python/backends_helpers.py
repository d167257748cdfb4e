# SPDX-License-Identifier: Apache-2.0
"""Batches in pages, and attention written out in float64, for the tests of batches and back ends."""

from __future__ import annotations

import math

import numpy as np
import torch

from attend import backends, batch
from attend.backends import AttentionConfig, BuilderConfig, ImplConfig
from attend.batch import CommonMetadata
from attend.cache import KvCacheSpec

BLOCK = 16


def prefix_sum(lengths) -> list[int]:
    return [0, *np.cumsum(lengths).tolist()]


def paged_table(rng, seq_lens, block=BLOCK, spare=2):
    """(int32 [B, max_blocks] with garbage behind the used blocks, number of blocks)."""
    used = [-(-n // block) for n in seq_lens]
    width = max(used, default=1) + 1
    order = rng.permutation(sum(used) + spare).tolist()
    table = np.full((len(used), width), -12345, np.int32)
    for r, n in enumerate(used):
        table[r, :n] = [order.pop() for _ in range(n)]
    return table, sum(used) + spare


def slots_of(table, query_lens, seq_lens, block=BLOCK) -> np.ndarray:
    slots = [
        table[r, p // block] * block + p % block
        for r, (q, n) in enumerate(zip(query_lens, seq_lens))
        for p in range(n - q, n)
    ]
    return np.array(slots, np.int64)


def attention(q, k, v, *, scale=None, causal=True, window=None, softcap=0.0):
    """float64 attention of one request: q [n, H, D] are the last positions of k, v [s, Hkv, D]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    logits = np.einsum("qhd,khd->hqk", q, k) * (1 / math.sqrt(q.shape[2]) if scale is None else scale)
    if softcap:
        logits = softcap * np.tanh(logits / softcap)
    position = np.arange(len(k) - len(q), len(k))[:, None]
    key = np.arange(len(k))[None, :]
    visible = np.ones((len(q), len(k)), bool)
    if causal:
        visible &= key <= position
    if window is not None:
        visible &= key > position - window
    return softmax_sum(np.where(visible, logits, -np.inf), v)


def softmax_sum(logits, v):
    """logits [H, q, k], v [k, H, D] -> [q, H, D]."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v)


class Requests:
    """Requests with random queries, keys and values: of all tokens, the last query_lens of which are new."""

    def __init__(self, seed, query_lens, seq_lens, num_q_heads=4, num_kv_heads=2, head_size=64):
        self.rng = np.random.default_rng(seed)
        self.query_lens, self.seq_lens = query_lens, seq_lens
        self.table, self.num_blocks = paged_table(self.rng, seq_lens)

        def normal(n, heads):
            return self.rng.standard_normal((n, heads, head_size), np.float32)

        self.q = normal(sum(query_lens), num_q_heads)
        self.keys = [normal(n, num_kv_heads) for n in seq_lens]
        self.values = [normal(n, num_kv_heads) for n in seq_lens]

    def new(self, rows) -> np.ndarray:
        return np.concatenate([x[len(x) - n :] for x, n in zip(rows, self.query_lens)])

    def fill(self, cache) -> None:
        """NaN everywhere but in the tokens computed before. `cache` is numpy's."""
        cache[...] = math.nan
        for r, (q, n) in enumerate(zip(self.query_lens, self.seq_lens)):
            for p in range(n - q):
                block, offset = self.table[r, p // BLOCK], p % BLOCK
                cache[0, block, offset] = self.keys[r][p]
                cache[1, block, offset] = self.values[r][p]

    def expected(self, **options) -> np.ndarray:
        starts = prefix_sum(self.query_lens)
        return np.concatenate(
            [
                attention(self.q[starts[r] : starts[r + 1]], self.keys[r], self.values[r], **options)
                for r in range(len(self.query_lens))
            ]
        )


def to_numpy(x):
    return x.float().numpy() if isinstance(x, torch.Tensor) else x


class Layer:
    """FLASH_ATTN with a layer over the pages of `requests`."""

    def __init__(self, requests, make=lambda x: x, dtype="float32", capture=None, kv_cache_dtype="auto", **options):
        self.requests, self.make = requests, make
        self.backend = backends.require(AttentionConfig(head_size=64, dtype=dtype))
        cache_dtype = dtype if kv_cache_dtype == "auto" else kv_cache_dtype
        spec = KvCacheSpec(requests.num_blocks, BLOCK, 2, 64, cache_dtype)
        window = options.get("sliding_window")
        self.config = BuilderConfig(4, spec, window_left=-1 if window is None else window - 1, capture=capture)
        self.builder = self.backend.make_builder(self.config)
        self.impl = self.backend.make_impl(ImplConfig(4, 2, 64, dtype=dtype, kv_cache_dtype=kv_cache_dtype, **options))
        self.cache = self.backend.new_kv_cache(
            spec, framework="numpy" if isinstance(make(np.zeros(1)), np.ndarray) else "torch"
        )

    def batch(self):
        r = self.requests
        common = CommonMetadata(prefix_sum(r.query_lens), r.seq_lens, block_table=self.make(r.table))
        return common.replace(slot_mapping=batch.make_slot_mapping(common, BLOCK))

    def forward(self, metadata, **options):
        r = self.requests
        typed = (lambda x: self.make(x).to(self.cache.dtype)) if isinstance(self.cache, torch.Tensor) else self.make
        fill = np.empty(self.cache.shape, np.float32)
        r.fill(fill)
        self.cache[...] = self.make(fill)
        return self.impl.forward(
            typed(r.q), self.cache, metadata, key=typed(r.new(r.keys)), value=typed(r.new(r.values)), **options
        )
