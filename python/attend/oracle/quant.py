# SPDX-License-Identifier: Apache-2.0
"""References of the codes that caches store, by the definition of each format and by search.

They take numbers of any framework and give numpy arrays, which the codes of caches must equal bit for bit.
"""

from __future__ import annotations

from typing import Any, Callable

import numpy

from .. import _native
from .._tensors import Tensor, dtype_name, is_torch, require_choice, require_tensor
from ..errors import InvalidArgument
from .result import as_float64

_FORMATS = {"float8_e4m3fn": "fp8_e4m3", "float8_e5m2": "fp8_e5m2"}
_LATENT, _ROPE, _ROW_BYTES = 512, 64, 656


def fp8_value(codes: Tensor, dtype: str) -> numpy.ndarray:
    """What codes stand for.

    Args:
        codes: uint8.
        dtype: "float8_e4m3fn" or "float8_e5m2".

    Returns:
        float64, shape of codes.

    Raises:
        InvalidArgument.
    """
    array = _integers("fp8_value", "codes", codes, numpy.uint8)
    return _native.oracle_fp8_value(_format("fp8_value", dtype), array.reshape(-1)).reshape(array.shape)


def fp8_code(x: Tensor, scale: Any, dtype: str) -> numpy.ndarray:
    """Codes of x / scale, rounded to float32 and then to the nearest finite value, ties to the even code; saturating.

    Args:
        x: numbers; NaN gives 0x7f with its sign.
        scale: a number or an array that broadcasts to x; finite, > 0, read as float32.
        dtype: "float8_e4m3fn" or "float8_e5m2".

    Returns:
        uint8, shape of x.

    Raises:
        InvalidArgument.
    """
    numbers, scales = _numbers_and_scales("fp8_code", x, scale)
    if not (numpy.isfinite(scales) & (scales > 0)).all():
        raise _refused("fp8_code", "scale", "finite scales > 0", "others")
    return _native.oracle_fp8_code(_format("fp8_code", dtype), numbers.reshape(-1), scales.reshape(-1)).reshape(
        numbers.shape
    )


def int8_scale(x: Tensor) -> numpy.ndarray:
    """max(amax / 127, 1e-6) over the last dimension, in float32; NaN where it has an infinity or NaN.

    Args:
        x: [..., n].

    Returns:
        float32 [...].

    Raises:
        InvalidArgument: n is 0 or x has no dimension.
    """
    numbers = _numbers("int8_scale", "x", x)
    if numpy.ndim(numbers) == 0 or numbers.shape[-1] == 0:
        raise _refused("int8_scale", "x", "a last dimension of at least 1", numpy.shape(numbers))
    return _native.oracle_int8_scale(numbers.reshape(-1), numbers.shape[-1]).reshape(numbers.shape[:-1])


def int8_code(x: Tensor, scale: Any) -> numpy.ndarray:
    """Codes of x / scale, rounded to float32 and then to the nearest integer, ties to even, in [-127, 127].

    Args:
        x: numbers, no NaN but where the scale is NaN.
        scale: a number or an array that broadcasts to x, > 0 or NaN, whose codes are 0.

    Returns:
        int8, shape of x.

    Raises:
        InvalidArgument.
    """
    numbers, scales = _numbers_and_scales("int8_code", x, scale)
    if not ((scales > 0) | numpy.isnan(scales)).all():
        raise _refused("int8_code", "scale", "scales > 0 or NaN", "others")
    if (numpy.isnan(numbers) & ~numpy.isnan(scales)).any():
        raise _refused("int8_code", "x", "no NaN where there is a scale", "one")
    return _native.oracle_int8_code(numbers.reshape(-1), scales.reshape(-1)).reshape(numbers.shape)


def fp8_ds_mla_encode(latent: Tensor, rope: Tensor) -> numpy.ndarray:
    """Rows of an MLA cache of format fp8_ds_mla.

    Args:
        latent: [n, 512] numbers.
        rope: uint16 [n, 64], bits of bfloat16.

    Returns:
        uint8 [n, 656].

    Raises:
        InvalidArgument.
    """
    numbers = _numbers("fp8_ds_mla_encode", "latent", latent)
    bits = _integers("fp8_ds_mla_encode", "rope", rope, numpy.uint16)
    if numbers.ndim != 2 or numbers.shape[1] != _LATENT:
        raise _refused("fp8_ds_mla_encode", "latent", f"[n, {_LATENT}]", numbers.shape)
    if bits.shape != (numbers.shape[0], _ROPE):
        raise _refused("fp8_ds_mla_encode", "rope", f"[{numbers.shape[0]}, {_ROPE}]", bits.shape)
    return _native.oracle_fp8_ds_mla_encode(numbers.reshape(-1), bits.reshape(-1)).reshape(-1, _ROW_BYTES)


def fp8_ds_mla_decode(rows: Tensor) -> numpy.ndarray:
    """The numbers that such rows mean: 512 of the latent, then 64 of the rope part.

    Args:
        rows: uint8 [n, 656].

    Returns:
        float64 [n, 576].

    Raises:
        InvalidArgument.
    """
    codes = _integers("fp8_ds_mla_decode", "rows", rows, numpy.uint8)
    if codes.ndim != 2 or codes.shape[1] != _ROW_BYTES:
        raise _refused("fp8_ds_mla_decode", "rows", f"[n, {_ROW_BYTES}]", codes.shape)
    return _native.oracle_fp8_ds_mla_decode(codes.reshape(-1)).reshape(-1, _LATENT + _ROPE)


def _refused(function: str, argument: str, expected: str, got: Any) -> InvalidArgument:
    return InvalidArgument(
        f"[oracle.{function}] argument '{argument}': expected {expected}, got {got}", f"oracle.{function}", argument
    )


def _format(function: str, dtype: str) -> str:
    require_choice(f"oracle.{function}", "dtype", dtype, tuple(_FORMATS))
    return _FORMATS[dtype]


def _integers(function: str, argument: str, tensor: Tensor, dtype: Any) -> numpy.ndarray:
    array = _array(function, argument, tensor, lambda x: x.detach().numpy() if is_torch(x) else numpy.asarray(x))
    if array.dtype != dtype:
        raise _refused(function, argument, f"elements of {numpy.dtype(dtype)}", array.dtype)
    return numpy.asarray(array, order="C")


def _array(function: str, argument: str, tensor: Tensor, convert: Callable[[Tensor], numpy.ndarray]) -> numpy.ndarray:
    """A numpy array of a tensor of any framework."""
    require_tensor(f"oracle.{function}", argument, tensor)
    if dtype_name(tensor).startswith("complex"):
        raise _refused(function, argument, "real numbers", dtype_name(tensor))
    try:
        return numpy.asarray(convert(tensor), order="C")
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise _refused(function, argument, "a tensor of numbers on the CPU", error) from error


def _numbers(function: str, argument: str, tensor: Tensor) -> numpy.ndarray:
    return _array(function, argument, tensor, as_float64)


def _numbers_and_scales(function: str, x: Tensor, scale: Any) -> tuple[numpy.ndarray, numpy.ndarray]:
    numbers = _numbers(function, "x", x)
    if isinstance(scale, (int, float)) and not isinstance(scale, bool):
        scale = numpy.asarray(scale, dtype=numpy.float64)
    with numpy.errstate(over="ignore"):
        scales = _numbers(function, "scale", scale).astype(numpy.float32)
    try:
        return numbers, numpy.array(numpy.broadcast_to(scales, numbers.shape), order="C")
    except ValueError as error:
        raise _refused(function, "scale", f"a shape that broadcasts to {numbers.shape}", numpy.shape(scales)) from error
