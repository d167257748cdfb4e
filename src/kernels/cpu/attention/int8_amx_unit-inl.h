// SPDX-License-Identifier: Apache-2.0
// One unit of the plan over int8 queries, keys and values on AMX tiles. Included inside an ISA
// namespace.
//
// Sums of codes are exact, and what is done to them is what the other levels do, number by number:
// the bits of the outputs are those of the other levels that have 16 lanes.

inline constexpr int kStepCodes = kTileRowBytes;  // dimensions or keys of one product
inline constexpr int kTileKeys = kTileDim;
inline constexpr int kScoreStride = plan::kScoreStride;

/// Sums of a row's weights.
struct RoundedSums {
  float full;     // before rounding
  float rounded;  // in units of 1
};

/// What makes logits of a row of sums.
struct CodeTerms {
  float factor, offset;
  const float* key_scales;
};

/// Turns sums s[span] into logits in place, -inf outside of `visible`, and returns their maximum.
/// Bounds are multiples of 64.
template <bool kExtra>
ATTEND_INLINE float logits_of_sums(float* s, KeyRange span, KeyRange visible, const CodeTerms& code,
                                   const LogitTerms& t) {
  const Simd::F factor = Simd::set1(code.factor), offset = Simd::set1(code.offset);
  const Simd::F minus_inf = Simd::set1(-std::numeric_limits<float>::infinity());
  // Several maxima, or each step would wait for the one before.
  Simd::F top[4] = {minus_inf, minus_inf, minus_inf, minus_inf};
  for (int j = span.lo; j < span.hi; j += kStepCodes) {
    const bool cut = j < visible.lo || j + kStepCodes > visible.hi;
    for (int v = 0; v < 4; ++v) {
      const int at = j + v * Simd::kLanes;
      const Simd::F scaled = Simd::mul(Dot::to_float(Dot::load(s + at)), factor);
      Simd::F x = Simd::fma(scaled, Simd::load(code.key_scales + at), offset);
      x = finish_logit<kExtra>(x, at, t);
      if (cut) x = Simd::keep_range(x, visible.lo - at, visible.hi - at, minus_inf);
      Simd::store(s + at, x);
      top[v] = Simd::max(top[v], x);
    }
  }
  return Simd::reduce_max(Simd::max(Simd::max(top[0], top[1]), Simd::max(top[2], top[3])));
}

/// Four vectors of numbers below 2^7 to bytes; what cvtps makes of NaN becomes 0.
ATTEND_INLINE __m512i bytes_of(const __m512i (&x)[4]) {
  // Packing works inside 128-bit lanes: put the dwords in order.
  const __m512i deal = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i low = _mm512_packs_epi32(x[0], x[1]), high = _mm512_packs_epi32(x[2], x[3]);
  return _mm512_permutexvar_epi32(deal, _mm512_packus_epi16(low, high));
}

/// Turns logits s[span] into rounded weights at `to`. The sum runs over 16 virtual lanes as in
/// weigh_rows.
ATTEND_INLINE RoundedSums round_logits(const float* s, KeyRange span, float max, std::uint8_t* to) {
  const Simd::F shift = Simd::set1(max), levels = Simd::set1(kWeightLevels);
  Simd::F sum = Simd::zero();
  __m512i rounded = _mm512_setzero_si512();
  for (int j = span.lo; j < span.hi; j += kStepCodes) {
    Simd::F e[4];
    __m512i x[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) e[v] = Simd::sub(Simd::load(s + j + v * Simd::kLanes), shift);
    Simd::exp2_of_each(e);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      sum = Simd::add(sum, e[v]);
      x[v] = _mm512_cvtps_epi32(Simd::mul(e[v], levels));
    }
    const __m512i bytes = bytes_of(x);
    _mm512_storeu_si512(to + j, bytes);
    rounded = _mm512_dpbusd_epi32(rounded, bytes, _mm512_set1_epi8(1));
  }
  const auto total = static_cast<float>(_mm512_reduce_add_epi32(rounded));
  return {Simd::reduce_add(sum), total * (1.0F / kWeightLevels)};
}

