// SPDX-License-Identifier: Apache-2.0
// One unit of the plan on AMX tiles, for keys and values that bf16 holds exactly. Included inside
// an ISA namespace.
//
// A tile product sums 32 bf16 products in float32 in an order that depends on nothing but their
// place in the sum. So it does not matter for the bits which rows share a tile, nor which operand
// is the left one: many query rows take packed keys, few take keys as they lie in memory.

inline constexpr int kStepDims = plan::kStepDims;  // or keys, of one product
inline constexpr int kTileKeys = kTileDim;
inline constexpr int kColumnPair = 2 * kTileDim;  // value columns that are packed together
inline constexpr int kScoreStride = plan::kScoreStride;

/// Upper halves of 32 elements.
ATTEND_INLINE __m512i upper_halves(__m512i a, __m512i b) {
  const __m512i pick =
      _mm512_set_epi16(63, 61, 59, 57, 55, 53, 51, 49, 47, 45, 43, 41, 39, 37, 35, 33, 31, 29, 27,
                       25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
  return _mm512_permutex2var_epi16(a, pick, b);
}

/// What is left of a weight without its upper half. Never 0 or less where the weight is more: an
/// infinite value times it must not be NaN, nor the opposite infinity.
ATTEND_INLINE Simd::F rest_of_weight(Simd::F x) {
  const __m512i upper = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(-65536));
  const Simd::F rest = Simd::sub(x, _mm512_castsi512_ps(upper));
  const __mmask16 some = _mm512_cmp_ps_mask(x, Simd::zero(), _CMP_GT_OQ);
  return _mm512_mask_max_ps(rest, some, rest, Simd::set1(0x1p-126F));
}

/// Stores 32 weights as two bf16 numbers each, whose sum is off by at most 2^-16 of the weight: 32
/// first parts at `to`, then 32 second ones.
ATTEND_INLINE void split_weights(Simd::F a, Simd::F b, float* to) {
  const __m512bh second = _mm512_cvtne2ps_pbh(rest_of_weight(b), rest_of_weight(a));
  _mm512_storeu_si512(to, upper_halves(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  std::memcpy(to + kTileDim, &second, sizeof second);
}

/// A row of logits that want multiplying by a factor above 0.
struct ScaledRow {
  float* s;
  float factor, max;  // max: of the products with the factor
};

/// weigh_rows for rows that are still to be multiplied by their factors, over a span of whole
/// steps; the sums run over 32 virtual lanes. kSplit: weights are stored as two parts. Fetches some
/// lines of the next piece at each step.
template <int N, bool kSplit, int kLines, typename Fetch>
ATTEND_INLINE void weigh_scaled_rows(const ScaledRow* rows, KeyRange span, float* sums,
                                     Fetch& fetch) {
  constexpr int kVecs = 2;
  Simd::F factor[N], shift[N], sum[N][kVecs];
  for (int i = 0; i < N; ++i) {
    factor[i] = Simd::set1(rows[i].factor);
    shift[i] = shift_of(rows[i].max);
    for (int v = 0; v < kVecs; ++v) sum[i][v] = Simd::zero();
  }
  for (int j = span.lo; j < span.hi; j += kStepDims) {
    Simd::F e[N * kVecs];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i)
      for (int v = 0; v < kVecs; ++v)
        e[i * kVecs + v] =
            Simd::sub(Simd::mul(Simd::load(rows[i].s + j + v * Simd::kLanes), factor[i]), shift[i]);
    Simd::exp2_of_each(e);
    if constexpr (kLines > 0) fetch.template lines<kLines>();
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      float* to = rows[i].s + j;
      for (int v = 0; v < kVecs; ++v) {
        const Simd::F x = e[i * kVecs + v];
        sum[i][v] = Simd::add(sum[i][v], x);
        if constexpr (!kSplit) Simd::store(to + v * Simd::kLanes, x);
      }
      if constexpr (kSplit) split_weights(e[i * kVecs], e[i * kVecs + 1], to);
    }
  }
  for (int i = 0; i < N; ++i) sums[i] = Simd::reduce_add(Simd::add(sum[i][0], sum[i][1]));
}

