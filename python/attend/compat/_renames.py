# SPDX-License-Identifier: Apache-2.0
"""Errors of attend.ops in the words of the function that was called."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from ..errors import InvalidArgument, InvalidType


class renamed:
    """Names `function` and its arguments in errors of bad input; `arguments` maps our names to its names."""

    __slots__ = ("arguments", "function")

    def __init__(self, function: str, arguments: Mapping[str, str]) -> None:
        self.function = function
        self.arguments = arguments

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if not isinstance(e, (InvalidArgument, InvalidType)):
            return
        argument = self.arguments.get(e.argument, e.argument)
        text = str(e).replace(f"[{e.function}]", f"[{self.function}]", 1)
        text = text.replace(f"argument '{e.argument}'", f"argument '{argument}'", 1)
        raise type(e)(text, self.function, argument) from None