struct Int8AmxRunner : Int8ValuesRunner {
  using Base = Int8ValuesRunner;
  using Base::Base;
  static constexpr bool kClearsTail = false;
  static constexpr int kTile = 2 * kTileDim, kBlock = 2 * kTileDim, kSpan = kStepCodes;
  /// Lines of the next piece fetched beside each phase of this one, as in AmxUnitRunner.
  static constexpr int kLinesPerProduct = 10, kLinesPerRow = 16, kLinesPerWeave = 7,
                       kLinesPerSum = 7;
  int steps() const { return (p.head_dim_qk + kStepCodes - 1) / kStepCodes; }
  int padded_dim() const { return steps() * kStepCodes; }
  /// A single tile of rows means decode, bound by memory.
  bool fetches() const { return rows <= kTileDim; }

  KeyRange unit_keys;  // of the piece at hand that any row sees

  std::int8_t* queries() const { return reinterpret_cast<std::int8_t*>(q); }
  void load_query(int r, int i) {
    const std::int8_t* from = query_codes(r, i);
    alignas(64) std::int8_t padded[kMaxInt8HeadDim] = {};
    std::memcpy(padded, from, static_cast<std::size_t>(p.head_dim_qk));
    if (fetches()) {
      // The right operand: four dimensions at a time, each with all rows.
      for (int d = 0; d < padded_dim(); d += kDotBytes)
        std::memcpy(queries() + (d * kTileDim + r * kDotBytes), padded + d, kDotBytes);
    } else {
      std::memcpy(queries() + std::int64_t{r} * padded_dim(), padded,
                  static_cast<std::size_t>(padded_dim()));
    }
    load_terms(r, i, from);
  }

  /// Keys are copied if tiles cannot be loaded from where they lie.
  bool copies_keys() const { return p.head_dim_qk % kStepCodes != 0; }
  bool rows_adjoin() const { return p.block_table == nullptr || p.block_size % kTileKeys == 0; }
  std::int8_t* copied_key(int j) const { return staged_k + std::int64_t{j} * padded_dim(); }

  void stage(int piece) {
    unit_keys = piece_range(0, rows, piece * kPieceSize);
    if (!fetches()) shape_tiles(kTileDim);
    if (!copies_keys()) return;
    const auto dim = static_cast<std::size_t>(p.head_dim_qk);
    for (int j = unit_keys.lo; j < unit_keys.hi; ++j) {
      std::memcpy(copied_key(j), stored_k_rows[j], dim);
      std::memset(copied_key(j) + dim, 0, static_cast<std::size_t>(padded_dim()) - dim);
    }
  }
  /// Key j in whole steps of dimensions; a visible one for one that is not.
  const std::int8_t* key_row(int j) const {
    if (!copies_keys()) return stored_k_rows[j];
    return copied_key(j >= unit_keys.lo && j < unit_keys.hi ? j : unit_keys.lo);
  }

  /// Sums of codes to `s`, as integers.
  template <typename Self>
  void logits(Self& /*self*/, int begin, int end, int base, bool /*keep_panels*/) {
    const KeyRange range = piece_range(begin, end, base);
    if (fetches()) {
      shape_tiles(kTileDim);
      int j = range.lo / kTileKeys * kTileKeys;
      for (; j + 4 * kTileKeys <= range.hi; j += 4 * kTileKeys) few_rows_times_keys<4>(j, range);
      for (; j < range.hi; j += kTileKeys) few_rows_times_keys<1>(j, range);
      return;
    }
    for (int panel = range.lo / plan::kPanelKeys; panel * plan::kPanelKeys < range.hi; ++panel) {
      const std::int8_t* keys = key_tiles(panel);
      float* to = s + panel * plan::kPanelKeys;
      if (end - begin > kTileDim) {
        rows_times_panel<2>(begin, keys, to);
      } else {
        rows_times_panel<1>(begin, keys, to);
      }
    }
  }