template <typename K, typename V>
struct AmxUnitRunner : UnitRunner<bf16, K, V> {
  using Base = UnitRunner<bf16, K, V>;
  using Base::acc, Base::factors, Base::hi, Base::keep, Base::key_scales, Base::kStagedKeys,
      Base::kStagedValues, Base::kValuesAreKeys, Base::lo, Base::next, Base::p, Base::packed_panel,
      Base::piece_l, Base::piece_m, Base::q, Base::rows, Base::s, Base::staged_k,
      Base::stored_k_rows, Base::stored_v_rows, Base::take, Base::u, Base::value_scales,
      Base::values_packed;
  using Base::Base;
  KeyRange unit_keys;  // of the piece at hand that any row sees
  /// Whatever rows hold that fill up a tile reaches no other row.
  static constexpr bool kClearsTail = false;
  static constexpr int kTile = 2 * kTileDim, kBlock = 2 * kTileDim, kSpan = kStepDims;
  /// Lines of the next piece fetched beside a step of each phase: bursts would wait for line
  /// buffers, phases without fetches would leave memory idle. Shares of the time, for heads of 128
  /// dimensions.
  static constexpr int kLinesPerProduct = kStagedKeys ? 1 : 9, kLinesPerCopy = 1,
                       kLinesPerStep = 6 * sizeof(K) / 2, kLinesPerWeave = 3 * sizeof(V) / 2,
                       kLinesPerSum = 8 * sizeof(V) / 2;
  /// Queries as sums of so many bf16 numbers.
  int num_parts() const { return p.q_dtype == DType::f32 ? 3 : p.q_dtype == DType::f16 ? 2 : 1; }
  int steps() const { return (p.head_dim_qk + kStepDims - 1) / kStepDims; }
  int padded_dim() const { return steps() * kStepDims; }
  int padded_rows() const { return static_cast<int>(plan::round_up(rows, kTileDim)); }
  /// A single tile of rows means decode, bound by memory.
  bool fetches() const { return rows <= kTileDim; }
  bool paired_columns() const { return false; }

  bf16* parts() const { return reinterpret_cast<bf16*>(q); }
  /// Dimension d of part `part` of row r. Few rows are the right operand: pairs of dimensions, each
  /// with all rows.
  std::int64_t place(int part, int r, int d) const {
    if (fetches()) return ((std::int64_t{part} * padded_dim() + d) / 2 * kTileDim + r) * 2 + d % 2;
    return (std::int64_t{part} * padded_rows() + r) * padded_dim() + d;
  }

  void load_query(int r, int i) {
    if constexpr (kStagedKeys) {
      with_dtype(p.q_dtype,
                 [&](auto element) ATTEND_LAMBDA { load_query_as<decltype(element)>(r, i); });
    } else {
      load_query_as<bf16>(r, i);
    }
  }
  template <typename Q>
  void load_query_as(int r, int i) {
    const int own = this->request[r];
    const float scale = p.scale * (p.q_descale.at(own, u.kv_head) * p.k_descale.at(own, u.kv_head));
    factors[r] = this->log2_factor(scale);
    const Q* from =
        static_cast<const Q*>(p.q) + p.q_layout.offset(p.query_start_loc, own, i, this->head(r));
    if constexpr (std::is_same_v<Q, bf16>) {
      copy_query(r, from);
      return;
    }
    alignas(64) float wide[kMaxHeadDimQk + kTileDim];
    if constexpr (sizeof(Q) == 1) {
      bf16 decoded[kMaxHeadDimQk + kTileDim];
      Simd::decode(from, p.head_dim_qk, decoded);
      widen_row(decoded, wide);
    } else {
      widen_row(from, wide);
    }
    for (int d = p.head_dim_qk; d < padded_dim(); ++d) wide[d] = 0.0F;
    for (int part = 0; part < num_parts(); ++part) {
      for (int d = 0; d < padded_dim(); ++d) {
        const std::uint32_t bits = std::bit_cast<std::uint32_t>(wide[d]);
        parts()[place(part, r, d)] = bf16{static_cast<std::uint16_t>(bits >> 16)};
        wide[d] -= std::bit_cast<float>(bits & 0xffff0000U);
      }
    }
  }
  /// A query of one part.
  void copy_query(int r, const bf16* from) {
    if (!fetches()) {
      bf16* to = parts() + place(0, r, 0);
      std::memcpy(to, from, sizeof(bf16) * static_cast<std::size_t>(p.head_dim_qk));
      for (int d = p.head_dim_qk; d < padded_dim(); ++d) to[d] = bf16{};
      return;
    }
    for (int d = 0; d < padded_dim(); d += 2) {
      bf16* to = parts() + place(0, r, d);
      if (d < p.head_dim_qk) {
        std::memcpy(to, from + d, 2 * sizeof(bf16));
      } else {
        to[0] = to[1] = bf16{};
      }
    }
  }
  template <typename Q>
  ATTEND_INLINE void widen_row(const Q* from, float* to) const {
    int d = 0;
    for (; d + Simd::kLanes <= p.head_dim_qk; d += Simd::kLanes)
      Simd::store(to + d, Simd::widen(from + d));
    if (d < p.head_dim_qk) Simd::store(to + d, Simd::widen_half(from + d));
  }

  /// Keys are copied if tiles cannot be loaded from where they lie.
  bool copies_keys() const { return kStagedKeys || p.head_dim_qk % kStepDims != 0; }

