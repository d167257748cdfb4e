# SPDX-License-Identifier: Apache-2.0
"""attend.ops of sparse MLA: attention to named rows, from tokens to rows, and their references."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from mla_helpers import LatentBatch, assert_error, attend_rows, ds_mla_numbers, ds_mla_rows, generator, i32, normal

import attend
from attend import ops, oracle

SCALE = 0.13
TOKENS, HEADS, DIM, LATENT, TOPK = 4, 3, 48, 32, 12


def named_rows(dtype=torch.float32, seed=1):
    """(q, cache, indices): rows that nobody names are NaN; names are -1, beyond the cache and twice, too."""
    q = normal((TOKENS, HEADS, DIM), seed, dtype)
    cache = normal((5, 7, DIM), seed + 1, dtype)
    indices = torch.randint(0, 35, (TOKENS, TOPK), generator=generator(seed + 2), dtype=torch.int32)
    indices[0, 3], indices[1, 5], indices[2, 2] = -1, 35, indices[2, 7]
    indices[3] = -1
    unnamed = torch.ones(35, dtype=torch.bool)
    unnamed[[i for i in indices.flatten().tolist() if 0 <= i < 35]] = False
    cache.view(-1, DIM)[unnamed] = math.nan
    return q, cache, indices


def expected_rows(q, rows, indices, value_dim, *, lengths=None, sinks=None):
    outs, lses, maxima = [], [], []
    for t in range(len(q)):
        names = indices[t].tolist()[: max(0, indices.shape[1] if lengths is None else int(lengths[t]))]
        keys = rows[[i for i in names if 0 <= i < len(rows)]]
        out, lse, largest = attend_rows(q[t], keys, value_dim, SCALE, sinks=sinks)
        outs.append(out)
        lses.append(lse)
        maxima.append(largest)
    return torch.stack(outs), torch.stack(lses), torch.stack(maxima)


@pytest.mark.parametrize("lengths", [None, [12, 4, 0, 7], [100, -3, 1, 12]], ids=["all", "some", "clamped"])
@pytest.mark.parametrize("sinks", [None, [0.3, -math.inf, 2.0]], ids=["plain", "sinks"])
def test_against_torch(lengths, sinks):
    q, cache, indices = named_rows()
    lengths = None if lengths is None else i32(lengths)
    sinks = None if sinks is None else torch.tensor(sinks)
    max_logits = torch.full((TOKENS, HEADS), math.nan)
    arguments = dict(scale=SCALE, head_dim_v=LATENT, topk_length=lengths, sinks=sinks)
    out, lse = ops.sparse_mla_attention(q, cache, indices, max_logits=max_logits, return_lse=True, **arguments)
    expected = expected_rows(q, cache.view(-1, DIM), indices, LATENT, lengths=lengths, sinks=sinks)
    for got, wanted in zip((out, lse, max_logits), expected):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5)
    reference = oracle.sparse_mla_attention(q, cache, indices, **arguments)
    for got, wanted in zip((reference.out, reference.lse, reference.max_logits), expected):
        numpy.testing.assert_allclose(got, wanted.numpy(), rtol=1e-7, atol=1e-7)
    assert reference.worst_ratio(out, lse) <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_within_bounds(dtype):
    q, cache, indices = named_rows(dtype)
    max_logits = torch.empty(TOKENS, HEADS)
    out, lse = ops.sparse_mla_attention(
        q, cache, indices, scale=SCALE, head_dim_v=LATENT, max_logits=max_logits, return_lse=True
    )
    reference = oracle.sparse_mla_attention(q, cache, indices, scale=SCALE, head_dim_v=LATENT)
    assert reference.worst_ratio(out, lse) <= 1
    error = numpy.abs(max_logits[:3].double().numpy() - reference.max_logits[:3])
    assert (error <= reference.max_logits_bound[:3]).all() and torch.isneginf(max_logits[3]).all()


def test_rows_of_bytes():
    rows = ds_mla_rows(normal((40, 512), 1, torch.bfloat16), normal((40, 64), 2, torch.bfloat16))
    q, indices = normal((2, 3, 576), 3, torch.bfloat16), i32([[5, 39, 0, -1], [7, 7, 40, 1]])
    out, lse = ops.sparse_mla_attention(q, rows.view(4, 10, 656), indices, scale=SCALE, return_lse=True)
    expected, expected_lse, _ = expected_rows(q, ds_mla_numbers(rows), indices, 512)
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-3, atol=1e-3)
    reference = oracle.sparse_mla_attention(q, rows.view(4, 10, 656), indices, scale=SCALE)
    assert reference.worst_ratio(out, lse) <= 1


def test_all_keys_named_is_dense_decode():
    batch = LatentBatch([1, 1], [20, 9], heads=3, dim=DIM)
    dense = ops.mla_decode(**batch.arguments(), scale=SCALE, head_dim_v=LATENT, return_lse=True)
    indices = torch.full((2, 24), -1, dtype=torch.int32)
    for r, slots in enumerate(batch.slots):
        indices[r, : len(slots)] = i32(slots)
    sparse = ops.sparse_mla_attention(batch.q, batch.cache, indices, scale=SCALE, head_dim_v=LATENT, return_lse=True)
    assert torch.equal(dense[0], sparse[0]) and torch.equal(dense[1], sparse[1])


def test_errors():
    q, cache, indices = named_rows()
    arguments = dict(q=q, kv_cache=cache, indices=indices, scale=SCALE, head_dim_v=LATENT)

    def changed(**changes):
        return lambda: ops.sparse_mla_attention(**{**arguments, **changes})

    invalid = attend.InvalidArgument
    assert_error(changed(scale=None), invalid, "sparse_mla_attention", "scale")
    assert_error(changed(head_dim_v=None), invalid, "sparse_mla_attention", "head_dim_v")
    assert_error(changed(indices=indices.long()), invalid, "sparse_mla_attention", "indices")
    assert_error(changed(indices=indices[:3]), invalid, "sparse_mla_attention", "indices")
    assert_error(changed(topk_length=i32([1, 2])), invalid, "sparse_mla_attention", "topk_length")
    assert_error(changed(indices=[[1]]), attend.InvalidType, "sparse_mla_attention", "indices")


# From tokens to rows.

TABLE = [[2, 0, 7], [1, -1, 3]]


def row_of(request, token, block_size, num_blocks, stride):
    if not 0 <= request < len(TABLE) or token < 0 or token // block_size >= len(TABLE[request]):
        return -1
    block = TABLE[request][token // block_size]
    return block * stride + token % block_size if 0 <= block < num_blocks else -1


@pytest.mark.parametrize("stride", [0, 6])
def test_convert_in_pages(stride):
    req_id = i32([0, 1, 1, 5])
    tokens = i32([[0, 3, 4, 11, 12], [9, -1, 5, 8, 0], [2**31 - 1, -(2**31), 3, 3, 7], [0, 1, 2, 3, 4]])
    out, counts = ops.convert_req_index_to_global_index(
        req_id, i32(TABLE), tokens, block_size=4, num_blocks=5, block_stride_rows=stride, return_valid_counts=True
    )
    expected = [[row_of(int(r), t, 4, 5, stride or 4) for t in row] for r, row in zip(req_id, tokens.tolist())]
    assert out.tolist() == expected
    assert counts.tolist() == [sum(x >= 0 for x in row) for row in expected]
    assert any(-1 not in row[:3] for row in expected) and expected[3] == [-1] * 5
    for request in range(2):
        for token in range(13):
            got = oracle.global_index(token, i32(TABLE[request]), block_size=4, num_blocks=5, block_stride_rows=stride)
            assert got == row_of(request, token, 4, 5, stride or 4)
    in_place = tokens.clone()
    assert (
        ops.convert_req_index_to_global_index(
            req_id, i32(TABLE), in_place, block_size=4, num_blocks=5, block_stride_rows=stride, out=in_place
        )
        is in_place
    )
    assert in_place.tolist() == expected


def test_convert_in_workspace():
    out = ops.convert_req_index_to_global_index(
        i32([0, 1, 0]),
        i32(TABLE),
        i32([[0, 5], [1, 9], [0, -1]]),
        block_size=4,
        num_blocks=5,
        prefill_workspace_request_ids=i32([-1, 1, 7]),
        prefill_workspace_starts=i32([0, 10]),
        workspace_rows=15,
    )
    assert out.tolist() == [[8, 1], [11, -1], [-1, -1]]


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_filter_of_a_rank(rank, compact):
    tokens = torch.randint(-1, 40, (2, 16), generator=generator(4), dtype=torch.int32)
    req_id = i32([1, 0])
    out, counts = ops.filter_and_convert_dcp_index(
        req_id,
        i32(TABLE),
        tokens,
        block_size=4,
        num_blocks=8,
        world_size=3,
        interleave=2,
        rank=rank,
        compact_to_front=compact,
        return_valid_counts=True,
    )
    expected = []
    for r, row in zip(req_id.tolist(), tokens.tolist()):
        rows = []
        for token in row:
            local = token // 6 * 2 + token % 2
            rows.append(row_of(r, local, 4, 8, 4) if token >= 0 and token // 2 % 3 == rank else -1)
        expected.append(sorted(rows, key=lambda x: x < 0) if compact else rows)
    assert out.tolist() == expected
    assert counts.tolist() == [sum(x >= 0 for x in row) for row in expected] and counts.sum() > 0
    for token in range(40):
        got = oracle.global_index(
            token, i32(TABLE[0]), block_size=4, num_blocks=8, world_size=3, interleave=2, rank=rank
        )
        local = token // 6 * 2 + token % 2
        assert got == (row_of(0, local, 4, 8, 4) if token // 2 % 3 == rank else -1)


def test_conversion_errors():
    invalid = attend.InvalidArgument

    def convert(**changes):
        arguments = dict(req_id=i32([0]), block_table=i32(TABLE), token_indices=i32([[1]]), block_size=4, num_blocks=5)
        return lambda: ops.convert_req_index_to_global_index(**{**arguments, **changes})

    name = "convert_req_index_to_global_index"
    assert_error(convert(block_size=0), invalid, name, "block_size")
    assert_error(convert(num_blocks=-1), invalid, name, "num_blocks")
    assert_error(convert(block_size=2.5), attend.InvalidType, name, "block_size")
    assert_error(convert(req_id=i32([0, 1])), invalid, name, "req_id")
    assert_error(convert(prefill_workspace_request_ids=i32([0])), invalid, name, "prefill_workspace_starts")
    with pytest.raises(invalid, match=r"\[filter_and_convert_dcp_index\] argument 'rank'"):
        ops.filter_and_convert_dcp_index(
            i32([0]), i32(TABLE), i32([[1]]), block_size=4, num_blocks=5, world_size=2, rank=2
        )
    with pytest.raises(invalid, match=r"\[oracle.global_index\] argument 'token'"):
        oracle.global_index(2**31, i32([1]), block_size=4, num_blocks=5)
    with pytest.raises(invalid, match="argument 'rank'"):
        oracle.global_index(1, i32([1]), block_size=4, num_blocks=5, world_size=2, rank=2)
