# SPDX-License-Identifier: Apache-2.0
"""The MLA and indexer functions of attend.compat.vllm_ops, called as vLLM calls them, compared with torch."""

from __future__ import annotations

import math

import numpy
import pytest
import torch
from opsa_helpers import attention64, bits, normal, prefix_sum

import attend
from attend import oracle
from attend.compat import vllm_ops

BLOCK_SIZE, NUM_BLOCKS, LATENT, ROPE = 16, 6, 512, 64
ONE = torch.tensor([1.0])
SLOTS = torch.tensor([17, -1, 3, 95], dtype=torch.int64)
TABLE = torch.tensor([[1, 5], [0, 2]], dtype=torch.int32)


def new_rows(seed: int, tokens: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    rng = numpy.random.default_rng(seed)
    return normal(rng, tokens, LATENT, dtype=torch.bfloat16), normal(rng, tokens, ROPE, dtype=torch.bfloat16)


def real_rows(kv_c: torch.Tensor, k_pe: torch.Tensor, name: str, scale: torch.Tensor) -> torch.Tensor:
    """What a cache of that type stores of the rows, as its elements."""
    rows = torch.cat([kv_c, k_pe], -1)
    types = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
    return (rows.float() / scale).to(types[name]) if name in types else rows


@pytest.mark.parametrize("name", ["auto", "fp8", "fp8_e5m2", "fp8_ds_mla"])
def test_writing_and_gathering(name: str) -> None:
    kv_c, k_pe = new_rows(1)
    scale = torch.tensor([0.25])
    width, dtype = {"auto": (576, torch.bfloat16), "fp8_ds_mla": (656, torch.uint8)}.get(name, (576, torch.uint8))
    cache = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, width, dtype=dtype)
    vllm_ops.concat_and_cache_mla(kv_c, k_pe, cache, SLOTS, name, scale)
    if name == "fp8_ds_mla":
        stored = torch.from_numpy(oracle.fp8_ds_mla_encode(kv_c, k_pe.view(torch.uint16)))
        numbers = torch.from_numpy(oracle.fp8_ds_mla_decode(stored)).bfloat16()
    else:
        stored = real_rows(kv_c, k_pe, name, scale)
        numbers = (stored.float() * scale).bfloat16() if name != "auto" else stored
    expected = torch.zeros_like(cache)
    for row in (0, 2, 3):
        expected[SLOTS[row] // BLOCK_SIZE, SLOTS[row] % BLOCK_SIZE] = stored[row].view(dtype)
    assert (bits(cache) == bits(expected)).all()

    # Request 0 begins at token 1 of block 1, where slot 17 is; request 1 at token 3 of block 0, where slot 3 is.
    starts, lengths = torch.tensor([1, 3], dtype=torch.int32), prefix_sum([1, 1])
    dst = torch.full((3, 576), math.nan, dtype=torch.bfloat16)
    vllm_ops.gather_and_maybe_dequant_cache(cache, dst, TABLE, lengths, torch.tensor([0, 1]), 2, name, scale, starts)
    assert (dst[:2] == numbers[[0, 2]]).all() and dst[2].isnan().all()
    raw = torch.full((3, width), 1).to(dtype)
    more = torch.cat([TABLE, TABLE]), torch.cat([lengths, lengths]), torch.cat([starts, starts])
    vllm_ops.cp_gather_cache(cache, raw, more[0], more[1], 2, more[2])
    assert (raw[:2] == stored[[0, 2]].view(dtype)).all() and (raw[2] == 1).all()
    if name == "fp8_ds_mla":
        workspace = torch.full((2 + 17, 576), math.nan, dtype=torch.bfloat16)
        begins = torch.tensor([0, 17], dtype=torch.int32)
        vllm_ops.cp_gather_and_upconvert_fp8_kv_cache(cache, workspace, TABLE, begins, 2)
        assert (workspace[1] == numbers[0]).all() and not workspace.isnan().any()


@pytest.mark.parametrize("name", ["auto", "fp8"])
def test_rotating_and_writing(name: str) -> None:
    kv_c, k_pe = new_rows(2)
    rng = numpy.random.default_rng(3)
    q_pe = normal(rng, 5, 4, ROPE, dtype=torch.bfloat16)
    angle = torch.arange(10)[:, None] / 100.0 ** torch.arange(32)
    positions = torch.tensor([0, 3, 9, 4, 1])
    cache = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, 576, dtype=torch.uint8 if name == "fp8" else torch.bfloat16)
    scale = torch.tensor([0.25])
    cos_sin = torch.cat([torch.cos(angle), torch.sin(angle)], -1)
    cos, sin = cos_sin[positions].chunk(2, -1)

    def rotated(x: torch.Tensor, c: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        a, b = x.float().chunk(2, -1)
        return torch.cat([a * c - b * s, a * s + b * c], -1)

    expected_q, expected_k = rotated(q_pe, cos[:, None], sin[:, None]), rotated(k_pe, cos, sin)
    untouched = q_pe[4].clone()  # behind the last slot
    vllm_ops.concat_and_cache_mla_rope_fused(positions, q_pe, k_pe, kv_c, cos_sin, True, SLOTS, cache, name, scale)
    torch.testing.assert_close(q_pe[:4].float(), expected_q[:4], rtol=8e-3, atol=8e-3)
    torch.testing.assert_close(k_pe[:4].float(), expected_k[:4], rtol=8e-3, atol=8e-3)
    assert (q_pe[4] == untouched).all()
    assert (bits(cache[1, 1]) == bits(real_rows(kv_c, k_pe, name, scale)[0])).all()


def test_decode() -> None:
    rng = numpy.random.default_rng(4)
    cache = torch.full((NUM_BLOCKS, BLOCK_SIZE, 576), math.nan)
    lengths = [20, 5]
    rows = [normal(rng, n, 576) for n in lengths]
    cache[1], cache[5, :4], cache[0, :5] = rows[0][:16], rows[0][16:], rows[1]
    query, out = normal(rng, 2, 4, 576), torch.empty(2, 4, 512)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    vllm_ops.mla_decode_kvcache_cpu(out, query, cache, 0.05, TABLE, seq_lens)
    for b, keys in enumerate(rows):
        mask = torch.ones(1, len(keys), dtype=torch.bool)
        expected, _ = attention64(query[b : b + 1], keys[:, None], keys[:, None, :512], mask, 0.05)
        torch.testing.assert_close(out[b : b + 1].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_the_cache_of_the_indexer(power_of_two: bool) -> None:
    key = normal(numpy.random.default_rng(5), 5, 128, dtype=torch.bfloat16)
    cache = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, 132, dtype=torch.uint8)
    vllm_ops.indexer_k_quant_and_cache(key, cache, SLOTS, 128, "ue8m0" if power_of_two else "fp8")
    scale = key.float().abs().amax(-1).clamp(min=1e-4) / 448
    scale = torch.exp2(torch.ceil(torch.log2(scale))) if power_of_two else scale
    codes = (key.float() / scale[:, None]).to(torch.float8_e4m3fn)
    dst_k, dst_scale = torch.zeros(3, 128, dtype=torch.uint8), torch.zeros(3, 4, dtype=torch.uint8)
    # Block 1 from its token 0: slot 17 is its second token.
    vllm_ops.cp_gather_indexer_k_quant_cache(cache, dst_k, dst_scale, TABLE[:1], prefix_sum([2]))
    assert (dst_k[1] == codes[0].view(torch.uint8)).all()
    assert float(dst_scale[1].view(torch.float32)) == float(scale[0])
    assert (dst_k[[0, 2]] == 0).all() and (dst_scale[[0, 2]] == 0).all()
    typed = torch.zeros(2, 128).to(torch.float8_e4m3fn), torch.zeros(2, 1)
    vllm_ops.cp_gather_indexer_k_quant_cache(cache, *typed, TABLE[:1], prefix_sum([2]))
    assert (typed[0].view(torch.uint8) == dst_k[:2]).all() and float(typed[1][1]) == float(scale[0])


def test_top_k() -> None:
    logits = normal(numpy.random.default_rng(6), 7, 40)[:, ::1]
    starts = torch.tensor([0, 5, 30, 0, 0, 0, 0], dtype=torch.int32)
    ends = torch.tensor([40, 20, 34, 0, 0, 0, 0], dtype=torch.int32)
    out = torch.full((7, 6), -9, dtype=torch.int32)
    vllm_ops.top_k_per_row_prefill(logits, starts, ends, out, 4, logits.stride(0), logits.stride(1), 6)
    for row, (begin, end) in enumerate(zip(starts[:4].tolist(), ends[:4].tolist())):
        chosen = sorted(torch.topk(logits[row, begin:end], min(6, end - begin)).indices.tolist())
        assert out[row].tolist() == chosen + [-1] * (6 - len(chosen))
    assert (out[4:] == -9).all()
    vllm_ops.top_k_per_row_decode(logits, 2, torch.tensor([30, 4], dtype=torch.int32), out, 4, 40, 1, 6)
    for row, length in enumerate((29, 30, 3, 4)):
        chosen = sorted(torch.topk(logits[row, :length], min(6, length)).indices.tolist())
        assert out[row].tolist() == chosen + [-1] * (6 - len(chosen))
    assert (out[4:] == -9).all()


def test_bad_arguments_have_the_names_of_the_caller() -> None:
    kv_c, k_pe = new_rows(7)
    cache, coded = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, 576), torch.zeros(NUM_BLOCKS, BLOCK_SIZE, 656, dtype=torch.uint8)
    cache = cache.bfloat16()
    dst, lengths, i32 = torch.zeros(8, 576).bfloat16(), prefix_sum([3, 4]), torch.int32
    indexed = torch.zeros(NUM_BLOCKS, BLOCK_SIZE, 132, dtype=torch.uint8)
    logits, out = torch.zeros(4, 10), torch.zeros(4, 3, dtype=i32)
    bounds = torch.zeros(4, dtype=i32), torch.full((4,), 10, dtype=i32)
    ops = vllm_ops
    cases = [
        ("kv_cache", lambda: ops.concat_and_cache_mla(kv_c, k_pe, cache, SLOTS, "fp8_ds_mla", ONE)),
        ("kv_cache", lambda: ops.concat_and_cache_mla(kv_c, k_pe, cache, SLOTS, "fp8", ONE)),
        ("kv_cache_dtype", lambda: ops.concat_and_cache_mla(kv_c, k_pe, coded, SLOTS, "nvfp4_ds_mla", ONE)),
        ("scale", lambda: ops.concat_and_cache_mla(kv_c, k_pe, coded[..., :576], SLOTS, "fp8", -ONE)),
        (
            "kv_cache_scale",
            lambda: ops.concat_and_cache_mla_rope_fused(
                torch.zeros(5, dtype=torch.int64),
                k_pe[:, None],
                k_pe.clone(),
                kv_c,
                torch.ones(1, 64),
                True,
                SLOTS,
                coded[..., :576],
                "fp8",
                torch.zeros(1),
            ),
        ),
        ("num_tokens", lambda: ops.gather_and_maybe_dequant_cache(cache, dst, TABLE, lengths, None, 6, "auto", ONE)),
        ("src_cache", lambda: ops.gather_and_maybe_dequant_cache(cache, dst, TABLE, lengths, None, 7, "fp8", ONE)),
        ("block_table", lambda: ops.cp_gather_cache(cache, dst, TABLE, lengths, 3)),
        ("batch_size", lambda: ops.cp_gather_cache(cache, dst, TABLE, lengths, 2.0)),
        ("cu_seq_lens", lambda: ops.cp_gather_cache(cache, dst, TABLE, lengths[:2], 2)),
        ("seq_starts", lambda: ops.cp_gather_cache(cache, dst, TABLE, lengths, 2, torch.zeros(1, dtype=i32))),
        (
            "host_cache",
            lambda: ops.cp_gather_and_upconvert_fp8_kv_cache(coded, dst, TABLE, lengths, 2, host_cache=coded),
        ),
        ("seq_starts", lambda: ops.cp_gather_and_upconvert_fp8_kv_cache(coded, dst, TABLE, lengths, 2, lengths)),
        ("out", lambda: ops.mla_decode_kvcache_cpu(None, dst[:2, None], cache, 0.1, TABLE, lengths[1:])),
        (
            "block_tables",
            lambda: ops.mla_decode_kvcache_cpu(
                torch.zeros(2, 1, 512).bfloat16(), dst[:2, None], cache, 0.1, TABLE + 90, lengths[1:]
            ),
        ),
        ("quant_block_size", lambda: ops.indexer_k_quant_and_cache(kv_c[:, :128], indexed, SLOTS, 64, "ue8m0")),
        ("kv_cache_dtype", lambda: ops.indexer_k_quant_and_cache(kv_c[:, :128], indexed, SLOTS, 128, "nvfp4")),
        (
            "dst_scale",
            lambda: ops.cp_gather_indexer_k_quant_cache(
                indexed,
                torch.zeros(8, 128).to(torch.float8_e4m3fn),
                torch.zeros(8, 8, dtype=torch.uint8),
                TABLE,
                lengths,
            ),
        ),
        ("stride0", lambda: ops.top_k_per_row_prefill(logits, *bounds, out, 4, 1, 1, 3)),
        ("raw_topk_indices", lambda: ops.top_k_per_row_prefill(logits, *bounds, out, 4, 10, 1, 2)),
        ("logits", lambda: ops.top_k_per_row_prefill(logits, *bounds, out, 5, 10, 1, 3)),
        ("cu_seqlen_ke", lambda: ops.top_k_per_row_prefill(logits, bounds[0], bounds[1] + 1, out, 4, 10, 1, 3)),
        ("seq_lens", lambda: ops.top_k_per_row_decode(logits, 2, bounds[0], out, 4, 10, 1, 3)),
    ]
    for argument, call in cases:
        with pytest.raises((attend.InvalidArgument, attend.InvalidType, attend.Unsupported), match=f"'{argument}'"):
            call()
