// SPDX-License-Identifier: Apache-2.0
// Types that elements have in memory. Included inside an ISA namespace.

/// Calls f with a value of the type; q of fp8 problems.
template <typename Fn>
ATTEND_INLINE void with_float_dtype(DType t, const Fn& f) {
  if (t == DType::f32) {
    f(float{});
  } else if (t == DType::f16) {
    f(f16{});
  } else {
    f(bf16{});
  }
}
template <typename Fn>
ATTEND_INLINE void with_dtype(DType t, const Fn& f) {
  if (t == DType::fp8_e4m3) {
    f(fp8_e4m3{});
  } else if (t == DType::fp8_e5m2) {
    f(fp8_e5m2{});
  } else {
    with_float_dtype(t, f);
  }
}

template <typename T>
ATTEND_INLINE void exchange(T& a, T& b) {
  const T was = a;
  a = b;
  b = was;
}

/// Codes to the bf16 numbers that they stand for.
template <typename Code>
struct Decoder {
#if ATTEND_VBMI
  CodeTable<Code> table;
  ATTEND_INLINE Decoder() : table() {}
#endif
  ATTEND_INLINE void decode(const Code* from, int n, bf16* to) const {
    int whole = 0;
#if ATTEND_VBMI
    if constexpr (CodeTable<Code>::kExists) {
      whole = n / 64 * 64;
      table.decode(from, whole, to);
      if (whole == n) return;
    }
#endif
    Simd::decode(from + whole, n - whole, to + whole);
  }
};

/// Rows of 512 scaled codes and 64 bf16 numbers to 576 of these.
template <>
struct Decoder<DsMlaByte> {
  Decoder<fp8_e4m3> codes;
  ATTEND_INLINE Decoder() : codes() {}
  ATTEND_INLINE void decode(const DsMlaByte* row, int /*n*/, bf16* to) const {
    const std::uint8_t* bytes = &row->bits;
    for (int tile = 0; tile < fp8_ds_mla::kTiles; ++tile, to += fp8_ds_mla::kTile) {
      float scale;
      std::memcpy(&scale, bytes + fp8_ds_mla::kScalesAt + tile * sizeof scale, sizeof scale);
      const Simd::F factor = Simd::set1(scale);
      alignas(64) bf16 plain[fp8_ds_mla::kTile];
      codes.decode(reinterpret_cast<const fp8_e4m3*>(bytes + tile * fp8_ds_mla::kTile),
                   fp8_ds_mla::kTile, plain);
      for (int i = 0; i < fp8_ds_mla::kTile; i += Simd::kLanes)
        Simd::narrow(to + i, Simd::mul(Simd::widen(plain + i), factor));
    }
    std::memcpy(to, bytes + fp8_ds_mla::kRopeAt, fp8_ds_mla::kRope * sizeof(bf16));
  }
};
