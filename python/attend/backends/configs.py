# SPDX-License-Identifier: Apache-2.0
"""Settings of back ends and what back ends can do, as data. Names and defaults are those of the C++ library.

Types of elements are given by name ("bfloat16", "float32", ...), platforms as "cpu", "cuda:9.0" or "rocm:gfx942".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .._tensors import Tensor
from ..cache import KvCacheSpec


@dataclass(frozen=True)
class AttentionConfig:
    """What a model and an engine ask of a back end.

    Attributes:
        head_size: elements of a head.
        dtype: of queries, keys and values.
        kv_cache_dtype: "auto" (= dtype), a type, or a format of KvCacheSpec other than "plain".
        block_size: only if the user fixed it.
        attn_type: "decoder", "encoder", "encoder_only" or "encoder_decoder".
        platform: the machine that is asked about, not necessarily this one.
        use_mla, has_sink, ...: what the layers need.
    """

    head_size: int
    dtype: str = "bfloat16"
    kv_cache_dtype: str = "auto"
    block_size: int | None = None
    attn_type: str = "decoder"
    platform: str = "cpu"
    use_mla: bool = False
    has_sink: bool = False
    use_sparse: bool = False
    use_differential: bool = False
    use_mm_prefix: bool = False
    use_per_head_quant_scales: bool = False
    use_non_causal: bool = False
    use_alibi_sqrt: bool = False
    batch_invariant: bool = False
    use_kv_connector: bool = False


@dataclass(frozen=True)
class Capability:
    """What a back end can do. Empty lists mean "any", a max_head_size of 0 "no limit".

    Attributes:
        cpu_only_dtypes: those of `dtypes` that only the CPU serves.
        block_sizes: a block size must be a multiple of one of these.
        devices: where it can be chosen automatically.
        min_cuda_capability: 10 * major + minor.
    """

    dtypes: tuple[str, ...]
    cpu_only_dtypes: tuple[str, ...]
    kv_cache_dtypes: tuple[str, ...]
    head_size_multiple: int
    max_head_size: int
    head_sizes: tuple[int, ...]
    block_sizes: tuple[int, ...]
    attn_types: tuple[str, ...]
    devices: tuple[str, ...]
    min_cuda_capability: int
    is_mla: bool
    is_sparse: bool
    is_differential: bool
    supports_sink: bool
    supports_mm_prefix: bool
    supports_per_head_quant_scales: bool
    supports_non_causal: bool
    supports_alibi_sqrt: bool
    supports_batch_invariance: bool
    supports_kv_connector: bool


@dataclass(frozen=True)
class MlaDims:
    """Sizes of multi-head latent attention: 512, 128, 64, 128 of DeepSeek-V3.

    Attributes:
        kv_lora_rank: L, the latent that keys and values of all heads come from.
        qk_nope_head_dim: P, part of a head's query and key without position.
        qk_rope_head_dim: R, part with rotary position.
        v_head_dim: V, a head's value.
    """

    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def cache_dim(self) -> int:
        """Elements of a cached row, L + R."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True)
class MlaPrefillConfig:
    """What an MLA layer asks of a prefill back end."""

    dims: MlaDims
    dtype: str = "bfloat16"
    platform: str = "cpu"
    batch_invariant: bool = False
    quant_output: bool = False


@dataclass(frozen=True)
class MlaPrefillCapability:
    """What a prefill back end of MLA layers can do. Empty lists mean "any", but for quant_output_devices "none"."""

    dtypes: tuple[str, ...]
    cpu_only_dtypes: tuple[str, ...]
    devices: tuple[str, ...]
    min_cuda_capability: int
    rocm_archs: tuple[str, ...]
    dim_multiple: int
    max_head_dim: int
    quant_output_devices: tuple[str, ...]
    supports_batch_invariance: bool


@dataclass(frozen=True)
class MlaBuilderConfig:
    """What an MLA back end's builder needs besides the cache.

    Attributes:
        dims, dtype: of the layers.
        max_model_len: tokens of the longest request.
        max_num_seqs: requests of the largest batch.
        prefill_backend: a name of mla_prefill_backends(), or "auto"; the layers' too.
        workspace_tokens: context tokens that keys and values are made of at a time; 0 = follows from the two above.
        decode_threshold: longest query that takes the decode path; 0 = the default.
        short_extends_decode: False: tokens of a prompt take the prefill path however few there are.
        quant_output: layers may be called with outputs in fp8.
    """

    dims: MlaDims
    max_model_len: int
    max_num_seqs: int
    dtype: str = "bfloat16"
    prefill_backend: str = "auto"
    platform: str = "cpu"
    workspace_tokens: int = 0
    decode_threshold: int = 0
    short_extends_decode: bool = True
    quant_output: bool = False


@dataclass(frozen=True)
class SparseBuilderConfig:
    """What a sparse MLA back end's builder needs besides MlaBuilderConfig.

    Attributes:
        topk: most tokens that a query attends to.
        max_num_batched_tokens: query tokens of the largest batch.
        strategy: where prefill tokens read their keys: "automatic", "mixed" or "separate".
        num_processors: that a schedule is made for; 0 = BuilderConfig.num_workers.
    """

    topk: int
    max_num_batched_tokens: int
    strategy: str = "automatic"
    num_processors: int = 0


@dataclass(frozen=True)
class DifferentialBuilderConfig:
    """What a differential back end's builder needs: the variant of the layers, "v1" or "v2"."""

    variant: str = "v1"


