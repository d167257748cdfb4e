# SPDX-License-Identifier: Apache-2.0
"""attend.compat.flashinfer's wrapper of latent attention against torch in float64."""

from __future__ import annotations

import math

import pytest
import torch

from attend.compat import flashinfer as fi
from attend.errors import Error, InvalidArgument, Unsupported

HEADS, CKV, KPE, PAGE, PAGES, SCALE = 6, 128, 32, 16, 9, 0.11
QO, KV_INDPTR = torch.tensor([0, 1, 4, 6]), torch.tensor([0, 2, 5, 6])
KV_INDICES, KV_LEN = torch.tensor([7, 2, 0, 5, 3, 8]), torch.tensor([20, 33, 5])


def problem(dtype: torch.dtype, together: bool):
    torch.manual_seed(3)
    q = torch.randn(6, HEADS, CKV + KPE).to(dtype)
    cache = torch.randn(PAGES, PAGE, CKV + KPE)
    cache[[1, 4, 6]] = math.nan  # pages that no request has
    cache[2, 4:] = cache[3, 1:] = cache[8, 5:] = math.nan
    cache = cache.to(dtype)
    parts = [q[..., :CKV], q[..., CKV:], cache[..., :CKV], cache[..., CKV:]]
    return q, cache, parts if together else [part.clone() for part in parts]


def planned(dtype: torch.dtype, causal: bool, kv_dtype: torch.dtype | None = None, **changed):
    wrapper = fi.BatchMLAPagedAttentionWrapper(torch.empty(0))
    arguments = {"qo_indptr": QO, "kv_indptr": KV_INDPTR, "kv_indices": KV_INDICES, "kv_len_arr": KV_LEN,
                 "num_heads": HEADS, "head_dim_ckv": CKV, "head_dim_kpe": KPE, "page_size": PAGE, "causal": causal,
                 "sm_scale": SCALE, "q_data_type": dtype, "kv_data_type": kv_dtype or dtype, **changed}  # fmt: skip
    wrapper.plan(**arguments)
    return wrapper


