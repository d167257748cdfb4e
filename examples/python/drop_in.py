# SPDX-License-Identifier: Apache-2.0
"""attend beside torch's scaled_dot_product_attention: the same tensors in, the difference out.

python examples/python/drop_in.py
"""

from __future__ import annotations

import torch

import attend


def with_torch(q, k, v):
    """[B, S, H, D] as flash-attention has it; grouped heads, causal."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def with_attend(q, k, v):
    return attend.ops.flash_attn_with_kvcache(q, k, v, causal=True)


def main() -> None:
    torch.manual_seed(0)
    batch, length, heads, kv_heads, head_size = 2, 200, 8, 2, 64
    for dtype in (torch.float32, torch.bfloat16):
        q = torch.randn(batch, length, heads, head_size, dtype=dtype)
        k, v = torch.randn(2, batch, length, kv_heads, head_size, dtype=dtype)
        exact = with_torch(q.double(), k.double(), v.double())
        difference = (with_attend(q, k, v).double() - exact).abs().max().item()
        of_torch = (with_torch(q, k, v).double() - exact).abs().max().item()
        name = str(dtype).removeprefix("torch.")
        print(f"{name:9} largest difference from float64: attend {difference:.2e}, torch {of_torch:.2e}")


if __name__ == "__main__":
    main()