  void stage(int piece) {
    unit_keys = this->piece_range(0, rows, piece * kPieceSize);
    if constexpr (kValuesAreKeys)
      for (int j = 0; j < kPieceSize; ++j) stored_v_rows[j] = copy_of_key(j);
    if (fetches()) return;
    shape_tiles(kTileDim);
    if (copies_keys()) copy_keys();
  }
  bf16* copy_of_key(int j) const { return staged_k + std::int64_t{j} * padded_dim(); }
  ATTEND_NOINLINE void copy_keys() {
    const Decoder<K> decoder(p);
    for (int j = unit_keys.lo; j < unit_keys.hi; ++j) copy_key(decoder, j, copy_of_key(j));
  }
  /// Key j as whole steps of bf16 numbers.
  ATTEND_INLINE void copy_key(const Decoder<K>& decoder, int j, bf16* to) const {
    if constexpr (kStagedKeys) {
      decoder.decode(stored_k_rows[j], p.head_dim_qk, to);
    } else {
      std::memcpy(to, stored_k_rows[j], sizeof(bf16) * static_cast<std::size_t>(p.head_dim_qk));
    }
    for (int d = p.head_dim_qk; d < padded_dim(); ++d) to[d] = bf16{};
  }

  template <typename Self>
  void logits(Self& /*self*/, int begin, int end, int base, bool /*keep_panels*/) {
    const KeyRange range = this->piece_range(begin, end, base);
    if (fetches()) {
      few_rows_logits(range);
      return;
    }
    for (int panel = range.lo / plan::kPanelKeys; panel * plan::kPanelKeys < range.hi; ++panel) {
      const float* keys = k_panel(panel);
      float* to = s + panel * plan::kPanelKeys;
      if (end - begin > kTileDim) {
        rows_times_panel<2>(begin, keys, to);
      } else {
        rows_times_panel<1>(begin, keys, to);
      }
    }
  }

  /// 64 keys at a time, as a product waits for the last one of its own tile.
  void few_rows_logits(KeyRange range) {
    shape_tiles(kTileDim);
    alignas(64) float products[4 * kTileFloats];
    KeyRange done{0, 0};  // keys whose products wait to be transposed
    for (int j = range.lo / kTileKeys * kTileKeys; j < range.hi; j = done.hi) {
      const KeyRange group{j, j + 4 * kTileKeys <= kPieceSize ? j + 4 * kTileKeys : j + kTileKeys};
      if (group.hi - group.lo > kTileKeys) {
        few_rows_times_keys<4>(group, done, products);
      } else {
        few_rows_times_keys<1>(group, done, products);
      }
      done = group;
    }
    transpose_products(done, products);
  }
  /// Copies keys [j, j + count). Keys that no row sees have the address of one that a row sees.
  ATTEND_NOINLINE void copy_tiles(int j, int count, bf16* to) {
    const InPhase packing(this->clock, Phase::pack);
    const Decoder<K> decoder(p);
    PrefetchRows<K, V> fetch = next;  // stores do not change it
    for (int i = 0; i < count; ++i) {
      copy_key(decoder, j + i, to + std::int64_t{i} * padded_dim());
      fetch.template lines<kLinesPerCopy>();
    }
    next = fetch;
  }

  /// 16 keys as the left operand, rows of whole steps of dimensions.
  struct KeyTile {
    const bf16* at;
    std::int64_t stride;  // bytes
  };
  /// Where they lie, or copies.
  template <int kTiles>
  ATTEND_INLINE void point_tiles(KeyRange group, KeyTile* tiles) {
    const std::int64_t row_bytes = std::int64_t{2} * padded_dim();
    const bool adjoin = p.block_table == nullptr || p.block_size % kTileKeys == 0;
    // Copies that are values too stay until these are multiplied.
    bf16* copies = copy_of_key(kValuesAreKeys ? group.lo : 0);
    if (copies_keys()) copy_tiles(group.lo, kTiles * kTileKeys, copies);
    for (int i = 0; i < kTiles; ++i) {
      const int j = group.lo + i * kTileKeys;
      bf16* copy = copies + std::int64_t{i} * kTileKeys * padded_dim();
      tiles[i] = {copy, row_bytes};
      if (copies_keys()) continue;
      if constexpr (!kStagedKeys) {
        if (adjoin && j >= unit_keys.lo && j + kTileKeys <= unit_keys.hi) {
          tiles[i] = {stored_k_rows[j], p.k_strides.token * std::int64_t{2}};
        } else {
          copy_tiles(j, kTileKeys, copy);
        }
      }
    }
  }

