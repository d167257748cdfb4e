# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's older names of run(), and parameters of its newer versions: order, effect, refusals by name."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from flash_helpers import assert_close, attention, error_of

from attend.compat import flashinfer as fi
from attend.errors import Error, InvalidArgument, InvalidType, Unsupported

HEADS, KV_HEADS, DIM, PAGE, ROWS, KEYS = 4, 2, 16, 4, 3, 5
EMPTY = torch.empty(0)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def problem():
    """q, k and v of one request, and the same keys and values on pages."""
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(n, h, DIM, generator=generator) for n, h in ((ROWS, HEADS), (KEYS, 2), (KEYS, 2)))
    pages = torch.full((3, 2, PAGE, KV_HEADS, DIM), math.nan)
    for position in range(KEYS):
        page = (2, 0)[position // PAGE]
        pages[page, 0, position % PAGE], pages[page, 1, position % PAGE] = k[position], v[position]
    return q, k, v, pages


def planned(kind, **options):
    """A wrapper with its plan for problem(), and run()'s positional arguments."""
    q, k, v, pages = problem()
    options = {"q_data_type": torch.float32, **options}
    table = (int32(0, 2), int32(2, 0), int32(1))
    sizes = (HEADS, KV_HEADS, DIM)
    if kind == "ragged":
        wrapper = fi.BatchPrefillWithRaggedKVCacheWrapper(EMPTY)
        wrapper.begin_forward(int32(0, ROWS), int32(0, KEYS), *sizes, **options)
        return wrapper, (q, k, v)
    if kind == "paged":
        wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(EMPTY)
        wrapper.begin_forward(int32(0, ROWS), *table, *sizes, PAGE, **options)
        return wrapper, (q, pages)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(EMPTY)
    wrapper.begin_forward(*table, *sizes, PAGE, **options)
    return wrapper, (q[:1], pages)


def reference(rows=ROWS, **options):
    q, k, v, _ = problem()
    out, lse = attention(q[:rows], k, v, **options)
    return out, lse.T / math.log(2)


@pytest.mark.parametrize("kind", ["ragged", "paged", "decode"])
def test_older_names_of_run(kind):
    rows = 1 if kind == "decode" else ROWS
    wrapper, tensors = planned(kind, sm_scale=0.7)
    run = wrapper.run(*tensors, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(wrapper.run_return_lse(*tensors), run))
    assert_close(run[0], reference(rows, scale=0.7)[0])
    # FlashInfer's forward() has values of its own: what it is not given is its default, not what was planned.
    out, lse = wrapper.forward_return_lse(*tensors)
    assert_close(out, reference(rows)[0])
    assert_close(lse, reference(rows)[1])
    assert torch.equal(wrapper.forward(*tensors), out)
    assert torch.equal(wrapper.run(*tensors), out), "later runs keep the values of forward()"
    assert_close(wrapper.forward(*tensors, window_left=1), reference(rows, window=(1, -1))[0])
    assert_close(wrapper.forward(*tensors, logits_soft_cap=0.5, sm_scale=0.9),
                 reference(rows, softcap=0.5, scale=0.9)[0])  # fmt: skip
    assert wrapper.end_forward() is None


@pytest.mark.parametrize("kind", ["ragged", "paged"])
def test_forward_decides_about_causality(kind):
    wrapper, tensors = planned(kind, causal=True)
    assert_close(wrapper.run(*tensors), reference(causal=True)[0])
    assert_close(wrapper.forward(*tensors), reference()[0])
    assert_close(wrapper.forward(*tensors, True), reference(causal=True)[0])


@pytest.mark.parametrize("kind", ["ragged", "paged", "decode"])
def test_a_forward_that_fails_changes_no_plan(kind):
    wrapper, tensors = planned(kind, sm_scale=0.7)
    before = wrapper.run(*tensors)
    for name, value in {"pos_encoding_mode": "ALIBI", "rope_theta": 1e4, "window_left": -7, "sm_scale": "x"}.items():
        assert f"forward] argument '{name}'" in error_of(Error, lambda: wrapper.forward(*tensors, **{name: value}))
    assert torch.equal(wrapper.run(*tensors), before)
    if kind != "decode":
        assert "'causal'" in error_of(InvalidType, lambda: wrapper.forward(*tensors, causal="no"))
    assert "begin_forward() first" in error_of(Error, lambda: type(wrapper)(EMPTY).forward(*tensors))


@pytest.mark.parametrize("kind", ["ragged", "paged"])
def test_base_and_layout_of_the_lse(kind):
    wrapper, tensors = planned(kind)
    want = reference()[1]
    for base, factor in (("log2", 1.0), ("ln", math.log(2))):
        assert_close(wrapper.run(*tensors, return_lse=True, lse_base=base)[1], factor * want)
        lse = wrapper.run(*tensors, return_lse=True, lse_base=base, lse_layout="HN")[1]
        assert lse.is_contiguous()
        assert_close(lse, factor * want.T)
        given = torch.full((HEADS, ROWS), math.nan)
        assert wrapper.run(*tensors, lse=given, return_lse=True, lse_base=base, lse_layout="HN")[1] is given
        assert torch.equal(given, lse)
    for options in ({"lse_base": "e"}, {"lse_layout": "NHD"}, {"lse": torch.zeros(ROWS, HEADS), "lse_layout": "HN"}):
        name = next(iter(options))
        assert f"run] argument '{name}'" in error_of(InvalidArgument, lambda o=options: wrapper.run(*tensors, **o))


def test_scales_of_single_prefill_multiply():
    q, k, v, _ = problem()
    out = fi.single_prefill_with_kv_cache(q, k, v, scale_k=2.0, k_scale=1.5, scale_v=0.5, v_scale=3.0)
    assert_close(out, 1.5 * reference(scale=3.0 / math.sqrt(DIM))[0])
    for name in ("scale_k", "k_scale", "scale_v", "v_scale"):
        call = lambda n=name: fi.single_prefill_with_kv_cache(q, k, v, **{n: "x"})
        assert error_of(Unsupported, call).startswith(f"[single_prefill_with_kv_cache] argument '{name}'")


def test_copies_on_the_host_are_compared():
    wrapper, tensors = planned("ragged", qo_indptr_cpu=int32(0, ROWS), kv_indptr_cpu=int32(0, KEYS))
    assert_close(wrapper.run(*tensors), reference()[0])
    for name in ("qo_indptr_cpu", "kv_indptr_cpu"):
        assert f"'{name}'" in error_of(InvalidArgument, lambda n=name: planned("ragged", **{n: int32(0, 2)}))


def test_batch_indices_and_positions_are_written_where_asked():
    want = fi.get_batch_indices_positions(int32(0, 2, 3), int32(5, 1), 3)
    given = torch.full((3,), -9, dtype=torch.int32), torch.full((3,), -9, dtype=torch.int32)
    results = fi.get_batch_indices_positions(int32(0, 2, 3), int32(5, 1), 3, *given)
    assert all(r is g and torch.equal(g, w) for r, g, w in zip(results, given, want))
    given[0].fill_(-9)
    for bad in (given[1][:2], given[1].long(), torch.zeros(6, dtype=torch.int32)[::2]):
        call = lambda b=bad: fi.get_batch_indices_positions(int32(0, 2, 3), int32(5, 1), 3, given[0], b)
        assert "'positions'" in error_of(InvalidArgument, call)
        assert bool((given[0] == -9).all()), "nothing is written before an error"


REFUSED = {
    "plan": {
        "ragged": ["token_pos_in_items_len", "use_token_head_sf", "v_indptr", "o_indptr", "seq_lens", "seq_lens_q",
                   "prefix_len_ptr", "token_pos_in_items_ptr", "max_item_len_ptr", "custom_mask", "packed_custom_mask"],
        "paged": ["token_pos_in_items_len", "use_token_head_sf", "use_fp16_qk_reduction", "custom_mask", "seq_lens"],
        "decode": ["use_token_head_sf", "is_causal", "window_right"],
    },
    "run": {
        "ragged": ["kv_cache_sf", "o_scale"],
        "paged": ["kv_cache_sf", "skip_softmax_threshold_scale_factor", "use_fp16_softmax", "uses_spcompress"],
        "decode": ["kv_cache_sf", "skip_softmax_threshold_scale_factor"],
    },
    "__init__": {
        "ragged": ["variant_owns_mask", "jit_kwargs"],
        "paged": ["variant_owns_mask", "max_total_num_rows", "jit_kwargs"],
        "decode": ["jit_kwargs"],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", ["ragged", "paged", "decode"])
@pytest.mark.parametrize("method", REFUSED)
@pytest.mark.parametrize("value", [True, 3, int32(0, 1)], ids=["flag", "number", "tensor"])
def test_what_cannot_be_done_is_refused_by_name(kind, method, value):
    wrapper, tensors = planned(kind)
    for name in REFUSED[method][kind]:
        call = {
            "plan": lambda n=name: planned(kind, **{n: value}),
            "run": lambda n=name: wrapper.run(*tensors, **{n: value}),
            "__init__": lambda n=name: type(wrapper)(EMPTY, **{n: value}),
        }[method]
        assert f"argument '{name}'" in error_of(Unsupported, call)


def test_tuning_changes_nothing():
    for kind in ("ragged", "paged"):
        wrapper, tensors = planned(kind, uniform_q_len=ROWS, disable_split_kv=True, max_sequence_kv=KEYS)
        assert_close(wrapper.run(*tensors, enable_pdl=True), reference()[0])
    wrapper, tensors = planned("decode", is_causal=False)
    assert_close(wrapper.run(*tensors), reference(1)[0])


ORDER = {
    fi.BatchDecodeWithPagedKVCacheWrapper.plan: "page_size pos_encoding_mode window_left logits_soft_cap q_data_type "
    "kv_data_type o_data_type data_type sm_scale rope_scale rope_theta non_blocking block_tables seq_lens "
    "fixed_split_size disable_split_kv q_len_per_req",
    fi.BatchPrefillWithRaggedKVCacheWrapper.plan: "o_data_type non_blocking prefix_len_ptr token_pos_in_items_ptr "
    "token_pos_in_items_len max_item_len_ptr fixed_split_size disable_split_kv seq_lens seq_lens_q "
    "max_token_per_sequence max_sequence_kv v_indptr o_indptr qo_indptr_cpu kv_indptr_cpu uniform_q_len "
    "use_token_head_sf",
    fi.BatchPrefillWithPagedKVCacheWrapper.plan: "fixed_split_size disable_split_kv uniform_q_len use_token_head_sf",
    fi.BatchPrefillWithPagedKVCacheWrapper.forward: "paged_kv_cache causal pos_encoding_mode use_fp16_qk_reduction "
    "k_scale v_scale window_left logits_soft_cap sm_scale rope_scale rope_theta",
    fi.BatchPrefillWithRaggedKVCacheWrapper.forward: "v causal pos_encoding_mode use_fp16_qk_reduction window_left "
    "logits_soft_cap sm_scale rope_scale rope_theta",
    fi.BatchDecodeWithPagedKVCacheWrapper.forward: "paged_kv_cache pos_encoding_mode q_scale k_scale v_scale "
    "window_left logits_soft_cap sm_scale rope_scale rope_theta",
    fi.single_prefill_with_kv_cache: "backend return_lse kv_cache_sf k_scale v_scale",
}


@pytest.mark.parametrize("function", ORDER, ids=lambda f: f.__qualname__)
def test_positional_arguments_end_as_those_of_flashinfer(function):
    parameters = inspect.signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    want = ORDER[function].split()
    assert positional[-len(want) :] == want
