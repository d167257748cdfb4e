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
#endif
  ATTEND_INLINE explicit Decoder(const AttentionProblem& /*p*/) {}
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

/// Rows of scaled codes and bf16 numbers to bf16 numbers.
template <>
struct Decoder<CodedByte> {
  Decoder<fp8_e4m3> codes;
  const RowFormat& format;
  const std::uint8_t* first;  // key of the cache
  std::uint64_t block_bytes;
  int block_size;

  ATTEND_INLINE explicit Decoder(const AttentionProblem& p)
      : codes(p),
        format(*p.coded.format),
        first(static_cast<const std::uint8_t*>(p.k)),
        block_bytes(static_cast<std::uint64_t>(p.coded.block_bytes)),
        block_size(p.coded.block_size) {}

  ATTEND_INLINE const std::uint8_t* scales_of(const CodedByte* row) const {
    const std::uint8_t* bytes = &row->bits;
    if (!format.scales_apart) return bytes + format.scales_at;
    const auto in_block =
        static_cast<std::uint32_t>(static_cast<std::uint64_t>(bytes - first) % block_bytes);
    const std::uint32_t token = in_block / static_cast<std::uint32_t>(format.step);
    return bytes - in_block + std::int64_t{block_size} * format.step +
           std::int64_t{token} * format.scale_bytes;
  }
  ATTEND_INLINE static float power_of_two(std::uint32_t exponent) {
    const std::uint32_t bits = exponent == 255 ? 0x7fc00000U : exponent << 23;
    return std::bit_cast<float>(exponent == 0 ? 0x00400000U : bits);
  }
  template <int kTile>
  ATTEND_INLINE void decode_tiles(const std::uint8_t* bytes, const std::uint8_t* scales,
                                  bf16* to) const {
    for (int d = 0; d < format.latent; d += kTile, to += kTile) {
      float scale;
      if (format.scale == RowScale::f32) {
        std::memcpy(&scale, scales, sizeof scale);
        scales += sizeof scale;
      } else {
        scale = power_of_two(*scales++);
      }
      const Simd::F factor = Simd::set1(scale);
      alignas(64) bf16 plain[kTile];
      codes.decode(reinterpret_cast<const fp8_e4m3*>(bytes + d), kTile, plain);
      for (int i = 0; i < kTile; i += Simd::kLanes)
        Simd::narrow(to + i, Simd::mul(Simd::widen(plain + i), factor));
    }
  }
  ATTEND_INLINE void decode(const CodedByte* row, int /*n*/, bf16* to) const {
    const std::uint8_t* bytes = &row->bits;
    const std::uint8_t* scales = scales_of(row);
    if (format.tile == 128) {
      decode_tiles<128>(bytes, scales, to);
    } else {
      decode_tiles<64>(bytes, scales, to);
    }
    std::memcpy(to + format.latent, bytes + format.rope_at,
                static_cast<std::size_t>(format.rope) * sizeof(bf16));
  }
};