  /// 16 keys as the left operand.
  struct KeyTile {
    const std::int8_t* at;
    std::int64_t stride;
    ATTEND_INLINE const std::int8_t* step(int k) const { return at + k * kStepCodes; }
  };
  ATTEND_INLINE KeyTile key_tile(int j, KeyRange range, std::int8_t* copy) const {
    const bool whole = j >= range.lo && j + kTileKeys <= range.hi;
    if (whole && copies_keys()) return {copied_key(j), padded_dim()};
    if (whole && rows_adjoin()) return {stored_k_rows[j], p.k_strides.token};
    for (int i = 0; i < kTileKeys; ++i)
      std::memcpy(copy + std::int64_t{i} * padded_dim(), key_row(j + i),
                  static_cast<std::size_t>(padded_dim()));
    return {copy, padded_dim()};
  }

  /// Sums of all rows and kTiles * 16 keys from j on. Several tiles at a time, because each waits
  /// for its own last product.
  template <int kTiles>
  ATTEND_NOINLINE void few_rows_times_keys(int j, KeyRange range) {
    alignas(64) std::int8_t copy[kTiles][kTileKeys * kMaxInt8HeadDim];
    alignas(64) float sums[kTiles][kTileFloats];
    KeyTile keys[kTiles];
    for (int i = 0; i < kTiles; ++i) keys[i] = key_tile(j + i * kTileKeys, range, copy[i]);
    const std::int8_t* right = queries();
    clear_tile<0>();
    if constexpr (kTiles == 4) {
      clear_tile<1>();
      clear_tile<2>();
      clear_tile<3>();
    }
    for (int k = 0; k < steps(); ++k, right += kTileDim * kTileRowBytes) {
      load_tile<6>(right, kTileRowBytes);
      load_tile<4>(keys[0].step(k), keys[0].stride);
      multiply_s8s8<0, 4, 6>();
      next.template lines<kLinesPerProduct>();
      if constexpr (kTiles == 4) {
        load_tile<5>(keys[1].step(k), keys[1].stride);
        multiply_s8s8<1, 5, 6>();
        next.template lines<kLinesPerProduct>();
        load_tile<7>(keys[2].step(k), keys[2].stride);
        multiply_s8s8<2, 7, 6>();
        next.template lines<kLinesPerProduct>();
        load_tile<4>(keys[3].step(k), keys[3].stride);
        multiply_s8s8<3, 4, 6>();
        next.template lines<kLinesPerProduct>();
      }
    }
    store_tile<0>(sums[0], kTileRowBytes);
    if constexpr (kTiles == 4) {
      store_tile<1>(sums[1], kTileRowBytes);
      store_tile<2>(sums[2], kTileRowBytes);
      store_tile<3>(sums[3], kTileRowBytes);
    }
    for (int i = 0; i < kTiles; ++i) {
      transpose<0>(sums[i], j + i * kTileKeys);
      if (rows > 8) transpose<8>(sums[i], j + i * kTileKeys);
    }
  }
  template <int kFirst>
  ATTEND_INLINE void transpose(const float* sums, int j) const {
    __m512i t[8];
    Simd::transpose_16x8([&](int i) ATTEND_LAMBDA { return sums + i * kTileDim + kFirst; }, t);
    for (int i = 0; i < 8; ++i)
      if (kFirst + i < rows)
        _mm512_storeu_si512(s + std::int64_t{kFirst + i} * kScoreStride + j, t[i]);
  }

