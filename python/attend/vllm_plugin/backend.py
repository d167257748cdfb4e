# SPDX-License-Identifier: Apache-2.0
"""The back end that vLLM sees: decoder attention over its paged cache, computed by attend.ops.

The cache of a layer is [num_blocks, num_kv_heads, block_size, 2 * head_size]: the rows of a head lie together, a key
and its value side by side. attend reads and writes it in place, through views with other strides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    AttentionType,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from .. import ops
from ..errors import Unsupported

__all__ = ["AttendBackend", "AttendImpl", "AttendMetadata", "AttendMetadataBuilder"]


class AttendBackend(AttentionBackend):
    """What attend can do, as vLLM asks for it."""

    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.float16, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        """The name of the back end that this one replaces: vLLM finds it by that."""
        return "CPU_ATTN"

    @staticmethod
    def get_impl_cls() -> type[AttendImpl]:
        """The class of a layer's attention."""
        return AttendImpl

    @staticmethod
    def get_builder_cls() -> type[AttendMetadataBuilder]:
        """The class that makes a batch's metadata."""
        return AttendMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any multiple of 16."""
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """8, 16, ..., 256."""
        return list(range(8, 257, 8))

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Heads outside of the rows of a block, as in the description of this module."""
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Yes."""
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        """Yes."""
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Yes: a row's bits do not depend on its batch."""
        return True

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Decoders only."""
        return attn_type == AttentionType.DECODER


@dataclass
class AttendMetadata:
    """A batch: what its layers have in common."""

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    causal: bool


class AttendMetadataBuilder(AttentionMetadataBuilder[AttendMetadata]):
    """Makes it of vLLM's metadata, without a copy."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.kv_cache_spec = kv_cache_spec

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> AttendMetadata:
        """The batch's metadata. `common_prefix_len` and `fast_build` are hints that change no result.

        Raises:
            Unsupported: if requests differ in whether they are causal.
        """
        m = common_attn_metadata
        if not isinstance(m.causal, bool):
            raise Unsupported("[AttendMetadataBuilder.build] argument 'causal': expected one bool for the batch")
        return AttendMetadata(
            num_actual_tokens=m.num_actual_tokens,
            query_start_loc=m.query_start_loc[: m.num_reqs + 1],
            seq_lens=m.seq_lens[: m.num_reqs],
            block_table=m.block_table_tensor[: m.num_reqs],
            slot_mapping=m.slot_mapping[: m.num_actual_tokens],
            causal=m.causal,
        )


def _views(kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values, each [num_blocks, block_size, num_kv_heads, head_size]."""
    half = kv_cache.shape[-1] // 2
    rows = kv_cache.transpose(1, 2)
    return rows[..., :half], rows[..., half:]


class AttendImpl(AttentionImpl[AttendMetadata]):
    """The attention of one layer."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ) -> None:
        if attn_type != AttentionType.DECODER:
            raise Unsupported(f"[AttendImpl] argument 'attn_type': expected decoder, got {attn_type}")
        if kv_cache_dtype not in AttendBackend.supported_kv_cache_dtypes:
            raise Unsupported(
                f"[AttendImpl] argument 'kv_cache_dtype': expected {AttendBackend.supported_kv_cache_dtypes}, "
                f"got {kv_cache_dtype}"
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.alibi_slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        self.sliding_window = -1 if sliding_window is None else sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or 0.0
        self.attn_type = attn_type
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks = sinks

    def do_kv_cache_update(
        self, layer: Any, key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
    ) -> None:
        """Copies the batch's new keys and values, [T, num_kv_heads, head_size], into the cache."""
        count = slot_mapping.shape[0]
        ops.reshape_and_cache_flash(key[:count], value[:count], *_views(kv_cache), slot_mapping)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AttendMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Writes the batch's attention, [T, num_heads, head_size] like the queries, to `output` and returns it.

        The keys and values of the batch are in the cache already: `key` and `value` are not read. Without metadata
        vLLM only warms up, and nothing is done.

        Raises:
            Unsupported: if the output is to be quantised.
        """
        if output_scale is not None or output_block_scale is not None:
            name = "output_scale" if output_scale is not None else "output_block_scale"
            raise Unsupported(f"[AttendImpl.forward] argument '{name}': outputs are not quantised")
        if attn_metadata is None:
            return output
        m, count = attn_metadata, attn_metadata.num_actual_tokens
        if self.sinks is not None and self.sinks.dtype != torch.float32:
            self.sinks = self.sinks.float()  # weights are there now, not yet when the layer was made
        keys, values = _views(kv_cache)
        ops.flash_attn_varlen(
            query[:count],
            keys,
            values,
            m.query_start_loc,
            seq_lens=m.seq_lens,
            block_table=m.block_table,
            scale=self.scale,
            causal=m.causal,
            window_left=self.sliding_window - 1 if self.sliding_window > 0 else -1,
            softcap=self.logits_soft_cap,
            alibi_slopes=self.alibi_slopes,
            sinks=self.sinks,
            out=output[:count].view(count, self.num_heads, self.head_size),
        )
        return output
