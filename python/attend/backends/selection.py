# SPDX-License-Identifier: Apache-2.0
"""Which back end to take, and every reason against the others."""

from __future__ import annotations

from dataclasses import dataclass

from .. import _native
from .._fields import fields
from .backend import Backend
from .configs import AttentionConfig, MlaPrefillCapability, MlaPrefillConfig


@dataclass(frozen=True)
class Selection:
    """Answer of a selector.

    Attributes:
        name: the choice; None = none fits.
        rejected: (name, all reasons) of every candidate that cannot serve the configuration, in order of priority.
        also_valid: candidates that could serve it but come later.
    """

    name: str | None
    rejected: list[tuple[str, list[str]]]
    also_valid: list[str]

    def __str__(self) -> str:
        lines = [f"choice      {self.name or 'none fits'}"]
        if self.also_valid:
            lines.append("also valid  " + ", ".join(self.also_valid))
        for name, reasons in self.rejected:
            lines += [f"rejected    {name}", *(f"            - {reason}" for reason in reasons)]
        return "\n".join(lines)


def select(config: AttentionConfig, name: str | None = None) -> Selection:
    """Validates every candidate and picks the first that fits. "None fits" is an answer, not an error.

    Args:
        config: what is needed.
        name: only this back end is validated; None = all.

    Raises:
        InvalidArgument: an unknown name.
    """
    return Selection(*_native.select_backend(config=fields("select", "config", config, AttentionConfig), name=name))


def require(config: AttentionConfig, name: str = "auto") -> Backend:
    """The back end of select().

    Raises:
        Unsupported: nothing fits; `reasons` has all of them.
        InvalidArgument: an unknown name.
    """
    return Backend(_native.require_backend(config=fields("require", "config", config, AttentionConfig), name=name))


def priority(config: AttentionConfig) -> list[str]:
    """Names of the candidates for a platform, best first."""
    return _native.backend_priority(config=fields("priority", "config", config, AttentionConfig))


def mla_prefill_backends() -> dict[str, MlaPrefillCapability]:
    """The back ends that compute the prefill of MLA layers, by name."""
    return {name: MlaPrefillCapability(**capability) for name, capability in _native.mla_prefill_backends().items()}


def select_mla_prefill(config: MlaPrefillConfig, name: str | None = None) -> Selection:
    """select() for the prefill of MLA layers."""
    function = "select_mla_prefill"
    return Selection(
        *_native.select_mla_prefill(config=fields(function, "config", config, MlaPrefillConfig), name=name)
    )
