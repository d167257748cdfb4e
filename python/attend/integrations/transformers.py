# SPDX-License-Identifier: Apache-2.0
"""attend as an attention implementation of Hugging Face Transformers.

    from attend.integrations import transformers as attend_transformers

    attend_transformers.register()
    model.set_attn_implementation("attend")

"attend" works from padding masks, windows and sequence lengths; where a model builds a mask that those do not describe
(packed positions, image blocks, chunks, sparse indices), and for a mask of the caller's, it attends under the boolean
mask itself. "attend_dense" always does the latter. Both serve model.generate_batch(), for models whose keys and values
Transformers' paged cache holds: it has no place for the latent rows of MLA.
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .. import torch as _attend_torch
from ..errors import InvalidArgument, Unsupported
from ..ops import flash_attn_varlen

__all__ = ["attention", "dense_mask", "padding_mask", "register"]

_FUNCTION = "attend.integrations.transformers.attention"
_OLDEST = (5, 23)
_NAMES = ("attend", "attend_dense")

#: What models hand to every attention function and attention does not depend on.
_WITHOUT_EFFECT = frozenset(
    {
        "cache",
        "cache_position",
        "deterministic",
        "encoder_hidden_states",
        "layer_idx",
        "logits_indices",
        "logits_processor_args",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "past_key_value",
        "past_key_values",
        "position_embeddings",
        "read_index",
        "return_dict",
        "seq_idx",
        "use_cache",
        "write_index",
    }
)


def register() -> None:
    """Registers "attend", "attend_dense" and "paged|attend", and lets them serve model.generate_batch().

    Process-wide; calling it again changes nothing.

    Raises:
        Unsupported: Transformers is older than 5.23.
    """
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < _OLDEST:
        raise Unsupported(
            f"[attend.integrations.transformers.register] expected transformers >= "
            f"{'.'.join(map(str, _OLDEST))}, got {transformers.__version__}"
        )
    for name, mask in (("attend", padding_mask), ("attend_dense", dense_mask), ("paged|attend", padding_mask)):
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
    _allow_continuous_batching()


def _allow_continuous_batching() -> None:
    """The manager takes implementations by name, and knows only those of Transformers."""
    from transformers.generation.continuous_batching import ContinuousBatchingManager

    switch = ContinuousBatchingManager.switch_to_cb_friendly_attn
    if getattr(switch, "allows_attend", False):
        return

    @functools.wraps(switch)
    def allowing(self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
        if model.config._attn_implementation not in _NAMES:
            switch(self, model, *args, **kwargs)

    allowing.allows_attend = True
    ContinuousBatchingManager.switch_to_cb_friendly_attn = allowing


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    local_size: int | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """Mask function of "attend": which keys are tokens, [B, T], or None if all are.

    Keys of a static cache behind those written so far are left off. If the model's mask is more than causality, a
    window and padding, it is the boolean mask [B, 1, S, T] of dense_mask(). Arguments: those of Transformers' masks.
    """
    chunked = local_size is not None and local_size == getattr(config, "attention_chunk_size", None)
    plain = (allow_is_causal_skip or allow_is_bidirectional_skip) and not chunked
    tracing = torch.compiler.is_compiling()
    if plain and allow_is_causal_skip and not (tracing and isinstance(q_offset, Tensor)):
        written = min(kv_length, int(q_offset) + q_length - kv_offset)
        if attention_mask is None:
            return None if written == kv_length else torch.ones(batch_size, written, dtype=torch.bool)
        tokens = attention_mask[:, kv_offset : kv_offset + written]
    elif plain and not allow_is_causal_skip:
        written = kv_length
        if attention_mask is None:
            return None
        tokens = attention_mask
    else:
        written, tokens = -1, None
    if tokens is not None and tokens.shape[1] == written:
        everything = written == kv_length and not tracing and bool(tokens.all())
        return None if everything else tokens
    return dense_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        local_size=local_size,
        config=config,
        **kwargs,
    )


def dense_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """Mask function of "attend_dense": bool [B, 1, S, T]; None only if every row sees every key."""
    return sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        allow_is_causal_skip=False,
        **kwargs,
    )


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    indices: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of all three names.

    Args:
        module: the calling layer; its `is_causal` counts where the argument is None.
        query: [B, Hq, S, D].
        key: [B, Hkv, T, D], not repeated.
        value: [B, Hkv, T, Dv].
        attention_mask: None; bool [B, T], which keys are tokens; or [B, 1 or Hq, S, T], bool, or float of 0 and the
            lowest value, which then decides alone.
        dropout: 0.
        scaling: multiplies the logits; None = 1 / sqrt(D).
        sliding_window: keys that a causal row sees, its own included; a row of an encoder sees as many to each side.
        softcap: of the logits; None = off.
        s_aux: [Hq], sinks.
        is_causal: overrides the module's.
        indices: int32 [B, S, N], the keys that each row may see.
        position_ids: [1, S]; without a mask a step other than one begins another sequence.
        cu_seq_lens_q, cu_seq_lens_k: int32, prefix sums of the lengths of packed sequences.
        kwargs: those in _WITHOUT_EFFECT and those that are None or False; others are refused.

    Returns:
        [B, S, Hq, Dv] and None.

    Raises:
        Unsupported: something that attend does not compute, by name.
        InvalidArgument, InvalidType.
    """
    _refuse(dropout, kwargs)
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    q, k, v = (_rows_of_heads(t) for t in (query, key, value))
    options = {
        "scale": scaling,
        "softcap": 0.0 if softcap is None else softcap,
        "sinks": None if s_aux is None else s_aux.detach().float(),
    }
    if attention_mask is not None and attention_mask.dim() == 4:
        return _masked(q, k, v, _boolean(attention_mask), indices=indices, **options), None
    left = -1 if sliding_window is None else sliding_window - 1
    band = {"causal": causal, "window_left": left, "window_right": -1 if causal else left}
    if attention_mask is None and indices is None:
        starts = _packed(q, k, position_ids) if cu_seq_lens_q is None else (cu_seq_lens_q, cu_seq_lens_k)
        if starts is not None:
            return _varlen(q, k, v, *starts, **band, **options), None
    elif cu_seq_lens_q is not None:
        raise InvalidArgument(
            f"[{_FUNCTION}] argument 'cu_seq_lens_q': expected None beside attention_mask or indices, got a tensor",
            _FUNCTION,
            "cu_seq_lens_q",
        )
    tokens = None if attention_mask is None else attention_mask.bool()
    if tokens is not None and tokens.shape[1] < k.shape[1]:  # a static cache that is not full
        k, v = k[:, : tokens.shape[1]], v[:, : tokens.shape[1]]
    return _masked(q, k, v, tokens, indices=indices, **band, **options), None


