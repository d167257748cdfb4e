# SPDX-License-Identifier: Apache-2.0
"""KV caches: shapes, stride orders, memory in huge pages spread over NUMA nodes, and the scales of int8 values."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import _native
from ._fields import fields, require_kind
from ._tensors import Tensor, numpy_dtype, require_choice
from .errors import InvalidArgument, InvalidType

__all__ = [
    "CacheMemory",
    "CacheMemoryReport",
    "KvCacheSpec",
    "ValueScaleCalibration",
    "cache_view",
    "flash_attn_cache_shape",
    "flash_attn_scale_shape",
    "flash_attn_stride_order",
    "load_value_scales",
    "mla_cache_shape",
    "mla_stride_order",
    "new_cache",
    "save_value_scales",
]

# Names of types as torch and numpy have them, by those of the library.
_DTYPES = {
    "f32": "float32",
    "f16": "float16",
    "bf16": "bfloat16",
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "i8": "int8",
    "u8": "uint8",
    "i32": "int32",
    "i64": "int64",
}
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2, "int32": 4, "int64": 8}


@dataclass(frozen=True)
class KvCacheSpec:
    """Shape of one layer's cache, or of all layers' if num_layers > 0.

    Attributes:
        num_blocks: >= 1.
        block_size: tokens per block, >= 1.
        num_kv_heads: >= 1; 1 for latents of MLA.
        head_size: elements, >= 1.
        dtype: "bfloat16", "float8_e4m3fn", ...; formats other than "plain" have a type of their own.
        num_layers: 0 = no layers dimension.
        format: "plain", "int8_level1", "int8_level2", "int8_per_token_head" or "fp8_ds_mla".
    """

    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_size: int
    dtype: str = "bfloat16"
    num_layers: int = 0
    format: str = "plain"

    def validate(self) -> None:
        """Raises InvalidArgument for a field out of range or a size over 2^62 bytes."""
        _native.stored_dtype(spec=fields("KvCacheSpec", "self", self, KvCacheSpec))

    @property
    def stored_dtype(self) -> str:
        """Type of the cache's elements as torch and numpy call it: `dtype`, or that of the format."""
        return _DTYPES[_native.stored_dtype(spec=fields("KvCacheSpec", "self", self, KvCacheSpec))]


def flash_attn_cache_shape(spec: KvCacheSpec) -> tuple[int, ...]:
    """[2, num_blocks, block_size, num_kv_heads, head_size], keys then values, with num_layers in front if there are.

    int8_level1: [2, num_blocks, num_kv_heads, block_size, head_size]; int8_level2: 3 planes of that.
    """
    return _native.flash_attn_cache_shape(spec=fields("flash_attn_cache_shape", "spec", spec, KvCacheSpec))


def flash_attn_scale_shape(spec: KvCacheSpec) -> tuple[int, ...]:
    """Shape of the float32 cache of scales of an int8 format, zeroed before use; () for other caches."""
    return _native.flash_attn_scale_shape(spec=fields("flash_attn_scale_shape", "spec", spec, KvCacheSpec))


def flash_attn_stride_order(
    layout: str = "nhd", include_layers: bool = False, format: str = "plain"
) -> tuple[int, ...]:
    """Permutation of flash_attn_cache_shape(): physical dimension i is logical dimension order[i].

    Args:
        layout: "nhd" or "hnd", order of tokens and heads in a block.
        include_layers: the shape has layers; then blocks are outermost.
        format: as KvCacheSpec.format.
    """
    return _native.flash_attn_stride_order(layout=layout, include_layers=include_layers, format=format)


def mla_cache_shape(spec: KvCacheSpec) -> tuple[int, ...]:
    """[num_blocks, block_size, head_size], with num_layers in front if there are; 656 bytes a row of fp8_ds_mla."""
    return _native.mla_cache_shape(spec=fields("mla_cache_shape", "spec", spec, KvCacheSpec))


