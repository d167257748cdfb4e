# SPDX-License-Identifier: Apache-2.0
"""Differential attention: heads come in pairs, whose result is the difference of two softmax maps.

attn = softmax(q1 k1^T scale) V - lambda * softmax(q2 k2^T scale) V with V = [v1 | v2]; then RMSNorm over each pair and
a factor.
"""

from __future__ import annotations

from .. import _native
from .._tensors import Tensor, empty, require, require_choice, require_flag, result_dtype


def differential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_start_loc: Tensor,
    *,
    cu_seqlens_kv: Tensor | None = None,
    seq_lens: Tensor | None = None,
    block_table: Tensor | None = None,
    variant: str = "v1",
    pairing: str = "interleaved",
    lambda_: float = 0.0,
    token_lambda: Tensor | None = None,
    norm: bool = True,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    out_scale: float = 1.0,
    scale: float | None = None,
    causal: bool = False,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    alibi_sqrt: bool = False,
    sinks: Tensor | None = None,
    lse_includes_sink: bool = False,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    out: Tensor | None = None,
    maps: Tensor | None = None,
    lse: Tensor | None = None,
    return_maps: bool = False,
    return_lse: bool = False,
    isa: str | None = None,
    arithmetic: str | None = None,
    executor: _native.ThreadPool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Both maps of every pair of heads in one pass, subtracted, normalised and scaled.

    Args:
        q: [T, H, D] of float32, float16, bfloat16; over fp8 caches also fp8. H is even.
        k: ragged [S, Hk, D]. Paged: [2, num_blocks, block_size, Hk / 2, D], the two branches (plane 0 of dimension 1 of
            the cache); variant v2 [num_blocks, block_size, Hk, D].
        v: shape of k.
        query_start_loc: int32 [B + 1], prefix sum of the query lengths.
        cu_seqlens_kv: int32 [B + 1], prefix sum of the key lengths of ragged keys.
        seq_lens: int32 [B], keys per request of paged keys.
        block_table: int32 [B, max_blocks].
        variant: "v1": each map has a key head of its own, values are the pair's two heads side by side; "v2": both maps
            read the same key and value head.
        pairing: which heads are pair p: "interleaved" 2 p and 2 p + 1, "halves" p and p + H / 2 (v1 only).
        lambda_: weight of the second map; not read with `token_lambda`.
        token_lambda: [T, H / 2], sigmoid of it is the lambda of that token and pair. Variant v2 needs it, v1 has none.
        norm: RMSNorm of each pair; False for v2.
        norm_weight: [2 D]; None = ones.
        norm_eps: > 0.
        out_scale: factor at the end, with and without norm; 1 - lambda_init of v1.
        q_descale, k_descale, v_descale: float32 [B, Hk], what an fp8 code is multiplied with.
        out: [T, H, D] to write to, variant v2 [T, H / 2, D]; None = a new tensor.
        maps: float32 [T, H, W], W = 2 D or D of v2: the normalised map of each head is written here, and no `out`.
        lse: float32 [T, H] to write to, of both maps.
        return_maps: give new maps instead of `out`, for merging and differential_combine().
        return_lse: give a pair with the LSE.
        scale, causal, ... : as in flash_attn_varlen(); slopes and sinks by query head.

    Returns:
        out, or the maps; with `return_lse` (that, lse).

    Raises:
        InvalidArgument, InvalidType, Unsupported (fast arithmetic): before anything is written.
    """
    require("differential_attention", "q", q, 3)
    require_choice("differential_attention", "variant", variant, ("v1", "v2"))
    require_flag("differential_attention", "return_maps", return_maps)
    require_flag("differential_attention", "return_lse", return_lse)
    tokens, heads, head_size = q.shape
    v2 = variant == "v2"
    if maps is None and return_maps:
        maps = empty(q, (tokens, heads, head_size if v2 else 2 * head_size), "float32")
    if out is None and maps is None:
        out = empty(q, (tokens, heads // 2 if v2 else heads, head_size), result_dtype(q))
    if lse is None and return_lse:
        lse = empty(q, (tokens, heads), "float32")
    _native.differential_attention(
        q=q,
        k=k,
        v=v,
        out=out,
        maps=maps,
        lse=lse,
        query_start_loc=query_start_loc,
        cu_seqlens_kv=cu_seqlens_kv,
        seq_lens=seq_lens,
        block_table=block_table,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        variant=variant,
        pairing=pairing,
        token_lambda=token_lambda,
        norm=norm,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        out_scale=out_scale,
        scale=scale,
        causal=causal,
        window_left=window_left,
        window_right=window_right,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        alibi_sqrt=alibi_sqrt,
        sinks=sinks,
        lse_includes_sink=lse_includes_sink,
        isa=isa,
        arithmetic=arithmetic,
        executor=executor,
        **{"lambda": lambda_},
    )
    result = out if maps is None else maps
    return (result, lse) if return_lse else result


def differential_combine(
    maps: Tensor,
    *,
    variant: str = "v1",
    pairing: str = "interleaved",
    lambda_: float = 0.0,
    token_lambda: Tensor | None = None,
    norm: bool = True,
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-5,
    out_scale: float = 1.0,
    out: Tensor | None = None,
    isa: str | None = None,
    executor: _native.ThreadPool | None = None,
) -> Tensor:
    """The end of differential_attention() for maps that come from elsewhere, for example merged over ranks.

    Args:
        maps: [T, H, W] of float32, float16 or bfloat16: normalised maps, by query head.
        out: [T, H, W / 2] to write to, variant v2 [T, H / 2, W]; None = a new tensor of the type of maps.
        variant, pairing, lambda_, ... : as in differential_attention().

    Returns:
        out.

    Raises:
        InvalidArgument, InvalidType, Unsupported: before anything is written.
    """
    require("differential_combine", "maps", maps, 3)
    require_choice("differential_combine", "variant", variant, ("v1", "v2"))
    tokens, heads, width = maps.shape
    if out is None:
        out = empty(maps, (tokens, heads // 2, width) if variant == "v2" else (tokens, heads, width // 2))
    _native.differential_combine(
        maps=maps,
        out=out,
        variant=variant,
        pairing=pairing,
        token_lambda=token_lambda,
        norm=norm,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        out_scale=out_scale,
        isa=isa,
        executor=executor,
        **{"lambda": lambda_},
    )
    return out


def differential_lambda(
    lambda_q1: Tensor,
    lambda_k1: Tensor,
    lambda_q2: Tensor,
    lambda_k2: Tensor,
    lambda_init: float,
    *,
    round_to: str | None = None,
) -> float:
    """exp(lambda_q1 . lambda_k1) - exp(lambda_q2 . lambda_k2) + lambda_init of a layer, in float32.

    Args:
        lambda_q1, lambda_k1, lambda_q2, lambda_k2: [D] of float32, float16 or bfloat16, alike, finite.
        lambda_init: see differential_lambda_init().
        round_to: "float16" or "bfloat16" rounds each step to that type; None = no rounding.

    Raises:
        InvalidArgument, InvalidType; also for a result that is not finite.
    """
    return _native.differential_lambda(
        lambda_q1=lambda_q1,
        lambda_k1=lambda_k1,
        lambda_q2=lambda_q2,
        lambda_k2=lambda_k2,
        lambda_init=lambda_init,
        round_to=round_to,
    )


def differential_lambda_init(layer: int) -> float:
    """0.8 - 0.6 exp(-0.3 layer), `layer` being the 0-based index among all layers of the model.

    Raises:
        InvalidArgument: a negative index.
    """
    return _native.differential_lambda_init(layer=layer)


def differential_reshape_and_cache(
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    *,
    pairing: str = "interleaved",
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    executor: _native.ThreadPool | None = None,
) -> None:
    """Writes T rows: the first head of each pair into branch 0, the second into branch 1.

    Args:
        key: [T', Hk, D] of float32, float16 or bfloat16, T' >= T, Hk even.
        value: like key.
        kv_cache: [2 branches, 2 (K, V), num_blocks, block_size, Hk / 2, D], type of key, float8_e4m3fn or float8_e5m2.
        slot_mapping: int64 [T], block * block_size + offset of each row; negative = skip that row.
        pairing: as in differential_attention().
        k_scale, v_scale: as in reshape_and_cache_flash(); [Hk] in the order of the heads of key.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    _native.differential_reshape_and_cache(
        key=key,
        value=value,
        kv_cache=kv_cache,
        slot_mapping=slot_mapping,
        pairing=pairing,
        k_scale=k_scale,
        v_scale=v_scale,
        executor=executor,
    )


def differential_cache_shape(
    num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, *, num_layers: int = 0
) -> tuple[int, ...]:
    """[2 branches, 2 (K, V), num_blocks, block_size, num_kv_heads / 2, head_size] of a cache of variant v1.

    Args:
        num_kv_heads: heads of both branches, even.
        num_layers: put in front; 0 = no such dimension.

    Raises:
        InvalidArgument: sizes out of range, a block size that is no multiple of 16.
    """
    return _native.differential_cache_shape(
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        num_layers=num_layers,
    )


def differential_stride_order(layout: str = "NHD", *, include_layers: bool = False) -> tuple[int, ...]:
    """Permutation of differential_cache_shape(): physical dimension i is logical dimension order[i].

    Args:
        layout: "NHD", the logical order, or "HND", heads before the tokens of a block.
        include_layers: of a cache of all layers, where blocks are outermost.

    Raises:
        InvalidArgument, InvalidType.
    """
    return _native.differential_stride_order(layout=layout, include_layers=include_layers)
