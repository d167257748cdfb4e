"""OpenVINO's PagedAttention: a model of one node with a paged cache."""
from base import Side

LABEL = "OpenVINO"
REQUIRES = ["openvino==2026.4.1"]
BLOCK = 32


def unsupported(p):
    return "its caches are not fp8" if p.kv.startswith("fp8") else None


def _model(p, element):
    """Queries, keys, values, the two caches and the lengths are inputs; the options are off."""
    import numpy as np
    import openvino as ov
    import openvino.opset13 as op
    from openvino.op import _PagedAttentionExtension
    width, kv_width = p.num_q_heads * p.head_dim, p.num_kv_heads * p.head_dim
    shapes = {"q": [-1, width], "k": [-1, kv_width], "v": [-1, kv_width]}
    inputs = [op.parameter(shape, element, name) for name, shape in shapes.items()]
    # The plugin fills in shape and type of a cache when it compiles the model.
    inputs += [op.parameter([-1, -1, -1, -1], ov.Type.dynamic, f"{x}_cache.0") for x in ("key", "value")]
    inputs += [op.parameter([-1], ov.Type.i32, name) for name in (
        "past_lens", "subsequence_begins", "block_indices", "block_indices_begins")]

    def constant(value, dtype):
        return op.constant(np.array(value, dtype))
    f32, i32 = np.float32, np.int32
    options = [([], i32)] * 2 + [([], f32)]                     # rotation of evicted keys
    options += [([], f32), (64, i32), (8, i32), ([], f32)]      # sparse attention, sinks
    options += [(0, i32)] + [([], i32)] * 3                     # eviction by diversity
    options += [([], i32), ([], np.uint8), ([], i32)]           # token types, bias between queries
    tail = [(p.head_dim ** -0.5, f32), (0, i32), ([], f32), (p.seq_len, i32), ([], i32), *options]
    node = _PagedAttentionExtension([x.output(0) for x in [*inputs, *(constant(*t) for t in tail)]])
    for name, value in (("num_k_heads", p.num_kv_heads), ("num_v_heads", p.num_kv_heads),
                        ("k_head_size", p.head_dim), ("v_head_size", p.head_dim)):
        node.get_rt_info()[name] = value
    return ov.Model([node.output(0)], inputs, "attention")


class PagedRun:
    def __init__(self, p, data, threads):
        import numpy as np
        import openvino as ov
        self.p, self.np = p, np
        self.element = {"f32": ov.Type.f32, "f16": ov.Type.f16, "bf16": ov.Type.bf16}[p.dtype]
        settings = {"INFERENCE_PRECISION_HINT": self.element, "INFERENCE_NUM_THREADS": threads,
                    "KV_CACHE_PRECISION": ov.Type.u8 if p.kv == "i8" else self.element}
        compiled = ov.Core().compile_model(_model(p, self.element), "CPU", settings)
        self.request = compiled.create_infer_request()
        blocks = p.batch * p.seq_len // BLOCK
        for i in (3, 4):
            # [blocks, heads, BLOCK, head_dim], and scales behind the rows or beside them.
            port = compiled.input(i)
            shape = [blocks] + [port.partial_shape[d].get_length() for d in (1, 2, 3)]
            self.request.set_input_tensor(i, ov.Tensor(port.element_type, shape))
        self.cache = f"{compiled.input(3).element_type.get_type_name()} cache"
        self.table = np.random.default_rng(1).permutation(blocks).astype(np.int32)
        rows = [self._rows(data, x) for x in "qkv"]
        if p.query_len < p.seq_len:
            self._fill(rows[1], rows[2])
        self._bind_problem(*rows)

    def _rows(self, data, name):
        """[batch, tokens, heads * head_dim]."""
        from data import widen
        bits = data.bits(name).reshape(*data.shapes[name][:2], -1)
        if self.p.dtype == "bf16":
            return bits
        return widen(bits).astype({"f32": "float32", "f16": "float16"}[self.p.dtype], copy=False)

    def _bind(self, arrays, past, starts, table, table_starts):
        import openvino as ov
        np = self.np
        self.kept = [np.ascontiguousarray(rows) for rows in arrays]  # a tensor does not own them
        for i, rows in enumerate(self.kept):
            # numpy has no bf16; the bits stand for it.
            self.request.set_input_tensor(i, ov.Tensor(rows, rows.shape, self.element))
        for i, x in enumerate((past, starts, table, table_starts)):
            self.request.set_input_tensor(5 + i, ov.Tensor(np.ascontiguousarray(x, np.int32)))

    def _fill(self, k, v):
        """Each block is a prompt of its own: that writes the cache without any long attention."""
        np, p = self.np, self.p
        k, v = (x.reshape(p.batch * p.seq_len, -1) for x in (k, v))
        step = 512  # blocks
        for begin in range(0, len(self.table), step):
            table = self.table[begin:begin + step]
            rows = slice(begin * BLOCK, (begin + len(table)) * BLOCK)
            q = np.zeros((len(table) * BLOCK, p.num_q_heads * p.head_dim), k.dtype)
            counts = np.arange(len(table) + 1)
            self._bind((q, k[rows], v[rows]), counts[:-1] * 0, counts * BLOCK, table, counts)
            self.request.infer()

    def _bind_problem(self, q, k, v):
        """The last query_len tokens are new; the node writes them into the cache, then attends."""
        np, p = self.np, self.p
        past, width = p.seq_len - p.query_len, p.seq_len // BLOCK
        arrays = [x[:, -p.query_len:].reshape(p.batch * p.query_len, -1) for x in (q, k, v)]
        counts = np.arange(p.batch + 1)
        self._bind(arrays, np.full(p.batch, past), counts * p.query_len, self.table, counts * width)

    def __call__(self):
        self.request.infer()

    def output(self):
        from data import widen
        out = self.request.get_output_tensor(0)
        if self.p.dtype != "bf16":
            return out.data
        return widen(self.np.frombuffer(bytes(out.data), self.np.uint16))


def prepare(p, data, threads):
    import openvino
    run = PagedRun(p, data, threads)
    return Side(f"{openvino.__version__.split('-')[0]}, {run.cache}, blocks of {BLOCK}", run,
                lambda: run.output().reshape(data.shapes["q"]))
