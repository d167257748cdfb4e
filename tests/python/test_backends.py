# SPDX-License-Identifier: Apache-2.0
"""attend.backends: selection, layers against attention written out in float64, and what lives as long as what."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import threading
import weakref

import numpy as np
import pytest
import torch
from backends_helpers import BLOCK, Layer, Requests, attention, paged_table, prefix_sum, slots_of, softmax_sum, to_numpy

import attend
from attend import backends, batch
from attend.backends import AotLimits, AttentionConfig, BuilderConfig, ImplConfig, MlaDims, MlaPrefillConfig
from attend.batch import CommonMetadata
from attend.cache import KvCacheSpec

MIXED = ([1, 1, 37, 5, 20], [70, 1, 37, 64, 300])


def test_names():
    names = backends.names()
    assert names == sorted(names)
    assert {"FLASH_ATTN", "FLASH_ATTN_MLA", "FLASHMLA_SPARSE", "DIFFERENTIAL_FLASH_ATTN"} <= set(names)
    for name in names:
        assert backends.find(name).name == name
    with pytest.raises(attend.InvalidArgument, match="FLASH_ATTN_MLA"):
        backends.find("NO_SUCH")


def test_capability():
    capability = backends.find("FLASH_ATTN").capability
    assert capability.max_head_size == 256 and "bf16" in capability.dtypes and not capability.is_mla
    assert backends.find("FLASHMLA_SPARSE").capability.is_sparse
    with pytest.raises(dataclasses.FrozenInstanceError):
        capability.is_mla = True


def test_selection():
    config = AttentionConfig(head_size=128)
    selection = backends.select(config)
    assert selection.name == "FLASH_ATTN" and backends.require(config).name == "FLASH_ATTN"
    reasons = dict(selection.rejected)
    assert "non-MLA not supported" in reasons["FLASH_ATTN_MLA"]
    assert "FLASH_ATTN" not in reasons and set(reasons) | {"FLASH_ATTN"} == set(backends.names())
    assert set(backends.priority(config)) == set(backends.names())
    assert "rejected    FLASH_ATTN_MLA" in str(selection)


def test_nothing_fits():
    config = AttentionConfig(head_size=100, platform="cuda:7.5")
    selection = backends.select(config)
    assert selection.name is None and len(selection.rejected) == len(backends.names())
    reasons = backends.find("FLASH_ATTN").validate_configuration(config)
    assert reasons == dict(selection.rejected)["FLASH_ATTN"]
    assert any("head_size not supported: 100" in r for r in reasons)
    assert any("compute capability not supported: 7.5" in r for r in reasons)
    with pytest.raises(attend.Unsupported) as error:
        backends.require(config)
    assert "head_size not supported: 100" in str(error.value) and error.value.reasons
    named = backends.select(config, "FLASH_ATTN")
    assert named.name is None and [name for name, _ in named.rejected] == ["FLASH_ATTN"]
    with pytest.raises(attend.InvalidArgument, match="NO_SUCH"):
        backends.select(config, "NO_SUCH")


@pytest.mark.parametrize(
    "field, value",
    [
        ("platform", "tpu"),
        ("dtype", "float13"),
        ("attn_type", "sideways"),
        ("head_size", "a"),
        ("use_mla", 1),
        ("block_size", 1.5),
    ],
)
def test_wrong_configurations(field, value):
    config = dataclasses.replace(AttentionConfig(head_size=64), **{field: value})
    with pytest.raises((attend.InvalidArgument, attend.InvalidType)) as error:
        backends.select(config)
    assert field in str(error.value)


def test_mla_prefill_selection():
    dims = MlaDims(512, 128, 64, 128)
    assert dims.cache_dim == 576
    assert backends.select_mla_prefill(MlaPrefillConfig(dims)).name == "FLASH_ATTN"
    on_rocm = backends.select_mla_prefill(MlaPrefillConfig(dims, platform="rocm:gfx942"))
    assert on_rocm.name == "ROCM_AITER_FA"
    odd = backends.select_mla_prefill(MlaPrefillConfig(MlaDims(512, 127, 64, 128)))
    assert odd.name is None and len(odd.rejected) == len(backends.mla_prefill_backends())
    assert "bf16" in backends.mla_prefill_backends()["FLASH_ATTN"].dtypes


def test_shapes_and_orders():
    backend = backends.find("FLASH_ATTN")
    spec = KvCacheSpec(7, 16, 3, 64, "float32")
    assert backend.kv_cache_shape(spec) == (2, 7, 16, 3, 64) and backend.kv_scale_shape(spec) == ()
    assert backend.kv_cache_block_dim == 1 and backend.kv_cache_stride_order("hnd") == (0, 1, 3, 2, 4)
    assert backend.preferred_block_size(48) == 48 and backend.preferred_block_size(17) == 16
    assert backend.required_kv_cache_layout is None
    with pytest.raises(attend.InvalidArgument, match="block_size"):
        backend.kv_cache_shape(KvCacheSpec(7, 17, 3, 64))
    cache = backend.new_kv_cache(spec, layout="hnd", framework="torch")
    assert cache.shape == (2, 7, 16, 3, 64) and cache.permute(0, 1, 3, 2, 4).is_contiguous() and not cache.any()
    assert backends.find("FLASH_ATTN_MLA").kv_cache_shape(KvCacheSpec(7, 64, 1, 576)) == (7, 64, 576)


@pytest.mark.parametrize("make", [lambda x: x, torch.from_numpy])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 19}, {"softcap": 3.0}, {"scale": 0.3}])
def test_mixed_batch(make, options):
    layer = Layer(Requests(1, *MIXED), make, **options)
    common = layer.batch()
    out = layer.forward(layer.builder.build(common))
    assert isinstance(out, type(make(np.zeros(1))))
    expected = layer.requests.expected(
        window=options.get("sliding_window"), softcap=options.get("softcap", 0.0), scale=options.get("scale")
    )
    np.testing.assert_allclose(to_numpy(out), expected, rtol=1e-5, atol=1e-5)
    # The new keys are in the cache, and nothing else was written.
    keys = to_numpy(layer.cache)[0].reshape(-1, 2, 64)
    np.testing.assert_array_equal(keys[to_numpy(common.slot_mapping)], layer.requests.new(layer.requests.keys))
    assert np.isfinite(keys[:, 0, 0]).sum() == sum(MIXED[1])


def test_bf16_and_fp8():
    requests = Requests(2, *MIXED)
    exact = requests.expected()
    bf16 = Layer(requests, torch.from_numpy, "bfloat16")
    out = bf16.forward(bf16.builder.build(bf16.batch()))
    assert out.dtype == torch.bfloat16
    np.testing.assert_allclose(to_numpy(out), exact, atol=0.03)
    fp8 = Layer(requests, torch.from_numpy, "bfloat16", kv_cache_dtype="float8_e4m3fn", k_scale=[0.5], v_scale=[0.25])
    q, k, v = (
        torch.from_numpy(x).bfloat16() for x in (requests.q, requests.new(requests.keys), requests.new(requests.values))
    )
    fresh = Requests(2, MIXED[0], MIXED[0])
    common = CommonMetadata(prefix_sum(MIXED[0]), MIXED[0], block_table=torch.from_numpy(fresh.table))
    common = common.replace(slot_mapping=batch.make_slot_mapping(common, BLOCK))
    out = fp8.impl.forward(q, fp8.cache, fp8.builder.build(common), key=k, value=v)
    starts = prefix_sum(MIXED[0])
    expected = np.concatenate(
        [attention(to_numpy(q[a:b]), to_numpy(k[a:b]), to_numpy(v[a:b])) for a, b in zip(starts, starts[1:])]
    )
    np.testing.assert_allclose(to_numpy(out), expected, atol=0.3)
    assert np.abs(to_numpy(out) - expected).max() > 1e-3  # the cache has 3 bits of mantissa
    slots = batch.make_slot_mapping(common, BLOCK)
    for plane, scale, rows in [(0, 0.5, k), (1, 0.25, v)]:
        codes = fp8.cache[plane].view(torch.uint8).view(-1, 2, 64)[slots].view(torch.float8_e4m3fn)
        np.testing.assert_allclose(codes.float().numpy() * scale, to_numpy(rows), rtol=1 / 16, atol=scale / 512)


def test_sinks_and_alibi_reach_the_layer():
    requests = Requests(3, [2, 1], [2, 33])
    plain = Layer(requests)
    metadata = plain.builder.build(plain.batch())
    sinks = [2.0, -1.0, 0.5, 3.0]
    lse = np.empty((3, 4), np.float32)
    exact = plain.forward(metadata, lse=lse)
    with_sinks = Layer(requests, sinks=sinks)
    out = with_sinks.forward(with_sinks.builder.build(with_sinks.batch()))
    kept = 1 / (1 + np.exp(np.array(sinks) - lse))
    np.testing.assert_allclose(out, exact * kept[:, :, None], rtol=1e-4, atol=1e-6)
    slopes = [0.5, 0.25, 0.125, 0.0625]
    with_alibi = Layer(requests, alibi_slopes=slopes)
    out = with_alibi.forward(with_alibi.builder.build(with_alibi.batch()))
    distance = 32 - np.arange(33)
    logits = np.einsum("hd,khd->hk", requests.q[2], np.repeat(requests.keys[1], 2, 1)) / 8
    logits = logits - np.array(slopes)[:, None] * distance
    expected = softmax_sum(logits[:, None], np.repeat(requests.values[1], 2, 1))
    np.testing.assert_allclose(out[2:], expected, rtol=1e-4, atol=1e-5)


def test_a_prompt_in_pieces_has_the_same_bits():
    whole = Layer(Requests(4, [53], [53]))
    expected = whole.forward(whole.builder.build(whole.batch()))
    r = whole.requests
    whole.cache[...] = np.nan
    pieces = []
    for begin, end in [(0, 1), (1, 18), (18, 50), (50, 53)]:
        common = CommonMetadata([0, end - begin], [end], block_table=r.table)
        common = common.replace(slot_mapping=batch.make_slot_mapping(common, BLOCK))
        pieces.append(
            whole.impl.forward(
                r.q[begin:end],
                whole.cache,
                whole.builder.build(common),
                key=r.keys[0][begin:end],
                value=r.values[0][begin:end],
            )
        )
    np.testing.assert_array_equal(np.concatenate(pieces), expected)


def test_profiling_run_and_padding():
    layer = Layer(Requests(5, [2, 1], [2, 33]))
    out = layer.impl.forward(
        layer.requests.q,
        layer.cache,
        None,
        key=layer.requests.new(layer.requests.keys),
        value=layer.requests.new(layer.requests.values),
        output=np.full((3, 4, 64), 7, np.float32),
    )
    assert not out.any()
    expected = layer.forward(layer.builder.build(layer.batch()))
    r = layer.requests
    padded = [
        np.concatenate([x, np.full((4, *x.shape[1:]), np.nan, np.float32)])
        for x in (r.q, r.new(r.keys), r.new(r.values))
    ]
    r.fill(layer.cache)
    out = layer.impl.forward(
        padded[0],
        layer.cache,
        layer.builder.build(layer.batch()),
        key=padded[1],
        value=padded[2],
        output=np.full((7, 4, 64), 7, np.float32),
    )
    np.testing.assert_array_equal(out[:3], expected)
    assert (out[3:] == 7).all()


def test_workspace():
    layer = Layer(Requests(6, *MIXED))
    metadata = layer.builder.build(layer.batch())
    expected = layer.forward(metadata)
    size = metadata.workspace_bytes
    assert size > 0
    memory = np.full(size + 64, 0xFF, np.uint8)
    aligned = memory[-memory.ctypes.data % 64 :][:size]
    np.testing.assert_array_equal(layer.forward(metadata, workspace=aligned), expected)
    with pytest.raises(attend.InvalidArgument, match="workspace"):
        layer.forward(metadata, workspace=aligned[:-64])
    with pytest.raises(attend.InvalidArgument, match="'workspace'.*contiguous"):
        layer.forward(metadata, workspace=memory[::2])


def test_update_block_table():
    layer = Layer(Requests(7, *MIXED))
    metadata = layer.builder.build(layer.batch())
    expected = layer.forward(metadata)
    # The same requests in other blocks: a second group's cache.
    layer.requests.table, count = paged_table(np.random.default_rng(77), MIXED[1])
    assert count == layer.requests.num_blocks
    table = layer.requests.table.copy()
    other = layer.builder.update_block_table(metadata, table, slots_of(table, *MIXED))
    alive = weakref.ref(table)
    del table, metadata
    gc.collect()
    assert alive() is not None
    np.testing.assert_array_equal(layer.forward(other), expected)
    del other
    gc.collect()
    assert alive() is None


def test_capture_and_refresh():
    capture = AotLimits(max_reqs=8, max_tokens=128, max_seq_len=400)
    layer = Layer(Requests(8, *MIXED), capture=capture)
    assert layer.builder.graph_support == "always"
    captured = layer.builder.build_for_capture(layer.batch())
    size = captured.workspace_bytes
    np.testing.assert_array_equal(layer.forward(captured), layer.forward(layer.builder.build(layer.batch())))
    for seed, lens in [(9, ([1, 1, 1], [5, 399, 17])), (10, ([100], [100]))]:
        other = Layer(Requests(seed, *lens), capture=capture)
        layer.builder.refresh(captured, other.batch())
        np.testing.assert_array_equal(other.forward(captured), other.forward(other.builder.build(other.batch())))
    assert captured.workspace_bytes == size


def test_refreshed_metadata_has_the_new_table_only():
    layer = Layer(Requests(8, [1], [1]), capture=AotLimits(max_reqs=8, max_tokens=128, max_seq_len=400))
    tables = [np.zeros((1, 40), np.int32) for _ in range(3)]
    alive = [weakref.ref(table) for table in tables]
    small, too_large, last = (
        CommonMetadata([0, 1], [n], block_table=table, slot_mapping=[0]) for n, table in zip((400, 401, 1), tables)
    )
    captured = layer.builder.build_for_capture(small)
    with pytest.raises(attend.InvalidArgument, match="max_seq_len|seq_lens"):
        layer.builder.refresh(captured, too_large)
    del tables, small, too_large
    gc.collect()
    assert [ref() is not None for ref in alive] == [True, False, True]
    layer.builder.refresh(captured, last)
    del last
    gc.collect()
    assert [ref() is not None for ref in alive] == [False, False, True]


def test_capture_is_refused():
    layer = Layer(Requests(8, [1], [1]))
    with pytest.raises(attend.Unsupported, match="capture"):
        layer.builder.build_for_capture(layer.batch())


def test_objects_may_be_dropped_in_any_order():
    requests = Requests(11, [3, 1], [3, 40])
    layer = Layer(requests)
    expected = layer.forward(layer.builder.build(layer.batch()))
    for order in itertools.permutations(["backend", "builder", "common", "table"]):
        layer = Layer(requests)
        table = requests.table.copy()
        common = CommonMetadata([0, 3, 4], [3, 40], block_table=table)
        common = common.replace(slot_mapping=batch.make_slot_mapping(common, BLOCK))
        held = {"backend": layer.backend, "builder": layer.builder, "common": common, "table": table}
        metadata = layer.builder.build(common)
        alive = weakref.ref(table)
        del layer.backend, layer.builder, common, table
        for name in order:
            del held[name]
            gc.collect()
        garbage = [np.full_like(requests.table, -1) for _ in range(20)]  # would take the table's memory
        assert alive() is not None and len(garbage) == 20
        np.testing.assert_array_equal(layer.forward(metadata), expected)
        del metadata
        gc.collect()
        assert alive() is None


def test_threads_of_python():
    layers = [Layer(Requests(20 + i, *MIXED)) for i in range(4)]
    expected = [layer.forward(layer.builder.build(layer.batch())) for layer in layers]
    results = [None] * 4

    def work(i):
        for _ in range(5):
            metadata = layers[i].builder.build(layers[i].batch())
            results[i] = layers[i].forward(metadata, executor=pool if i % 2 else None)

    layers[1].builder = layers[1].backend.make_builder(dataclasses.replace(layers[1].config, num_workers=3))
    pool = attend.ThreadPool(3)
    layers[3].builder = layers[3].backend.make_builder(dataclasses.replace(layers[3].config, num_workers=3))
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result, e in zip(results, expected):
        np.testing.assert_array_equal(result, e)


@pytest.mark.parametrize(
    "change, argument",
    [
        ({"query": None}, "query"),
        ({"query": np.zeros((3, 4, 64))}, "query"),
        ({"query": np.zeros((4, 64), np.float32)}, "query"),
        ({"query": np.zeros((3, 5, 64), np.float32)}, "query"),
        ({"kv_cache": None}, "kv_cache"),
        ({"key": None}, "key"),
        ({"key": torch.zeros(3, 2, 64)}, "key"),
        ({"key": np.zeros((3, 4, 64), np.float32)}, "key"),
        ({"metadata": 3}, "metadata"),
        ({"metadata": "cache"}, "metadata"),
        ({"executor": 2}, "executor"),
        ({"lse": np.zeros((3, 4))}, "lse"),
        ({"output": np.zeros((2, 4, 64), np.float32)}, "output"),
        ({"kv_c": np.zeros((3, 64), np.float32)}, "kv_c"),
        ({"topk_indices": np.zeros((3, 4), np.int32)}, "topk_indices"),
        ({"token_lambda": np.zeros((3, 2), np.float32)}, "token_lambda"),
        ({"output_scale": 1.0}, "output_scale"),
        ({"kv_scale_cache": np.zeros((3, 2), np.float32)}, "kv_scale_cache"),
    ],
)
def test_wrong_calls(change, argument):
    layer = Layer(Requests(12, [2, 1], [2, 33]))
    r = layer.requests
    call = {
        "query": r.q,
        "kv_cache": layer.cache,
        "metadata": layer.builder.build(layer.batch()),
        "key": r.new(r.keys),
        "value": r.new(r.values),
    } | change
    layer.cache[...] = 5
    with pytest.raises((attend.InvalidArgument, attend.InvalidType)) as error:
        layer.impl.forward(**call)
    assert argument in str(error.value)
    assert (layer.cache == 5).all()


def test_wrong_settings():
    backend = backends.find("FLASH_ATTN")
    spec = KvCacheSpec(7, 16, 2, 64, "float32")
    for config, argument in [
        (BuilderConfig(5, spec), "num_q_heads"),
        (BuilderConfig(4, spec, num_workers=0), "num_workers"),
        (BuilderConfig(4, spec, num_workers=10**9), "num_workers"),
        (BuilderConfig(4, spec, cascade="maybe"), "cascade"),
        (BuilderConfig(4, "spec"), "cache"),
        (BuilderConfig(4, spec, mla=3), "mla"),
        (BuilderConfig(4, spec, arithmetic="slow"), "arithmetic"),
        (BuilderConfig(4, spec, capture=MlaDims(1, 2, 3, 4)), "kv_lora_rank"),
        (spec, "config"),
    ]:
        with pytest.raises((attend.InvalidArgument, attend.InvalidType), match=argument):
            backend.make_builder(config)
    for config, argument in [
        (ImplConfig(4, 3, 64), "num_q_heads|num_kv_heads"),
        (ImplConfig(4, 2, 63), "head_size"),
        (ImplConfig(4, 2, 64, sinks=[1.0]), "sinks"),
        (ImplConfig(4, 2, 64, dtype="int9"), "dtype"),
        (ImplConfig(4, 2, 64, sinks=3), "sinks"),
        (None, "config"),
    ]:
        with pytest.raises((attend.InvalidArgument, attend.InvalidType), match=argument):
            backend.make_impl(config)
    with pytest.raises(attend.InvalidType, match="'batch'.*CommonMetadata"):
        backend.make_builder(BuilderConfig(4, spec)).build(3)


def test_threads_of_layers():
    """They are those that the builder was told of, whatever the process uses elsewhere."""
    requests = Requests(14, *MIXED)
    layer = Layer(requests)
    expected = layer.forward(layer.builder.build(layer.batch()))
    for workers in (1, 3):
        builder = layer.backend.make_builder(dataclasses.replace(layer.config, num_workers=workers))
        metadata = builder.build(layer.batch())
        np.testing.assert_array_equal(layer.forward(metadata), expected)
        with attend.num_threads(5):
            np.testing.assert_array_equal(layer.forward(metadata), expected)
        with pytest.raises(attend.InvalidArgument, match=f"'executor': expected {workers} workers.*got 2"):
            layer.forward(metadata, executor=attend.ThreadPool(2))
    with attend.num_threads(3):
        builder = layer.backend.make_builder(layer.config)
    with pytest.raises(attend.InvalidArgument, match="expected 3 workers"):
        layer.forward(builder.build(layer.batch()), executor=attend.ThreadPool(2))