  /// Products of all rows and the keys of `group`, kTiles * 16. Transposes those of the keys
  /// before, `done`, once what it waits for is there: after the copying.
  template <int kTiles>
  ATTEND_NOINLINE void few_rows_times_keys(KeyRange group, KeyRange done, float* products) {
    KeyTile keys[kTiles];
    point_tiles<kTiles>(group, keys);
    transpose_products(done, products);
    const bf16* queries = parts();
    clear_tile<0>();
    if constexpr (kTiles == 4) {
      clear_tile<1>();
      clear_tile<2>();
      clear_tile<3>();
    }
    for (int part = 0; part < num_parts(); ++part) {
      for (int k = 0; k < steps(); ++k, queries += 2 * kTileFloats) {
        const std::int64_t d = std::int64_t{k} * kStepDims;
        load_tile<6>(queries, kTileRowBytes);
        load_tile<4>(keys[0].at + d, keys[0].stride);
        multiply_bf16<0, 4, 6>();
        if constexpr (kTiles == 4) {
          load_tile<5>(keys[1].at + d, keys[1].stride);
          multiply_bf16<1, 5, 6>();
          load_tile<7>(keys[2].at + d, keys[2].stride);
          multiply_bf16<2, 7, 6>();
          load_tile<4>(keys[3].at + d, keys[3].stride);
          multiply_bf16<3, 4, 6>();
        }
        if (part > 0) continue;
        for (int i = 0; i < kTiles; ++i) next.template lines<kLinesPerProduct>();
      }
    }
    store_tile<0>(products, kTileRowBytes);
    if constexpr (kTiles == 4) {
      store_tile<1>(products + kTileFloats, kTileRowBytes);
      store_tile<2>(products + 2 * kTileFloats, kTileRowBytes);
      store_tile<3>(products + 3 * kTileFloats, kTileRowBytes);
    }
  }
  /// The logits of `keys` to the rows of s.
  ATTEND_INLINE void transpose_products(KeyRange keys, const float* products) const {
    for (int j = keys.lo; j < keys.hi; j += kTileKeys, products += kTileFloats) {
      transpose<0>(products, j);
      if (rows > 8) transpose<8>(products, j);
    }
  }
  template <int kFirst>
  ATTEND_INLINE void transpose(const float* products, int j) const {
    __m512i t[8];
    Simd::transpose_16x8([&](int i) ATTEND_LAMBDA { return products + i * kTileDim + kFirst; }, t);
    for (int i = 0; i < 8; ++i)
      if (kFirst + i < rows)
        Simd::store(s + std::int64_t{kFirst + i} * kScoreStride + j, _mm512_castsi512_ps(t[i]));
  }

  /// Two tiles of 16 keys as right operands: pairs of dimensions, each with all keys.
  ATTEND_NOINLINE const float* k_panel(int panel) {
    const std::int64_t half = std::int64_t{padded_dim()} / 2 * kTileKeys;
    float* to = this->k_panels + 2 * half * panel;
    if (packed_panel[panel]) return to;
    packed_panel[panel] = true;
    const InPhase packing(this->clock, Phase::pack);
    NoPrefetch none;
    for (int i = 0; i < 2; ++i) {
      const int j = panel * plan::kPanelKeys + i * kTileKeys;
      const bf16* key_rows[kTileKeys];
      for (int key = 0; key < kTileKeys; ++key) {
        if (copies_keys()) {
          const bool visible = j + key >= unit_keys.lo && j + key < unit_keys.hi;
          const int row = visible ? j + key : unit_keys.lo;
          key_rows[key] = copy_of_key(row);
        } else if constexpr (!kStagedKeys) {
          key_rows[key] = stored_k_rows[j + key];
        }
      }
      Simd::template pack_pairs<kTileKeys>(key_rows, padded_dim(), to + half * i, none);
    }
    return to;
  }

  /// Logits of kRowTiles * 16 rows from `begin` on and one panel, before the factor.
  template <int kRowTiles>
  ATTEND_NOINLINE void rows_times_panel(int begin, const float* keys, float* to) {
    const std::int64_t half = std::int64_t{padded_dim()} / 2 * kTileKeys;
    const std::int64_t row_bytes = std::int64_t{2} * padded_dim();
    clear_tile<0>();
    clear_tile<1>();
    if constexpr (kRowTiles == 2) {
      clear_tile<2>();
      clear_tile<3>();
    }
    for (int part = 0; part < num_parts(); ++part) {
      const bf16* queries = parts() + place(part, begin, 0);
      for (int k = 0; k < steps(); ++k) {
        load_tile<6>(keys + k * kTileFloats, kTileRowBytes);
        load_tile<7>(keys + half + k * kTileFloats, kTileRowBytes);
        load_tile<4>(queries + k * kStepDims, row_bytes);
        multiply_bf16<0, 4, 6>();
        multiply_bf16<1, 4, 7>();
        if constexpr (kRowTiles == 2) {
          load_tile<5>(queries + kTileDim * padded_dim() + k * kStepDims, row_bytes);
          multiply_bf16<2, 5, 6>();
          multiply_bf16<3, 5, 7>();
        }
      }
    }
    constexpr std::int64_t kStride = kScoreStride * sizeof(float);
    store_tile<0>(to, kStride);
    store_tile<1>(to + kTileKeys, kStride);
    if constexpr (kRowTiles == 2) {
      store_tile<2>(to + kTileDim * kScoreStride, kStride);
      store_tile<3>(to + kTileDim * kScoreStride + kTileKeys, kStride);
    }
  }

