# SPDX-License-Identifier: Apache-2.0
"""What references give."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from .._tensors import Tensor, is_torch


@dataclass(frozen=True)
class Bounded:
    """Numbers, and how far a correct result may be from each."""

    value: numpy.ndarray  #: float64
    bound: numpy.ndarray  #: float64, same shape; 0 = the same number


@dataclass(frozen=True)
class Result:
    """An output with its log-sum-exp, and how far a correct function may be from each element."""

    out: numpy.ndarray  #: float64, shape of the function's output
    out_bound: numpy.ndarray  #: same shape
    lse: numpy.ndarray | None  #: float64, shape of the function's LSE; None if it has none
    lse_bound: numpy.ndarray | None  #: same shape

    def worst_ratio(self, out: Tensor, lse: Tensor | None = None) -> float:
        """Largest error as a share of its bound: correct results give at most 1.

        An element that must be NaN or infinite and is not, or the other way round, gives infinity.
        """
        ratio = _ratio(out, self.out, self.out_bound)
        if lse is None:
            return ratio
        if self.lse is None or self.lse_bound is None:
            raise ValueError("this result has no LSE to compare with")
        return max(ratio, _ratio(lse, self.lse, self.lse_bound))


def as_float64(tensor: Tensor) -> numpy.ndarray:
    """The numbers of a tensor of any framework."""
    if is_torch(tensor):
        return tensor.detach().double().numpy()
    if not isinstance(tensor, numpy.ndarray):
        tensor = numpy.from_dlpack(tensor)
    return tensor.astype(numpy.float64)


def result_of(arrays: Sequence[numpy.ndarray], out_shape: Sequence[int], lse_shape: Sequence[int] | None) -> Result:
    """Gives flat arrays of the native module their shapes."""
    out, out_bound, lse, lse_bound = arrays
    if lse_shape is None:
        return Result(out.reshape(out_shape), out_bound.reshape(out_shape), None, None)
    return Result(
        out.reshape(out_shape), out_bound.reshape(out_shape), lse.reshape(lse_shape), lse_bound.reshape(lse_shape)
    )


def _ratio(got: Any, expected: numpy.ndarray, bound: numpy.ndarray) -> float:
    numbers = as_float64(got)
    if numbers.shape != expected.shape:
        raise ValueError(f"expected a tensor of shape {expected.shape}, got {numbers.shape}")
    finite = numpy.isfinite(expected)
    same = numpy.array_equal(numbers[~finite], expected[~finite], equal_nan=True)
    if not same or not numpy.isfinite(numbers[finite]).all():
        return float("inf")
    error = numpy.abs(numbers[finite] - expected[finite])
    allowed = bound[finite]
    if numpy.any((error > 0) & (allowed == 0)):
        return float("inf")
    return float(numpy.max(error / numpy.where(allowed == 0, 1.0, allowed), initial=0.0))
