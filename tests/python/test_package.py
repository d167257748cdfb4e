# SPDX-License-Identifier: Apache-2.0
"""The package as such: what importing it costs, what its public functions tell, its version and files."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pathlib
import pkgutil
import re
import subprocess
import sys

import pytest

import attend

# What a module may need beyond numpy; it is then skipped where that is missing, never where it fails.
HEAVY = ("torch", "numpy", "ml_dtypes", "transformers")


def modules():
    """Every public module of the package, by name."""
    names = ["attend"]
    for info in pkgutil.walk_packages(attend.__path__, "attend."):
        if info.name == "attend.vllm_plugin.backend" and importlib.util.find_spec("vllm") is None:
            continue  # test_vllm_plugin.py has a stand-in for vLLM
        if not any(part.startswith("_") for part in info.name.split(".")):
            names.append(info.name)
    return names


def functions():
    """(module, name, function) of every public function that the package defines."""
    for module_name in modules():
        module = importlib.import_module(module_name)
        public = getattr(module, "__all__", [n for n in vars(module) if not n.startswith("_")])
        for name in public:
            value = getattr(module, name)
            if inspect.isfunction(value) and value.__module__ == module_name:
                yield module_name, name, value


def fresh(code):
    """Standard output of a new interpreter without the modules that this one has."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.split()


def test_import_loads_no_framework_and_few_modules():
    loaded = fresh("import sys; before = set(sys.modules); import attend; print(*sorted(set(sys.modules) - before))")
    assert not {m.partition(".")[0] for m in loaded} & set(HEAVY)
    assert "attend._native" in loaded
    # Cheap to import: few modules, its own and a handful of the standard library's.
    assert len(loaded) <= 80, loaded


def test_a_call_with_numpy_does_not_load_torch():
    code = (
        "import sys, numpy as np, attend\n"
        "x = np.ones((2, 1, 8), np.float32)\n"
        "start = np.array([0, 2], np.int32)\n"
        "assert (attend.ops.flash_attn_varlen(x, x, x, start, cu_seqlens_kv=start) == 1).all()\n"
        "print('torch' in sys.modules)"
    )
    assert fresh(code) == ["False"]


@pytest.mark.parametrize("name", modules())
def test_modules_import_alone_and_have_a_docstring(name):
    module = importlib.import_module(name)
    assert module.__doc__ and module.__doc__.strip()
    for public in getattr(module, "__all__", []):
        assert hasattr(module, public), f"{name}.__all__ names {public}, which is not there"


def test_public_functions_are_documented_and_typed():
    wrong, count = [], 0
    for module, name, function in functions():
        count += 1
        if not inspect.getdoc(function):
            wrong.append(f"{module}.{name}: no docstring")
        wrong += [
            f"{module}.{name}: {p.name} has no type"
            for p in inspect.signature(function).parameters.values()
            if p.annotation is inspect.Parameter.empty
        ]
        if inspect.signature(function).return_annotation is inspect.Signature.empty:
            wrong.append(f"{module}.{name}: result has no type")
    assert not wrong
    assert count >= 6


def test_required_arguments_of_ops_are_in_their_docstrings():
    wrong = []
    for module, name, function in functions():
        if module.startswith("attend.ops") and name in attend.ops.__all__:
            text = inspect.getdoc(function)
            if re.search(r"as (in|of|for) `?\w+(\(\))?", text):
                continue  # refers to another function
            wrong += [
                f"{module}.{name}: {p.name}"
                for p in inspect.signature(function).parameters.values()
                if p.default is inspect.Parameter.empty and p.name not in text
            ]
    assert not wrong


def test_version_is_the_one_of_the_project():
    project = (pathlib.Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'\nversion = "{attend.__version__}"\n' in project


def test_marker_and_stubs_lie_beside_the_module():
    folder = pathlib.Path(attend.__file__).parent
    assert (folder / "py.typed").exists()
    assert "def flash_attn_varlen" in (folder / "_native.pyi").read_text()
