# SPDX-License-Identifier: Apache-2.0
"""attend.backends.SparseIndexer: what it chooses, against logits of float64."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from backends_helpers import prefix_sum
from test_backends_latent import SparseLayer

import attend
from attend.backends import SparseIndexer

HEADS, TOPK = 4, 64


class Chooser:
    """An indexer over the pages of a sparse layer, without rotation."""

    def __init__(self, query_lens, seq_lens, seed=3):
        self.query_lens, self.seq_lens = query_lens, seq_lens
        self.layer = SparseLayer(torch.bfloat16, query_lens, seq_lens)
        generator = torch.Generator().manual_seed(seed)
        tokens = sum(seq_lens)
        self.q = torch.randn(tokens, HEADS, 128, generator=generator)
        self.k = torch.randn(tokens, 128, generator=generator)
        self.weights = torch.rand(tokens, HEADS, generator=generator)
        rotation = torch.cat([torch.ones(512, 32), torch.zeros(512, 32)], 1)
        self.norm = (1 + torch.rand(128, generator=generator)).tolist(), torch.randn(128, generator=generator).tolist()
        self.indexer = SparseIndexer(HEADS, TOPK, rotation, *self.norm, k_norm_eps=1e-5)
        self.cache = torch.zeros((self.layer.num_blocks, 64, 132), dtype=torch.uint8)

    def run(self, query_lens, computed, rows, metadata_of):
        positions = torch.cat([torch.arange(c, c + n) for c, n in zip(computed, query_lens)])
        return self.indexer.forward(self.q[rows], self.k[rows], self.weights[rows], positions, self.cache, metadata_of)

    def logits(self, request):
        """float64 [tokens, tokens] of a request, without rounding to codes; what lies behind a token is -inf."""
        begin = prefix_sum(self.seq_lens)[request]
        part = slice(begin, begin + self.seq_lens[request])
        q, k, w = self.q[part].double(), self.k[part].double(), self.weights[part].double()
        k = (k - k.mean(-1, keepdim=True)) / (k.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        k = k * torch.tensor(self.norm[0]).double() + torch.tensor(self.norm[1]).double()
        scores = torch.einsum("qhd,kd->qhk", q, k).relu()
        logits = torch.einsum("qhk,qh->qk", scores, w)
        return logits.masked_fill(torch.ones_like(logits).triu(1).bool(), float("-inf"))


def test_chooses_the_highest_logits():
    chooser = Chooser([200, 40], [200, 40])
    layer = chooser.layer
    layer.builder = layer.builder_for(256)
    chosen = chooser.run([200, 40], [0, 0], slice(None), layer.builder.build(layer.common))
    assert chosen.dtype == torch.int32 and chosen.shape == (240, TOPK)
    at, overlap = 0, []
    for request, n in enumerate([200, 40]):
        logits = chooser.logits(request)
        for position in range(n):
            row = chosen[at]
            kept = row[row >= 0]
            assert (row[len(kept) :] == -1).all() and (kept.diff() > 0).all() and kept.max() <= position
            if position < TOPK:  # sees no more: all of them
                assert kept.tolist() == list(range(position + 1))
            else:
                assert len(kept) == TOPK
                best = logits[position].topk(TOPK).indices
                overlap.append(np.isin(kept.numpy(), best.numpy()).mean())
                # fp8 codes blur the logits, but nothing that is clearly lower gets in.
                worst = logits[position][kept.long()].min()
                assert worst > logits[position][best].min() - 0.25 * logits[position][: position + 1].std()
            at += 1
    assert np.mean(overlap) > 0.97


def test_chunks_choose_the_same():
    chooser = Chooser([150], [150])
    layer = chooser.layer
    layer.builder = layer.builder_for(256)
    whole = chooser.run([150], [0], slice(None), layer.builder.build(layer.common))
    chooser.cache.zero_()
    pieces = []
    for begin, end in [(0, 70), (70, 71), (71, 150)]:
        part = layer.common.replace(
            query_start_loc=[0, end - begin], seq_lens=[end], slot_mapping=layer.common.slot_mapping[begin:end]
        )
        pieces.append(chooser.run([end - begin], [begin], slice(begin, end), layer.builder.build(part)))
    assert torch.equal(torch.cat(pieces), whole)


def test_profiling_run_and_workspace():
    chooser = Chooser([3], [3])
    assert (chooser.run([3], [0], slice(None), None) == -1).all()
    metadata = chooser.layer.builder.build(chooser.layer.common)
    assert chooser.indexer.workspace_bytes(metadata) > 0
    with pytest.raises(attend.InvalidArgument, match="workspace"):
        chooser.indexer.forward(
            chooser.q,
            chooser.k,
            chooser.weights,
            torch.arange(3),
            chooser.cache,
            metadata,
            workspace=torch.empty(0, dtype=torch.uint8),
        )


def test_the_rotation_lives_as_long_as_the_indexer():
    rotation = torch.zeros(8, 64)
    alive = weakref.ref(rotation)
    indexer = SparseIndexer(HEADS, TOPK, rotation, [1.0] * 128, [0.0] * 128)
    del rotation
    gc.collect()
    assert alive() is not None
    del indexer
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    "change, argument",
    [
        ({"num_heads": 0}, "num_heads"),
        ({"topk": 0}, "topk"),
        ({"cos_sin_cache": None}, "cos_sin_cache"),
        ({"cos_sin_cache": torch.zeros(8, 63)}, "cos_sin_cache"),
        ({"k_norm_weight": [1.0]}, "k_norm_weight"),
        ({"k_norm_bias": 3}, "k_norm_bias"),
        ({"scale_fmt": "round"}, "scale_fmt"),
        ({"hadamard": 1}, "hadamard"),
    ],
)
def test_wrong_settings(change, argument):
    fields = {
        "num_heads": HEADS,
        "topk": TOPK,
        "cos_sin_cache": torch.zeros(8, 64),
        "k_norm_weight": [1.0] * 128,
        "k_norm_bias": [0.0] * 128,
    } | change
    with pytest.raises((attend.InvalidArgument, attend.InvalidType), match=argument):
        SparseIndexer(**fields)


@pytest.mark.parametrize(
    "change, argument",
    [
        ({"q": None}, "q"),
        ({"k": np.zeros((3, 128), np.float32)}, "k"),
        ({"weights": torch.zeros(3, 5)}, "weights"),
        ({"positions": torch.zeros(3)}, "positions"),
        ({"cache": torch.zeros(2, 64, 132)}, "cache"),
        ({"metadata": 3}, "metadata"),
        ({"topk_indices": torch.zeros(3, TOPK)}, "topk_indices"),
    ],
)
def test_wrong_calls(change, argument):
    chooser = Chooser([3], [3])
    call = {
        "q": chooser.q,
        "k": chooser.k,
        "weights": chooser.weights,
        "positions": torch.arange(3),
        "cache": chooser.cache,
        "metadata": chooser.layer.builder.build(chooser.layer.common),
    } | change
    with pytest.raises((attend.InvalidArgument, attend.InvalidType), match=argument):
        chooser.indexer.forward(**call)
