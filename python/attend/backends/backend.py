# SPDX-License-Identifier: Apache-2.0
"""Back ends, builders of metadata, and layers."""

from __future__ import annotations

import sys
from typing import Any

from .. import _native
from .._fields import fields, require_kind
from .._tensors import Tensor, empty, require
from ..batch import CommonMetadata, Integers, native_batch
from ..cache import KvCacheSpec, new_cache
from ..threads import available_cpus, get_num_threads
from .configs import AttentionConfig, BuilderConfig, Capability, ImplConfig


def names() -> list[str]:
    """Names of all back ends."""
    return _native.backend_names()


def find(name: str) -> Backend:
    """The back end of that name.

    Raises:
        InvalidArgument: listing the valid names.
    """
    return Backend(_native.find_backend(name=name))


def _num_workers() -> int:
    """Threads of a call without executor, as far as that is known before there are tensors."""
    torch = sys.modules.get("torch")
    return get_num_threads() or (torch.get_num_threads() if torch is not None else available_cpus())


class Backend:
    """One attention back end, of find() or require()."""

    __slots__ = ("_native",)

    def __init__(self, native: Any) -> None:
        self._native = require_kind("Backend", "native", native, _native.Backend)

    name = property(lambda self: self._native.name, doc="Name in capitals, like FLASH_ATTN.")
    capability = property(lambda self: Capability(**self._native.capability), doc="What it can do: a Capability.")
    kv_cache_block_dim = property(
        lambda self: self._native.kv_cache_block_dim,
        doc="Dimension of kv_cache_shape() without layers that counts blocks.",
    )
    required_kv_cache_layout = property(
        lambda self: self._native.required_kv_cache_layout,
        doc='Layout that it insists on, "nhd" or "hnd"; None = both work.',
    )

    def __repr__(self) -> str:
        return f"<attend back end {self.name}>"

    def validate_configuration(self, config: AttentionConfig) -> list[str]:
        """Every reason why it cannot serve `config`, in a fixed order; empty = it can."""
        return self._native.validate_configuration(
            config=fields("validate_configuration", "config", config, AttentionConfig)
        )

    def kv_cache_shape(self, spec: KvCacheSpec) -> tuple[int, ...]:
        """Logical shape of a cache.

        Raises:
            InvalidArgument: a block size that it does not support, or a field out of range.
        """
        return self._native.kv_cache_shape(spec=fields("kv_cache_shape", "spec", spec, KvCacheSpec))

    def kv_scale_shape(self, spec: KvCacheSpec) -> tuple[int, ...]:
        """Shape of the float32 cache of scales beside the cache; () = there is none."""
        return self._native.kv_scale_shape(spec=fields("kv_scale_shape", "spec", spec, KvCacheSpec))

    def kv_cache_stride_order(
        self, layout: str = "nhd", include_layers: bool = False, format: str = "plain"
    ) -> tuple[int, ...]:
        """Permutation of kv_cache_shape(): physical dimension i is logical dimension order[i]."""
        return self._native.kv_cache_stride_order(layout=layout, include_layers=include_layers, format=format)

    def preferred_block_size(self, preferred: int) -> int:
        """`preferred` if it is supported, else the smallest supported block size."""
        return self._native.preferred_block_size(preferred=preferred)

    def new_kv_cache(
        self,
        spec: KvCacheSpec,
        *,
        layout: str = "nhd",
        framework: str = "numpy",
        executor: _native.ThreadPool | None = None,
    ) -> Tensor:
        """A zeroed cache with memory of its own (attend.cache.CacheMemory), of kv_cache_shape() in the stride order.

        Args:
            spec: the cache.
            layout: "nhd" or "hnd".
            framework: "numpy" or "torch".
            executor: whose threads touch the memory.
        """
        require_kind("new_kv_cache", "spec", spec, KvCacheSpec)
        order = self.kv_cache_stride_order(layout, spec.num_layers > 0, spec.format)
        return new_cache(
            self.kv_cache_shape(spec), spec.stored_dtype, order=order, framework=framework, executor=executor
        )

    def make_builder(self, config: BuilderConfig) -> MetadataBuilder:
        """A builder for a group of layers with the same cache.

        Raises:
            InvalidArgument: a field that is out of range; Unsupported: config.arithmetic.
        """
        values = fields("make_builder", "config", config, BuilderConfig)
        if values["num_workers"] is None:
            values["num_workers"] = _num_workers()
        return MetadataBuilder(_native.make_builder(backend=self._native, config=values))

    def make_impl(self, config: ImplConfig) -> Impl:
        """A layer.

        Raises:
            InvalidArgument: a field that is out of range.
        """
        values = fields("make_impl", "config", config, ImplConfig)
        return Impl(_native.make_impl(backend=self._native, config=values), config)


class Metadata:
    """What a builder made of a batch, for all layers of a group. Keeps the batch's block table alive."""

    __slots__ = ("_native",)

    def __init__(self, native: Any) -> None:
        self._native = require_kind("Metadata", "native", native, _native.Metadata)

    workspace_bytes = property(lambda self: self._native.workspace_bytes, doc="Scratch that Impl.forward() needs.")
    cascade = property(
        lambda self: self._native.cascade,
        doc="Which prefixes are attended to once for several requests, and why; None = not looked for.",
    )
    sparse = property(
        lambda self: self._native.sparse, doc="Strategy of a sparse back end, and why; None = another back end."
    )