  /// Two tiles of 16 keys as right operands: four dimensions at a time, each with all keys.
  ATTEND_NOINLINE const std::int8_t* key_tiles(int panel) {
    auto* to = reinterpret_cast<std::int8_t*>(k_panels) +
               std::int64_t{panel} * plan::kPanelKeys * padded_dim();
    if (packed_panel[panel]) return to;
    packed_panel[panel] = true;
    const InPhase packing(clock, Phase::pack);
    std::int8_t* at = to;
    for (int i = 0; i < plan::kPanelKeys; i += kTileKeys) {
      const std::int8_t* key_rows[kTileKeys];
      for (int key = 0; key < kTileKeys; ++key)
        key_rows[key] = key_row(panel * plan::kPanelKeys + i + key);
      for (int d = 0; d < padded_dim(); d += 8 * kDotBytes, at += 8 * kTileRowBytes) {
        __m512i t[8];
        Simd::transpose_16x8([&](int key) ATTEND_LAMBDA { return key_rows[key] + d; }, t);
        for (int row = 0; row < 8; ++row) _mm512_storeu_si512(at + row * kTileRowBytes, t[row]);
      }
    }
    return to;
  }

  /// Sums of kRowTiles * 16 rows from `begin` on and one panel.
  template <int kRowTiles>
  ATTEND_NOINLINE void rows_times_panel(int begin, const std::int8_t* keys, float* to) const {
    const std::int64_t row_bytes = padded_dim(), half = row_bytes * kTileKeys;
    const std::int8_t* upper = queries() + begin * row_bytes;
    clear_tile<0>();
    clear_tile<1>();
    if constexpr (kRowTiles == 2) {
      clear_tile<2>();
      clear_tile<3>();
    }
    for (int k = 0; k < steps(); ++k, keys += kTileDim * kTileRowBytes, upper += kStepCodes) {
      load_tile<6>(keys, kTileRowBytes);
      load_tile<4>(upper, row_bytes);
      multiply_s8s8<0, 4, 6>();
      load_tile<7>(keys + half, kTileRowBytes);
      multiply_s8s8<1, 4, 7>();
      if constexpr (kRowTiles == 2) {
        load_tile<5>(upper + kTileDim * row_bytes, row_bytes);
        multiply_s8s8<2, 5, 6>();
        multiply_s8s8<3, 5, 7>();
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

  float* score_row(int at) const { return s + std::int64_t{at} * kScoreStride; }

  template <typename Self>
  ATTEND_INLINE void finish_rows(Self& /*self*/, int r, int end, int begin, KeyRange span,
                                 int base) {
    if (has_extra_terms()) {
      weigh_rows<true>(r, end, begin, span, base);
    } else {
      weigh_rows<false>(r, end, begin, span, base);
    }
  }
  /// Finds the maximum of the row after the one whose weights it computes, which would wait for
  /// their own.
  template <bool kExtra>
  ATTEND_NOINLINE void weigh_rows(int r, int end, int begin, KeyRange span, int base) {
    piece_m[r] = find_max<kExtra>(r, r - begin, span, base);
    for (; r < end; ++r) {
      if (r + 1 < end) piece_m[r + 1] = find_max<kExtra>(r + 1, r + 1 - begin, span, base);
      weigh_row(r, r - begin, span, base);
      if (fetches()) {
        next.template lines<kLinesPerRow>();
      }
    }
  }
  /// Visible keys of row r, cut to `span`.
  ATTEND_INLINE KeyRange visible_in(KeyRange span, int r, int base) const {
    const int first = lo[r] - base, end = hi[r] - base;
    return {first < span.lo ? span.lo : first, end > span.hi ? span.hi : end};
  }
  /// The steps that hold visible keys.
  ATTEND_INLINE static KeyRange steps_of(KeyRange visible) {
    return {visible.lo / kStepCodes * kStepCodes,
            static_cast<int>(plan::round_up(visible.hi, kStepCodes))};
  }
  /// Turns sums of the visible steps into logits.
  template <bool kExtra>
  ATTEND_INLINE float find_max(int r, int at, KeyRange span, int base) const {
    const KeyRange visible = visible_in(span, r, base);
    if (visible.lo >= visible.hi) return -std::numeric_limits<float>::infinity();
    const CodeTerms terms{factors[r], offsets[r], key_scales};
    return logits_of_sums<kExtra>(score_row(at), steps_of(visible), visible, terms,
                                  logit_terms(r, base, 1.0F));
  }
  /// Weights outside of the visible steps are 0.
  ATTEND_INLINE void weigh_row(int r, int at, KeyRange span, int base) {
    KeyRange seen = steps_of(visible_in(span, r, base));
    if (piece_m[r] == -std::numeric_limits<float>::infinity()) seen = {span.hi, span.hi};
    std::uint8_t* to = weight_row(at);
    const auto clear = [&](int from, int stop) ATTEND_LAMBDA {
      for (int j = from; j < stop; j += kStepCodes)
        _mm512_storeu_si512(to + j, _mm512_setzero_si512());
    };
    clear(span.lo, seen.lo);
    const RoundedSums sums = round_logits(score_row(at), seen, piece_m[r], to);
    clear(seen.hi, span.hi);
    piece_full[r] = sums.full;
    piece_l[r] = sums.rounded;
  }

  /// Packs the values of whole steps: masked keys weigh 0.
  ATTEND_NOINLINE void pack_steps(KeyRange range) {
    const InPhase packing(clock, Phase::pack);
    NoPrefetch none;
    const int begin = range.lo / kStepCodes * kStepCodes;
    const int end = static_cast<int>(plan::round_up(range.hi, kStepCodes));
    for (int j = begin; j < end; j += kDotBytes) {
      Dot::pack_values(stored_v_rows + j, p.head_dim_v, panel() + std::int64_t{j} * dv_padded,
                       none);
      if (fetches()) next.template lines<kLinesPerWeave>();
    }
    values_packed = true;
  }

  void outputs(int begin, int end, int base, KeyRange unit_range) {
    for (int r = begin; r < end; ++r) full[r] = fma_one(full[r], keep[r], piece_full[r] * take[r]);
    if (!values_packed) pack_steps(unit_range);
    const KeyRange range = piece_range(begin, end, base);
    if (range.lo >= range.hi) return;
    const KeyRange of_steps{range.lo / kStepCodes, (range.hi + kStepCodes - 1) / kStepCodes};
    if (end - begin > kTileDim) {
      add_rows(begin, end, of_steps);
      return;
    }
    if (fetches()) shape_tiles(rows);
    int c = 0;
    for (; c + 4 * kTileDim <= dv_padded; c += 4 * kTileDim)
      add_few_rows<4>(begin, end, c, of_steps);
    if (c < dv_padded) add_few_rows<2>(begin, end, c, of_steps);
  }

  /// Values of 64 keys and 16 columns: the right operand, in rows of value_stride() bytes.
  const std::int8_t* value_tile(int step, int column) const {
    return panel() + (std::int64_t{step} * kStepCodes * dv_padded + column * kDotBytes);
  }
  std::int64_t value_stride() const { return std::int64_t{dv_padded} * kDotBytes; }

  /// Adds kColumnTiles * 16 columns of the values of `steps` to up to 16 rows.
  template <int kColumnTiles>
  ATTEND_NOINLINE void add_few_rows(int begin, int end, int column, KeyRange of_steps) {
    alignas(64) std::int32_t sums[kColumnTiles * kTileFloats];
    const std::int64_t stride = value_stride();
    clear_tile<0>();
    clear_tile<1>();
    if constexpr (kColumnTiles == 4) {
      clear_tile<2>();
      clear_tile<3>();
    }
    for (int i = of_steps.lo; i < of_steps.hi; ++i) {
      const std::int8_t* values = value_tile(i, column);
      load_tile<4>(weights + i * kStepCodes, kPieceSize);
      load_tile<6>(values, stride);
      multiply_u8s8<0, 4, 6>();
      if (fetches()) next.template lines<kLinesPerSum>();
      load_tile<7>(values + kTileRowBytes, stride);
      multiply_u8s8<1, 4, 7>();
      if (fetches()) next.template lines<kLinesPerSum>();
      if constexpr (kColumnTiles == 4) {
        load_tile<6>(values + 2 * kTileRowBytes, stride);
        multiply_u8s8<2, 4, 6>();
        if (fetches()) next.template lines<kLinesPerSum>();
        load_tile<7>(values + 3 * kTileRowBytes, stride);
        multiply_u8s8<3, 4, 7>();
        if (fetches()) next.template lines<kLinesPerSum>();
      }
    }
    constexpr std::int64_t kStride = kColumnTiles * kTileRowBytes;
    store_tile<0>(sums, kStride);
    store_tile<1>(sums + kTileDim, kStride);
    if constexpr (kColumnTiles == 4) {
      store_tile<2>(sums + 2 * kTileDim, kStride);
      store_tile<3>(sums + 3 * kTileDim, kStride);
    }
    merge_columns<kColumnTiles>(begin, end, column, sums);
  }

  /// Adds the values of `steps` to up to 32 rows, 32 columns at a time. Sums are merged while the
  /// tiles of the next columns are multiplied.
  ATTEND_NOINLINE void add_rows(int begin, int end, KeyRange of_steps) const {
    alignas(64) std::int32_t sums[2][4 * kTileFloats];
    constexpr int kColumns = 2 * kTileDim;
    for (int c = 0; c < dv_padded; c += kColumns) {
      multiply_values(c, of_steps, sums[c / kColumns % 2]);
      if (c > 0) merge_columns<2>(begin, end, c - kColumns, sums[(c / kColumns - 1) % 2]);
    }
    merge_columns<2>(begin, end, dv_padded - kColumns, sums[(dv_padded / kColumns - 1) % 2]);
  }
  /// sums[row][column] = weights of 32 rows times 32 columns of values.
  ATTEND_INLINE void multiply_values(int column, KeyRange of_steps, std::int32_t* sums) const {
    const std::int64_t stride = value_stride();
    clear_tile<0>();
    clear_tile<1>();
    clear_tile<2>();
    clear_tile<3>();
    for (int i = of_steps.lo; i < of_steps.hi; ++i) {
      const std::int8_t* values = value_tile(i, column);
      const std::uint8_t* upper = weights + i * kStepCodes;
      load_tile<6>(values, stride);
      load_tile<4>(upper, kPieceSize);
      multiply_u8s8<0, 4, 6>();
      load_tile<7>(values + kTileRowBytes, stride);
      multiply_u8s8<1, 4, 7>();
      load_tile<5>(upper + kTileDim * kPieceSize, kPieceSize);
      multiply_u8s8<2, 5, 6>();
      multiply_u8s8<3, 5, 7>();
    }
    constexpr std::int64_t kStride = 2 * kTileRowBytes;
    store_tile<0>(sums, kStride);
    store_tile<1>(sums + kTileDim, kStride);
    store_tile<2>(sums + 2 * kTileFloats, kStride);
    store_tile<3>(sums + 2 * kTileFloats + kTileDim, kStride);
  }

  /// Merges kColumnTiles * 16 sums of each of rows [begin, end), as int8_pv_tile does.
  template <int kColumnTiles>
  ATTEND_INLINE void merge_columns(int begin, int end, int column, const std::int32_t* sums) const {
    const Simd::F unit = Simd::set1(1.0F / kWeightLevels);
    for (int r = begin; r < end; ++r) {
      const Simd::F old = Simd::set1(keep[r]), factor = Simd::set1(take[r]);
      const bool first = keep[r] == 0.0F;
      float* at = acc + std::int64_t{r} * dv_padded + column;
      for (int i = 0; i < kColumnTiles; ++i, sums += kTileDim, at += kTileDim) {
        const Simd::F part = Simd::mul(Simd::mul(Dot::to_float(Dot::load(sums)), unit), factor);
        Simd::store(at, first ? part : Simd::fma(Simd::load(at), old, part));
      }
    }
  }
};

void run_int8_amx_unit(const AttentionProblem& p, const WorkUnit& u,
                       const KernelWorkspace& ws) noexcept {
  Int8AmxRunner runner(p, u, ws);
  runner.run(runner, ws.partials);
  release_tiles();
}
