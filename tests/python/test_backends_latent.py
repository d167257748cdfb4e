# SPDX-License-Identifier: Apache-2.0
"""attend.backends: latent, sparse and differential attention against float64 written out."""

from __future__ import annotations

import dataclasses
import gc

import numpy as np
import pytest
import torch
from backends_helpers import BLOCK, Layer, Requests, attention, paged_table, prefix_sum, to_numpy

import attend
from attend import backends, batch
from attend.backends import (
    AttentionConfig,
    BuilderConfig,
    DifferentialBuilderConfig,
    DifferentialLayerConfig,
    ImplConfig,
    MlaBuilderConfig,
    MlaDims,
    MlaLayerConfig,
    SparseBuilderConfig,
)
from attend.batch import CommonMetadata
from attend.cache import KvCacheSpec

DIMS = MlaDims(512, 32, 64, 24)


class LatentLayer:
    """A layer of latent attention over pages, and its attention written out over the keys and values of all heads."""

    sparse = None
    name = "FLASH_ATTN_MLA"

    def __init__(self, dtype, query_lens, seq_lens, heads=4, seed=5):
        generator = torch.Generator().manual_seed(seed)
        self.query_lens, self.seq_lens = query_lens, seq_lens

        def normal(*shape):
            return torch.randn(shape, generator=generator).to(dtype)

        self.weight = (normal(heads * (DIMS.qk_nope_head_dim + DIMS.v_head_dim), DIMS.kv_lora_rank) / 16).to(dtype)
        self.latents = [normal(n, DIMS.cache_dim) for n in seq_lens]
        self.query = normal(sum(query_lens), heads, DIMS.qk_nope_head_dim + DIMS.qk_rope_head_dim)
        table, num_blocks = paged_table(np.random.default_rng(seed), seq_lens, block=64)
        self.num_blocks = num_blocks
        name = str(dtype).removeprefix("torch.")
        backend = backends.find(self.name)
        spec = KvCacheSpec(num_blocks, 64, 1, DIMS.cache_dim, name)
        mla = MlaBuilderConfig(DIMS, max_model_len=512, max_num_seqs=8, dtype=name)
        self.backend, self.config = backend, BuilderConfig(heads, spec, mla=mla, sparse=self.sparse)
        self.builder = backend.make_builder(self.config)
        self.impl = backend.make_impl(
            ImplConfig(heads, 1, DIMS.cache_dim, dtype=name, mla=MlaLayerConfig(self.weight, DIMS, heads, dtype=name))
        )
        self.cache = backend.new_kv_cache(spec, framework="torch")
        common = CommonMetadata(prefix_sum(query_lens), seq_lens, block_table=torch.from_numpy(table))
        self.common = common.replace(slot_mapping=batch.make_slot_mapping(common, 64))

    def forward(self, metadata, **options):
        self.cache[...] = float("nan")
        table = self.common.block_table
        for r, (q, n) in enumerate(zip(self.query_lens, self.seq_lens)):
            for p in range(n - q):
                self.cache[table[r, p // 64], p % 64] = self.latents[r][p]
        new = torch.cat([x[len(x) - n :] for x, n in zip(self.latents, self.query_lens)])
        kv_c, k_pe = new[:, : DIMS.kv_lora_rank], new[:, DIMS.kv_lora_rank :]
        return self.impl.forward(self.query, self.cache, metadata, kv_c=kv_c, k_pe=k_pe, **options)

    def expected(self):
        heads, nope = self.query.shape[1], DIMS.qk_nope_head_dim
        weight = self.weight.double().numpy().reshape(heads, -1, DIMS.kv_lora_rank)
        result, at = [], 0
        for n_q, latents in zip(self.query_lens, self.latents):
            rows = latents.double().numpy()
            both = np.einsum("kl,hdl->khd", rows[:, : DIMS.kv_lora_rank], weight)
            rope = np.repeat(rows[:, None, DIMS.kv_lora_rank :], heads, 1)
            keys = np.concatenate([both[:, :, :nope], rope], 2)
            query = self.query[at : at + n_q].double().numpy()
            result.append(attention(query, keys, both[:, :, nope:]))
            at += n_q
        return np.concatenate(result)


class SparseLayer(LatentLayer):
    """The same for the sparse back end, with an index of all tokens unless there is another one."""

    sparse = SparseBuilderConfig(topk=64, max_num_batched_tokens=64)
    name = "FLASHMLA_SPARSE"

    def builder_for(self, tokens):
        """A builder for larger batches."""
        sparse = dataclasses.replace(self.sparse, max_num_batched_tokens=tokens)
        return self.backend.make_builder(dataclasses.replace(self.config, sparse=sparse))

    def forward(self, metadata, indices=None):
        if indices is None:
            indices = torch.arange(64, dtype=torch.int32).repeat(sum(self.query_lens), 1)
        return super().forward(metadata, topk_indices=indices)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.06)])
def test_latent_attention(dtype, tolerance):
    layer = LatentLayer(dtype, [1, 2, 30, 40], [70, 130, 100, 40])
    out = layer.forward(layer.builder.build(layer.common))
    assert out.shape == (73, 4, DIMS.v_head_dim) and out.dtype == dtype
    np.testing.assert_allclose(to_numpy(out), layer.expected(), atol=tolerance, rtol=tolerance)


