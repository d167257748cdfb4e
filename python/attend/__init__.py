# SPDX-License-Identifier: Apache-2.0
"""The attention layer of an LLM server.

attend.ops has the library's functions; attend.batch, attend.cache and attend.backends what an engine needs besides;
attend.compat functions of other libraries, under their names and with their conventions; attend.integrations what
plugs into Transformers. Importing attend imports neither torch nor numpy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import errors, ops, threads
from ._native import __version__
from .errors import DeviceError, Error, InvalidArgument, InvalidType, OutOfBlocks, Unsupported
from .ops import MlaWeights
from .threads import ThreadPool, get_num_threads, num_threads, set_num_threads

if TYPE_CHECKING:
    from . import backends, batch, cache, compat, integrations, oracle

__all__ = [
    "DeviceError",
    "Error",
    "InvalidArgument",
    "InvalidType",
    "MlaWeights",
    "OutOfBlocks",
    "ThreadPool",
    "Unsupported",
    "__version__",
    "backends",
    "batch",
    "cache",
    "compat",
    "errors",
    "get_num_threads",
    "integrations",
    "num_threads",
    "ops",
    "oracle",
    "set_num_threads",
    "threads",
]

_LATE = ("backends", "batch", "cache", "compat", "integrations", "oracle")


def __getattr__(name: str) -> Any:
    """Imports modules that not everybody needs when they are first used."""
    if name not in _LATE:
        raise AttributeError(f"module 'attend' has no attribute '{name}'")
    from importlib import import_module

    return import_module("." + name, __name__)