def mla_stride_order(include_layers: bool = False) -> tuple[int, ...]:
    """Permutation of mla_cache_shape(), as flash_attn_stride_order()."""
    return _native.mla_stride_order(include_layers=include_layers)


@dataclass(frozen=True)
class CacheMemoryReport:
    """What became of a CacheMemory, which works in every case.

    Attributes:
        huge_pages_advised: the kernel was asked for huge pages and may give them.
        huge_pages_problem: why it was not; "" if it was, or was not to be.
        nodes: bytes by NUMA node; empty if no node was chosen.
        nodes_problem: why pages may lie elsewhere than `nodes` says; "" if they do not.
    """

    huge_pages_advised: bool
    huge_pages_problem: str
    nodes: dict[int, int]
    nodes_problem: str


class CacheMemory:
    """Memory of KV caches: in huge pages where the kernel gives them, spread over NUMA nodes, touched at once.

    Views of it (cache_view()) keep the memory alive, whatever becomes of this object.

    Args:
        num_bytes: >= 0.
        fill: first value of every byte, 0 to 255.
        huge_pages: ask for huge pages.
        executor: the attend.ThreadPool whose threads touch it; None = the threads of every call.

    Raises:
        DeviceError: the memory cannot be had.
    """

    __slots__ = ("_native",)

    def __init__(
        self, num_bytes: int, *, fill: int = 0, huge_pages: bool = True, executor: _native.ThreadPool | None = None
    ) -> None:
        self._native = _native.CacheMemory(num_bytes=num_bytes, fill=fill, huge_pages=huge_pages, executor=executor)

    num_bytes = property(lambda self: self._native.num_bytes, doc="Size.")
    report = property(lambda self: CacheMemoryReport(**self._native.report), doc="A CacheMemoryReport.")

    def huge_page_bytes(self) -> int:
        """Bytes that lie in huge pages now. Takes milliseconds."""
        return self._native.huge_page_bytes()

    def bytes(self) -> Any:
        """All of it as a uint8 array of numpy, not copied."""
        return self._native.bytes()


def cache_view(
    memory: CacheMemory,
    shape: Sequence[int],
    dtype: str,
    *,
    order: Sequence[int] | None = None,
    offset: int = 0,
    framework: str = "numpy",
) -> Tensor:
    """A tensor of the logical shape over memory laid out physically by `order`. Nothing is copied.

    Args:
        memory: where it lies; lives at least as long as the tensor.
        shape: logical shape, at most 7 dimensions.
        dtype: "float32", "bfloat16", ...; numpy's bfloat16 and fp8 types are those of ml_dtypes.
        order: a permutation, physical dimension i is logical dimension order[i]; None = row-major.
        offset: first byte, a multiple of the element's size.
        framework: "numpy" or "torch".

    Raises:
        InvalidArgument: no permutation, an unknown type or framework, or more bytes than there are.
    """
    function = "cache_view"

    def refuse(argument: str, expected: str, got: Any) -> None:
        raise InvalidArgument(f"[{function}] argument '{argument}': expected {expected}, got {got}", function, argument)

    native = require_kind(function, "memory", memory, CacheMemory)._native
    shape = tuple(shape)
    strides = _native.cache_strides(shape=shape, order=tuple(range(len(shape)) if order is None else order))
    dtype = _DTYPES.get(dtype, dtype)
    if dtype not in _DTYPES.values():
        refuse("dtype", "one of " + ", ".join(_DTYPES.values()), dtype)
    size = _SIZES.get(dtype, 1)
    if offset < 0 or offset % size:
        refuse("offset", f"a multiple of {size} bytes, >= 0", offset)
    end = offset + math.prod(shape) * size
    if min(shape, default=0) < 0 or end > memory.num_bytes:
        refuse("shape", f"sizes >= 0 and at most {memory.num_bytes} bytes", f"{shape} of {dtype} up to byte {end}")
    window = native.bytes()[offset:end]
    if framework == "torch":
        import torch

        return torch.from_numpy(window).view(getattr(torch, dtype)).as_strided(shape, strides)
    if framework != "numpy":
        refuse("framework", "numpy or torch", framework)
    import numpy

    return numpy.ndarray(shape, numpy_dtype(dtype), buffer=window, strides=[s * size for s in strides])


