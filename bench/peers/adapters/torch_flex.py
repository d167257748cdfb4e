"""torch's flex_attention, compiled for the problem."""
from base import Side, fastest, needs_same_type

LABEL = "torch FlexAttention"
REQUIRES = ["torch==2.13.0+cpu"]
unsupported = needs_same_type


def prepare(p, data, threads):
    import torch
    import torch_data
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    q, k, v = (torch_data.load_heads_first(data, name, p.dtype) for name in "qkv")
    offset, out = p.seq_len - p.query_len, [None]
    mask = None if p.is_decode else create_block_mask(
        lambda b, h, i, j: i + offset >= j, None, None, p.query_len, p.seq_len, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)

    def run():
        out[0] = compiled(q, k, v, block_mask=mask, enable_gqa=True)
    chosen, run = fastest({"torch.compile": run})
    return Side(f"{torch.__version__}, {chosen}", run, lambda: torch_data.to_numpy(out[0].transpose(1, 2)))
