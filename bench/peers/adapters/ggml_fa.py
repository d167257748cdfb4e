"""The flash attention of ggml (llama.cpp), a graph of ggml_flash_attn_ext nodes."""
import ctypes
import os
import pathlib

from base import Side, fastest

LABEL = "ggml"
REQUIRES = []
SOURCE = "llama-cpp-python==0.3.36"  # its source archive has ggml; no package has ggml's libraries
BUILD = pathlib.Path(__file__).resolve().parents[3] / "build" / "peers" / "ggml"
TYPES = {"f32": 0, "f16": 1, "i8": 8}  # i8: q8_0, a scale for 32 elements of a row
# Its bf16 caches take a path that is several times slower; f16 holds the same values.
STORED_AS = {"bf16": "f16"}
ALIGN = 64


def stored(p):
    return STORED_AS.get(p.kv, p.kv)


def unsupported(p):
    return "no fp8" if stored(p) not in TYPES else None


def install(build, pip, run):
    """Compiles ggml alone, for this CPU."""
    if not list(BUILD.glob("*.tar.gz")):
        run([*pip, "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python", "-d", str(BUILD), SOURCE])
    archive = next(BUILD.glob("*.tar.gz"))
    run(["tar", "xzf", str(archive), "-C", str(BUILD), "--strip-components=1"])
    source = BUILD / "vendor" / "llama.cpp" / "ggml"
    (source / "ggml.pc.in").touch()  # the archive lacks it, and it is only for installing
    run(["cmake", "-S", str(source), "-B", str(BUILD / "build"), "-DCMAKE_BUILD_TYPE=Release",
         "-DGGML_NATIVE=ON", "-DGGML_BUILD_TESTS=OFF", "-DGGML_BUILD_EXAMPLES=OFF"])
    run(["cmake", "--build", str(BUILD / "build"), "--parallel", str(os.cpu_count())])


class Plan(ctypes.Structure):
    _fields_ = [("work_size", ctypes.c_size_t), ("work_data", ctypes.c_void_p), ("n_threads", ctypes.c_int),
                ("threadpool", ctypes.c_void_p), ("abort", ctypes.c_void_p), ("abort_data", ctypes.c_void_p),
                ("use_ref", ctypes.c_bool)]


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def _load():
    """(base library, CPU library) with the signatures that are used."""
    folder = BUILD / "build" / "src"
    base = ctypes.CDLL(str(folder / "libggml-base.so"), ctypes.RTLD_GLOBAL)
    cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"), ctypes.RTLD_GLOBAL)
    pointer, size, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
    for library, name, result, arguments in (
            (base, "ggml_init", pointer, [InitParams]),
            (base, "ggml_version", ctypes.c_char_p, []),
            (base, "ggml_new_tensor_4d", pointer, [pointer, number, size, size, size, size]),
            (base, "ggml_get_data", pointer, [pointer]),
            (base, "ggml_flash_attn_ext", pointer, [pointer] * 5 + [real] * 3),
            (base, "ggml_new_graph", pointer, [pointer]),
            (base, "ggml_build_forward_expand", None, [pointer, pointer]),
            (base, "ggml_row_size", ctypes.c_size_t, [number, size]),
            (base, "ggml_quantize_chunk", ctypes.c_size_t, [number, pointer, pointer, size, size, size, pointer]),
            (cpu, "ggml_cpu_init", None, []),
            (cpu, "ggml_graph_plan", Plan, [pointer, number, pointer]),
            (cpu, "ggml_graph_compute", number, [pointer, ctypes.POINTER(Plan)])):
        getattr(library, name).restype, getattr(library, name).argtypes = result, arguments
    cpu.ggml_cpu_init()
    return base, cpu


