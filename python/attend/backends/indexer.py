# SPDX-License-Identifier: Apache-2.0
"""What chooses the tokens of sparse multi-head latent attention."""

from __future__ import annotations

from collections.abc import Sequence

from .. import _native
from .._fields import require_kind
from .._tensors import Tensor, empty, require
from .backend import Metadata


class SparseIndexer:
    """The indexer of a layer, from its projections to Impl.forward()'s topk_indices. Any number of threads may call it.

    Args:
        num_heads: of 128 elements.
        topk: tokens chosen for each query: SparseBuilderConfig.topk.
        cos_sin_cache: [max_pos, 64], cosines of the 32 pairs, then their sines; lives at least as long as the indexer.
        k_norm_weight, k_norm_bias: [128], LayerNorm of the keys, with k_norm_eps.
        is_neox: pairs (i, i + 32); False: (2 i, 2 i + 1).
        hadamard: queries and keys are multiplied by the Hadamard matrix after the rotation.
        scale_fmt: scales of queries and keys, "ue8m0" (powers of two) or "unrounded".
        softmax_scale: None = 128^-0.5.

    Raises:
        InvalidArgument, InvalidType: naming what is out of range.
    """

    __slots__ = ("_native", "_topk")

    def __init__(
        self,
        num_heads: int,
        topk: int,
        cos_sin_cache: Tensor,
        k_norm_weight: Sequence[float],
        k_norm_bias: Sequence[float],
        *,
        k_norm_eps: float = 1e-6,
        is_neox: bool = True,
        hadamard: bool = False,
        scale_fmt: str = "ue8m0",
        softmax_scale: float | None = None,
    ) -> None:
        self._native = _native.SparseIndexer(
            num_heads=num_heads,
            topk=topk,
            cos_sin_cache=cos_sin_cache,
            k_norm_weight=k_norm_weight,
            k_norm_bias=k_norm_bias,
            k_norm_eps=k_norm_eps,
            is_neox=is_neox,
            hadamard=hadamard,
            scale_fmt=scale_fmt,
            softmax_scale=softmax_scale,
        )
        self._topk = topk

    def workspace_bytes(self, metadata: Metadata) -> int:
        """Bytes that forward() needs with metadata of a sparse MLA builder."""
        function = "SparseIndexer.workspace_bytes"
        return self._native.workspace_bytes(metadata=require_kind(function, "metadata", metadata, Metadata)._native)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        weights: Tensor,
        positions: Tensor,
        cache: Tensor,
        metadata: Metadata | None,
        *,
        topk_indices: Tensor | None = None,
        workspace: Tensor | None = None,
        executor: _native.ThreadPool | None = None,
    ) -> Tensor:
        """Writes the keys of the new tokens, then chooses for each query token the `topk` with the highest logits.

        Args:
            q: [T, H, 128] or [T, H * 128] of float32, float16 or bfloat16.
            k: [T, 128], type of q, before its norm.
            weights: [T, H], float32 or type of q.
            positions: int64 [T], contiguous.
            cache: uint8 [num_blocks, block_size, 132], the indexer's own, with the blocks of the metadata; written.
            metadata: of a sparse MLA builder; None = profiling run: -1 everywhere.
            topk_indices: int32 [T, topk] to write to; None = a new tensor.
            workspace: workspace_bytes(metadata) bytes, 64-byte aligned; None = a buffer of the calling thread.
            executor: threads, as many as BuilderConfig.num_workers; None = a pool of that many.

        Returns:
            Positions, ascending, then -1; -1 in rows behind the batch's.

        Raises:
            InvalidArgument, InvalidType: before anything but the workspace is written.
        """
        if topk_indices is None:
            require("SparseIndexer.forward", "k", k, 2)
            topk_indices = empty(k, (k.shape[0], self._topk), "int32")
        native = metadata
        if metadata is not None:
            native = require_kind("SparseIndexer.forward", "metadata", metadata, Metadata)._native
        self._native.forward(
            q=q,
            k=k,
            weights=weights,
            positions=positions,
            cache=cache,
            metadata=native,
            topk_indices=topk_indices,
            workspace=workspace,
            executor=executor,
        )
        return topk_indices
