# SPDX-License-Identifier: Apache-2.0
"""attend.cache: shapes and orders written out, views of memory, scales of int8 values."""

from __future__ import annotations

import gc
import itertools
import struct

import numpy as np
import pytest
import torch

import attend
from attend import cache
from attend.cache import CacheMemory, KvCacheSpec, cache_view


def test_shapes():
    spec = KvCacheSpec(num_blocks=7, block_size=16, num_kv_heads=3, head_size=64)
    assert cache.flash_attn_cache_shape(spec) == (2, 7, 16, 3, 64)
    assert cache.flash_attn_scale_shape(spec) == ()
    assert spec.stored_dtype == "bfloat16"
    layers = KvCacheSpec(7, 16, 3, 64, "float16", num_layers=5)
    assert cache.flash_attn_cache_shape(layers) == (5, 2, 7, 16, 3, 64) and layers.stored_dtype == "float16"
    level1 = KvCacheSpec(7, 16, 3, 64, format="int8_level1")
    assert cache.flash_attn_cache_shape(level1) == (2, 7, 3, 16, 64) and level1.stored_dtype == "int8"
    assert cache.flash_attn_scale_shape(level1) == (7, 3, 16)
    assert cache.flash_attn_cache_shape(KvCacheSpec(7, 16, 3, 64, format="int8_level2")) == (3, 7, 3, 16, 64)
    per_token = KvCacheSpec(7, 16, 3, 64, format="int8_per_token_head")
    assert cache.flash_attn_scale_shape(per_token) == (2, 7, 16, 3)
    assert cache.mla_cache_shape(KvCacheSpec(7, 64, 1, 576)) == (7, 64, 576)
    rows = KvCacheSpec(7, 64, 1, 576, format="fp8_ds_mla")
    assert cache.mla_cache_shape(rows) == (7, 64, 656) and rows.stored_dtype == "uint8"


def test_orders():
    assert cache.flash_attn_stride_order() == (0, 1, 2, 3, 4)
    assert cache.flash_attn_stride_order("hnd") == (0, 1, 3, 2, 4)
    assert cache.flash_attn_stride_order("NHD", include_layers=True)[0] == 2  # blocks are outermost
    assert cache.flash_attn_stride_order("hnd", include_layers=True)[:2] == (2, 4)
    assert cache.mla_stride_order() == (0, 1, 2) and cache.mla_stride_order(True) == (1, 0, 2, 3)


@pytest.mark.parametrize(
    "spec, argument",
    [
        (KvCacheSpec(0, 16, 3, 64), "num_blocks"),
        (KvCacheSpec(7, 0, 3, 64), "block_size"),
        (KvCacheSpec(7, 16, 0, 64), "num_kv_heads"),
        (KvCacheSpec(7, 16, 3, 0), "head_size"),
        (KvCacheSpec(7, 16, 3, 64, "float128"), "dtype"),
        (KvCacheSpec(7, 16, 3, 64, num_layers=-1), "num_layers"),
        (KvCacheSpec(7, 16, 3, 64, format="int9"), "format"),
        (KvCacheSpec("7", 16, 3, 64), "num_blocks"),
        (KvCacheSpec(2**40, 2**30, 3, 64), "num_blocks"),
        (KvCacheSpec(7, 2**31, 3, 64), "block_size"),
        (KvCacheSpec(7, 16, 3, 64, dtype=3), "dtype"),
    ],
)
def test_wrong_specs(spec, argument):
    for function in (cache.flash_attn_cache_shape, KvCacheSpec.validate):
        with pytest.raises((attend.InvalidArgument, attend.InvalidType), match=f"'{argument}'"):
            function(spec)
    with pytest.raises(attend.InvalidType, match="'spec'.*KvCacheSpec"):
        cache.flash_attn_cache_shape((7, 16, 3, 64))


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_views_write_through(framework):
    memory = CacheMemory(1 << 16, fill=0xA5)
    whole = memory.bytes()
    assert whole.shape == (1 << 16,) and (whole == 0xA5).all()
    view = cache_view(memory, (4, 8), "float32", offset=64, framework=framework)
    view[...] = 0
    view[1, 2] = 1.5
    assert struct.unpack("f", whole[64 + 4 * (8 + 2) :][:4].tobytes()) == (1.5,)
    assert (whole[:64] == 0xA5).all() and (whole[64 + 4 * 32 :] == 0xA5).all() and not whole[64 : 64 + 40].any()


@pytest.mark.parametrize("framework", ["numpy", "torch"])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_orders_of_views(framework, order):
    shape = (2, 3, 5)
    memory = CacheMemory(4 * 30)
    cache_view(memory, (30,), "int32")[...] = np.arange(30)
    view = cache_view(memory, shape, "int32", order=order, framework=framework)
    physical = np.arange(30).reshape([shape[i] for i in order])
    for index in itertools.product(*map(range, shape)):
        assert view[index] == physical[tuple(index[i] for i in order)]


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int64"])
def test_types_of_views(name):
    memory = CacheMemory(64)
    view = cache_view(memory, (8,), name, framework="torch")
    assert view.dtype == getattr(torch, name)
    view[3] = 2
    array = cache_view(memory, (8,), name)
    assert str(array.dtype) == name and float(array[3]) == 2 and float(array[2]) == 0


@pytest.mark.parametrize("framework", ["numpy", "torch"])
def test_views_keep_the_memory(framework):
    views = []
    for i in range(20):
        memory = CacheMemory(1 << 21)
        view = cache_view(memory, (1 << 19,), "int32", framework=framework)
        view[...] = i
        views.append(view[5:])
        del memory, view
    gc.collect()
    for i, view in enumerate(views):
        assert view[0] == i and view[-1] == i and (view == i).all()


