# SPDX-License-Identifier: Apache-2.0
"""The plugin for vLLM against the interface that vLLM 0.32 gives to back ends; a stand-in where vLLM is missing."""

from __future__ import annotations

import abc
import enum
import importlib
import pathlib
import sys
import types
from typing import Generic, TypeVar

import numpy as np
import pytest
import torch
from foreign_helpers import Batch, by_torch_flex, by_torch_sdpa

import attend
from attend import vllm_plugin

SINKS = np.array([0.5, -1.0, 2.0, 3.0], np.float32)
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)


def stand_in():
    """Modules with the classes of vLLM that the plugin uses: their abstract methods and nothing else."""
    kind = TypeVar("kind")

    class AttentionBackend(abc.ABC):
        @staticmethod
        @abc.abstractmethod
        def get_name(): ...

        @staticmethod
        @abc.abstractmethod
        def get_impl_cls(): ...

        @staticmethod
        @abc.abstractmethod
        def get_builder_cls(): ...

    class AttentionImpl(abc.ABC, Generic[kind]):
        @abc.abstractmethod
        def __init__(self): ...

        @abc.abstractmethod
        def forward(self): ...

    class AttentionMetadataBuilder(abc.ABC, Generic[kind]):
        @abc.abstractmethod
        def __init__(self, kv_cache_spec, layer_names, vllm_config, device): ...

        @abc.abstractmethod
        def build(self): ...

    class AttentionType(str, enum.Enum):
        DECODER = "decoder"
        ENCODER = "encoder"

    class Backends(enum.Enum):
        CPU_ATTN = "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend"

    overrides = {}
    names = {
        "vllm": {},
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backends.registry": {
            "AttentionBackendEnum": Backends,
            "register_backend": lambda backend, class_path: overrides.update({backend: class_path}),
            "overrides": overrides,
        },
        "vllm.v1.attention.backend": {
            "AttentionBackend": AttentionBackend,
            "AttentionImpl": AttentionImpl,
            "AttentionMetadataBuilder": AttentionMetadataBuilder,
            "AttentionType": AttentionType,
            "MultipleOf": lambda n: ("multiple of", n),
        },
        "vllm.v1.kv_cache_interface": {"KVCacheLayout": enum.Enum("KVCacheLayout", ["LBHNC"])},
    }
    modules = {}
    for name, values in names.items():
        modules[name] = types.ModuleType(name)
        vars(modules[name]).update(values)
    return modules


@pytest.fixture
def vllm(monkeypatch):
    """The stand-in in sys.modules; the plugin's back end is imported anew."""
    modules = stand_in()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "attend.vllm_plugin.backend", raising=False)
    yield modules
    sys.modules.pop("attend.vllm_plugin.backend", None)


@pytest.fixture
def backend(vllm):
    return importlib.import_module("attend.vllm_plugin.backend")


