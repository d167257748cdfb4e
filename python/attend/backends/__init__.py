# SPDX-License-Identifier: Apache-2.0
"""Attention back ends: what they can do, which one to take and why, and running them batch by batch, layer by layer.

backend = require(AttentionConfig(head_size=128, dtype="float32"))
builder = backend.make_builder(BuilderConfig(num_q_heads=8, cache=spec))
impl = backend.make_impl(ImplConfig(num_q_heads=8, num_kv_heads=2, head_size=128, dtype="float32"))
metadata = builder.build(batch)  # once a step
out = impl.forward(query, kv_cache, metadata, key=key, value=value)  # once a layer
"""

from .backend import Backend, Impl, Metadata, MetadataBuilder, find, names
from .configs import (
    AotLimits,
    AttentionConfig,
    BuilderConfig,
    Capability,
    DifferentialBuilderConfig,
    DifferentialLayerConfig,
    ImplConfig,
    MlaBuilderConfig,
    MlaDims,
    MlaLayerConfig,
    MlaPrefillCapability,
    MlaPrefillConfig,
    SparseBuilderConfig,
)
from .indexer import SparseIndexer
from .selection import Selection, mla_prefill_backends, priority, require, select, select_mla_prefill

__all__ = [
    "AotLimits",
    "AttentionConfig",
    "Backend",
    "BuilderConfig",
    "Capability",
    "DifferentialBuilderConfig",
    "DifferentialLayerConfig",
    "Impl",
    "ImplConfig",
    "Metadata",
    "MetadataBuilder",
    "MlaBuilderConfig",
    "MlaDims",
    "MlaLayerConfig",
    "MlaPrefillCapability",
    "MlaPrefillConfig",
    "Selection",
    "SparseBuilderConfig",
    "SparseIndexer",
    "find",
    "mla_prefill_backends",
    "names",
    "priority",
    "require",
    "select",
    "select_mla_prefill",
]
