# SPDX-License-Identifier: Apache-2.0
"""attend.compat.deep_gemm: DeepGEMM's signatures and conventions."""

from __future__ import annotations

import inspect

import pytest
import torch
from mla_helpers import assert_error, e4m3, i32, normal

import attend
from attend import ops
from attend.compat import deep_gemm

invalid = attend.InvalidArgument


def test_signatures():
    """Names, order and defaults are DeepGEMM's; None stands for its torch.float32."""
    expected = {
        "fp8_mqa_logits": "q kv weights cu_seq_len_k_start cu_seq_len_k_end clean_logits=True max_seqlen_k=0",
        "fp8_paged_mqa_logits": "q kv_cache weights context_lens block_table schedule_meta max_context_len "
        "clean_logits=False indices=None",
        "get_paged_mqa_logits_metadata": "context_lens block_kv num_sms indices=None",
        "fp8_fp4_mqa_logits": "q kv weights cu_seq_len_k_start cu_seq_len_k_end clean_logits=True max_seqlen_k=0 "
        "logits_dtype=None schedule_meta=None",
        "fp8_fp4_paged_mqa_logits": "q kv_cache weights context_lens block_table schedule_meta max_context_len "
        "clean_logits=False logits_dtype=None indices=None",
    }
    for name, wanted in expected.items():
        parameters = inspect.signature(getattr(deep_gemm, name)).parameters.values()
        shown = [p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters]
        assert shown == wanted.split(), name


def reference(q, k, k_scale, weights):
    """[M, Nk] in float64."""
    relu = torch.relu(torch.einsum("mhd,nd->hmn", q.double(), k.double()))
    return (relu * weights.double().T[:, :, None]).sum(0) * k_scale.double()


def prefill_problem():
    q, k = e4m3(normal((4, 6, 128), 1)), e4m3(normal((30, 128), 2))
    return q, (k, normal((30,), 3).abs()), normal((4, 6), 4), i32([0, 4, 10, 30]), i32([30, 9, 10, 30])


@pytest.mark.parametrize("clean", [True, False])
def test_mqa_logits(clean):
    q, kv, weights, start, end = prefill_problem()
    logits = deep_gemm.fp8_mqa_logits(q, kv, weights, start, end, clean)
    j = torch.arange(30)
    seen = (j >= start[:, None]) & (j < end[:, None])
    expected = reference(q, *kv, weights)
    assert logits.shape == (4, 30) and logits.dtype == torch.float32
    torch.testing.assert_close(logits[seen].double(), expected[seen], rtol=1e-5, atol=1e-4)
    if clean:
        assert torch.isneginf(logits[~seen]).all()
    mixed = deep_gemm.fp8_fp4_mqa_logits((q, None), kv, weights, start, end, clean, logits_dtype=torch.float32)
    assert torch.equal(mixed[seen], logits[seen])


