# SPDX-License-Identifier: Apache-2.0
"""attend.compat.flash_mla: FlashMLA's signatures, layouts and conventions."""

from __future__ import annotations

import inspect
import math

import numpy
import pytest
import torch
from mla_helpers import (
    LatentBatch,
    assert_error,
    attend_batch,
    attend_rows,
    ds_mla_numbers,
    ds_mla_rows,
    ds_v4_blocks,
    ds_v4_numbers,
    generator,
    i32,
    normal,
)

import attend
from attend import ops, oracle
from attend.compat import flash_mla
from attend.errors import InvalidType

invalid = attend.InvalidArgument


def decode_batch(query_len=2, dtype=torch.float32, lens=(70, 0, 130), dim=48):
    batch = LatentBatch([query_len] * len(lens), list(lens), heads=3, dim=dim, dtype=dtype, block=64)
    batch.cache = batch.cache[:, :, None]
    return batch, batch.q.view(len(lens), query_len, 3, dim)


def of_requests(out, lse, batch, query_len):
    """Rows of tokens in FlashMLA's layouts, with its LSE of rows without keys."""
    count = len(batch.seq_lens)
    lse = torch.where(torch.isneginf(lse), math.inf, lse)
    return out.view(count, query_len, *out.shape[1:]), lse.view(count, query_len, -1).transpose(1, 2)


def test_signatures():
    """Names, order and defaults are FlashMLA's."""
    expected = {
        "flash_mla_with_kvcache": "q k_cache block_table cache_seqlens head_dim_v tile_scheduler_metadata "
        "num_splits=None softmax_scale=None causal=False is_fp8_kvcache=False indices=None "
        "attn_sink=None extra_k_cache=None extra_indices_in_kvcache=None topk_length=None "
        "extra_topk_length=None",
        "flash_mla_sparse_fwd": "q kv indices sm_scale d_v=512 attn_sink=None topk_length=None",
        "flash_attn_varlen_func": "q k v cu_seqlens_qo cu_seqlens_kv max_seqlen_qo max_seqlen_kv dropout_p=0.0 "
        "softmax_scale=None causal=False deterministic=False is_varlen=True",
    }
    for name, wanted in expected.items():
        parameters = inspect.signature(getattr(flash_mla, name)).parameters.values()
        shown = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
        assert shown == wanted.split(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_dense_decode(dtype, causal, scale):
    batch, q = decode_batch(dtype=dtype)
    schedule, none = flash_mla.get_mla_metadata()
    assert none is None
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, batch.cache, batch.block_table, batch.lengths, 32, schedule, none, softmax_scale=scale, causal=causal
    )
    assert out.shape == (3, 2, 3, 32) and lse.shape == (3, 3, 2) and out.dtype == dtype
    wanted_out, wanted_lse = of_requests(
        *attend_batch(batch, 32, 48**-0.5 if scale is None else scale, causal=causal), batch, 2
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), wanted_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=tolerance, atol=tolerance)
    assert torch.isposinf(lse[1]).all() and (out[1] == 0).all()
    reference = oracle.flash_mla_with_kvcache(
        q, batch.cache, batch.block_table, batch.lengths, 32, softmax_scale=scale, causal=causal
    )
    assert reference.worst_ratio(out, lse) <= 1
    numpy.testing.assert_allclose(reference.out, wanted_out.numpy(), rtol=1e-7, atol=1e-7)
    # The old form gives tensors, which do not change any bit.
    old = flash_mla.get_mla_metadata(batch.lengths, 2 * 3, 1)
    again = flash_mla.flash_mla_with_kvcache(
        q, batch.cache, batch.block_table, batch.lengths, 32, *old, softmax_scale=scale, causal=causal
    )
    assert torch.equal(again[0], out) and torch.equal(again[1], lse)


