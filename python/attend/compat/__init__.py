# SPDX-License-Identifier: Apache-2.0
"""Functions of other libraries under their names, with their argument order, defaults, layouts and conventions.

`install("flash_attn")` puts such a module where `import flash_attn` finds it, so that foreign code runs unchanged.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from ..errors import Error, InvalidArgument
from ._distributions import Finder

__all__ = ["install", "installable", "uninstall"]

#: Names of other libraries' modules, and ours that stands for each.
_MODULES = {
    "deep_gemm": "deep_gemm",
    "flash_attn": "flash_attn",
    "flash_attn.bert_padding": "flash_attn_bert_padding",
    "flash_attn.flash_attn_interface": "flash_attn",
    "flash_attn_3": "flash_attn_3",
    "flash_attn_interface": "flash_attn_3",
    "flash_mla": "flash_mla",
    "flash_mla.flash_mla_interface": "flash_mla",
    "flashinfer": "flashinfer",
    "flashinfer.cascade": "flashinfer",
    "flashinfer.decode": "flashinfer",
    "flashinfer.mla": "flashinfer",
    "flashinfer.page": "flashinfer",
    "flashinfer.prefill": "flashinfer",
    "vllm._custom_ops": "vllm_ops",
    "vllm.vllm_flash_attn": "vllm_flash_attn",
}

_installed: dict[str, ModuleType] = {}
#: What install() replaced by force.
_replaced: dict[str, ModuleType] = {}
_finder = Finder()


def installable() -> list[str]:
    """Names that install() knows, without their submodules."""
    return sorted(name for name in _MODULES if name.split(".")[0] == name or name.startswith("vllm."))


def _names(name: str) -> list[str]:
    """The module and the submodules that come with it."""
    if not isinstance(name, str) or name not in installable():
        text = f"[install] argument 'name': expected one of {', '.join(installable())}, got {str(name)[:60]!r}"
        raise InvalidArgument(text, "install", "name")
    return [name, *(other for other in _MODULES if other.startswith(name + "."))]


def install(name: str, *, force: bool = False) -> ModuleType:
    """Makes `import name` give our module with that library's functions, for the whole process.

    `importlib.metadata.version()` gives the version whose interface that is, where the library has one.

    Args:
        name: one of installable(), e.g. "flash_attn" or "vllm.vllm_flash_attn".
        force: put it there even if the library itself has been imported already.

    Returns:
        The module.

    Raises:
        InvalidArgument: an unknown name.
        Error: the library has been imported, and `force` is False.
    """
    names = _names(name)
    if not force:
        for module in names:
            if module in sys.modules and sys.modules[module] is not _installed.get(module):
                raise Error(f"[install] argument 'name': {module} has been imported already; force=True replaces it")
    for module in names:
        ours = importlib.import_module(f"{__name__}.{_MODULES[module]}")
        stand_in = ModuleType(module, ours.__doc__)
        stand_in.__dict__.update({k: v for k, v in vars(ours).items() if not k.startswith("_")})
        stand_in.__dict__["__all__"] = list(ours.__all__)
        stand_in.__dict__["__version__"] = getattr(ours, "__version__", "0")
        stand_in.__path__ = []  # a package, whose submodules are those that are installed with it
        # importlib.util.find_spec(), which clients ask whether there is such a library, wants a spec.
        stand_in.__spec__ = ModuleSpec(module, None, is_package=True)
        there = sys.modules.get(module)
        if there is not None and there is not _installed.get(module):
            _replaced[module] = there
        _installed[module] = sys.modules[module] = stand_in
        parent, _, child = module.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], child, stand_in)
    _finder.add(name, sys.modules[name].__version__)
    return sys.modules[name]


def uninstall(name: str) -> None:
    """Takes away what install() put there and puts back what it replaced; nothing if something else is there by now."""
    _finder.remove(name)
    for module in _names(name):
        stand_in = _installed.pop(module, None)
        before = _replaced.pop(module, None)
        if stand_in is None or sys.modules.get(module) is not stand_in:
            continue
        parent, _, child = module.rpartition(".")
        owner = sys.modules.get(parent)
        if before is None:
            del sys.modules[module]
            if getattr(owner, child, None) is stand_in:
                delattr(owner, child)
        else:
            sys.modules[module] = before
            if owner is not None:
                setattr(owner, child, before)
