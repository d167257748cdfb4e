"""jax.nn.dot_product_attention, compiled by XLA for the CPU."""
from base import Side, fastest, needs_same_type

LABEL = "jax"
REQUIRES = ["jax==0.10.2"]
unsupported = needs_same_type


def environment(threads):
    """XLA has no number of threads: it takes the CPUs that the process may use (prepare sets them)."""
    return {"JAX_PLATFORMS": "cpu"}


def prepare(p, data, threads):
    import os
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:threads]))
    import jax
    import jax.numpy as jnp
    import numpy as np
    dtype = {"f32": jnp.float32, "f16": jnp.float16, "bf16": jnp.bfloat16}[p.dtype]
    q, k, v = (jnp.asarray(np.asarray(data.bits(x)).view(jnp.bfloat16)).astype(dtype) for x in "qkv")
    out = [None]

    @jax.jit
    def grouped(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=not p.is_decode)

    @jax.jit
    def folded(q, k, v):
        """The heads of a group as rows of one matrix, keys and values by head."""
        rows = q.reshape(p.batch, p.num_kv_heads, p.group, p.head_dim)
        logits = jnp.einsum("bhgd,bhsd->bhgs", rows, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * p.head_dim ** -0.5).astype(dtype)
        return jnp.einsum("bhgs,bhsd->bhgd", weights, v).reshape(q.shape)

    def timed(function, *tensors):
        def run():
            out[0] = function(*tensors).block_until_ready()
        return run
    ways = {"dot_product_attention": timed(grouped, q, k, v)}
    if p.is_decode:
        by_head = [x.transpose(0, 2, 1, 3).copy() for x in (k, v)]
        ways["einsum, softmax, einsum"] = timed(folded, q, *by_head)
    chosen, run = fastest(ways)
    return Side(f"{jax.__version__}, {chosen}", run, lambda: np.asarray(out[0].astype(jnp.float32)))