def test_numpy_has_the_bits_of_torch():
    batch, q = decode_batch()
    arguments = (q, batch.cache, batch.block_table, batch.lengths)
    out, lse = flash_mla.flash_mla_with_kvcache(*arguments, 32, flash_mla.get_mla_metadata()[0])
    schedule = flash_mla.get_mla_metadata()[0]
    for _ in range(2):
        arrays = flash_mla.flash_mla_with_kvcache(*(t.numpy() for t in arguments), 32, schedule)
        assert (arrays[0] == out.numpy()).all() and (arrays[1] == lse.numpy()).all()
    assert isinstance(schedule.num_splits, numpy.ndarray)


def test_causal_row_without_keys():
    batch, q = decode_batch(query_len=3, lens=(2, 65))
    out, lse = flash_mla.flash_mla_with_kvcache(
        q, batch.cache, batch.block_table, batch.lengths, 32, flash_mla.get_mla_metadata()[0], causal=True
    )
    assert torch.isposinf(lse[0, :, 0]).all() and (out[0, 0] == 0).all()
    assert torch.isfinite(lse[0, :, 1:]).all() and torch.isfinite(lse[1]).all()


def test_a_used_schedule_is_for_its_batch():
    batch, q = decode_batch()
    schedule, _ = flash_mla.get_mla_metadata()
    call = lambda **changes: flash_mla.flash_mla_with_kvcache(
        **{
            **dict(
                q=q,
                k_cache=batch.cache,
                block_table=batch.block_table,
                cache_seqlens=batch.lengths,
                head_dim_v=32,
                tile_scheduler_metadata=schedule,
            ),
            **changes,
        }
    )
    assert not schedule.have_initialized
    first = call()
    assert schedule.have_initialized and schedule.config.h_q == 3 and schedule.num_splits.shape == (4,)
    assert schedule.tile_scheduler_metadata.shape[1] == 8
    assert torch.equal(call()[0], first[0])
    name = "flash_mla_with_kvcache"
    assert_error(lambda: call(causal=True), invalid, name, "tile_scheduler_metadata")
    assert_error(lambda: call(q=q[:, :1]), invalid, name, "tile_scheduler_metadata")
    assert_error(lambda: call(num_splits=schedule.num_splits), invalid, name, "num_splits")
    with pytest.raises(invalid, match="what get_mla_metadata gives"):
        call(cache_seqlens=i32([70, 0, 61]))