def test_sparse_attention():
    layer = SparseLayer(torch.bfloat16, [1, 2, 30], [50, 40, 60])
    metadata = layer.builder.build(layer.common)
    assert metadata.sparse is not None and metadata.cascade is None
    np.testing.assert_allclose(to_numpy(layer.forward(metadata)), layer.expected(), atol=0.06, rtol=0.06)
    # A token that only sees itself has its own value.
    positions = [p for q, n in zip(layer.query_lens, layer.seq_lens) for p in range(n - q, n)]
    own = torch.full((33, 64), -1, dtype=torch.int32)
    own[:, 5] = torch.tensor(positions, dtype=torch.int32)
    out = layer.forward(metadata, own)
    rows = torch.cat([x[len(x) - n :] for x, n in zip(layer.latents, layer.query_lens)])[
        :, : DIMS.kv_lora_rank
    ].double()
    weight = layer.weight.double().view(4, -1, DIMS.kv_lora_rank)[:, DIMS.qk_nope_head_dim :]
    np.testing.assert_allclose(to_numpy(out), torch.einsum("tl,hdl->thd", rows, weight).numpy(), atol=0.06, rtol=0.02)
    with pytest.raises(attend.InvalidArgument, match="topk_indices"):
        LatentLayer.forward(layer, metadata)


@pytest.mark.parametrize("pairing", ["interleaved", "halves"])
def test_differential_attention(pairing):
    rng = np.random.default_rng(6)
    query_lens, seq_lens, heads, size = [1, 9], [30, 9], 4, 32
    table, num_blocks = paged_table(rng, seq_lens)
    backend = backends.require(AttentionConfig(head_size=size, dtype="float32", use_differential=True))
    spec = KvCacheSpec(num_blocks, BLOCK, heads, size, "float32")
    builder = backend.make_builder(BuilderConfig(heads, spec, differential=DifferentialBuilderConfig("v1")))
    vectors = {
        name: (0.1 * rng.standard_normal(size)).tolist()
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
    }
    impl = backend.make_impl(
        ImplConfig(
            heads,
            heads,
            size,
            dtype="float32",
            differential=DifferentialLayerConfig(pairing=pairing, lambda_init=0.3, **vectors),
        )
    )
    keys, values = ([rng.standard_normal((n, heads, size), np.float32) for n in seq_lens] for _ in range(2))
    q = rng.standard_normal((10, heads, size), np.float32)
    cache = backend.new_kv_cache(spec)
    for queries, lens in [(seq_lens, seq_lens), (query_lens, seq_lens)]:  # fills the cache, then the step itself
        common = CommonMetadata(prefix_sum(queries), lens, block_table=table)
        common = common.replace(slot_mapping=batch.make_slot_mapping(common, BLOCK))
        new = [np.concatenate([x[len(x) - n :] for x, n in zip(rows, queries)]) for rows in (keys, values)]
        query = q if queries is query_lens else np.zeros((sum(queries), heads, size), np.float32)
        out = impl.forward(query, cache, builder.build(common), key=new[0], value=new[1])
    lam = (
        np.exp(np.dot(vectors["lambda_q1"], vectors["lambda_k1"]))
        - np.exp(np.dot(vectors["lambda_q2"], vectors["lambda_k2"]))
        + 0.3
    )
    pairs = [(2 * p, 2 * p + 1) if pairing == "interleaved" else (p, p + 2) for p in range(2)]
    expected = np.empty((10, 2, 2 * size))
    for p, (a, b) in enumerate(pairs):
        for r, rows in enumerate([slice(0, 1), slice(1, 10)]):
            both = np.concatenate([values[r][:, [a]], values[r][:, [b]]], 2)
            maps = [attention(q[rows][:, [h]], keys[r][:, [h]], both)[:, 0] for h in (a, b)]
            x = maps[0] - lam * maps[1]
            expected[rows, p] = 0.7 * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(out.reshape(10, 2, 2 * size), expected, atol=2e-4, rtol=1e-4)


def test_metadata_outlives_the_builder_of_a_sparse_back_end():
    """Its buffers belong to the builder and are handed out again once metadata is gone."""
    test = SparseLayer(torch.bfloat16, [3, 2], [30, 20])
    first = test.builder.build(test.common)
    expected = test.forward(first)
    kept = test.builder.build(test.common)
    del first
    gc.collect()
    test.builder.build(CommonMetadata([0, 1], [1], block_table=np.zeros((1, 1), np.int32), slot_mapping=[0]))
    del test.builder
    gc.collect()
    np.testing.assert_array_equal(to_numpy(test.forward(kept)), to_numpy(expected))


def test_metadata_of_another_back_end_is_refused():
    sparse = SparseLayer(torch.bfloat16, [1], [5])
    layer = Layer(Requests(13, [2, 1], [2, 33]))
    with pytest.raises((attend.InvalidArgument, attend.Error), match="metadata"):
        layer.forward(sparse.builder.build(sparse.common))
    with pytest.raises(attend.InvalidArgument, match="metadata"):
        layer.builder.update_block_table(sparse.builder.build(sparse.common), layer.requests.table, None)