def test_entry_point_names_register():
    project = (pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '[project.entry-points."vllm.general_plugins"]\nattend = "attend.vllm_plugin:register"\n' in project
    assert callable(vllm_plugin.register)


def test_register_replaces_the_cpu_back_end_if_asked_to(vllm, monkeypatch):
    registry = vllm["vllm.v1.attention.backends.registry"]
    monkeypatch.delenv("ATTEND_VLLM", raising=False)
    vllm_plugin.register()
    assert not registry.overrides
    monkeypatch.setenv("ATTEND_VLLM", "1")
    vllm_plugin.register()
    path = registry.overrides[registry.AttentionBackendEnum.CPU_ATTN]
    module, _, name = path.rpartition(".")
    cls = getattr(importlib.import_module(module), name)
    assert issubclass(cls, vllm["vllm.v1.attention.backend"].AttentionBackend)
    assert cls.get_name() == "CPU_ATTN"


class Served:
    """A batch as vLLM hands it over: padded metadata, and a cache in its layout."""

    def __init__(self, b, backend):
        self.b, size = b, b.k_cache.shape[1]
        dim, pad = b.q.shape[-1], 3
        self.cache = torch.full((len(b.k_cache), b.num_kv_heads, size, 2 * dim), float("nan"))
        slots = []
        for i, (n, queries) in enumerate(zip(b.seq_lens, b.query_lens)):
            place = torch.arange(n)
            slots.append(torch.from_numpy(b.block_table[i]).long()[place // size] * size + place % size)
            old = slots[-1][: n - queries]
            self.cache[old // size, :, old % size, :dim] = torch.from_numpy(b.k[i][: n - queries])
            self.cache[old // size, :, old % size, dim:] = torch.from_numpy(b.v[i][: n - queries])
        new = [s[n - queries :] for s, n, queries in zip(slots, b.seq_lens, b.query_lens)]
        self.key, self.value = (
            torch.from_numpy(np.concatenate([x[n - c :] for x, n, c in zip(rows, b.seq_lens, b.query_lens)]))
            for rows in (b.k, b.v)
        )
        requests = len(b.seq_lens)
        self.common = types.SimpleNamespace(
            num_reqs=requests,
            num_actual_tokens=len(b.q),
            query_start_loc=torch.from_numpy(np.append(b.query_start_loc, [99] * pad).astype(np.int32)),
            seq_lens=torch.tensor([*b.seq_lens, *[99] * pad], dtype=torch.int32),
            block_table_tensor=torch.from_numpy(
                np.concatenate([b.block_table, np.full((pad, b.block_table.shape[1]), 99, np.int32)])
            ),
            slot_mapping=torch.cat([*new, torch.full((pad,), -1)]),
            causal=True,
        )
        builder = backend.AttendBackend.get_builder_cls()(None, ["layer"], None, torch.device("cpu"))
        self.metadata = builder.build(0, self.common)

    def forward(self, backend, **options):
        """[T, H * D]: vLLM gives some layers outputs of two dimensions; rows of padding stay as they are."""
        b, rows = self.b, len(self.b.q) + 3
        impl = backend.AttendBackend.get_impl_cls()(
            b.num_heads, b.q.shape[-1], b.scale, b.num_kv_heads, kv_cache_dtype="auto", **options
        )
        cache = self.cache.clone()
        impl.do_kv_cache_update(None, self.key, self.value, cache, self.metadata.slot_mapping)
        output = torch.full((rows, b.num_heads, b.q.shape[-1]), 7.0)
        query = torch.cat([torch.from_numpy(b.q), torch.full((3, *b.q.shape[1:]), float("nan"))])
        result = impl.forward(None, query, self.key, self.value, cache, self.metadata, output)
        assert result is output
        assert (output[len(b.q) :] == 7).all()
        return output[: len(b.q)].double().numpy()


CASES = {
    "plain": ({}, by_torch_sdpa, {}),
    "window": ({"sliding_window": 4}, by_torch_sdpa, {"window_left": 3}),
    "window_of_one": ({"sliding_window": 1}, by_torch_sdpa, {"window_left": 0}),
    "softcap": ({"logits_soft_cap": 0.75}, by_torch_flex, {"softcap": 0.75}),
    "alibi": ({"alibi_slopes": SLOPES.tolist()}, by_torch_sdpa, {"alibi_slopes": SLOPES}),
    "sinks": ({"sinks": torch.from_numpy(SINKS).bfloat16()}, by_torch_sdpa, {"sinks": SINKS}),
}


@pytest.mark.parametrize("case", CASES)
def test_forward(backend, case):
    options, reference, theirs = CASES[case]
    batch = Batch(block_size=16)
    out = Served(batch, backend).forward(backend, **options)
    np.testing.assert_allclose(out, reference(batch, **theirs)[0], rtol=2e-6, atol=2e-6)
    if case != "plain":
        assert np.abs(out - Served(batch, backend).forward(backend)).max() > 1e-3


def test_warm_up_and_what_is_not_supported(backend):
    batch = Batch(block_size=16)
    served, cls = Served(batch, backend), backend.AttendBackend.get_impl_cls()
    impl = cls(batch.num_heads, 64, batch.scale, batch.num_kv_heads)
    output = torch.zeros(2, batch.num_heads, 64)
    assert impl.forward(None, output, output, output, served.cache, None, output) is output
    with pytest.raises(attend.errors.Unsupported, match="output_scale"):
        impl.forward(None, output, output, output, served.cache, served.metadata, output, torch.ones(1))
    with pytest.raises(attend.errors.Unsupported, match="attn_type"):
        cls(4, 64, 1.0, attn_type="encoder")
    with pytest.raises(attend.errors.Unsupported, match="kv_cache_dtype"):
        cls(4, 64, 1.0, kv_cache_dtype="fp8")
    served.common.causal = torch.ones(3, dtype=torch.bool)
    with pytest.raises(attend.errors.Unsupported, match="causal"):
        backend.AttendBackend.get_builder_cls()(None, [], None, None).build(0, served.common)
