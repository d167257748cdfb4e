# SPDX-License-Identifier: Apache-2.0
"""What importlib.metadata says about installed stand-ins: clients ask it for a library's version before they use it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, DistributionFinder

#: The names under which the libraries that have a version are distributed, by the modules that install() knows.
_DISTRIBUTIONS = {"flash_attn": "flash-attn", "flashinfer": "flashinfer-python"}


class StandIn(Distribution):
    """The distribution of one stand-in; it has no files."""

    def __init__(self, module: str, version: str) -> None:
        self._module = module
        self._texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {_DISTRIBUTIONS[module]}\nVersion: {version}\n",
            "top_level.txt": f"{module}\n",
        }

    def read_text(self, filename: str) -> str | None:
        """The text of a file of metadata; None if there is none."""
        return self._texts.get(filename)

    def locate_file(self, path: str | os.PathLike[str]) -> os.PathLike[str]:
        """Always raises: nothing of it lies on disk."""
        raise FileNotFoundError(f"{path}: {self._module} is attend's, see attend.compat.install")


_ANY = DistributionFinder.Context()


class Finder(DistributionFinder):
    """Finds the distributions of stand-ins, after those that are on disk, which sys.meta_path has first."""

    def __init__(self) -> None:
        self._found: dict[str, StandIn] = {}

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> None:
        """None: modules are in sys.modules."""
        return None

    def find_distributions(self, context: DistributionFinder.Context = _ANY) -> Iterable[StandIn]:
        """Those of the name that is asked for, however it is written; all if none is."""
        wanted = None if context.name is None else _normal(context.name)
        return [
            found
            for module, found in self._found.items()
            if wanted is None or _normal(_DISTRIBUTIONS[module]) == wanted
        ]

    def add(self, module: str, version: str) -> None:
        """Adds the distribution of a module, if it has one."""
        if module in _DISTRIBUTIONS:
            self._found[module] = StandIn(module, version)
            if self not in sys.meta_path:
                sys.meta_path.append(self)

    def remove(self, module: str) -> None:
        """Takes it away again."""
        self._found.pop(module, None)
        if not self._found and self in sys.meta_path:
            sys.meta_path.remove(self)


def _normal(name: str) -> str:
    return name.lower().replace("-", "_").replace(".", "_")