  /// Two rows at once fill the registers.
  template <typename Self>
  ATTEND_INLINE void finish_rows(Self& /*self*/, int r, int end, int begin, KeyRange span,
                                 int base) {
    for (; r + 2 <= end; r += 2) finish_some<2>(r, r - begin, span, base);
    for (; r < end; ++r) finish_some<1>(r, r - begin, span, base);
  }
  template <int N>
  ATTEND_NOINLINE void finish_some(int r, int at, KeyRange span, int base) {
    ScaledRow each[N];
    for (int i = 0; i < N; ++i) each[i] = finish_row(r + i, at + i, span, base);
    float sums[N];
    if (p.v_scale != nullptr) {
      weigh_scaled_rows<N, false, 0>(each, span, sums, next);
      for (int i = 0; i < N; ++i) scale_and_split(r + i, each[i].s, span, base);
    } else if (fetches()) {
      PrefetchRows<K, V> fetch = next;  // stores do not change it
      weigh_scaled_rows<N, true, N * kLinesPerStep>(each, span, sums, fetch);
      next = fetch;
    } else {
      weigh_scaled_rows<N, true, 0>(each, span, sums, next);
    }
    for (int i = 0; i < N; ++i) {
      piece_m[r + i] = each[i].max;
      piece_l[r + i] = sums[i];
    }
  }
  /// Logits of row r, which is row `at` of its block, in whatever unit weigh_scaled_rows takes.
  ATTEND_INLINE ScaledRow finish_row(int r, int at, KeyRange span, int base) const {
    float* sr = s + std::int64_t{at} * kScoreStride;
    const KeyRange visible{lo[r] - base, hi[r] - base};
    if (p.k_scale != nullptr) multiply_by(sr, key_scales, span);
    const LogitTerms terms = this->logit_terms(r, base, factors[r]);
    if (this->has_extra_terms())
      return {sr, 1.0F, finish_logits<true, true>(sr, span, visible, terms)};
    // A factor may underflow to 0, and -inf * 0 is NaN.
    if (factors[r] == 0.0F) return {sr, 1.0F, finish_logits<false, true>(sr, span, visible, terms)};
    return {sr, factors[r], factors[r] * finish_logits<false, false>(sr, span, visible, terms)};
  }
  ATTEND_INLINE void scale_and_split(int r, float* sr, KeyRange span, int base) const {
    multiply_visible_by(sr, value_scales, span, {lo[r] - base, hi[r] - base});
    for (int j = span.lo; j < span.hi; j += kStepDims)
      split_weights(Simd::load(sr + j), Simd::load(sr + j + Simd::kLanes), sr + j);
  }

  int column_pairs() const { return (p.head_dim_v + kColumnPair - 1) / kColumnPair; }
  /// Right operands of the values of a step of 32 keys: two tiles for each pair of column tiles.
  float* value_tiles(int step, int pair) const {
    return this->v_panels + (std::int64_t{step} * column_pairs() + pair) * (2 * kTileFloats);
  }

  /// Up to 32 columns of a value row, of which `left` are left; kWhole: 32 or more.
  template <bool kWhole>
  ATTEND_INLINE static __m512i value_columns(const V* from, int left) {
    const __mmask32 there = left >= kColumnPair ? ~0U : (1U << left) - 1U;
    if constexpr (!kStagedValues) {
      return kWhole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi16(there, from);
    } else if constexpr (std::is_same_v<V, std::int8_t>) {
      alignas(64) bf16 decoded[kColumnPair] = {};
      Simd::decode(from, left >= kColumnPair ? kColumnPair : left, decoded);
      return _mm512_load_si512(decoded);
    } else {
      return Simd::decode_codes(V{}, _mm256_maskz_loadu_epi8(there, from));
    }
  }

