"""torch.nn.functional.scaled_dot_product_attention."""
from base import Side, fastest, needs_same_type

LABEL = "torch SDPA"
REQUIRES = ["torch==2.13.0+cpu"]
unsupported = needs_same_type


def _candidates(p, q, k, v, out):
    from torch.nn.functional import scaled_dot_product_attention as sdpa
    wide_k, wide_v = (t.repeat_interleave(p.group, 1) if not p.is_decode else None for t in (k, v))
    # A decode's query heads of a group are rows of one matrix: no mask, each key read once.
    rows = q.reshape(p.batch, p.num_kv_heads, p.group * p.query_len, p.head_dim)

    def grouped():
        out[0] = sdpa(q, k, v, is_causal=not p.is_decode, enable_gqa=True)

    def repeated():
        out[0] = sdpa(q, wide_k, wide_v, is_causal=True)

    def folded():
        out[0] = sdpa(rows, k, v).reshape(q.shape)

    def matmuls():
        logits = (rows * p.head_dim ** -0.5) @ k.transpose(2, 3)
        out[0] = (logits.softmax(-1) @ v).reshape(q.shape)
    if p.is_decode:
        return {"enable_gqa": grouped, "heads of a group as rows": folded,
                "matmul, softmax, matmul": matmuls}
    return {"enable_gqa": grouped, "keys repeated per head": repeated}


def prepare(p, data, threads):
    import torch
    import torch_data
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    q, k, v = (torch_data.load_heads_first(data, name, p.dtype) for name in "qkv")
    out = [None]
    chosen, run = fastest(_candidates(p, q, k, v, out))
    return Side(f"{torch.__version__}, {chosen}", run,
                lambda: torch_data.to_numpy(out[0].transpose(1, 2)))
