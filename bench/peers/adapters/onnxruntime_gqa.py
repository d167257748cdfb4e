"""onnxruntime's GroupQueryAttention: a model of one node whose cache is updated in place."""
from base import Side, fastest

LABEL = "onnxruntime"
REQUIRES = ["onnxruntime==1.31.1", "onnx==1.23.2"]


def unsupported(p):
    if p.kv.startswith("fp8"):
        return "its CPU caches are not fp8"
    return "no bf16 on the CPU" if p.kv == "bf16" else None


def _model(p, dtype, scaling):
    """Bytes of the model; int8 caches are scaled per tensor or per channel."""
    from onnx import TensorProto, helper
    types = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "i8": TensorProto.INT8}
    q_type, kv_type = types[dtype], types[p.kv]
    inputs = {"query": q_type, "key": q_type, "value": q_type, "past_key": kv_type, "past_value": kv_type,
              "seqlens_k": TensorProto.INT32, "total": TensorProto.INT32}
    names, settings = list(inputs), {"num_heads": p.num_q_heads, "kv_num_heads": p.num_kv_heads}
    if scaling:
        inputs |= {"k_scale": TensorProto.FLOAT, "v_scale": TensorProto.FLOAT}
        names += [""] * 5 + ["k_scale", "v_scale"]
        settings |= {"k_quant_type": scaling, "v_quant_type": scaling, "kv_cache_bit_width": 8}
    outputs = {"out": q_type, "present_key": kv_type, "present_value": kv_type}
    node = helper.make_node("GroupQueryAttention", names, list(outputs), domain="com.microsoft", **settings)
    graph = helper.make_graph(
        [node], "attention", *([helper.make_tensor_value_info(n, t, None) for n, t in x.items()]
                               for x in (inputs, outputs)))
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _codes(x, scaling):
    """(int8 codes, scale) of [batch, heads, tokens, head_dim]."""
    import numpy as np
    axes = (0, 1, 2, 3) if scaling == "PER_TENSOR" else (0, 2)
    amax = np.maximum(x.max(axes, keepdims=True), -x.min(axes, keepdims=True))
    scale = (amax / 127).astype(np.float32)
    codes = np.empty(x.shape, np.int8)
    for i in range(x.shape[0]):  # a request at a time: the quotients are as large as four caches
        codes[i] = np.rint(x[i] / scale[0])
    return codes, scale.reshape(-1) if scaling == "PER_TENSOR" else scale


class BoundRun:
    """A session with everything bound: a run copies nothing that the node does not copy."""

    def __init__(self, p, data, threads, dtype, scaling):
        import numpy as np
        import onnxruntime as ort
        from data import widen
        numpy_type = {"f32": np.float32, "f16": np.float16}[dtype]
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(_model(p, dtype, scaling), options, ["CPUExecutionProvider"])
        self.binding = session.io_binding()
        self.run = lambda: session.run_with_iobinding(self.binding)

        def give(name, array):
            value = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
            self.binding.bind_ortvalue_input(name, value)
            return value
        give("query", widen(data.bits("q")).astype(numpy_type).reshape(p.batch, p.query_len, -1))
        for name, short in (("key", "k"), ("value", "v")):
            rows = widen(data.bits(short)).astype(numpy_type, copy=False)
            # The last query_len tokens are new; the node puts them behind those in the cache.
            give(name, rows[:, p.seq_len - p.query_len:].reshape(p.batch, p.query_len, -1))
            cache = np.ascontiguousarray(rows.transpose(0, 2, 1, 3))
            if scaling:
                cache, scale = _codes(cache, scaling)
                give(f"{short}_scale", scale)
            self.binding.bind_ortvalue_output(f"present_{name}", give(f"past_{name}", cache))
        give("seqlens_k", np.full((p.batch, 1), p.seq_len - 1, np.int32))
        give("total", np.array([p.seq_len], np.int32))
        self.out = ort.OrtValue.ortvalue_from_shape_and_type(
            [p.batch, p.query_len, p.num_q_heads * p.head_dim], numpy_type)
        self.binding.bind_ortvalue_output("out", self.out)

    def __call__(self):
        self.run()


def prepare(p, data, threads):
    import onnxruntime
    if p.kv == "i8":
        ways = {f"queries {d}, scales {s}": (d, s) for d, s in (("f32", "PER_TENSOR"), ("f16", "PER_CHANNEL"))}
    else:
        ways = {f"{p.dtype}": (p.dtype, "")}
    chosen, run = fastest({name: BoundRun(p, data, threads, *way) for name, way in ways.items()})
    return Side(f"{onnxruntime.__version__}, {chosen}", run,
                lambda: run.out.numpy().reshape(data.shapes["q"]))
