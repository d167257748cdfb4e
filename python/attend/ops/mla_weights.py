# SPDX-License-Identifier: Apache-2.0
"""The weights of multi-head latent attention, and the products with them."""

from __future__ import annotations

from .. import _native
from .._tensors import Tensor, dtype_name, empty, require


class MlaWeights:
    """The weights W_UK and W_UV of an MLA layer, packed for the products with them; made once, never changed.

    H heads; L kv_lora_rank, P qk_nope_head_dim, R qk_rope_head_dim, V v_head_dim. Any number of threads may call the
    products at the same time. All of their tensors have the layer's type; a row of a result has the same bits
    whatever other rows are multiplied with it.
    """

    __slots__ = ("_native",)

    def __init__(
        self,
        weight: Tensor,
        *,
        num_heads: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
        dtype: str | None = None,
        weight_scale: Tensor | None = None,
        isa: str | None = None,
        executor: _native.ThreadPool | None = None,
    ) -> None:
        """Packs the weight of a kv_b_proj layer.

        Args:
            weight: [H * (P + V), L], for each head P rows of keys, then V rows of values: float32, float16 or
                bfloat16, or codes of int8 or float8_e4m3fn with scales. Only read during the call.
            num_heads: H.
            kv_lora_rank, qk_nope_head_dim, qk_rope_head_dim, v_head_dim: L, P, R, V; L, P and V multiples of 8.
            dtype: type of the layer, "float32", "float16" or "bfloat16"; None = that of weight, bfloat16 for codes.
            weight_scale: float32, of codes only: [1] for all, [H * (P + V)] for rows, or
                [ceil(H * (P + V) / 128), ceil(L / 128)] for blocks of 128 x 128.
            isa: level of the kernels ("avx2", ...); None = the highest that the machine has.

        Raises:
            InvalidArgument, InvalidType, Unsupported.
        """
        require("MlaWeights", "weight", weight, 2)
        if dtype is None:
            name = dtype_name(weight)
            dtype = name if name in ("float32", "float16", "bfloat16") else "bfloat16"
        self._native = _native.MlaWeights.from_kv_b_proj(
            weight=weight,
            weight_scale=weight_scale,
            kv_lora_rank=kv_lora_rank,
            qk_nope_head_dim=qk_nope_head_dim,
            qk_rope_head_dim=qk_rope_head_dim,
            v_head_dim=v_head_dim,
            num_heads=num_heads,
            dtype=dtype,
            isa=isa,
            executor=executor,
        )

    @property
    def num_heads(self) -> int:
        """H."""
        return self._native.num_heads

    @property
    def kv_lora_rank(self) -> int:
        """L, the latent that keys and values of all heads come from."""
        return self._native.dims[0]

    @property
    def qk_nope_head_dim(self) -> int:
        """P, the part of a head's query and key without position."""
        return self._native.dims[1]

    @property
    def qk_rope_head_dim(self) -> int:
        """R, the part with rotary position."""
        return self._native.dims[2]

    @property
    def v_head_dim(self) -> int:
        """V, a head's value."""
        return self._native.dims[3]

    @property
    def dtype(self) -> str:
        """Type of the layer: "float32", "float16" or "bfloat16"."""
        return {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[self._native.dtype]

    @property
    def isa(self) -> str:
        """Highest level of the kernels."""
        return self._native.isa

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weights."""
        return self._native.bytes

    def up_project(
        self,
        kv_c: Tensor,
        *,
        k_nope: Tensor | None = None,
        v: Tensor | None = None,
        executor: _native.ThreadPool | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Keys without position and values of all heads from latents.

        Args:
            kv_c: [N, L].
            k_nope: [N, H, P] to write to; None = a new tensor.
            v: [N, H, V] to write to; None = a new tensor.

        Returns:
            (k_nope, v).

        Raises:
            InvalidArgument, InvalidType: before anything is written.
        """
        require("MlaWeights.up_project", "kv_c", kv_c, 2)
        rows = (kv_c.shape[0], self.num_heads)
        k_nope = empty(kv_c, (*rows, self.qk_nope_head_dim)) if k_nope is None else k_nope
        v = empty(kv_c, (*rows, self.v_head_dim)) if v is None else v
        self._native.up_project(kv_c=kv_c, k_nope=k_nope, v=v, executor=executor)
        return k_nope, v

    def absorb_query(
        self, q_nope: Tensor, *, out: Tensor | None = None, executor: _native.ThreadPool | None = None
    ) -> Tensor:
        """Queries that can be multiplied with latents: each head's times its W_UK.

        Args:
            q_nope: [T, H, P].
            out: [T, H, L] to write to, may be part of a [T, H, L + R] tensor; None = a new tensor.

        Returns:
            out.

        Raises:
            InvalidArgument, InvalidType: before anything is written.
        """
        require("MlaWeights.absorb_query", "q_nope", q_nope, 3)
        out = empty(q_nope, (*q_nope.shape[:2], self.kv_lora_rank)) if out is None else out
        self._native.absorb_query(q_nope=q_nope, ql_nope=out, executor=executor)
        return out

    def v_up_project(
        self, latents: Tensor, *, out: Tensor | None = None, executor: _native.ThreadPool | None = None
    ) -> Tensor:
        """Outputs from sums of latents: each head's times its W_UV.

        Args:
            latents: [T, H, L].
            out: [T, H, V] to write to; None = a new tensor.

        Returns:
            out.

        Raises:
            InvalidArgument, InvalidType: before anything is written.
        """
        require("MlaWeights.v_up_project", "latents", latents, 3)
        out = empty(latents, (*latents.shape[:2], self.v_head_dim)) if out is None else out
        self._native.v_up_project(latents=latents, out=out, executor=executor)
        return out

    def copy_w_uk_t(self, out: Tensor) -> Tensor:
        """Writes W_UK as absorb_query() uses it.

        Args:
            out: [H, P, L] of the layer's type.

        Returns:
            out.

        Raises:
            InvalidArgument, InvalidType: before anything is written.
        """
        self._native.copy_w_uk_t(out=out)
        return out

    def copy_w_uv(self, out: Tensor) -> Tensor:
        """Writes W_UV as v_up_project() uses it.

        Args:
            out: [H, L, V] of the layer's type.

        Returns:
            out.

        Raises:
            InvalidArgument, InvalidType: before anything is written.
        """
        self._native.copy_w_uv(out=out)
        return out
