# SPDX-License-Identifier: Apache-2.0
"""attend.ops of MLA: decode, caches, weights, and their references."""

from __future__ import annotations

import math

import ml_dtypes
import numpy
import pytest
import torch
from mla_helpers import (
    LatentBatch,
    assert_error,
    attend_batch,
    ds_mla_numbers,
    ds_mla_rows,
    ds_v4_blocks,
    ds_v4_numbers,
    e4m3,
    i32,
    normal,
    prefix_sum,
)

import attend
from attend import ops, oracle

SCALE = 0.11
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS = [
    dict(),
    dict(causal=True),
    dict(causal=True, window_left=5),
    dict(window_left=3, window_right=2),
    dict(softcap=1.5),
    dict(sinks=torch.tensor([0.5, -math.inf, 2.0])),
    dict(alibi_slopes=torch.tensor([0.5, 0.25, 0.1])),
]


def small_batch(dtype=torch.float32, seed=1):
    return LatentBatch([1, 3, 2], [20, 3, 17], heads=3, dim=48, dtype=dtype, seed=seed)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_decode_against_torch(options):
    batch = small_batch()
    out, lse = ops.mla_decode(**batch.arguments(), scale=SCALE, head_dim_v=32, return_lse=True, **options)
    written_out = {("slopes" if k == "alibi_slopes" else k): v for k, v in options.items()}
    expected, expected_lse = attend_batch(batch, 32, SCALE, **written_out)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)
    reference = oracle.mla_decode(**batch.arguments(), scale=SCALE, head_dim_v=32, **options)
    numpy.testing.assert_allclose(reference.out, expected.numpy(), rtol=1e-7, atol=1e-7)
    numpy.testing.assert_allclose(reference.lse, expected_lse.numpy(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arithmetic", ["exact", "automatic"])
def test_decode_within_bounds(dtype, arithmetic):
    batch = small_batch(dtype)
    out, lse = ops.mla_decode(
        **batch.arguments(), scale=SCALE, head_dim_v=32, causal=True, return_lse=True, arithmetic=arithmetic
    )
    reference = oracle.mla_decode(**batch.arguments(), scale=SCALE, head_dim_v=32, causal=True)
    assert out.dtype == dtype and reference.worst_ratio(out, lse) <= 1
    # The bounds are no free pass: one element that is off is seen.
    out[2, 1, 5] += 0.25
    assert reference.worst_ratio(out) > 1


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_decode_fp8_cache(cache_dtype):
    batch = small_batch(torch.bfloat16)
    batch.cache = (batch.cache.float() / 0.5).to(cache_dtype)
    arguments = dict(batch.arguments(), scale=SCALE, head_dim_v=32, kv_scale=torch.tensor([0.5]))
    out, lse = ops.mla_decode(**arguments, return_lse=True)
    assert oracle.mla_decode(**arguments).worst_ratio(out, lse) <= 1
    rows = [batch.cache.float().view(-1, 48)[slots] * 0.5 for slots in batch.slots]
    expected, _ = attend_batch(batch, 32, SCALE, rows=rows)
    torch.testing.assert_close(out.double(), expected, rtol=2e-2, atol=2e-2)
    assert_error(
        lambda: ops.mla_decode(**{**arguments, "kv_scale": None}), attend.InvalidArgument, "mla_decode", "kv_scale"
    )


@pytest.mark.parametrize("row_format", ops.row_formats(), ids=lambda f: f.name)
def test_decode_rows_of_bytes(row_format):
    batch = LatentBatch([2, 1], [18, 9], heads=2, dim=row_format.dim, dtype=torch.bfloat16)
    numbers = torch.nan_to_num(batch.cache).view(-1, row_format.dim)
    latent, rope = numbers[:, : row_format.latent].contiguous(), numbers[:, row_format.latent :].contiguous()
    if row_format.scales_apart:
        cache, meaning = ds_v4_blocks(latent, rope, 16), ds_v4_numbers(latent, rope)
    else:
        cache = ds_mla_rows(latent, rope).view(-1, 16, 656)
        meaning = ds_mla_numbers(cache.view(-1, 656))
    arguments = dict(batch.arguments(), kv_cache=cache, scale=SCALE, causal=True)
    out, lse = ops.mla_decode(**arguments, return_lse=True)
    assert out.shape == (3, 2, row_format.value_dim)
    assert oracle.mla_decode(**arguments).worst_ratio(out, lse) <= 1
    expected, _ = attend_batch(batch, row_format.value_dim, SCALE, rows=[meaning[s] for s in batch.slots], causal=True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)
    numpy.testing.assert_array_equal(oracle.mla_rows(cache), meaning.double().numpy().reshape(-1, 16, row_format.dim))


def test_decode_numpy_has_the_bits_of_torch():
    batch = small_batch(torch.bfloat16)
    expected = ops.mla_decode(**batch.arguments(), scale=SCALE, head_dim_v=32)
    arrays = {
        name: (t.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if t.dtype == torch.bfloat16 else t.numpy())
        for name, t in batch.arguments().items()
    }
    out = ops.mla_decode(**arrays, scale=SCALE, head_dim_v=32)
    assert out.dtype == ml_dtypes.bfloat16
    numpy.testing.assert_array_equal(out.view(numpy.int16), expected.view(torch.int16).numpy())


def test_decode_writes_to_given_tensors():
    batch = small_batch()
    memory = torch.full((6, 3, 40), math.nan)
    lse = torch.full((6, 3), math.nan)
    out = ops.mla_decode(**batch.arguments(), scale=SCALE, out=memory[:, :, :32], lse=lse)
    assert out.data_ptr() == memory.data_ptr() and memory[:, :, 32:].isnan().all()
    expected = ops.mla_decode(
        **batch.arguments(), scale=SCALE, head_dim_v=32, return_lse=True, executor=attend.ThreadPool(2)
    )
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_nothing_to_do():
    batch = small_batch()
    arguments = dict(batch.arguments(), q=batch.q[:0], query_start_loc=i32([0] * 4), scale=SCALE, head_dim_v=32)
    out, lse = ops.mla_decode(**arguments, return_lse=True)
    assert out.shape == (0, 3, 32) and lse.shape == (0, 3) and oracle.mla_decode(**arguments).out.shape == (0, 3, 32)
    layer = attend.MlaWeights(normal((72, 24), 1), **SIZES)
    assert [t.shape for t in layer.up_project(torch.zeros(0, 24))] == [(0, 3, 16), (0, 3, 8)]
    cache = normal((2, 4, 24), 1)
    before = cache.clone()
    ops.concat_and_cache_mla(normal((3, 16), 1), normal((3, 8), 2), cache, torch.zeros(0, dtype=torch.int64))
    ops.copy_blocks_mla([cache], [])
    assert torch.equal(cache, before)
    assert ops.sparse_mla_attention(
        batch.q[:0], batch.cache, torch.zeros(0, 4, dtype=torch.int32), scale=SCALE, head_dim_v=32
    ).shape == (0, 3, 32)


def test_decode_errors():
    batch = small_batch()
    arguments = dict(batch.arguments(), scale=SCALE, head_dim_v=32)

    def changed(**changes):
        return lambda: ops.mla_decode(**{**arguments, **changes})

    invalid = attend.InvalidArgument
    assert_error(changed(scale=None), invalid, "mla_decode", "scale")
    assert_error(changed(head_dim_v=None), invalid, "mla_decode", "head_dim_v")
    assert_error(changed(out=torch.empty(6, 3, 32), head_dim_v=24), invalid, "mla_decode", "head_dim_v")
    assert_error(changed(q=batch.q[0]), invalid, "mla_decode", "q")
    assert_error(changed(q=None), attend.InvalidType, "mla_decode", "q")
    assert_error(changed(seq_lens=i32([20, 3, 1000])), invalid, "mla_decode", "seq_lens")
    assert_error(changed(seq_lens=batch.lengths.numpy()), invalid, "mla_decode", "seq_lens")
    assert_error(changed(isa="mips"), invalid, "mla_decode", "isa")
    assert_error(
        lambda: oracle.mla_decode(**{**arguments, "block_table": batch.block_table + 1000}),
        invalid,
        "mla_decode",
        "block_table",
    )


# Caches.


def slots_and_cache(dtype, row_bytes=None):
    """12 tokens in a cache of 3 blocks of 8, one of them skipped."""
    slots = torch.randperm(24, generator=torch.Generator().manual_seed(5))[:12].to(torch.int64)
    slots[4] = -1
    width = 24 if row_bytes is None else row_bytes
    return slots, torch.full((3, 8, width), 7).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_concat_copies_bits(dtype):
    kv_c, k_pe = normal((13, 16), 1, dtype), normal((13, 8), 2, dtype)
    slots, cache = slots_and_cache(dtype)
    expected = cache.clone().view(-1, 24)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot] = torch.cat([kv_c[t], k_pe[t]])
    ops.concat_and_cache_mla(kv_c, k_pe, cache, slots)
    assert torch.equal(cache.view(-1, 24), expected)


def test_concat_fp8():
    kv_c, k_pe = normal((12, 16), 1) * 100, normal((12, 8), 2)
    slots, cache = slots_and_cache(torch.float8_e4m3fn)
    expected = cache.clone().view(-1, 24)
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot] = e4m3(torch.cat([kv_c[t], k_pe[t]]) / 0.25)
    ops.concat_and_cache_mla(kv_c, k_pe, cache, slots, scale=torch.tensor(0.25))
    assert torch.equal(cache.view(torch.uint8).view(-1, 24), expected.view(torch.uint8))