class MetadataBuilder:
    """Turns batches into a back end's metadata, once per batch. Made by Backend.make_builder()."""

    __slots__ = ("_native",)

    def __init__(self, native: Any) -> None:
        self._native = require_kind("MetadataBuilder", "native", native, _native.MetadataBuilder)

    reorder_batch_threshold = property(
        lambda self: self._native.reorder_batch_threshold,
        doc="Longest query that the back end treats as decode and wants in front; None = order is free.",
    )
    graph_support = property(
        lambda self: self._native.graph_support,
        doc='Batches that captured metadata serves: "never", "uniform_single_token_decode", "uniform_batch", "always".',
    )

    def build(self, batch: CommonMetadata, *, common_prefix_len: int = 0, fast_build: bool = False) -> Metadata:
        """Metadata of a batch.

        Args:
            batch: the batch.
            common_prefix_len: tokens that all requests share at the start, whole blocks; 0 = none or not known.
            fast_build: prefer a quick plan over a balanced one.

        Raises:
            InvalidArgument: the batch breaks an invariant.
        """
        return Metadata(
            self._native.build(
                batch=native_batch("MetadataBuilder.build", "batch", batch),
                common_prefix_len=common_prefix_len,
                fast_build=fast_build,
            )
        )

    def update_block_table(
        self, metadata: Metadata, block_table: Tensor | None, slot_mapping: Integers | None
    ) -> Metadata:
        """A copy for another cache group that differs only in these two."""
        function = "MetadataBuilder.update_block_table"
        return Metadata(
            self._native.update_block_table(
                metadata=require_kind(function, "metadata", metadata, Metadata)._native,
                block_table=block_table,
                slot_mapping=slot_mapping,
            )
        )

    def build_for_capture(self, batch: CommonMetadata) -> Metadata:
        """Metadata with buffers of fixed sizes and addresses, which refresh() puts other batches into.

        Raises:
            InvalidArgument: the batch; Unsupported: graph_support is "never".
        """
        return Metadata(
            self._native.build_for_capture(batch=native_batch("MetadataBuilder.build_for_capture", "batch", batch))
        )

    def refresh(self, metadata: Metadata, batch: CommonMetadata) -> None:
        """Puts another batch, within BuilderConfig.capture, into metadata of build_for_capture() or a copy of it.

        Raises:
            InvalidArgument: as build_for_capture(), or a layer is running with the metadata, which is left as it was.
        """
        function = "MetadataBuilder.refresh"
        self._native.refresh(
            metadata=require_kind(function, "metadata", metadata, Metadata)._native,
            batch=native_batch(function, "batch", batch),
        )


class Impl:
    """One layer. Made by Backend.make_impl(); any number of threads may call it."""

    __slots__ = ("_config", "_native")

    def __init__(self, native: Any, config: ImplConfig) -> None:
        self._native = require_kind("Impl", "native", native, _native.Impl)
        self._config = config

    def _output(self, query: Tensor) -> Tensor:
        require("Impl.forward", "query", query, 3)
        heads, size = self._config.num_q_heads, self._config.head_size
        if self._config.mla is not None:
            size = self._config.mla.dims.v_head_dim
        if self._config.differential is not None and self._config.differential.variant == "v2":
            heads //= 2
        return empty(query, (query.shape[0], heads, size))

    def forward(
        self,
        query: Tensor,
        kv_cache: Tensor | None,
        metadata: Metadata | None,
        *,
        key: Tensor | None = None,
        value: Tensor | None = None,
        kv_c: Tensor | None = None,
        k_pe: Tensor | None = None,
        topk_indices: Tensor | None = None,
        token_lambda: Tensor | None = None,
        kv_scale_cache: Tensor | None = None,
        output: Tensor | None = None,
        output_scale: float | None = None,
        lse: Tensor | None = None,
        workspace: Tensor | None = None,
        executor: _native.ThreadPool | None = None,
    ) -> Tensor:
        """Writes the new keys into the cache, where the metadata has slots, then attends. T tokens.

        T may exceed the batch's num_tokens: rows behind it are neither read nor written.

        Args:
            query: [T, Hq, D]; of MLA [T, Hq, P + R], rotated.
            kv_cache: of Backend.kv_cache_shape(), written; None for encoders.
            metadata: of the batch; None = profiling run: the output is filled with zeros.
            key, value: [T, Hkv, D]; None = they are already in the cache.
            kv_c, k_pe: of MLA instead: [T, L] and [T, R].
            topk_indices: of sparse MLA, and needed there: int32 [T, topk], positions; negative = none.
            token_lambda: of differential attention v2, and needed there: [T, Hq / 2].
            kv_scale_cache: float32, of Backend.kv_scale_shape(), written.
            output: [T, Hq, D] to write to, of MLA [T, Hq, V]; None = a new tensor of query's type.
            output_scale: of an fp8 output of MLA: a code stands for code * output_scale.
            lse: float32 [T, Hq] to write to, natural logarithm; None = not wanted.
            workspace: metadata.workspace_bytes bytes, 64-byte aligned; None = a buffer of the calling thread, which
                it keeps.
            executor: threads, as many as BuilderConfig.num_workers; None = a pool of that many.

        Returns:
            The output.

        Raises:
            InvalidArgument, InvalidType: before anything is written.
        """
        if output is None:
            output = self._output(query)
        native = None if metadata is None else require_kind("Impl.forward", "metadata", metadata, Metadata)._native
        self._native.forward(
            query=query,
            key=key,
            value=value,
            kv_c=kv_c,
            k_pe=k_pe,
            topk_indices=topk_indices,
            token_lambda=token_lambda,
            kv_cache=kv_cache,
            kv_scale_cache=kv_scale_cache,
            output=output,
            output_scale=output_scale,
            lse=lse,
            workspace=workspace,
            metadata=native,
            executor=executor,
        )
        return output