  /// Packs columns of kPairs pairs of tiles, from `pair` on, of the values of keys j and j + 1,
  /// keys outside of `range` as zeros: two rows of right operands, the first at `to`. Woven inside
  /// 128-bit lanes; merge_columns puts the columns in order.
  template <int kPairs>
  ATTEND_INLINE void pack_two(int j, KeyRange range, int pair, float* to) const {
    const bool first = j >= range.lo && j < range.hi;
    const bool second = j + 1 >= range.lo && j + 1 < range.hi;
    const int at = pair * kColumnPair, left = p.head_dim_v - at;
    if (first && second && left >= kPairs * kColumnPair) {
      pack_whole<kPairs>(stored_v_rows[j] + at, stored_v_rows[j + 1] + at, to);
      return;
    }
    if constexpr (CodeTable<V>::kExists && kPairs == 2) {
      const __mmask64 there = left >= 64 ? ~0ULL : (1ULL << left) - 1ULL;
      weave_codes(_mm512_maskz_loadu_epi8(first ? there : 0, stored_v_rows[j] + at),
                  _mm512_maskz_loadu_epi8(second ? there : 0, stored_v_rows[j + 1] + at), to);
      return;
    }
    for (int i = 0; i < kPairs; ++i) {
      __m512i a = _mm512_setzero_si512(), b = a;
      const int columns = left - i * kColumnPair;
      if (first) a = value_columns<false>(stored_v_rows[j] + at + i * kColumnPair, columns);
      if (second) b = value_columns<false>(stored_v_rows[j + 1] + at + i * kColumnPair, columns);
      weave(a, b, to + i * 2 * kTileFloats);
    }
  }
  /// The same for two rows that are there, with every column.
  template <int kPairs>
  ATTEND_INLINE static void pack_whole(const V* a, const V* b, float* to) {
    if constexpr (CodeTable<V>::kExists && kPairs == 2) {
      weave_codes(_mm512_loadu_si512(a), _mm512_loadu_si512(b), to);
    } else {
      for (int i = 0; i < kPairs; ++i)
        weave(value_columns<true>(a + i * kColumnPair, kColumnPair),
              value_columns<true>(b + i * kColumnPair, kColumnPair), to + i * 2 * kTileFloats);
    }
  }
  /// Codes of 64 columns are woven before they are looked up. Each 128-bit lane holds 16 columns,
  /// so a tile has 4 of each: mixes_columns().
  ATTEND_INLINE static void weave_codes(__m512i a, __m512i b, float* to) {
    const CodeTable<V> table;
    store_numbers(table, _mm512_unpacklo_epi8(a, b), to);
    store_numbers(table, _mm512_unpackhi_epi8(a, b), to + 2 * kTileFloats);
  }
  template <typename Table>
  ATTEND_INLINE static void store_numbers(const Table& table, __m512i codes, float* to) {
    __m512i low, high;
    table.look_up(codes, &low, &high);
    _mm512_store_si512(to, _mm512_unpacklo_epi8(low, high));
    _mm512_store_si512(to + kTileFloats, _mm512_unpackhi_epi8(low, high));
  }
  ATTEND_INLINE static void weave(__m512i a, __m512i b, float* to) {
    _mm512_store_si512(to, _mm512_unpacklo_epi16(a, b));
    _mm512_store_si512(to + kTileFloats, _mm512_unpackhi_epi16(a, b));
  }
  ATTEND_NOINLINE void pack_values(KeyRange range) {
    const InPhase packing(this->clock, Phase::pack);
    const int end = static_cast<int>(plan::round_up(range.hi, kStepDims));
    for (int j = range.lo / kStepDims * kStepDims; j < end; j += 2) {
      float* to = value_tiles(j / kStepDims, 0) + j % kStepDims / 2 * kTileDim;
      int pair = 0;
      for (; pair + 2 <= column_pairs(); pair += 2, to += 4 * kTileFloats)
        pack_two<2>(j, range, pair, to);
      if (pair < column_pairs()) pack_two<1>(j, range, pair, to);
    }
    values_packed = true;
  }
  bool packed_values_finite(KeyRange range) {
    if (this->values_scanned) return this->values_finite;
    bool bad = false;
    const int end = (range.hi + kStepDims - 1) / kStepDims;
    const float* stop = value_tiles(end, 0);
    for (const float* at = value_tiles(range.lo / kStepDims, 0); at < stop; at += kTileDim) {
      const __m512i x = _mm512_loadu_si512(at);
      bad |= Simd::any_nonfinite(_mm512_castsi512_ps(x));
      bad |= Simd::any_nonfinite(_mm512_castsi512_ps(_mm512_slli_epi32(x, 16)));
    }
    this->values_scanned = true;
    return this->values_finite = !bad;
  }

  void outputs(int begin, int end, int base, KeyRange unit_range) {
    const KeyRange range = this->piece_range(begin, end, base);
    if (range.lo >= range.hi) return;
    if (fetches()) {
      shape_tiles(rows);
      if (this->same_masks(begin, end, base)) {
        add_few_rows(begin, end, s, range);
        return;
      }
    }
    if (!values_packed) pack_values(unit_range);
    if (this->same_masks(begin, end, base) || packed_values_finite(unit_range)) {
      if (end - begin > kTileDim) {
        add_rows<2>(begin, end, s, range);
      } else {
        add_rows<1>(begin, end, s, range);
      }
      return;
    }
    // An infinite or NaN value behind one row's mask must not reach that row through 0 * inf.
    for (int r = begin; r < end; ++r) {
      const KeyRange own = this->piece_range(r, r + 1, base);
      if (own.lo >= own.hi) continue;
      pack_values(own);
      add_rows<1>(r, r + 1, s + std::int64_t{r - begin} * kScoreStride, own);
    }
    values_packed = false;
  }

  /// Adds the values of the steps of `range` to up to 16 rows, four tiles of columns at a time.
  ATTEND_NOINLINE void add_few_rows(int begin, int end, const float* weights, KeyRange range) {
    int pair = 0;
    for (; pair + 2 <= column_pairs(); pair += 2) add_columns<2>(begin, end, weights, range, pair);
    if (pair < column_pairs()) add_columns<1>(begin, end, weights, range, pair);
  }