@pytest.mark.parametrize("row_format", ops.row_formats(), ids=lambda f: f.name)
def test_concat_rows_of_bytes_and_gather(row_format):
    kv_c = normal((12, row_format.latent), 1, torch.bfloat16) * torch.linspace(0.01, 30, 12)[:, None].bfloat16()
    k_pe = normal((12, 64), 2, torch.bfloat16)
    slots, cache = slots_and_cache(torch.uint8, row_format.row_bytes)
    ops.concat_and_cache_mla(kv_c, k_pe, cache, slots)
    if row_format.scales_apart:
        meaning = ds_v4_numbers(kv_c, k_pe)
    else:
        rows = ds_mla_rows(kv_c, k_pe)
        meaning = ds_mla_numbers(rows)
        kept = slots >= 0
        assert torch.equal(cache.view(-1, 656)[slots[kept]], rows[kept])
    # One request whose blocks are all of the cache: row s of the result is slot s.
    gathered = torch.full((25, row_format.dim), math.nan, dtype=torch.bfloat16)
    ops.gather_and_maybe_dequant_cache(cache, gathered, i32([[0, 1, 2]]), i32([0, 24]))
    upconverted = torch.full((24, row_format.dim), math.nan, dtype=torch.bfloat16)
    ops.cp_gather_and_upconvert_fp8_kv_cache(cache, upconverted, i32([[0, 1, 2]]), i32([0]))
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            assert torch.equal(gathered[slot], meaning[t]) and torch.equal(upconverted[slot], meaning[t])
    assert gathered[24].isnan().all()