@pytest.mark.parametrize("per_token", [False, True])
def test_paged_mqa_logits(per_token):
    """Keys are put into the blocks by hand: all codes of a block, then all of its scales."""
    lengths, block = [9, 17], 8
    table = i32([[3, 0, 5], [1, 4, 2]])
    cache = torch.full((6, block * 132), 0x7F, dtype=torch.uint8)
    keys, scales = e4m3(normal((2, 17, 128), 1)), normal((2, 17), 2).abs()
    for r, n in enumerate(lengths):
        for t in range(n):
            base, offset = cache[table[r, t // block]], t % block
            base[offset * 128 : offset * 128 + 128] = keys[r, t].view(torch.uint8)
            base[block * 128 + offset * 4 : block * 128 + offset * 4 + 4] = scales[r, t : t + 1].view(torch.uint8)
    cache = cache.view(6, block, 1, 132)
    q, weights = e4m3(normal((2, 2, 6, 128), 3)), normal((4, 6), 4)
    context_lens = i32([[8, 9], [16, 17]]) if per_token else i32(lengths)
    schedule = deep_gemm.get_paged_mqa_logits_metadata(context_lens, block, deep_gemm.get_num_sms())
    assert schedule.shape == (deep_gemm.get_num_sms() + 1, 2)
    logits = deep_gemm.fp8_paged_mqa_logits(q, cache, weights, context_lens, table, schedule, 20, True)
    assert logits.shape == (4, 20)
    for r, n in enumerate(lengths):
        for i in range(2):
            seen, row = n - 1 + i, logits[2 * r + i]
            expected = reference(q[r, i : i + 1], keys[r], scales[r], weights[2 * r + i : 2 * r + i + 1])[0, :seen]
            torch.testing.assert_close(row[:seen].double(), expected, rtol=1e-5, atol=1e-4)
            assert torch.isneginf(row[seen:]).all()
    seen = torch.isfinite(logits)
    unclean = deep_gemm.fp8_paged_mqa_logits(q, cache, weights, context_lens, table, None, 20)
    mixed = deep_gemm.fp8_fp4_paged_mqa_logits((q, None), cache, weights, context_lens, table, schedule, 20)
    assert torch.equal(unclean[seen], logits[seen]) and torch.equal(mixed[seen], logits[seen])
    direct = ops.fp8_paged_mqa_logits(q, cache, weights, context_lens, table, 20)
    assert torch.equal(direct, logits)


def test_processors():
    attend.set_num_threads(7)
    try:
        assert deep_gemm.get_num_sms() == 7
    finally:
        attend.set_num_threads(None)
    assert deep_gemm.get_num_sms() == attend.threads.available_cpus()


def test_what_is_not_supported_raises_by_name():
    q, kv, weights, start, end = prefill_problem()
    rest = (kv, weights, start, end)
    paged = (torch.zeros(2, 8, 1, 132, dtype=torch.uint8), weights[:1], i32([1]), i32([[0]]), None, 8)
    codes = q[None, :1]
    cases = [
        ("max_seqlen_k", lambda: deep_gemm.fp8_mqa_logits(q, *rest, False, 16)),
        ("max_seqlen_k", lambda: deep_gemm.fp8_fp4_mqa_logits((q, None), *rest, max_seqlen_k=16)),
        ("q", lambda: deep_gemm.fp8_fp4_mqa_logits((q, i32([1])), *rest)),
        ("q", lambda: deep_gemm.fp8_fp4_mqa_logits((q.view(torch.int8), None), *rest)),
        ("logits_dtype", lambda: deep_gemm.fp8_fp4_mqa_logits((q, None), *rest, logits_dtype=torch.bfloat16)),
        ("schedule_meta", lambda: deep_gemm.fp8_fp4_mqa_logits((q, None), *rest, schedule_meta=i32([1]))),
        ("indices", lambda: deep_gemm.fp8_paged_mqa_logits(codes, *paged, indices=i32([0]))),
        ("q", lambda: deep_gemm.fp8_fp4_paged_mqa_logits((codes, i32([0])), *paged)),
        ("logits_dtype", lambda: deep_gemm.fp8_fp4_paged_mqa_logits((codes, None), *paged, logits_dtype="bfloat16")),
        ("indices", lambda: deep_gemm.get_paged_mqa_logits_metadata(i32([4]), 8, 2, i32([0]))),
    ]
    for argument, call in cases:
        with pytest.raises(attend.Unsupported, match=f"argument '{argument}'") as raised:
            call()
        assert raised.value.reasons == [str(raised.value)]
    # The same calls without what is not supported work.
    deep_gemm.fp8_fp4_mqa_logits((q, None), *rest)
    deep_gemm.fp8_fp4_paged_mqa_logits((codes, None), *paged)


def test_errors_name_the_arguments_of_deep_gemm():
    q, kv, weights, start, end = prefill_problem()
    name = "fp8_mqa_logits"
    assert_error(lambda: deep_gemm.fp8_mqa_logits(q, kv[0], weights, start, end), attend.InvalidType, name, "kv")
    assert_error(lambda: deep_gemm.fp8_mqa_logits(q, (kv[0], kv[1].half()), weights, start, end), invalid, name, "kv")
    assert_error(
        lambda: deep_gemm.fp8_mqa_logits(q, kv, weights, start.long(), end), invalid, name, "cu_seq_len_k_start"
    )
    assert_error(lambda: deep_gemm.fp8_mqa_logits(q, kv, weights, start, end + 1), invalid, name, "cu_seq_len_k_end")
    assert_error(
        lambda: deep_gemm.fp8_fp4_mqa_logits((q, None), kv, weights[:3], start, end),
        invalid,
        "fp8_fp4_mqa_logits",
        "weights",
    )
    assert_error(
        lambda: deep_gemm.fp8_fp4_mqa_logits(q, kv, weights, start, end), attend.InvalidType, "fp8_fp4_mqa_logits", "q"
    )
    cache = torch.zeros(2, 8, 1, 132, dtype=torch.uint8)
    paged = (q[:1, None], cache, weights[:1], i32([9]), i32([[0, 1]]))
    other = deep_gemm.get_paged_mqa_logits_metadata(i32([3]), 8, 2)
    name = "fp8_paged_mqa_logits"
    deep_gemm.fp8_paged_mqa_logits(*paged, None, 9)
    assert_error(lambda: deep_gemm.fp8_paged_mqa_logits(*paged, None, 0), invalid, name, "max_context_len")
    assert_error(lambda: deep_gemm.fp8_paged_mqa_logits(*paged, other[:, :1], 9), invalid, name, "schedule_meta")
    assert_error(
        lambda: deep_gemm.get_paged_mqa_logits_metadata(i32([4]), 0, 2),
        invalid,
        "get_paged_mqa_logits_metadata",
        "block_kv",
    )
