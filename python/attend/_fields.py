# SPDX-License-Identifier: Apache-2.0
"""What the settings of the library have in common on their way to the native module."""

from __future__ import annotations

from typing import Any

from .errors import InvalidType


def require_kind(function: str, argument: str, value: Any, kind: type) -> Any:
    """`value`, if it is an instance of `kind`."""
    if not isinstance(value, kind):
        got = "None" if value is None else type(value).__name__
        raise InvalidType(
            f"[{function}] argument '{argument}': expected {kind.__module__}.{kind.__qualname__}, got {got}",
            function,
            argument,
        )
    return value


def fields(function: str, argument: str, value: Any, kind: type) -> dict[str, Any]:
    """The fields of a dataclass, those that are dataclasses as dicts too."""
    require_kind(function, argument, value, kind)
    return {
        name: fields(function, name, field, type(field))
        if hasattr(field := getattr(value, name), "__dataclass_fields__")
        else field
        for name in value.__dataclass_fields__
    }