@pytest.mark.parametrize("is_neox", [True, False])
def test_concat_with_rope(is_neox):
    q_pe, k_pe, kv_c = normal((12, 3, 8), 1), normal((12, 8), 2), normal((12, 16), 3)
    positions = torch.arange(12) * 3
    angles = torch.outer(torch.arange(40.0), 10000 ** (-torch.arange(4.0) / 4))
    table = torch.cat([angles.cos(), angles.sin()], -1)

    def rotated(x):
        cos, sin = table[positions].double().chunk(2, -1)
        if x.dim() == 3:
            cos, sin = cos[:, None], sin[:, None]
        a, b = (x.double()[..., :4], x.double()[..., 4:]) if is_neox else (x.double()[..., ::2], x.double()[..., 1::2])
        c, d = a * cos - b * sin, b * cos + a * sin
        return torch.cat([c, d], -1) if is_neox else torch.stack([c, d], -1).flatten(-2)

    expected_q, expected_k = rotated(q_pe), rotated(k_pe)
    slots, cache = slots_and_cache(torch.float32)
    ops.concat_and_cache_mla_rope_fused(positions, q_pe, k_pe, kv_c, table, is_neox, slots, cache)
    torch.testing.assert_close(q_pe.double(), expected_q, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(k_pe.double(), expected_k, rtol=1e-6, atol=1e-6)
    plain = slots_and_cache(torch.float32)[1]
    ops.concat_and_cache_mla(kv_c, k_pe, plain, slots)
    assert torch.equal(cache, plain)


def test_gathers_of_ragged_requests():
    batch = LatentBatch([1, 1], [20, 33], heads=1, dim=24, dtype=torch.float16)
    starts, lengths = [3, 0], [10, 33]
    for gather in (ops.gather_and_maybe_dequant_cache, ops.cp_gather_cache):
        dst = torch.full((44, 24), math.nan, dtype=torch.float16)
        gather(batch.cache, dst, batch.block_table, prefix_sum(lengths), seq_starts=i32(starts))
        assert torch.equal(dst[:43], torch.cat([batch.rows[0][3:13], batch.rows[1]])) and dst[43].isnan().all()
    codes = batch.cache.float().to(torch.float8_e5m2)
    dst = torch.full((43, 24), math.nan)
    ops.gather_and_maybe_dequant_cache(
        codes, dst, batch.block_table, prefix_sum(lengths), seq_starts=i32(starts), scale=torch.tensor([3.0])
    )
    numbers = torch.cat([batch.rows[0][3:13], batch.rows[1]]).float().to(torch.float8_e5m2).float() * 3
    assert torch.equal(dst, numbers)


@pytest.mark.parametrize("moves", [[(0, 2), (1, 3)], torch.tensor([[0, 2], [1, 3]])], ids=["list", "tensor"])
def test_copy_blocks(moves):
    caches = [normal((4, 2, 8), 1), normal((4, 2, 8), 2)]
    before = [c.clone() for c in caches]
    ops.copy_blocks_mla(caches, moves)
    for cache, old in zip(caches, before):
        assert torch.equal(cache, old[[0, 1, 0, 1]])
    assert_error(lambda: ops.copy_blocks_mla(caches, None), attend.InvalidArgument, "copy_blocks_mla", "moves")
    assert_error(lambda: ops.copy_blocks_mla(caches, [(0, 1, 2)]), attend.InvalidType, "copy_blocks_mla", "moves")


def test_cache_errors():
    slots, cache = slots_and_cache(torch.float32)
    kv_c, k_pe = normal((12, 16), 1), normal((12, 8), 2)
    before = cache.clone()
    assert_error(
        lambda: ops.concat_and_cache_mla(kv_c, k_pe, cache, slots + 24),
        attend.InvalidArgument,
        "concat_and_cache_mla",
        "slot_mapping",
    )
    assert_error(
        lambda: ops.concat_and_cache_mla(kv_c, k_pe, cache.numpy(), slots),
        attend.InvalidArgument,
        "concat_and_cache_mla",
        "kv_cache",
    )
    assert torch.equal(cache, before)
    assert_error(
        lambda: ops.concat_and_cache_mla_rope_fused(
            torch.arange(12), normal((12, 2, 8), 1), k_pe, kv_c, normal((12, 8), 2), None, slots, cache
        ),
        attend.InvalidArgument,
        "concat_and_cache_mla_rope_fused",
        "is_neox",
    )
    assert_error(lambda: oracle.mla_rows(cache), attend.InvalidArgument, "oracle.mla_rows", "kv_cache")


# Weights.

SIZES = dict(num_heads=3, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_against_torch(dtype):
    weight = (normal((3 * 24, 24), 1) * 0.3).to(dtype)
    layer = attend.MlaWeights(weight, **SIZES)
    assert (layer.num_heads, layer.kv_lora_rank, layer.qk_nope_head_dim, layer.qk_rope_head_dim, layer.v_head_dim) == (
        3,
        24,
        16,
        8,
        8,
    )
    assert layer.dtype == str(dtype).split(".")[-1] and layer.nbytes > 0 and layer.isa
    w = weight.view(3, 24, 24)
    w_uk, w_uv = w[:, :16].double(), w[:, 16:].double()
    assert torch.equal(layer.copy_w_uk_t(torch.empty(3, 16, 24, dtype=dtype)), w[:, :16])
    assert torch.equal(layer.copy_w_uv(torch.empty(3, 24, 8, dtype=dtype)), w[:, 16:].transpose(1, 2))

    kv_c, q_nope, latents = normal((5, 24), 2, dtype), normal((4, 3, 16), 3, dtype), normal((4, 3, 24), 4, dtype)
    k_nope, v = layer.up_project(kv_c)
    keys, values = oracle.mla_up_project(weight, kv_c, **SIZES)
    products = [
        (k_nope, keys, torch.einsum("nl,hpl->nhp", kv_c.double(), w_uk)),
        (v, values, torch.einsum("nl,hvl->nhv", kv_c.double(), w_uv)),
        (
            layer.absorb_query(q_nope),
            oracle.mla_absorb_query(weight, q_nope, **SIZES),
            torch.einsum("thp,hpl->thl", q_nope.double(), w_uk),
        ),
        (
            layer.v_up_project(latents),
            oracle.mla_v_up_project(weight, latents, **SIZES),
            torch.einsum("thl,hvl->thv", latents.double(), w_uv),
        ),
    ]
    for got, reference, expected in products:
        assert got.dtype == dtype
        numpy.testing.assert_allclose(reference.value, expected.numpy(), rtol=1e-12, atol=1e-12)
        assert (numpy.abs(got.double().numpy() - reference.value) <= reference.bound).all()
        assert (reference.bound < 0.05).all()


@pytest.mark.parametrize("scales", ["one", "rows", "blocks"])
@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn])
def test_weights_of_codes(codes, scales):
    sizes = dict(SIZES, num_heads=6, kv_lora_rank=136)  # 144 rows, 136 columns: 2 x 2 blocks
    numbers = torch.randint(-100, 100, (144, 136), generator=torch.Generator().manual_seed(3)).float()
    weight = numbers.to(codes)
    shape = dict(one=(1,), rows=(144,), blocks=(2, 2))[scales]
    scale = torch.linspace(0.01, 0.02, math.prod(shape)).view(shape)
    full = (
        scale.view(-1, 1)
        if scales != "blocks"
        else scale.repeat_interleave(128, 0)[:144].repeat_interleave(128, 1)[:, :136]
    )
    exact = (weight.float() * full).to(torch.float32).view(6, 24, 136)
    layer = attend.MlaWeights(weight, dtype="float32", weight_scale=scale, **sizes)
    assert torch.equal(layer.copy_w_uk_t(torch.empty(6, 16, 136)), exact[:, :16])
    q_nope = normal((2, 6, 16), 1)
    reference = oracle.mla_absorb_query(weight, q_nope, dtype="float32", weight_scale=scale, **sizes)
    expected = torch.einsum("thp,hpl->thl", q_nope.double(), exact[:, :16].double())
    numpy.testing.assert_allclose(reference.value, expected.numpy(), rtol=1e-12, atol=1e-12)
    assert (numpy.abs(layer.absorb_query(q_nope).double().numpy() - reference.value) <= reference.bound).all()
    assert attend.MlaWeights(weight, weight_scale=scale, **sizes).dtype == "bfloat16"


