// SPDX-License-Identifier: Apache-2.0
// The end of differential attention: two maps of a pair of heads to one row. Included inside an ISA
// namespace.

/// Normalised maps of one pair, [value_width()], with room up to a multiple of 16.
struct PairMaps {
  alignas(64) float of[2][kMaxHeadDimV + 16];
};

/// A pair: query token of its request, kv head, and which pair of that kv head's.
struct PairAt {
  int tok, kv_head, member;
};

/// Element i of a vector of a floating-point type.
ATTEND_INLINE float element(const void* from, DType dtype, std::int64_t i) {
  float lanes[Simd::kLanes];
  with_float_dtype(dtype, [&](auto type) ATTEND_LAMBDA {
    const decltype(type) one[Simd::kLanes] = {static_cast<const decltype(type)*>(from)[i]};
    Simd::store(lanes, Simd::widen(one));
  });
  return lanes[0];
}

/// 1 / (1 + e^-x). Far from 0 it is 0 or 1 within 2^-120; NaN stays NaN.
ATTEND_INLINE float sigmoid(float x) {
  if (x != x) return x;
  const float in_range = x < -85.0F ? -85.0F : x > 85.0F ? 85.0F : x;
  return 1.0F / (1.0F + exp2_one(-in_range * kLog2e));
}

/// Index of a pair among all of a token.
ATTEND_INLINE int pair_index(const AttentionProblem& p, const PairAt& at) {
  return at.kv_head * (p.group_size / 2) + at.member;
}

ATTEND_INLINE float lambda_of(const PairTerms& t, std::int64_t token, int pair) {
  if (t.token_lambda == nullptr) return t.lambda;
  return sigmoid(element(t.token_lambda, t.token_lambda_dtype,
                         token * t.token_lambda_stride_token + pair * t.token_lambda_stride_pair));
}

/// Sum of squares of x[n], n a multiple of 16, over 16 virtual lanes and then a fixed tree.
ATTEND_INLINE float sum_of_squares(const float* x, int n) {
  constexpr int kVecs = 16 / Simd::kLanes;
  Simd::F sum[kVecs];
  for (int v = 0; v < kVecs; ++v) sum[v] = Simd::zero();
  for (int c = 0; c < n; c += 16)
    for (int v = 0; v < kVecs; ++v) {
      const Simd::F part = Simd::load(x + c + v * Simd::kLanes);
      sum[v] = Simd::fma(part, part, sum[v]);
    }
  for (int width = kVecs / 2; width > 0; width /= 2)
    for (int v = 0; v < width; ++v) sum[v] = Simd::add(sum[v], sum[v + width]);
  return Simd::reduce_add(sum[0]);
}

/// x[width] = map 1 - lambda * map 2, normalised and scaled; x has room up to a multiple of 16.
ATTEND_INLINE void combine_maps(const PairTerms& t, int width, float lambda, const float* map1,
                                const float* map2, float* x) {
  const int padded = static_cast<int>(plan::round_up(width, 16));
  const Simd::F minus = Simd::set1(-lambda);
  for (int c = 0; c < padded; c += Simd::kLanes)
    Simd::store(x + c, Simd::fma(minus, Simd::load(map2 + c), Simd::load(map1 + c)));
  float factor = t.out_scale;
  if (t.norm) {
    for (int c = width; c < padded; ++c) x[c] = 0.0F;
    const float mean = sum_of_squares(x, padded) / static_cast<float>(width);
    float root[Simd::kLanes];
    Simd::store(root, Simd::sqrt(Simd::set1(mean + t.norm_eps)));
    factor = t.out_scale / root[0];
  }
  for (int c = 0; c < padded; c += Simd::kLanes)
    Simd::store(x + c, Simd::mul(Simd::load(x + c), Simd::set1(factor)));
  if (t.norm_weight == nullptr) return;
  // There are weights with two branches only: the width is a multiple of 16.
  with_float_dtype(t.norm_weight_dtype, [&](auto type) ATTEND_LAMBDA {
    const auto* weights = static_cast<const decltype(type)*>(t.norm_weight);
    for (int c = 0; c < width; c += Simd::kLanes)
      Simd::store(x + c, Simd::mul(Simd::load(x + c), Simd::widen(weights + c)));
  });
}

/// Writes x[n], n a multiple of 8.
template <typename Out>
ATTEND_INLINE void write_columns(const float* x, int n, Out* to) {
  int c = 0;
  for (; c + Simd::kLanes <= n; c += Simd::kLanes) Simd::narrow(to + c, Simd::load(x + c));
#if ATTEND_HALF_VECTOR
  if (c < n) Simd::narrow_half(to + c, Simd::load(x + c));
#endif
}

/// What two maps become, to the output: a head of it for each branch.
template <typename Out>
ATTEND_INLINE void combine_pair(const AttentionProblem& p, int request, const PairAt& at,
                                PairMaps& maps) {
  const PairTerms& t = p.differential.pair;
  const int width = p.value_width(), pair = pair_index(p, at);
  const std::int64_t token = std::int64_t{p.query_start_loc[request]} + at.tok;
  alignas(64) float x[kMaxHeadDimV + 16];
  for (auto& map : maps.of)
    for (int c = width; c < width + 8; ++c) map[c] = 0.0F;
  combine_maps(t, width, lambda_of(t, token, pair), maps.of[0], maps.of[1], x);
  for (int b = 0; b < p.branches; ++b) {
    const int head = pair * p.branches + b;
    write_columns(
        x + b * p.head_dim_v, p.head_dim_v,
        static_cast<Out*>(p.out) + p.out_layout.offset(p.query_start_loc, request, at.tok, head));
  }
}

/// The same for maps in memory, as q of the problem: tokens [begin, end) of one request.
template <typename Out, typename Map>
ATTEND_INLINE void combine_stored(const AttentionProblem& p, int begin, int end) {
  for (int tok = begin; tok < end; ++tok) {
    for (int member = 0; member < p.group_size / 2; ++member) {
      PairMaps maps;
      for (int map = 0; map < 2; ++map) {
        const Map* from = static_cast<const Map*>(p.q) +
                          p.q_layout.offset(p.query_start_loc, 0, tok,
                                            p.head(0, map * (p.group_size / 2) + member));
        int c = 0;
        for (; c + Simd::kLanes <= p.value_width(); c += Simd::kLanes)
          Simd::store(maps.of[map] + c, Simd::widen(from + c));
#if ATTEND_HALF_VECTOR
        if (c < p.value_width()) Simd::store(maps.of[map] + c, Simd::widen_half(from + c));
#endif
      }
      combine_pair<Out>(p, 0, {tok, 0, member}, maps);
    }
  }
}

inline void combine_maps_unit(const AttentionProblem& p, int begin, int end) noexcept {
  with_float_dtype(p.out_dtype, [&](auto out) ATTEND_LAMBDA {
    with_float_dtype(p.q_dtype, [&](auto map) ATTEND_LAMBDA {
      combine_stored<decltype(out), decltype(map)>(p, begin, end);
    });
  });
}