def reference(q: torch.Tensor, cache: torch.Tensor, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = torch.zeros(6, HEADS, CKV, dtype=torch.float64), torch.zeros(6, HEADS, dtype=torch.float64)
    for b, length in enumerate(KV_LEN.tolist()):
        rows = cache[KV_INDICES[KV_INDPTR[b] : KV_INDPTR[b + 1]]].flatten(0, 1)[:length].double()
        for t in range(QO[b], QO[b + 1]):
            seen = rows[: length - (int(QO[b + 1]) - 1 - t)] if causal else rows
            logits = SCALE * q[t].double() @ seen.T
            out[t] = logits.softmax(-1) @ seen[:, :CKV]
            lse[t] = logits.logsumexp(-1) / math.log(2)
    return out, lse


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_run(dtype: torch.dtype, tolerance: float, causal: bool, together: bool) -> None:
    q, cache, parts = problem(dtype, together)
    wrapper = planned(dtype, causal)
    out, lse = wrapper.run(*parts, return_lse=True)
    expected, expected_lse = reference(q, cache, causal)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert torch.allclose(out.double(), expected, atol=tolerance, rtol=tolerance)
    assert torch.allclose(lse.double(), expected_lse, atol=1e-4)
    assert torch.equal(wrapper.run(*parts), out)
    natural = wrapper.run(*parts, return_lse=True, return_lse_base_on_e=True)[1]
    assert torch.allclose(natural, lse * math.log(2))


def test_copied_pages_give_the_bits_of_pages_in_place() -> None:
    runs = [planned(torch.bfloat16, True).run(*problem(torch.bfloat16, together)[2]) for together in (True, False)]
    assert torch.equal(*runs)


def test_fp8_caches() -> None:
    q, cache, _ = problem(torch.bfloat16, True)
    cache = cache.float().nan_to_num(0).to(torch.float8_e4m3fn)
    wrapper = planned(torch.bfloat16, True, torch.float8_e4m3fn)
    parts = [q[..., :CKV], q[..., CKV:]]
    out = wrapper.run(*parts, cache[..., :CKV], cache[..., CKV:], ckv_scale=0.5, kpe_scale=0.5)
    expected, _ = reference(q, 0.5 * cache.float(), True)
    assert torch.allclose(out.double(), expected, atol=2e-2, rtol=2e-2)
    copied = wrapper.run(*parts, cache[..., :CKV].clone(), cache[..., CKV:].clone(), ckv_scale=0.5, kpe_scale=0.5)
    assert torch.equal(copied, out)


def test_outputs_are_written_where_they_should() -> None:
    parts = problem(torch.float32, True)[2]
    wrapper = planned(torch.float32, True)
    out, lse = torch.full((6, HEADS, CKV), math.nan), torch.full((6, HEADS), math.nan)
    assert wrapper.run(*parts, out=out, lse=lse) is out
    assert all(torch.equal(a, b) for a, b in zip(wrapper.run(*parts, return_lse=True), (out, lse)))


@pytest.mark.parametrize("together", [True, False])
def test_page_ids_are_checked(together: bool) -> None:
    parts = problem(torch.float32, together)[2]
    for bad in (PAGES, -1):
        indices = KV_INDICES.clone()
        indices[3] = bad
        out = torch.full((6, HEADS, CKV), 7.0)
        with pytest.raises(InvalidArgument, match=r"MLAPagedAttentionWrapper.run\] argument 'kv_indices'"):
            planned(torch.float32, True, kv_indices=indices).run(*parts, out=out)
        assert bool((out == 7).all())


def test_errors_name_the_argument() -> None:
    parts = problem(torch.float32, True)[2]
    wrapper = planned(torch.float32, True)
    swapped = [parts[1], parts[0], *parts[2:]]
    for kind, argument, call in (
        (InvalidArgument, "kv_len_arr", lambda: planned(torch.float32, True, kv_len_arr=torch.tensor([33, 3, 3]))),
        (InvalidArgument, "kv_len_arr", lambda: planned(torch.float32, True, kv_len_arr=torch.tensor([-1, 3, 3]))),
        (InvalidArgument, "qo_indptr", lambda: planned(torch.float32, True, qo_indptr=QO[:3])),
        (Unsupported, "use_profiler", lambda: planned(torch.float32, True, use_profiler=True)),
        (InvalidArgument, "q_nope", lambda: wrapper.run(*swapped)),
        (InvalidArgument, "kpe_cache", lambda: wrapper.run(*parts[:3], parts[3].half())),
        (Unsupported, "page_table", lambda: wrapper.run(*parts, page_table=KV_INDICES)),
        (Unsupported, "kpe_scale", lambda: wrapper.run(*parts, kpe_scale=2.0)),
        (Unsupported, "ckv_scale", lambda: wrapper.run(*parts, ckv_scale=2.0, kpe_scale=2.0)),
    ):
        with pytest.raises(kind, match=f"argument '{argument}'"):
            call()
    with pytest.raises(Error, match="call plan"):
        fi.BatchMLAPagedAttentionWrapper(torch.empty(0)).run(*parts)


def test_one_tensor_of_both_parts_or_a_pair() -> None:
    q, cache, parts = problem(torch.float32, True)
    wrapper = planned(torch.float32, True)
    out = wrapper.run(*parts)
    assert torch.equal(wrapper.run(query=q, kv_cache=cache), out)
    assert torch.equal(wrapper.run(query=(parts[0], parts[1]), kv_cache=(parts[2], parts[3])), out)
    for argument, call in (
        ("q_pe", lambda: wrapper.run(q_pe=parts[1], query=q, kv_cache=cache)),
        ("query", lambda: wrapper.run(query=q[..., 1:], kv_cache=cache)),
        ("query", lambda: wrapper.run(query=parts, kv_cache=cache)),
        ("kv_cache", lambda: wrapper.run(query=q, kv_cache=cache[0])),
        ("ckv_cache", lambda: wrapper.run(query=q)),
    ):
        with pytest.raises(Error, match=rf"run\] argument '{argument}'"):
            call()


def test_what_the_plan_announces_is_kept() -> None:
    parts = problem(torch.float32, True)[2]
    wrapper = planned(torch.float32, True, lse_mode="basee", use_sinks=True, query_layout="split")
    sinks = torch.zeros(HEADS)
    assert wrapper.run(*parts, return_lse=True, return_lse_base_on_e=True, sinks=sinks)[1].shape == (6, HEADS)
    with pytest.raises(InvalidArgument, match="argument 'return_lse_base_on_e'"):
        wrapper.run(*parts, return_lse=True, sinks=sinks)
    with pytest.raises(InvalidArgument, match="argument 'sinks'"):
        wrapper.run(*parts)


def test_what_cannot_be_planned_is_refused_by_name() -> None:
    for name, value in {"metadata": 1, "cum_seq_lens_q": QO, "block_tables": QO, "seq_lens": QO, "max_q_len": 3,
                        "query_layout": "other", "kv_cache_layout": 3, "lse_mode": "base10", "skip_softmax": True,
                        "output_dtype": torch.float8_e4m3fn, "output_scale": "per-tensor",
                        "scale_mode": "bmm-scalar"}.items():  # fmt: skip
        with pytest.raises(Unsupported, match=rf"plan\] argument '{name}'"):
            planned(torch.float32, True, **{name: value})
    with pytest.raises(Unsupported, match=r"plan\] argument 'q_data_type'"):
        planned(torch.float8_e4m3fn, True)
    for name in ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr", "num_heads", "sm_scale"):
        with pytest.raises(Error, match=rf"plan\] argument '{name}'"):
            planned(torch.float32, True, **{name: None})
    wrapper, parts = planned(torch.float32, True), problem(torch.float32, True)[2]
    for name in ("skip_softmax_threshold_scale_factor", "bmm1_scale", "bmm2_scale", "o_scale", "ckv_scale_arr"):
        with pytest.raises(Unsupported, match=rf"run\] argument '{name}'"):
            wrapper.run(*parts, **{name: 1.0})
