# SPDX-License-Identifier: Apache-2.0
"""Tensors of any framework: making results of the framework that the inputs have."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from . import _native
from .errors import InvalidArgument, InvalidType

#: A tensor of torch, numpy (with ml_dtypes for bf16 and fp8) or any library that speaks DLPack.
Tensor = Any

_NUMPY_ONLY = {"bfloat16": "bfloat16", "float8_e4m3fn": "float8_e4m3fn", "float8_e5m2": "float8_e5m2"}


def is_torch(tensor: Tensor) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(tensor, torch.Tensor)


def numpy_dtype(name: str) -> Any:
    """numpy's type of that name; those that numpy lacks are from ml_dtypes."""
    import numpy

    if name not in _NUMPY_ONLY:
        return numpy.dtype(name)
    import ml_dtypes

    return numpy.dtype(getattr(ml_dtypes, name))


def dtype_name(tensor: Tensor) -> str:
    """ "float32", "bfloat16", "float8_e4m3fn", ... as torch and numpy call it."""
    return str(tensor.dtype).rsplit(".", 1)[-1]


def empty(like: Tensor, shape: Sequence[int], dtype: str | None = None) -> Tensor:
    """An uninitialised tensor of like's framework; `dtype` None is like's."""
    if is_torch(like):
        if dtype is None:
            return like.new_empty(shape)
        return like.new_empty(shape, dtype=getattr(sys.modules["torch"], dtype))
    import numpy

    if isinstance(like, numpy.ndarray):
        return numpy.empty(shape, dtype=like.dtype if dtype is None else numpy_dtype(dtype))
    if hasattr(like, "__array_namespace__"):
        memory = _native.dlpack_tensor(tuple(shape), dtype_name(like) if dtype is None else dtype)
        return like.__array_namespace__().from_dlpack(memory)
    return numpy.empty(shape, dtype=numpy_dtype(dtype_name(like) if dtype is None else dtype))


def require_tensor(function: str, argument: str, tensor: Tensor) -> None:
    """Something with a shape and a type of elements."""
    if not hasattr(tensor, "shape") or not hasattr(tensor, "dtype"):
        got = "None" if tensor is None else type(tensor).__name__
        raise InvalidType(f"[{function}] argument '{argument}': expected a tensor, got {got}", function, argument)


def require(function: str, argument: str, tensor: Tensor, rank: int) -> None:
    """The least that a function needs to know before it makes its results."""
    try:
        if len(tensor.shape) == rank and tensor.dtype is not None:
            return
    except Exception:
        pass
    require_tensor(function, argument, tensor)
    raise InvalidArgument(
        f"[{function}] argument '{argument}': expected {rank} dimensions, got {tuple(tensor.shape)}", function, argument
    )


def require_integer(function: str, argument: str, value: int, least: int, most: int = 2**31 - 1) -> None:
    """An integer from `least` to `most`; not a tensor with one."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InvalidType(
            f"[{function}] argument '{argument}': expected an integer, got {type(value).__name__}", function, argument
        )
    if not least <= value <= most:
        raise InvalidArgument(
            f"[{function}] argument '{argument}': expected a number from {least} to {most}, got {value}",
            function,
            argument,
        )


def result_dtype(like: Tensor) -> str | None:
    """Type of a result: None (that of `like`), for fp8 inputs bfloat16."""
    return "bfloat16" if dtype_name(like).startswith("float8") else None


#: Types that outputs may have.
OUT_TYPES = ("float32", "float16", "bfloat16")


def require_flag(function: str, argument: str, value: bool) -> None:
    """What a function decides by before it makes its results: True or False."""
    if not isinstance(value, bool):
        raise InvalidType(
            f"[{function}] argument '{argument}': expected True or False, got {type(value).__name__}",
            function,
            argument,
        )


def require_choice(function: str, argument: str, value: str, choices: Sequence[str]) -> None:
    """One of a few words."""
    if not isinstance(value, str):
        raise InvalidType(
            f"[{function}] argument '{argument}': expected a string, got {type(value).__name__}", function, argument
        )
    if value not in choices:
        expected = ", ".join(choices[:-1]) + f" or {choices[-1]}"
        raise InvalidArgument(
            f"[{function}] argument '{argument}': expected {expected}, got {value}", function, argument
        )


def zeros(like: Tensor, shape: Sequence[int], dtype: str | None = None) -> Tensor:
    result = empty(like, shape, dtype)
    result[...] = 0
    return result


def view_as(tensor: Tensor, dtype: str) -> Tensor:
    """The same memory of a torch or numpy tensor, read as elements of another type."""
    if is_torch(tensor):
        return tensor.view(getattr(sys.modules["torch"], dtype))
    return tensor.view(numpy_dtype(dtype))


def copy(tensor: Tensor | None) -> Tensor | None:
    """A tensor of its own with the same elements; None stays None."""
    if tensor is None:
        return None
    if is_torch(tensor):
        return tensor.detach().clone()
    if hasattr(tensor, "__array_namespace__") and type(tensor).__module__ != "numpy":
        result = empty(tensor, tensor.shape)
        result[...] = tensor
        return result
    import numpy

    if isinstance(tensor, numpy.ndarray):
        return tensor.copy()
    try:
        return numpy.array(numpy.from_dlpack(tensor))
    except Exception:  # no tensor: the function that takes it says so
        return tensor
