# SPDX-License-Identifier: Apache-2.0
"""int8 codes for attention inputs. A code c stands for c * scale."""

from __future__ import annotations

from .. import _native
from .._tensors import Tensor, empty, require, require_choice, require_flag


def scaled_int8_quant_for_attn(
    input: Tensor,
    mode: str = "per_token_head",
    *,
    transpose_scale: bool = False,
    static_scale: Tensor | None = None,
    mean: Tensor | None = None,
    output: Tensor | None = None,
    scale: Tensor | None = None,
    executor: _native.ThreadPool | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantises to int8: scale = max(amax / 127, 1e-6), codes = x / scale, ties to even, in [-127, 127].

    What shares a computed scale with an infinity or NaN gets the scale NaN and codes 0.

    Args:
        input: [T, H, D] of float32, float16 or bfloat16.
        mode: what shares a scale: "per_token_head", the elements of one (token, head), for queries and keys;
            "per_channel", the tokens of one (head, element), for values.
        transpose_scale: per_token_head only: scales are [H, T], as flash_attn_varlen_int8() reads those of queries.
        static_scale: per_channel only: float32 [H, D], > 0, used instead of computed scales; None = compute.
        mean: per_token_head only: float32 [H, D], subtracted from every row before it is quantised (smooth keys);
            None = nothing.
        output: int8 [T, H, D] to write to; None = a new tensor.
        scale: float32 to write the scales to; None = a new tensor. Not with `static_scale`.

    Returns:
        (output, scale): scale is [T, H], [H, T] if transposed, or [H, D] per channel; `static_scale` if that is given.

    Raises:
        InvalidArgument, InvalidType: before anything is written; also for NaN in the input with a static scale.
    """
    require("scaled_int8_quant_for_attn", "input", input, 3)
    require_choice("scaled_int8_quant_for_attn", "mode", mode, ("per_token_head", "per_channel"))
    require_flag("scaled_int8_quant_for_attn", "transpose_scale", transpose_scale)
    tokens, heads, head_size = input.shape
    if output is None:
        output = empty(input, (tokens, heads, head_size), "int8")
    if scale is None and static_scale is None:
        shape = (heads, head_size) if mode == "per_channel" else (heads, tokens) if transpose_scale else (tokens, heads)
        scale = empty(input, shape, "float32")
    _native.scaled_int8_quant_for_attn(
        input=input,
        output=output,
        mode=mode,
        scale=scale,
        transpose_scale=transpose_scale,
        static_scale=static_scale,
        mean=mean,
        executor=executor,
    )
    return output, scale if static_scale is None else static_scale


def channel_mean(
    input: Tensor, start_loc: Tensor, *, mean: Tensor | None = None, executor: _native.ThreadPool | None = None
) -> Tensor:
    """Mean over the tokens of each request, summed in float64; 0 for a request without tokens.

    Args:
        input: [T, H, D] of float32, float16 or bfloat16.
        start_loc: int32 [B + 1], prefix sum of the requests' tokens.
        mean: float32 [B, H, D] to write to; None = a new tensor.

    Returns:
        mean.

    Raises:
        InvalidArgument, InvalidType: before anything is written.
    """
    require("channel_mean", "input", input, 3)
    require("channel_mean", "start_loc", start_loc, 1)
    if mean is None:
        mean = empty(input, (max(start_loc.shape[0] - 1, 0), *input.shape[1:]), "float32")
    _native.channel_mean(input=input, start_loc=start_loc, mean=mean, executor=executor)
    return mean