  /// A group of steps whose values are packed while those before are multiplied.
  struct Packing {
    int at, end;  // keys, whole steps
    float* to;    // of the group's first key
    bool whole;   // every key and column is there
  };
  template <int kPairs>
  ATTEND_INLINE Packing packing(int at, int end, float* to, KeyRange range, int pair) const {
    return {at, end, to,
            at >= range.lo && end <= range.hi && (pair + kPairs) * kColumnPair <= p.head_dim_v};
  }
  /// Pairs of keys that are packed at a time: what a step has between two products, each.
  template <int kPairs>
  static constexpr int kPerStop = kStepDims / 2 / (2 * kPairs);
  template <int kPairs, typename Fetch>
  ATTEND_INLINE void pack_some(Packing& job, KeyRange range, int pair, Fetch& fetch) const {
    if (job.at >= job.end) return;
    const unsigned in_group = static_cast<unsigned>(job.at) % (kGroupSteps * kStepDims);
    float* to = job.to + in_group / kStepDims * kPairs * 2 * kTileFloats +
                in_group % kStepDims / 2 * kTileDim;
    const V* const* from = stored_v_rows + job.at;
    if (job.whole) {
      for (int i = 0; i < kPerStop<kPairs>; ++i, from += 2, to += kTileDim) {
        pack_whole<kPairs>(from[0] + pair * kColumnPair, from[1] + pair * kColumnPair, to);
        fetch.template lines<kLinesPerWeave>();
      }
    } else {
      for (int i = 0; i < kPerStop<kPairs>; ++i, to += kTileDim)
        pack_two<kPairs>(job.at + 2 * i, range, pair, to);
      fetch.template lines<kPerStop<kPairs> * kLinesPerWeave>();
    }
    job.at += 2 * kPerStop<kPairs>;
  }
  template <int kPairs, typename Fetch>
  ATTEND_INLINE void pack_rest(Packing& job, KeyRange range, int pair, Fetch& fetch) const {
    while (job.at < job.end) pack_some<kPairs>(job, range, pair, fetch);
  }
  static constexpr int kGroupSteps = 2;

  /// The same for kPairs pairs of column tiles. The packed values stay in the nearest cache.
  template <int kPairs>
  ATTEND_INLINE void add_columns(int begin, int end, const float* weights, KeyRange range,
                                 int pair) {
    constexpr std::int64_t kStride = kScoreStride * sizeof(float);
    constexpr int kStepFloats = kPairs * 2 * kTileFloats;
    constexpr int kGroup = kGroupSteps * kStepDims;
    clear_tile<0>();
    clear_tile<1>();
    if constexpr (kPairs == 2) {
      clear_tile<2>();
      clear_tile<3>();
    }
    const int last = static_cast<int>(plan::round_up(range.hi, kStepDims));
    float* slot = this->v_panels;
    float* other = slot + kGroupSteps * kStepFloats;
    const int first = range.lo / kGroup * kGroup;
    Packing job = packing<kPairs>(range.lo / kStepDims * kStepDims,
                                  first + kGroup < last ? first + kGroup : last, slot, range, pair);
    PrefetchRows<K, V> fetch = next;  // stores do not change it
    pack_rest<kPairs>(job, range, pair, fetch);
    for (int group = first; group < last; group += kGroup, exchange(slot, other)) {
      const int stop = group + kGroup < last ? group + kGroup : last;
      job = packing<kPairs>(stop, stop + kGroup < last ? stop + kGroup : last, other, range, pair);
      const int from = range.lo / kStepDims * kStepDims;
      for (int j = group < from ? from : group; j < stop; j += kStepDims) {
        const float* values = slot + (j - group) / kStepDims * kStepFloats;
        load_tile<4>(weights + j, kStride);
        load_tile<5>(weights + j + kTileDim, kStride);
        load_tile<6>(values, kTileRowBytes);
        load_tile<7>(values + kTileFloats, kTileRowBytes);
        multiply_bf16<0, 4, 6>();
        multiply_bf16<1, 4, 7>();
        fetch.template lines<kLinesPerSum>();
        pack_some<kPairs>(job, range, pair, fetch);
        multiply_bf16<0, 5, 6>();
        multiply_bf16<1, 5, 7>();
        fetch.template lines<kLinesPerSum>();
        pack_some<kPairs>(job, range, pair, fetch);
        if constexpr (kPairs == 2) {
          load_tile<6>(values + 2 * kTileFloats, kTileRowBytes);
          load_tile<7>(values + 3 * kTileFloats, kTileRowBytes);
          multiply_bf16<2, 4, 6>();
          multiply_bf16<3, 4, 7>();
          fetch.template lines<kLinesPerSum>();
          pack_some<kPairs>(job, range, pair, fetch);
          multiply_bf16<2, 5, 6>();
          multiply_bf16<3, 5, 7>();
          fetch.template lines<kLinesPerSum>();
          pack_some<kPairs>(job, range, pair, fetch);
        }
      }
      pack_rest<kPairs>(job, range, pair, fetch);
    }
    next = fetch;
    alignas(64) float sums[kStepFloats];
    store_tile<0>(sums, kTileRowBytes);
    store_tile<1>(sums + kTileFloats, kTileRowBytes);
    if constexpr (kPairs == 2) {
      store_tile<2>(sums + 2 * kTileFloats, kTileRowBytes);
      store_tile<3>(sums + 3 * kTileFloats, kTileRowBytes);
    }
    for (int i = 0; i < kPairs; ++i)
      merge_columns(begin, end, pair + i, sums + i * 2 * kTileFloats);
  }

