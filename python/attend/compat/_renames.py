# SPDX-License-Identifier: Apache-2.0
"""Errors of attend.ops in the words of the function that was called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import TracebackType

from ..errors import InvalidArgument, InvalidType, Unsupported

_SUBJECT = re.compile(r"\[([^]]*)\] argument '([^']*)'")
#: Names in the rest of a text: only those with an underscore, as the others ("k", "scale") are words as well.
_NAME = re.compile(r"\b[a-z]\w*_\w+\b")


class renamed:
    """Names `function` and its arguments in errors about arguments; `arguments` maps our names to its names."""

    __slots__ = ("arguments", "function")

    def __init__(self, function: str, arguments: Mapping[str, str]) -> None:
        self.function = function
        self.arguments = arguments

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(e, Unsupported):
            raise Unsupported(self._text(str(e)), [self._text(reason) for reason in e.reasons]) from None
        if isinstance(e, (InvalidArgument, InvalidType)):
            raise type(e)(self._text(str(e)), self.function, self._name(e.argument)) from None

    def _name(self, argument: str) -> str:
        return self.arguments.get(argument, argument)

    def _text(self, text: str) -> str:
        subject = _SUBJECT.match(text)
        if subject is None:
            return text
        rest = _NAME.sub(lambda name: self._name(name[0]), text[subject.end() :])
        return f"[{self.function}] argument '{self._name(subject[2])}'{rest}"
