# SPDX-License-Identifier: Apache-2.0
"""Rows of numbers of any framework as Python's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import InvalidType


def numbers_of(function: str, argument: str, values: Sequence[Any], kind: type) -> list[Any]:
    """The elements of a row as float or int."""
    try:
        return [kind(x) for x in values]
    except Exception:
        raise InvalidType(
            f"[{function}] argument '{argument}': expected a sequence of numbers, got {type(values).__name__}",
            function,
            argument,
        ) from None
