"""The problems that scripts/peers gives to every library."""
import dataclasses

# Largest relative error of the sampled rows with which a result counts as right. Above the errors of the
# least exact peer of each type, which the tables show; a wrong mask, layout or scale gives errors near 1.
ERROR_LIMIT = {"f32": 1e-3, "f16": 4e-2, "bf16": 4e-2, "i8": 4e-2, "fp8_e4m3": 0.2, "fp8_e5m2": 0.3}


@dataclasses.dataclass(frozen=True)
class Problem:
    """All requests alike and causal: query i stands at position seq_len - query_len + i."""
    name: str
    batch: int
    query_len: int
    seq_len: int
    dtype: str = "bf16"     # of queries and output: f32, f16, bf16
    kv_dtype: str = ""      # of keys and values: "" = dtype; i8, fp8_e4m3, fp8_e5m2
    block_size: int = 0     # of our cache, blocks shuffled; 0 = ragged
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    only_threads: int = 0   # 0 = any number
    quick: bool = True      # one of those that scripts/peers --quick runs

    @property
    def kv(self):
        return self.kv_dtype or self.dtype

    @property
    def group(self):
        return self.num_q_heads // self.num_kv_heads

    @property
    def is_decode(self):
        return self.query_len == 1

    @property
    def flops(self):
        """Of the pairs that the mask leaves."""
        first = self.seq_len - self.query_len + 1
        pairs = self.batch * self.query_len * (first + self.seq_len) / 2
        return 4 * pairs * self.head_dim * self.num_q_heads

    @property
    def bytes(self):
        """Keys and values once, in the type that they are stored in."""
        size = {"f32": 4, "f16": 2, "bf16": 2}.get(self.kv, 1)
        return 2 * self.batch * self.seq_len * self.num_kv_heads * self.head_dim * size

    @property
    def shape_name(self):
        return f"b{self.batch}_q{self.query_len}_s{self.seq_len}"


def _all():
    for dtype, kv in (("bf16", ""), ("f16", ""), ("f32", ""), ("bf16", "i8")):
        name = "int8l1" if kv else dtype
        yield Problem(f"prefill_{name}_gqa4_d128_4k", 1, 4096, 4096, dtype, kv, 32 if kv else 0,
                      quick=dtype == "bf16")
    for dtype, kv in (("bf16", ""), ("f16", ""), ("f32", ""), ("bf16", "i8"), ("bf16", "fp8_e4m3"),
                      ("bf16", "fp8_e5m2")):
        name = {"i8": "int8l1"}.get(kv, kv or dtype)
        yield Problem(f"decode_{name}_gqa4_8x32k", 8, 1, 32768, dtype, kv, 32,
                      quick=dtype == "bf16" and kv != "fp8_e5m2")
    for dtype, kv in (("bf16", ""), ("f16", ""), ("bf16", "i8")):
        yield Problem(f"decode_{'int8l1' if kv else dtype}_64x512", 64, 1, 512, dtype, kv, 32,
                      quick=dtype == "bf16")
    for name, dtype in (("short_batch_64x128", "bf16"), ("short_batch_f32_64x128", "f32")):
        yield Problem(name, 64, 128, 128, dtype, quick=dtype == "bf16")
    for name, dtype in (("single_token_128", "bf16"), ("single_token_f32_128", "f32")):
        yield Problem(name, 1, 1, 128, dtype, "", 32, only_threads=1, quick=dtype == "bf16")


PROBLEMS = list(_all())
