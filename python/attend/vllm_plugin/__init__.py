# SPDX-License-Identifier: Apache-2.0
"""vLLM's entry point: attend computes attention on vLLM's CPU platform, if asked to.

vLLM calls register() in each of its processes, because the package names it in the group `vllm.general_plugins`. It
does something if the environment variable ATTEND_VLLM is 1: whoever installs attend for another reason keeps vLLM as
it is.
"""

from __future__ import annotations

import os

__all__ = ["register"]

_BACKEND = "attend.vllm_plugin.backend.AttendBackend"


def register() -> None:
    """Puts AttendBackend in the place of vLLM's CPU_ATTN, the back end that its CPU platform always takes.

    vLLM itself is not imported here beyond its list of back ends; the back end is when a model asks for it. Does
    nothing on another platform than the CPU, where CPU_ATTN is never chosen.

    Raises:
        ImportError: if this is no vLLM with a registry of attention back ends.
    """
    if os.environ.get("ATTEND_VLLM") != "1":
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, _BACKEND)
