# SPDX-License-Identifier: Apache-2.0
"""What the drop-in functions for vLLM share: errors of their own, and caches by kv_cache_dtype."""

from __future__ import annotations

from typing import Any, NoReturn

from .._tensors import Tensor, dtype_name, is_torch, view_as
from ..errors import InvalidArgument, InvalidType, Unsupported

_FP8 = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
_PLAIN = {"float": "float32", "float32": "float32", "half": "float16", "float16": "float16", "bfloat16": "bfloat16"}


def refuse(
    kind: type[InvalidArgument] | type[InvalidType], function: str, argument: str, expected: str, got: Any
) -> NoReturn:
    raise kind(f"[{function}] argument '{argument}': expected {expected}, got {got}", function, argument)


def unsupported(function: str, argument: str, expected: str, got: Any) -> NoReturn:
    raise Unsupported(f"[{function}] argument '{argument}': expected {expected}, got {got}", [f"{argument} = {got}"])


def cache_as(function: str, argument: str, cache: Tensor, kv_cache_dtype: str) -> Tensor:
    """The cache with elements of the type that `kv_cache_dtype` says."""
    if not hasattr(cache, "dtype"):
        refuse(InvalidType, function, argument, "a tensor", type(cache).__name__)
    if not isinstance(kv_cache_dtype, str):
        refuse(InvalidType, function, "kv_cache_dtype", "a string", type(kv_cache_dtype).__name__)
    stored = dtype_name(cache)
    if kv_cache_dtype == "auto":
        return cache
    wanted = _FP8.get(kv_cache_dtype) or _PLAIN.get(kv_cache_dtype)
    if wanted is None:
        unsupported(function, "kv_cache_dtype", f"auto, {', '.join(_FP8)} or the name of a type", kv_cache_dtype)
    if stored == "uint8" and kv_cache_dtype in _FP8:
        return view_as(cache, wanted)
    if stored != wanted:
        refuse(InvalidArgument, function, argument, f"elements of kv_cache_dtype {kv_cache_dtype}", stored)
    return cache


def transposed(function: str, argument: str, lse: Tensor) -> Tensor:
    if len(getattr(lse, "shape", ())) != 2:
        refuse(InvalidArgument, function, argument, "a tensor [H, T]", getattr(lse, "shape", type(lse).__name__))
    return lse.T


def query_start_loc(function: str, argument: str, lengths: Tensor) -> Tensor:
    """That of one query token a request, for as many requests as there are lengths."""
    shape = getattr(lengths, "shape", ())
    if len(shape) != 1:
        refuse(InvalidArgument, function, argument, "int32 [B]", tuple(shape))
    if is_torch(lengths):
        import torch

        return torch.arange(shape[0] + 1, dtype=torch.int32)
    import numpy

    return numpy.arange(shape[0] + 1, dtype=numpy.int32)