class GraphRun:
    """`nodes` attention nodes, each with batch / nodes of the requests."""

    def __init__(self, p, data, threads, nodes):
        self.p, self.data = p, data
        self.base, self.cpu = _load()
        kv_bytes = 2 * p.batch * p.seq_len * p.num_kv_heads * self.base.ggml_row_size(TYPES[stored(p)], p.head_dim)
        q_bytes = 8 * p.batch * p.query_len * p.num_q_heads * p.head_dim
        mask_bytes = 2 * p.query_len * p.seq_len
        self.context = self.base.ggml_init(InitParams(kv_bytes + q_bytes + mask_bytes + (1 << 24), None, False))
        self.mask = None if p.is_decode else self._mask()
        self.graph = self.base.ggml_new_graph(self.context)
        each = p.batch // nodes
        self.outputs = [self._node(range(i * each, (i + 1) * each)) for i in range(nodes)]
        self.plan = self.cpu.ggml_graph_plan(self.graph, threads, None)
        self.work = ctypes.create_string_buffer(self.plan.work_size + ALIGN)
        start = ctypes.addressof(self.work)
        self.plan.work_data = start + -start % ALIGN

    def _mask(self):
        """0 where a key is seen, -infinity elsewhere, for all requests and heads."""
        import numpy as np
        p = self.p
        mask = np.full((p.query_len, p.seq_len), -np.inf, np.float16)
        mask[np.tri(p.query_len, p.seq_len, p.seq_len - p.query_len, bool)] = 0
        tensor = self.base.ggml_new_tensor_4d(self.context, TYPES["f16"], p.seq_len, p.query_len, 1, 1)
        ctypes.memmove(self.base.ggml_get_data(tensor), mask.ctypes.data, mask.nbytes)
        return tensor

    def _tensor(self, name, kind, requests):
        """[batch, heads, tokens, head_dim] in ggml's order of dimensions reversed."""
        import numpy as np
        from data import widen
        p, bits = self.p, self.data.bits(name)
        tokens, heads = bits.shape[1:3]
        tensor = self.base.ggml_new_tensor_4d(self.context, kind, p.head_dim, tokens, heads, len(requests))
        at = self.base.ggml_get_data(tensor)
        for r in requests:
            rows = np.ascontiguousarray(widen(bits[r]).transpose(1, 0, 2))
            if kind == TYPES["f32"]:
                ctypes.memmove(at, rows.ctypes.data, rows.nbytes)
                at += rows.nbytes
            else:
                at += self.base.ggml_quantize_chunk(kind, rows.ctypes.data, at, 0, heads * tokens, p.head_dim,
                                                    None)
        return tensor

    def _node(self, requests):
        p = self.p
        q, k, v = (self._tensor(x, kind, requests) for x, kind in
                   (("q", TYPES["f32"]), ("k", TYPES[stored(p)]), ("v", TYPES[stored(p)])))
        out = self.base.ggml_flash_attn_ext(self.context, q, k, v, self.mask, p.head_dim ** -0.5, 0.0, 0.0)
        self.base.ggml_build_forward_expand(self.graph, out)
        return out

    def __call__(self):
        if self.cpu.ggml_graph_compute(self.graph, ctypes.byref(self.plan)) != 0:
            raise RuntimeError("ggml_graph_compute failed")

    def output(self):
        import numpy as np
        p, parts = self.p, []
        count = p.batch // len(self.outputs) * p.query_len * p.num_q_heads * p.head_dim
        for out in self.outputs:
            at = ctypes.cast(self.base.ggml_get_data(out), ctypes.POINTER(ctypes.c_float))
            parts.append(np.ctypeslib.as_array(at, (count,)))
        return np.concatenate(parts).reshape(self.data.shapes["q"])


def prepare(p, data, threads):
    # It splits the keys of a decode over threads only where a node has one request.
    counts = {"one node": 1, "a node for each request": p.batch}
    chosen, run = fastest({name: GraphRun(p, data, threads, n) for name, n in counts.items()
                           if n == 1 or p.batch > 1})
    kind = "q8_0" if p.kv == "i8" else stored(p)
    return Side(f"ggml {run.base.ggml_version().decode()} ({SOURCE.replace('==', ' ')}), {kind}, {chosen}", run,
                run.output)
