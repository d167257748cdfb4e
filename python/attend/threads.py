# SPDX-License-Identifier: Apache-2.0
"""Which threads calls run on: those of set_num_threads(), else torch's number for tensors of torch, else all CPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from . import _native
from ._native import ThreadPool

__all__ = ["ThreadPool", "available_cpus", "get_num_threads", "num_threads", "set_num_threads"]


def available_cpus() -> int:
    """CPUs that this process may use: its affinity mask, capped by its cgroup's quota."""
    return _native.available_cpus()


def get_num_threads() -> int | None:
    """What set_num_threads() has set; None = the framework decides."""
    return _native.num_threads()


def set_num_threads(n: int | None) -> None:
    """Threads of every call from now on that names no executor; None lets the framework decide again."""
    _native.set_num_threads(n)


@contextmanager
def num_threads(n: int | None) -> Iterator[None]:
    """set_num_threads() for the block of a with statement, in the whole process."""
    before = get_num_threads()
    set_num_threads(n)
    try:
        yield
    finally:
        set_num_threads(before)