  /// Adds the packed values of the steps of `range` to rows [begin, end), kRowTiles * 16 at most.
  template <int kRowTiles>
  ATTEND_NOINLINE void add_rows(int begin, int end, const float* weights, KeyRange range) const {
    constexpr std::int64_t kStride = kScoreStride * sizeof(float);
    alignas(64) float sums[2 * kRowTiles * kTileFloats];
    const int first = range.lo / kStepDims, last = (range.hi + kStepDims - 1) / kStepDims;
    for (int pair = 0; pair < column_pairs(); ++pair) {
      clear_tile<0>();
      clear_tile<1>();
      if constexpr (kRowTiles == 2) {
        clear_tile<2>();
        clear_tile<3>();
      }
      for (int i = first; i < last; ++i) {
        const float* values = value_tiles(i, pair);
        const float* upper = weights + i * kStepDims;
        load_tile<6>(values, kTileRowBytes);
        load_tile<4>(upper, kStride);
        multiply_bf16<0, 4, 6>();
        load_tile<7>(values + kTileFloats, kTileRowBytes);
        multiply_bf16<1, 4, 7>();
        load_tile<5>(upper + kTileDim, kStride);
        if constexpr (kRowTiles == 2) {
          const float* lower = upper + kTileDim * kScoreStride;
          load_tile<4>(lower, kStride);
          multiply_bf16<2, 4, 6>();
          multiply_bf16<3, 4, 7>();
          multiply_bf16<0, 5, 6>();
          multiply_bf16<1, 5, 7>();
          load_tile<4>(lower + kTileDim, kStride);
          multiply_bf16<2, 4, 6>();
          multiply_bf16<3, 4, 7>();
        } else {
          multiply_bf16<0, 5, 6>();
          multiply_bf16<1, 5, 7>();
        }
      }
      store_tile<0>(sums, kTileRowBytes);
      store_tile<1>(sums + kRowTiles * kTileFloats, kTileRowBytes);
      if constexpr (kRowTiles == 2) {
        store_tile<2>(sums + kTileFloats, kTileRowBytes);
        store_tile<3>(sums + 3 * kTileFloats, kTileRowBytes);
      }
      merge_columns<kRowTiles>(begin, end, pair, sums);
    }
  }

  /// Whether the tiles of the pair hold 8 of every 16 columns out of 64, not 32 columns in a row.
  bool mixes_columns(int pair) const {
    return CodeTable<V>::kExists && pair / 2 * 2 + 2 <= column_pairs();
  }
  /// Two times 8 columns, the second ones `gap` columns after the first ones.
  ATTEND_INLINE static __m512 load_columns(const float* from, int gap) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(from)),
                              _mm256_loadu_ps(from + gap), 1);
  }
  ATTEND_INLINE static void store_columns(float* to, int gap, __m512 x) {
    _mm256_storeu_ps(to, _mm512_castps512_ps256(x));
    _mm256_storeu_ps(to + gap, _mm512_extractf32x8_ps(x, 1));
  }

  /// Merges the sums of a pair of column tiles into rows [begin, end).
  template <int kRowTiles = 1>
  ATTEND_INLINE void merge_columns(int begin, int end, int pair, const float* sums) const {
    const bool mixed = mixes_columns(pair);
    const int gap = mixed ? 16 : 8,
              first = mixed ? pair / 2 * 64 + pair % 2 * 8 : pair * kColumnPair;
    const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int r = begin; r < end; ++r, sums += kTileDim) {
      const __m512 x = _mm512_loadu_ps(sums);
      const __m512 y = _mm512_loadu_ps(sums + kRowTiles * kTileFloats);
      const __m512 factor = _mm512_set1_ps(take[r]);
      const __m512 a = _mm512_mul_ps(_mm512_permutex2var_ps(x, low, y), factor);
      const __m512 b = _mm512_mul_ps(_mm512_permutex2var_ps(x, high, y), factor);
      float* at = acc + std::int64_t{r} * this->dv_padded + first;
      if (keep[r] == 0.0F) {
        store_columns(at, gap, a);
        store_columns(at + 2 * gap, gap, b);
      } else {
        const __m512 old = _mm512_set1_ps(keep[r]);
        store_columns(at, gap, _mm512_fmadd_ps(load_columns(at, gap), old, a));
        store_columns(at + 2 * gap, gap, _mm512_fmadd_ps(load_columns(at + 2 * gap, gap), old, b));
      }
    }
  }
};

template <typename Stored, typename Values = Stored>
void run_amx_unit(const AttentionProblem& p, const WorkUnit& u,
                  const KernelWorkspace& ws) noexcept {
  AmxUnitRunner<Stored, Values> runner(p, u, ws);
  runner.run(runner, ws.partials);
  release_tiles();
}
