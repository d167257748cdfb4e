# SPDX-License-Identifier: Apache-2.0
"""Modules under other libraries' names."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import types

import pytest

from attend import compat
from attend.errors import Error, InvalidArgument


@pytest.fixture
def installed():
    """install(), undone at the end of the test."""
    names = []

    def install(name, **options):
        module = compat.install(name, **options)
        names.append(name)
        return module

    yield install
    for name in names:
        compat.uninstall(name)


def test_foreign_imports_find_our_functions(installed):
    module = installed("flash_attn")
    import flash_attn
    from flash_attn import flash_attn_func
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    assert flash_attn is module and flash_attn.__version__.startswith("2.")
    assert flash_attn_func is importlib.import_module("attend.compat.flash_attn").flash_attn_func
    assert flash_attn_varlen_func is flash_attn.flash_attn_interface.flash_attn_varlen_func


def test_submodules_of_flashinfer_are_found(installed):
    installed("flashinfer")
    from flashinfer.decode import single_decode_with_kv_cache
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    ours = importlib.import_module("attend.compat.flashinfer")
    assert BatchMLAPagedAttentionWrapper is ours.BatchMLAPagedAttentionWrapper
    assert single_decode_with_kv_cache is ours.single_decode_with_kv_cache
    compat.uninstall("flashinfer")
    assert "flashinfer.mla" not in sys.modules


def test_clients_that_ask_for_a_version_find_it(installed):
    version = installed("flash_attn").__version__
    for spelling in ("flash-attn", "flash_attn", "Flash.Attn"):
        assert importlib.metadata.version(spelling) == version
    assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
    compat.uninstall("flash_attn")
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash_attn")


def test_a_distribution_on_disk_comes_first(installed, tmp_path, monkeypatch):
    there = tmp_path / "flash_attn-2.3.4.dist-info"
    there.mkdir()
    (there / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.3.4\n")
    installed("flash_attn")
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.metadata.version("flash-attn") == "2.3.4"


@pytest.mark.parametrize("name", compat.installable())
def test_every_name_has_a_module(name, installed):
    module = installed(name)
    assert sys.modules[name] is module and module.__all__
    assert all(callable(getattr(module, f)) or f.isupper() for f in module.__all__)


def test_uninstalling_takes_away_the_submodules_too():
    compat.install("flash_attn")
    compat.uninstall("flash_attn")
    assert "flash_attn" not in sys.modules and "flash_attn.flash_attn_interface" not in sys.modules
    compat.uninstall("flash_attn")


def test_a_library_that_is_there_is_not_replaced_unless_forced(installed, monkeypatch):
    real = types.ModuleType("flash_mla")
    monkeypatch.setitem(sys.modules, "flash_mla", real)
    with pytest.raises(Error, match="flash_mla has been imported already"):
        compat.install("flash_mla")
    assert sys.modules["flash_mla"] is real
    assert installed("flash_mla", force=True) is sys.modules["flash_mla"] is not real


def test_a_library_that_was_replaced_comes_back(monkeypatch):
    real = types.ModuleType("flash_mla")
    monkeypatch.setitem(sys.modules, "flash_mla", real)
    compat.install("flash_mla", force=True)
    compat.install("flash_mla")
    compat.uninstall("flash_mla")
    assert sys.modules["flash_mla"] is real


def test_a_parent_module_keeps_nothing(monkeypatch):
    parent = types.ModuleType("vllm")
    monkeypatch.setitem(sys.modules, "vllm", parent)
    module = compat.install("vllm.vllm_flash_attn")
    assert parent.vllm_flash_attn is module
    compat.uninstall("vllm.vllm_flash_attn")
    assert not hasattr(parent, "vllm_flash_attn")


@pytest.mark.parametrize("name", [n for n in compat.installable() if "." not in n])
def test_clients_that_ask_for_a_spec_find_one(name, installed):
    installed(name)
    assert importlib.util.find_spec(name).name == name


def test_installing_twice_is_no_error(installed):
    installed("flash_attn")
    installed("flash_attn")


def test_unknown_names_are_refused():
    with pytest.raises(InvalidArgument, match="expected one of deep_gemm"):
        compat.install("flash_attention")
