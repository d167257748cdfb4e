// SPDX-License-Identifier: Apache-2.0
// Integer vocabulary of the scalar level. Included inside a namespace, after Simd and
// dot_generic-inl.h.

struct Dot {
  static constexpr int kLanes = Simd::kLanes;
  struct I {
    std::int32_t v[kLanes];
  };
  template <typename Op>
  ATTEND_INLINE static I map(Op op) {
    I r;
    for (int i = 0; i < kLanes; ++i) r.v[i] = op(i);
    return r;
  }
  ATTEND_INLINE static I zero() { return I{}; }
  ATTEND_INLINE static I set1(std::int32_t x) {
    return map([&](int) { return x; });
  }
  /// kLanes times 4 bytes.
  ATTEND_INLINE static I load(const void* p) {
    I r;
    std::memcpy(&r, p, sizeof r);
    return r;
  }
  /// 4 bytes, in every lane.
  ATTEND_INLINE static I broadcast(const void* p) {
    std::int32_t x;
    std::memcpy(&x, p, sizeof x);
    return set1(x);
  }
  ATTEND_INLINE static Simd::F to_float(I x) {
    return Simd::map([&](int i) { return static_cast<float>(x.v[i]); });
  }
  /// sum + the products of unsigned and signed bytes, exact.
  ATTEND_INLINE static I dot(I sum, I u8, I s8) {
    return map([&](int i) {
      std::int32_t total = sum.v[i];
      for (int b = 0; b < kDotBytes; ++b) {
        const auto x = static_cast<std::uint8_t>(static_cast<std::uint32_t>(u8.v[i]) >> (8 * b));
        const auto y = static_cast<std::int8_t>(static_cast<std::uint32_t>(s8.v[i]) >> (8 * b));
        total += std::int32_t{x} * std::int32_t{y};
      }
      return total;
    });
  }
  /// Rounds numbers of [0, 127] to nearest even and stores them as bytes; NaN gives 0, larger ones,
  /// which stand beside a NaN, any byte. Returns them as floats.
  ATTEND_INLINE static Simd::F store_rounded(std::uint8_t* to, Simd::F x) {
    return Simd::map([&](int i) {
      const float rounded = x.v[i] >= 0.0F ? __builtin_rintf(x.v[i]) : 0.0F;
      to[i] = static_cast<std::uint8_t>(rounded < 255.0F ? rounded : 255.0F);
      return rounded;
    });
  }
  template <typename Beside>
  ATTEND_INLINE static void pack_keys(const std::int8_t* const* rows, int head_dim,
                                      std::uint8_t* panel, Beside& beside) {
    beside.template beside_pack<0>();
    pack_biased_keys(rows, 0, head_dim, panel);
  }
  template <typename Beside>
  ATTEND_INLINE static void pack_values(const std::int8_t* const* rows, int head_dim,
                                        std::int8_t* panel, Beside& beside) {
    beside.template beside_weave<0>();
    weave_values(rows, 0, head_dim, panel);
  }
};