@dataclass(frozen=True)
class AotLimits:
    """Room of what MetadataBuilder.build_for_capture() makes; each >= 1."""

    max_reqs: int
    max_tokens: int
    max_seq_len: int


@dataclass(frozen=True)
class BuilderConfig:
    """One group of layers with the same cache.

    Attributes:
        num_q_heads: query heads.
        cache: num_blocks may be 0 for encoders, which have no cache.
        window_left, window_right: keys visible to both sides of a position; -1 = all.
        num_speculative_tokens: drafts that a decode carries.
        num_workers: threads that layers run on; None = attend.get_num_threads(), else torch's, else all CPUs, as they
            are when the builder is made. Changes no bit of a result.
        attn_type: as AttentionConfig's.
        cascade: whether a shared prefix is attended to once: "auto", "vllm", "off" or "always".
        use_alibi: the layers have ALiBi slopes; only cascade "vllm" asks.
        capture: room for build_for_capture(); None = it is not called.
        max_num_splits: most parts along keys of a unit of work; 0 = as many as help.
        arithmetic: "automatic", "exact" or "fast".
        mla, sparse, differential: of such back ends only, and needed there.
    """

    num_q_heads: int
    cache: KvCacheSpec
    window_left: int = -1
    window_right: int = -1
    num_speculative_tokens: int = 0
    num_workers: int | None = None
    attn_type: str = "decoder"
    cascade: str = "auto"
    use_alibi: bool = False
    capture: AotLimits | None = None
    max_num_splits: int = 0
    arithmetic: str = "automatic"
    mla: MlaBuilderConfig | None = None
    sparse: SparseBuilderConfig | None = None
    differential: DifferentialBuilderConfig | None = None


@dataclass(frozen=True)
class MlaLayerConfig:
    """Weights of an MLA layer, packed once when the layer is made.

    Attributes:
        kv_b_proj: [H * (P + V), L] of float32, float16 or bfloat16, or codes of int8 or fp8: the linear layer from
            the latent, for each head P rows of keys, then V rows of values. Only read while the layer is made.
        dims: sizes.
        num_heads: H.
        dtype: of the layer.
        kv_b_proj_scale: float32 scales of codes: one, one a row, or one for each block of 128 by 128; else None.
        prefill_backend, platform: as the builder's.
    """

    kv_b_proj: Tensor
    dims: MlaDims
    num_heads: int
    dtype: str = "bfloat16"
    kv_b_proj_scale: Tensor | None = None
    prefill_backend: str = "auto"
    platform: str = "cpu"


@dataclass(frozen=True)
class DifferentialLayerConfig:
    """What a layer of differential attention has.

    Attributes:
        variant: "v1", or "v2", which has no vectors and takes Impl.forward()'s token_lambda.
        pairing: heads of a pair: "interleaved" (2 p, 2 p + 1) or "halves" (p, p + H / 2).
        lambda_q1, lambda_k1, lambda_q2, lambda_k2: [head_size].
        lambda_init: results are multiplied with 1 - lambda_init.
        lambda_rounding: type that lambda is rounded to; None = float32.
        norm: RMSNorm of each pair, with norm_weight [2 * head_size] (None = ones) and norm_eps.
    """

    variant: str = "v1"
    pairing: str = "interleaved"
    lambda_q1: Sequence[float] | None = None
    lambda_k1: Sequence[float] | None = None
    lambda_q2: Sequence[float] | None = None
    lambda_k2: Sequence[float] | None = None
    lambda_init: float = 0.0
    lambda_rounding: str | None = None
    norm: bool = True
    norm_weight: Sequence[float] | None = None
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class ImplConfig:
    """Constants of one layer. Vectors are lists or tuples of numbers.

    Attributes:
        num_q_heads, num_kv_heads, head_size: of MLA num_kv_heads is 1, head_size MlaDims.cache_dim.
        scale: multiplies q.k; None = 1 / sqrt(head_size).
        softcap: 0 = off.
        sliding_window: visible keys, the own one included; None = all.
        alibi_slopes: [num_q_heads], or None.
        use_alibi_sqrt: the bias grows with the root of the distance.
        sinks: [num_q_heads], or None.
        lse_includes_sink: the LSE counts the sink.
        attn_type, dtype, kv_cache_dtype: as AttentionConfig's.
        shares_kv_cache: the layer reads the cache of an earlier one and writes nothing.
        k_scale, v_scale: what an fp8 code is multiplied with: 1 value or one a kv head; None = 1.
        value_scales: num_kv_heads * head_size scales, of int8_level1 only and needed there.
        mla, differential: of such back ends only, and needed there.
    """

    num_q_heads: int
    num_kv_heads: int
    head_size: int
    scale: float | None = None
    softcap: float = 0.0
    sliding_window: int | None = None
    alibi_slopes: Sequence[float] | None = None
    use_alibi_sqrt: bool = False
    sinks: Sequence[float] | None = None
    lse_includes_sink: bool = False
    attn_type: str = "decoder"
    dtype: str = "bfloat16"
    kv_cache_dtype: str = "auto"
    shares_kv_cache: bool = False
    k_scale: Sequence[float] | None = None
    v_scale: Sequence[float] | None = None
    value_scales: Sequence[float] | None = None
    mla: MlaLayerConfig | None = None
    differential: DifferentialLayerConfig | None = None