def test_absorbed_decode_is_attention_of_the_heads():
    """Queries times W_UK over latents, then W_UV: the same as keys and values of all heads."""
    weight = normal((3 * 24, 24), 1) * 0.3
    layer = attend.MlaWeights(weight, **SIZES)
    batch = LatentBatch([2, 1], [12, 30], heads=3, dim=32, seed=7)
    q = normal((3, 3, 24), 8)  # P = 16, then R = 8
    absorbed = torch.empty(3, 3, 32)
    layer.absorb_query(q[:, :, :16], out=absorbed[:, :, :24])
    absorbed[:, :, 24:] = q[:, :, 16:]
    latents = ops.mla_decode(
        absorbed,
        batch.cache,
        batch.block_table,
        batch.query_start_loc,
        batch.lengths,
        scale=24**-0.5,
        head_dim_v=24,
        causal=True,
    )
    out = layer.v_up_project(latents)
    token = 0
    for rows, query_len in zip(batch.rows, batch.query_lens):
        k_nope, v = layer.up_project(rows[:, :24].contiguous())
        k = torch.cat([k_nope, rows[:, None, 24:].expand(-1, 3, -1)], -1)
        for i in range(query_len):
            seen = len(rows) - query_len + i + 1
            expected = torch.nn.functional.scaled_dot_product_attention(
                q[token][:, None].double(), k[:seen].transpose(0, 1).double(), v[:seen].transpose(0, 1).double()
            )
            torch.testing.assert_close(out[token].double(), expected[:, 0], rtol=1e-4, atol=1e-5)
            token += 1


def test_weights_errors():
    weight = normal((72, 24), 1)
    layer = attend.MlaWeights(weight, **SIZES)
    invalid = attend.InvalidArgument
    assert_error(lambda: attend.MlaWeights(weight[:70], **SIZES), invalid, "MlaWeights.from_kv_b_proj", "weight")
    assert_error(
        lambda: attend.MlaWeights(weight, dtype="float3", **SIZES), invalid, "MlaWeights.from_kv_b_proj", "dtype"
    )
    assert_error(lambda: layer.up_project(normal((5, 16), 1)), invalid, "MlaWeights.up_project", "kv_c")
    assert_error(lambda: layer.absorb_query(normal((5, 3, 16), 1).half()), invalid, "MlaWeights.absorb_query", "q_nope")
    assert_error(lambda: layer.copy_w_uv(torch.empty(3, 8, 24)), invalid, "MlaWeights.copy_w_uv", "out")
    assert_error(
        lambda: oracle.mla_up_project(weight, normal((5, 16), 1), **SIZES), invalid, "MlaWeights.up_project", "kv_c"
    )
