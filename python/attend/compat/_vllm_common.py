# SPDX-License-Identifier: Apache-2.0
"""What the drop-in functions for vLLM share: errors of their own, and caches by kv_cache_dtype."""

from __future__ import annotations

import math
import sys
from numbers import Real
from typing import Any, NoReturn

from .._tensors import Tensor, dtype_name, empty, is_torch, view_as
from ..errors import InvalidArgument, InvalidType, Unsupported

#: Types of fp8 codes by kv_cache_dtype.
FP8 = {"fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2"}
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
    wanted = FP8.get(kv_cache_dtype) or _PLAIN.get(kv_cache_dtype)
    if wanted is None:
        unsupported(function, "kv_cache_dtype", f"auto, {', '.join(FP8)} or the name of a type", kv_cache_dtype)
    if stored == "uint8" and kv_cache_dtype in FP8:
        return view_as(cache, wanted)
    if stored != wanted:
        refuse(InvalidArgument, function, argument, f"elements of kv_cache_dtype {kv_cache_dtype}", stored)
    return cache


def require_dense(function: str, argument: str, tensor: Tensor, rank: int | None = None) -> None:
    """A tensor of torch or numpy that can be sliced and reshaped without leaving the CPU; `rank` None is any."""
    if is_torch(tensor):
        torch = sys.modules["torch"]
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided or tensor.is_quantized:
            refuse(InvalidArgument, function, argument, "a dense tensor on the CPU", f"{tensor.layout} {tensor.device}")
        if tensor.requires_grad and torch.is_grad_enabled():
            refuse(InvalidArgument, function, argument, "a tensor without gradients", "requires_grad=True")
    elif type(tensor) is not getattr(sys.modules.get("numpy"), "ndarray", None):
        got = "None" if tensor is None else type(tensor).__name__
        refuse(InvalidType, function, argument, "a tensor of torch or numpy", got)
    if rank is not None and len(tensor.shape) != rank:
        refuse(InvalidArgument, function, argument, f"{rank} dimensions", tuple(tensor.shape))


def require_number(function: str, argument: str, value: float) -> float:
    """A finite number > 0 that stays so as float32."""
    if isinstance(value, bool) or not isinstance(value, Real):
        refuse(InvalidType, function, argument, "a number", type(value).__name__)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not 1e-37 < number < 3e38:
        refuse(InvalidArgument, function, argument, "a finite float32 > 0", number)
    return number


def float32_of(like: Tensor, shape: tuple[int, ...], number: float) -> Tensor:
    """A float32 tensor of like's framework, filled with `number`."""
    result = empty(like, shape, "float32")
    result[...] = number
    return result


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