def test_memory_goes_with_its_last_view():
    """Many times the memory of the machine, one after the other."""
    for _ in range(8):
        view = cache.new_cache((1 << 28,), "uint8")
        assert view[12345] == 0
        del view

    def mapped():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * 4096

    before = mapped()
    view = cache.new_cache((1 << 28,), "uint8")
    assert mapped() - before >= 1 << 28
    del view
    gc.collect()
    assert mapped() - before < 1 << 27


def test_report():
    report = CacheMemory(1 << 22).report
    assert report.huge_pages_advised == (report.huge_pages_problem == "") and isinstance(report.nodes, dict)
    memory = CacheMemory(1 << 22, huge_pages=False)
    assert not memory.report.huge_pages_advised and memory.report.huge_pages_problem == ""
    assert 0 <= memory.huge_page_bytes() <= memory.num_bytes == 1 << 22
    assert CacheMemory(0).bytes().size == 0 and cache_view(CacheMemory(0), (0, 4), "float32").shape == (0, 4)


@pytest.mark.parametrize(
    "arguments, argument",
    [
        ({"shape": (3, 43)}, "shape"),
        ({"shape": (-1, 4)}, "shape"),
        ({"shape": (1.5,)}, "shape"),
        ({"shape": (1,) * 8}, "order"),
        ({"order": (0, 0)}, "order"),
        ({"order": (0,)}, "order"),
        ({"order": (0, 2)}, "order"),
        ({"order": (0, -1)}, "order"),
        ({"order": (0, 2**32 + 1)}, "order"),
        ({"dtype": "float128"}, "dtype"),
        ({"offset": 2}, "offset"),
        ({"offset": -4}, "offset"),
        ({"offset": 512}, "shape"),
        ({"framework": "jax"}, "framework"),
        ({"memory": bytearray(512)}, "memory"),
    ],
)
def test_wrong_views(arguments, argument):
    fields = {"memory": CacheMemory(512), "shape": (4, 8), "dtype": "float32"} | arguments
    with pytest.raises((attend.InvalidArgument, attend.InvalidType), match=f"'{argument}'"):
        cache_view(**fields)


@pytest.mark.parametrize(
    "arguments, argument",
    [
        ({"num_bytes": -1}, "num_bytes"),
        ({"num_bytes": 1.5}, "num_bytes"),
        ({"fill": 256}, "fill"),
        ({"executor": 3}, "executor"),
    ],
)
def test_wrong_memory(arguments, argument):
    with pytest.raises((attend.InvalidArgument, attend.InvalidType), match=f"'{argument}'"):
        CacheMemory(**({"num_bytes": 64} | arguments))


def test_memory_that_cannot_be_had():
    with pytest.raises(attend.DeviceError):
        CacheMemory(1 << 60)


@pytest.mark.parametrize("make", [lambda x: x, torch.from_numpy, lambda x: torch.from_numpy(x).bfloat16()])
def test_value_scales(make, tmp_path):
    rng = np.random.default_rng(0)
    calibration = cache.ValueScaleCalibration(2, 3, 8)
    seen = []
    for layer in (0, 1, 0):
        values = make(rng.standard_normal((6, 3, 8), np.float32))
        calibration.observe(layer, values)
        seen.append(np.asarray(torch.as_tensor(values).float()))
    expected = np.stack([np.abs(np.concatenate([seen[0], seen[2]])).max(0), np.abs(seen[1]).max(0)]) / np.float32(127)
    scales = calibration.scales()
    np.testing.assert_array_equal(scales, np.maximum(expected, np.float32(1e-6)))
    path = tmp_path / "scales.safetensors"
    cache.save_value_scales(path, scales)
    np.testing.assert_array_equal(cache.load_value_scales(str(path)), scales)


def test_file_of_value_scales_is_safetensors(tmp_path):
    path = tmp_path / "scales.safetensors"
    scales = np.arange(1, 13, dtype=np.float32).reshape(2, 2, 3)
    cache.save_value_scales(path, scales)
    from safetensors.numpy import load_file

    tensors = load_file(path)
    assert sorted(tensors) == ["layers.0.value_scale", "layers.1.value_scale"]
    np.testing.assert_array_equal(tensors["layers.1.value_scale"], scales[1])


def test_wrong_value_scales(tmp_path):
    path = tmp_path / "scales.safetensors"
    for scales in (np.ones((2, 3), np.float32), np.ones((2, 3, 4)), np.zeros((2, 3, 4), np.float32), None, 3):
        with pytest.raises((attend.InvalidArgument, attend.InvalidType)):
            cache.save_value_scales(path, scales)
        assert not path.exists()
    with pytest.raises(attend.InvalidArgument, match="missing"):
        cache.load_value_scales(tmp_path / "missing")
    cache.save_value_scales(path, np.ones((2, 3, 4), np.float32))
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    with pytest.raises(attend.InvalidArgument, match="scales.safetensors"):
        cache.load_value_scales(path)
    calibration = cache.ValueScaleCalibration(1, 3, 4)
    for layer, value in [
        (1, np.ones((2, 3, 4), np.float32)),
        (0, np.ones((2, 3, 5), np.float32)),
        (0, np.full((2, 3, 4), np.nan, np.float32)),
        (0, None),
    ]:
        with pytest.raises((attend.InvalidArgument, attend.InvalidType)):
            calibration.observe(layer, value)
    with pytest.raises(attend.InvalidArgument):
        calibration.scales()  # nothing observed
