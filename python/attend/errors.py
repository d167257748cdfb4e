# SPDX-License-Identifier: Apache-2.0
"""What the library raises. Every error text names function, argument, what was expected and what was given."""


class Error(Exception):
    """Base of every exception that attend raises on purpose."""


class InvalidArgument(Error, ValueError):
    """Bad input. Nothing has been written when it is raised."""

    def __init__(self, text: str, function: str = "", argument: str = "") -> None:
        super().__init__(text)
        self.function = function
        self.argument = argument


class InvalidType(Error, TypeError):
    """An argument of a wrong type, or one that the function does not have."""

    def __init__(self, text: str, function: str = "", argument: str = "") -> None:
        super().__init__(text)
        self.function = function
        self.argument = argument


class Unsupported(Error, NotImplementedError):
    """A valid request that nothing here can serve. `reasons` has every reason, not the first."""

    def __init__(self, text: str, reasons: "list[str] | None" = None) -> None:
        super().__init__(text)
        self.reasons = list(reasons or [])


class OutOfBlocks(Error, RuntimeError):
    """A request needs more blocks than the whole cache has."""


class DeviceError(Error, RuntimeError):
    """The machine or its driver failed: memory mapping, thread creation."""