def _refuse(dropout: float, kwargs: dict[str, Any]) -> None:
    if dropout != 0.0:
        raise Unsupported(f"[{_FUNCTION}] argument 'dropout': expected 0 (inference only), got {dropout}")
    for name, value in kwargs.items():
        if name not in _WITHOUT_EFFECT and value is not None and value is not False:
            raise Unsupported(
                f"[{_FUNCTION}] argument '{name}': expected None (attend does not support it), got "
                f"{'a tensor' if isinstance(value, Tensor) else repr(value)}"
            )


def _rows_of_heads(states: Tensor) -> Tensor:
    rows = states.transpose(1, 2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _boolean(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return mask
    visible = mask == 0
    if not torch.compiler.is_compiling() and bool((~visible & (mask > torch.finfo(mask.dtype).min / 2)).any()):
        raise Unsupported(
            f"[{_FUNCTION}] argument 'attention_mask': expected 0 or the lowest value of its type, got a bias"
        )
    return visible


def _packed(q: Tensor, k: Tensor, position_ids: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Starts of the sequences that the positions of one row tell; None = there is only one."""
    rows = q.shape[1]
    packable = position_ids is not None and position_ids.dim() == 2 and q.shape[0] == 1 and rows == k.shape[1]
    if not packable or rows == 1 or position_ids.shape != (1, rows) or torch.compiler.is_compiling():
        return None
    begins = (position_ids[0].diff() != 1).nonzero()[:, 0] + 1
    if len(begins) == 0:
        return None
    starts = torch.cat([begins.new_zeros(1), begins, begins.new_full((1,), rows)]).to(torch.int32)
    return starts, starts


def _varlen(q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, **options: Any) -> Tensor:
    flat = [t.reshape(-1, *t.shape[2:]) for t in (q, k, v)]
    starts_q, starts_k = (s.to(torch.int32).contiguous() for s in (starts_q, starts_k))
    if torch.compiler.is_compiling():
        out = torch.ops.attend.flash_attn_varlen(*flat, starts_q, cu_seqlens_kv=starts_k, **options)[0]
    else:
        out = flash_attn_varlen(*flat, starts_q, cu_seqlens_kv=starts_k, **options)
    return out.view(*q.shape[:3], v.shape[3])


def _masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    attend = torch.ops.attend.masked_attention if torch.compiler.is_compiling() else _attend_torch.masked_attention
    return attend(q, k, v, mask, **options)