def _tuple(function: str, argument: str, values: Sequence[int]) -> tuple[int, ...]:
    try:
        return tuple(values)
    except TypeError:
        text = f"[{function}] argument '{argument}': expected a sequence of integers, got {type(values).__name__}"
        raise InvalidType(text, function, argument) from None


def _path(function: str, path: str | os.PathLike[str]) -> str:
    if not isinstance(path, (str, os.PathLike)):
        text = f"[{function}] argument 'path': expected a path, got {type(path).__name__}"
        raise InvalidType(text, function, "path")
    return os.fspath(path)


def new_cache(
    shape: Sequence[int],
    dtype: str,
    *,
    order: Sequence[int] | None = None,
    framework: str = "numpy",
    fill: int = 0,
    executor: _native.ThreadPool | None = None,
) -> Tensor:
    """A cache_view() of a CacheMemory of its own.

    Args:
        shape, dtype, order, framework: as cache_view().
        fill, executor: as CacheMemory.
    """
    shape = _tuple("new_cache", "shape", shape)
    _native.cache_strides(shape=shape, order=tuple(range(len(shape))))
    require_choice("new_cache", "dtype", dtype, sorted({*_DTYPES, *_DTYPES.values()}))
    num_bytes = math.prod(shape) * _SIZES.get(_DTYPES.get(dtype, dtype), 1)
    memory = CacheMemory(num_bytes, fill=fill, executor=executor)
    return cache_view(memory, shape, dtype, order=order, framework=framework)


class ValueScaleCalibration:
    """Largest magnitudes of values over any number of batches, from which scales of int8 values follow.

    Args:
        num_layers, num_kv_heads, head_size: each >= 1.
    """

    __slots__ = ("_native",)

    def __init__(self, num_layers: int, num_kv_heads: int, head_size: int) -> None:
        self._native = _native.ValueScaleCalibration(
            num_layers=num_layers, num_kv_heads=num_kv_heads, head_size=head_size
        )

    def observe(self, layer: int, value: Tensor) -> None:
        """Takes the values of a batch: [T, num_kv_heads, head_size] of float32, float16 or bfloat16, finite."""
        self._native.observe(layer=layer, value=value)

    def scales(self) -> Any:
        """float32 array [num_layers, num_kv_heads, head_size]: max(amax / 127, 1e-6) of everything observed so far.

        Raises:
            InvalidArgument: a layer has seen no token.
        """
        return self._native.scales()


def save_value_scales(path: str | os.PathLike[str], scales: Tensor) -> None:
    """Writes a safetensors file of value scales. The file appears under its name when it is complete.

    Args:
        path: the file.
        scales: float32 [num_layers, num_kv_heads, head_size], contiguous, each finite and > 0.

    Raises:
        InvalidArgument, InvalidType: shape, type or values; DeviceError: cannot be written.
    """
    shape = tuple(getattr(scales, "shape", ()))
    if scales is not None and len(shape) != 3:
        raise InvalidArgument(
            f"[save_value_scales] argument 'scales': expected 3 dimensions, got {shape}", "save_value_scales", "scales"
        )
    layers, heads, head_size = shape or (0, 0, 0)
    _native.save_value_scales(
        path=_path("save_value_scales", path), scales=scales, num_layers=layers, num_kv_heads=heads, head_size=head_size
    )


def load_value_scales(path: str | os.PathLike[str]) -> Any:
    """float32 array [num_layers, num_kv_heads, head_size] of a file of save_value_scales(). Nothing in it is trusted.

    Raises:
        InvalidArgument: naming the file and what is wrong with it.
    """
    return _native.load_value_scales(path=_path("load_value_scales", path))