@pytest.mark.parametrize("lens", [[70, 0, 130], [1], [4000, 3, 64, 65]])
def test_old_metadata_covers_every_block_once(lens):
    attend.set_num_threads(12)
    try:
        rows, splits = flash_mla.get_mla_metadata(i32(lens), 3, 1, num_heads_q=3)
    finally:
        attend.set_num_threads(None)
    assert rows.shape == (6, 8) and rows.dtype == torch.int32 and splits.shape == (len(lens) + 1,)
    seen, pieces = [], [0] * len(lens)
    for first, begin, last, end, _, *padding in rows.tolist():
        assert padding == [0, 0, 0]
        for request in range(first, last + 1):
            blocks = -(-lens[request] // 64)
            part = range(begin if request == first else 0, end if request == last else blocks)
            pieces[request] += len(part) > 0 or blocks == 0
            seen += [(request, b) for b in part]
    assert sorted(seen) == [(r, b) for r, n in enumerate(lens) for b in range(-(-n // 64))]
    assert splits.tolist() == [0, *numpy.cumsum(pieces).tolist()]


def test_old_metadata_arguments():
    lengths = i32([70, 0, 130])
    with_topk = flash_mla.get_mla_metadata(lengths, 6, 1, 3, True, 96)
    same = flash_mla.get_mla_metadata(i32([96] * 3), 6, 1, 3)
    assert all(torch.equal(a, b) for a, b in zip(with_topk, same))
    name = "get_mla_metadata"
    assert_error(lambda: flash_mla.get_mla_metadata(lengths, 6, 1, 4), invalid, name, "num_heads_q")
    assert_error(lambda: flash_mla.get_mla_metadata(lengths, 0, 1), invalid, name, "num_q_tokens_per_head_k")
    assert_error(
        lambda: flash_mla.get_mla_metadata(lengths, 6, 1, 3, "yes"), attend.InvalidType, name, "is_fp8_kvcache"
    )
    assert_error(lambda: flash_mla.get_mla_metadata(lengths.long(), 6, 1), invalid, name, "cache_seqlens")


def test_old_metadata_of_another_batch():
    batch, q = decode_batch()
    old = ops.get_mla_metadata(i32([7000, 0, 130]), 2)
    assert_error(
        lambda: flash_mla.flash_mla_with_kvcache(q, batch.cache, batch.block_table, batch.lengths, 32, *old),
        invalid,
        "flash_mla_with_kvcache",
        "num_splits",
    )
    old = ops.get_mla_metadata(i32([70, 0, 700]), 1)
    assert_error(
        lambda: flash_mla.flash_mla_with_kvcache(q, batch.cache, batch.block_table, batch.lengths, 32, *old),
        invalid,
        "flash_mla_with_kvcache",
        "tile_scheduler_metadata",
    )
    assert_error(
        lambda: flash_mla.flash_mla_with_kvcache(q, batch.cache, batch.block_table, batch.lengths, 32, old[0]),
        attend.InvalidType,
        "flash_mla_with_kvcache",
        "num_splits",
    )
    assert_error(
        lambda: flash_mla.flash_mla_with_kvcache(q, batch.cache, batch.block_table, batch.lengths, 32, None),
        attend.InvalidType,
        "flash_mla_with_kvcache",
        "tile_scheduler_metadata",
    )


def coded_cache(row_format, blocks):
    latent = normal((blocks * 64, row_format.latent), 1, torch.bfloat16)
    rope = normal((blocks * 64, 64), 2, torch.bfloat16)
    if row_format.scales_apart:
        return ds_v4_blocks(latent, rope, 64)[:, :, None], ds_v4_numbers(latent, rope)
    rows = ds_mla_rows(latent, rope)
    return rows.view(blocks, 64, 1, 656), ds_mla_numbers(rows)


def expected_of_indices(q, caches, scale, sink=None):
    """Rows of [B, Sq, H, D] against what (rows, indices, lengths) of each cache name, FlashMLA's conventions."""
    outs, lses = [], []
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            keys = []
            for rows, indices, lengths in caches:
                names = indices[b, i].tolist()[: indices.shape[2] if lengths is None else int(lengths[b])]
                keys.append(rows[[x for x in names if 0 <= x < len(rows)]])
            out, lse, _ = attend_rows(q[b, i], torch.cat(keys), 512, scale, sinks=sink)
            outs.append(out)
            lses.append(torch.where(torch.isneginf(lse), math.inf, lse))
    shape = q.shape[:2]
    return torch.stack(outs).view(*shape, q.shape[2], 512), torch.stack(lses).view(*shape, -1).transpose(1, 2)


@pytest.mark.parametrize("row_format", ops.row_formats(), ids=lambda f: f.name)
@pytest.mark.parametrize("as_type", [torch.uint8, torch.float8_e4m3fn, torch.int8])
def test_indices_into_bytes(row_format, as_type):
    cache, numbers = coded_cache(row_format, 3)
    more, more_numbers = coded_cache(row_format, 2)
    q = normal((2, 2, 3, row_format.dim), 4, torch.bfloat16)
    indices = torch.randint(-1, 192, (2, 2, 16), generator=generator(5), dtype=torch.int32)
    extra = torch.randint(-1, 128, (2, 2, 8), generator=generator(6), dtype=torch.int32)
    indices[1, 0] = extra[1, 0] = -1
    sink = torch.tensor([0.5, math.inf, -math.inf])
    lengths, extra_lengths = i32([16, 5]), i32([3, 8])
    keywords = dict(
        is_fp8_kvcache=True,
        indices=indices,
        attn_sink=sink,
        extra_k_cache=more.view(as_type),
        topk_length=lengths,
        extra_indices_in_kvcache=extra,
        extra_topk_length=extra_lengths,
    )
    schedule, _ = flash_mla.get_mla_metadata()
    out, lse = flash_mla.flash_mla_with_kvcache(q, cache.view(as_type), None, None, 512, schedule, **keywords)
    again = flash_mla.flash_mla_with_kvcache(q, cache.view(as_type), None, None, 512, schedule, **keywords)
    assert torch.equal(out, again[0])
    wanted_out, wanted_lse = expected_of_indices(
        q,
        [(numbers, indices, lengths), (more_numbers, extra, extra_lengths)],
        row_format.dim**-0.5,
        torch.tensor([0.5, -math.inf, -math.inf]),
    )
    wanted_out[:, :, 1] = 0
    torch.testing.assert_close(out.double(), wanted_out, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=1e-3, atol=1e-3)
    assert torch.isposinf(lse[1, :, 0]).all() and (out[1, 0] == 0).all()
    keywords["extra_k_cache"] = more
    keywords["extra_indices"] = keywords.pop("extra_indices_in_kvcache")
    reference = oracle.flash_mla_with_kvcache(q, cache, None, None, 512, **keywords)
    assert reference.worst_ratio(out, lse) <= 1


def test_decode_errors():
    batch, q = decode_batch()
    schedule = flash_mla.get_mla_metadata()[0]
    indices = torch.zeros(3, 2, 4, dtype=torch.int32)

    def call(**changes):
        arguments = dict(
            q=q,
            k_cache=batch.cache,
            block_table=batch.block_table,
            cache_seqlens=batch.lengths,
            head_dim_v=32,
            tile_scheduler_metadata=schedule,
        )
        return lambda: flash_mla.flash_mla_with_kvcache(**{**arguments, **changes})

    name = "flash_mla_with_kvcache"
    assert_error(call(head_dim_v=0), invalid, name, "head_dim_v")
    assert_error(call(head_dim_v=36), invalid, name, "head_dim_v")
    assert_error(call(attn_sink=torch.zeros(3)), invalid, name, "attn_sink")
    assert_error(call(indices=indices, causal=True), invalid, name, "causal")
    assert_error(call(indices=indices[0]), invalid, name, "indices")
    assert_error(call(indices=indices, extra_indices_in_kvcache=indices), invalid, name, "extra_indices_in_kvcache")
    assert_error(call(is_fp8_kvcache=True), invalid, name, "q")
    assert_error(call(k_cache=batch.cache[:, :32]), invalid, name, "k_cache")
    assert_error(call(cache_seqlens=None), invalid, name, "cache_seqlens")
    assert not schedule.have_initialized


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_fwd(dtype):
    q, kv = normal((4, 3, 48), 1, dtype), normal((50, 1, 48), 2, dtype)
    indices = torch.randint(0, 50, (4, 1, 12), generator=generator(3), dtype=torch.int32)
    indices[0, 0, 4], indices[1, 0, 0] = -1, 50
    lengths, sink = i32([12, 7, 0, 3]), torch.tensor([0.5, math.inf, -math.inf])
    unnamed = torch.ones(50, dtype=torch.bool)
    for t in range(4):
        unnamed[[x for x in indices[t, 0].tolist()[: int(lengths[t])] if 0 <= x < 50]] = False
    expected = [
        attend_rows(
            q[t],
            kv[[x for x in indices[t, 0].tolist()[: int(lengths[t])] if 0 <= x < 50], 0],
            32,
            0.2,
            sinks=torch.tensor([0.5, -math.inf, -math.inf]),
        )
        for t in range(4)
    ]
    kv[unnamed] = math.nan
    out, max_logits, lse = flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.2, 32, sink, lengths)
    wanted_out = torch.stack([e[0] for e in expected])
    wanted_out[:, 1] = 0
    wanted_lse = torch.stack([e[1] for e in expected])
    wanted_lse[2] = math.inf
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.double(), wanted_out, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        max_logits.double(), torch.stack([e[2] for e in expected]), rtol=tolerance, atol=tolerance
    )
    reference = oracle.flash_mla_sparse_fwd(q, kv, indices, 0.2, 32, attn_sink=sink, topk_length=lengths)
    assert reference.worst_ratio(out, lse) <= 1
    assert_error(
        lambda: flash_mla.flash_mla_sparse_fwd(q, kv, indices, 0.0, 32), invalid, "flash_mla_sparse_fwd", "sm_scale"
    )
    two = kv.expand(50, 2, 48)
    assert_error(
        lambda: flash_mla.flash_mla_sparse_fwd(q, two, indices, 0.2, 32), invalid, "flash_mla_sparse_fwd", "kv"
    )


@pytest.mark.parametrize("causal", [False, True])
def test_varlen_prefill(causal):
    lens_q, lens_k = [3, 4, 2], [7, 0, 2]
    q, k, v = normal((9, 4, 24), 1), normal((9, 2, 24), 2), normal((9, 2, 16), 3)
    starts_q, starts_k = i32([0, 3, 7, 9]), i32([0, 7, 7, 9])
    out, lse = flash_mla.flash_attn_varlen_func(q, k, v, starts_q, starts_k, 4, 7, causal=causal)
    packed = flash_mla.flash_attn_varlen_kvpacked_func(
        q, torch.cat([k, v], -1), starts_q, starts_k, 4, 7, 24, causal=causal
    )
    assert torch.equal(packed[0], out) and torch.equal(packed[1], lse)
    assert out.shape == (9, 4, 16) and lse.shape == (9, 4)
    assert torch.isposinf(lse[3:7]).all() and (out[3:7] == 0).all()
    for r, (a, b) in enumerate(((0, 0), (7, 7))):
        n, s = (lens_q[0], lens_k[0]) if r == 0 else (lens_q[2], lens_k[2])
        mask = torch.ones(n, s, dtype=torch.bool).tril(s - n) if causal else None
        expected = torch.nn.functional.scaled_dot_product_attention(
            q[a : a + n].transpose(0, 1).double(),
            k[b : b + s].transpose(0, 1).double(),
            v[b : b + s].transpose(0, 1).double(),
            attn_mask=mask,
            enable_gqa=True,
        )
        torch.testing.assert_close(out[a : a + n].double(), expected.transpose(0, 1), rtol=1e-5, atol=1e-5)
    one = normal((5, 2, 24 + 24 + 16), 4)
    whole = flash_mla.flash_attn_varlen_qkvpacked_func(one, i32([0, 5]), 5, 24, causal=causal, is_varlen=False)
    parts = flash_mla.flash_attn_varlen_func(
        one[:, :, :24], one[:, :, 24:48], one[:, :, 48:], i32([0, 5]), i32([0, 5]), 5, 5, causal=causal
    )
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


def test_varlen_errors():
    q = k = v = normal((9, 4, 24), 1)
    starts = i32([0, 7, 9])
    name = "flash_attn_varlen_func"

    def call(**changes):
        arguments = dict(q=q, k=k, v=v, cu_seqlens_qo=starts, cu_seqlens_kv=starts, max_seqlen_qo=7, max_seqlen_kv=7)
        return lambda: flash_mla.flash_attn_varlen_func(**{**arguments, **changes})

    with pytest.raises(attend.Unsupported, match="dropout_p"):
        call(dropout_p=0.1)()
    assert_error(call(max_seqlen_qo=6), invalid, name, "max_seqlen_qo")
    assert_error(call(is_varlen=False), invalid, name, "is_varlen")
    assert_error(call(softmax_scale=-1.0), invalid, name, "softmax_scale")
    assert_error(call(cu_seqlens_qo=i32([0, 7, 8])), invalid, name, "q")
    assert_error(call(cu_seqlens_qo=starts.long()), invalid, name, "cu_seqlens_qo")
    assert_error(call(cu_seqlens_kv=[0, 7, 9]), attend.InvalidType, name, "cu_seqlens_kv")


def test_packed_arguments_that_cannot_be_sliced():
    class Unsliced:
        shape, dtype = (3, 2, 24), "float32"

    starts = torch.tensor([0, 3], dtype=torch.int32)
    query = torch.zeros(3, 2, 16)
    for argument, call in (
        ("kv", lambda: flash_mla.flash_attn_varlen_kvpacked_func(query, Unsliced(), starts, starts, 3, 3, 16)),
        ("qkv", lambda: flash_mla.flash_attn_varlen_qkvpacked_func(Unsliced(), starts, 3, 8)),
    ):
        with pytest.raises(InvalidType, match=f"argument '{argument}'"):
            call()
