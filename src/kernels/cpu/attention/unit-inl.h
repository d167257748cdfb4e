// SPDX-License-Identifier: Apache-2.0
// One unit of the plan: for each piece of keys pack, multiply, softmax, multiply, merge. Included
// inside an ISA namespace.

/// A derived runner hides what it does differently; whatever calls such a function takes the
/// runner as `self`.
template <typename T, typename K, typename V>
struct UnitRunner : UnitState<T, K, V> {
  using Base = UnitState<T, K, V>;
  using Base::acc, Base::clock, Base::dv_padded, Base::fetched, Base::following, Base::hi,
      Base::k_panels, Base::k_rows, Base::keep, Base::key_scales, Base::kStagedKeys,
      Base::kStagedValues, Base::kValuesAreKeys, Base::l, Base::lo, Base::m, Base::next_k_rows,
      Base::next_v_rows, Base::p, Base::piece_l, Base::piece_m, Base::q, Base::request, Base::rows,
      Base::s, Base::staged_k, Base::staged_v, Base::stored_k_rows, Base::stored_v_rows, Base::take,
      Base::u, Base::v_panels, Base::v_rows, Base::value_scales;
  using Base::Base;

  /// Whether rows that fill up a tile have to be cleared.
  static constexpr bool kClearsTail = true;
  /// Rows that see the same span of keys, rows whose logits are held at once, and the divisor of a
  /// span's bounds.
  static constexpr int kTile = Simd::kTileRows, kBlock = plan::kBlockRows, kSpan = 16;
  static constexpr int kColumnStep = Simd::kTileVecs * Simd::kLanes;

  bool packed_panel[plan::kPanels];
  bool values_packed;
  bool values_late;  // staged: decoded a few rows at a time, where they are multiplied
  bool values_finite;
  bool values_scanned;
  bool has_next;  // the next_ pointers are set, for
  KeyRange next_range;
  PrefetchRows<K, V> next;

  template <typename Self>
  void load_queries(Self& self) {
    int r = 0;
    int own = u.request;
    for (int tok = this->token(0); r < rows; ++tok) {
      while (tok >= p.query_start_loc[own + 1]) ++own;
      const KeyRange visible = visible_keys(p, own, this->position(own, tok));
      for (int g = 0; g < p.group_size; ++g, ++r) {
        lo[r] = visible.lo;
        hi[r] = visible.hi;
        request[r] = own;
        self.load_query(r, tok - p.query_start_loc[own]);
      }
    }
    if constexpr (Self::kClearsTail) {
      const int padded = static_cast<int>(plan::round_up(rows, Self::kTile));
      for (; r < padded; ++r) {  // rows that fill up the last tile see nothing
        lo[r] = hi[r] = 0;
        self.clear_query(r);
      }
    }
    self.reset();
  }

  /// Row r is query token i of its request.
  void load_query(int r, int i) {
    if constexpr (kStagedKeys) {
      with_dtype(p.q_dtype,
                 [&](auto element) ATTEND_LAMBDA { load_query_as<decltype(element)>(r, i); });
    } else {
      load_query_as<T>(r, i);
    }
  }

  template <typename Q>
  void load_query_as(int r, int i) {
    const int own = request[r];
    const float scale = p.scale * (p.q_descale.at(own, u.kv_head) * p.k_descale.at(own, u.kv_head));
    const Simd::F factor = Simd::set1(log2_factor(scale));
    const Q* from =
        static_cast<const Q*>(p.q) + p.q_layout.offset(p.query_start_loc, own, i, this->head(r));
    alignas(64) float scaled[kMaxHeadDimQk + Simd::kLanes];
    if constexpr (sizeof(Q) == 1) {
      bf16 decoded[kMaxHeadDimQk];
      Simd::decode(from, p.head_dim_qk, decoded);
      scale_query(decoded, factor, scaled);
    } else {
      scale_query(from, factor, scaled);
    }
    float* to = query(r);
    for (int d = 0; d < p.head_dim_qk; ++d) to[d * Simd::kTileRows] = scaled[d];
  }
  void clear_query(int r) {
    float* to = query(r);
    for (int d = 0; d < p.head_dim_qk; ++d) to[d * Simd::kTileRows] = 0.0F;
  }
  /// Dimension 0 of row r. The rows of a tile lie beside each other, one dimension after the other,
  /// so that a tile needs one address for all of them.
  float* query(int r) const {
    return q + std::int64_t{r / Simd::kTileRows} * Simd::kTileRows * p.head_dim_qk +
           r % Simd::kTileRows;
  }

  /// With softcap the tile computes its argument, else the logit in log2 units.
  float log2_factor(float scale) const {
    return p.softcap > 0.0F ? scale / p.softcap : scale * kLog2e;
  }

  /// to = from * factor, up to a whole vector.
  template <typename Q>
  ATTEND_INLINE void scale_query(const Q* from, Simd::F factor, float* to) const {
    int d = 0;
    for (; d + Simd::kLanes <= p.head_dim_qk; d += Simd::kLanes)
      Simd::store(to + d, Simd::mul(Simd::widen(from + d), factor));
#if ATTEND_HALF_VECTOR
    if (d < p.head_dim_qk) Simd::store(to + d, Simd::mul(Simd::widen_half(from + d), factor));
#endif
  }

  /// Empties the state. Accumulators need no zeros: what an empty state holds is never read.
  void reset() {
    const int padded = static_cast<int>(plan::round_up(rows, plan::kBlockRows));
    for (int r = 0; r < padded; ++r) {
      m[r] = -std::numeric_limits<float>::infinity();
      l[r] = 0.0F;
    }
  }

  /// Union of the visible keys of rows [begin, end), cut to piece `base`, relative to it.
  KeyRange piece_range(int begin, int end, int base) const {
    KeyRange range{kPieceSize, 0};
    for (int r = begin; r < end; ++r) {
      if (lo[r] >= hi[r]) continue;
      const int a = lo[r] - base, b = hi[r] - base;
      range.lo = a < range.lo ? a : range.lo;
      range.hi = b > range.hi ? b : range.hi;
    }
    range.lo = range.lo < 0 ? 0 : range.lo;
    range.hi = range.hi > kPieceSize ? kPieceSize : range.hi;
    return range;
  }

  /// Pointers for the keys of `range` of a unit's piece at `base`; the other entries repeat the
  /// first, so that packing and prefetching never touch a row that no query sees.
  void point_rows(const WorkUnit& unit, KeyRange range, int base) {
    const HeadRows<K> k{static_cast<const K*>(p.k) + unit.kv_head * p.k_strides.head, p.k_strides,
                        unit.request};
    fill_rows(p, k, base + range.lo, base + range.hi, next_k_rows + range.lo);
    if constexpr (!kValuesAreKeys) {
      const HeadRows<V> v{static_cast<const V*>(p.v) + unit.kv_head * p.v_strides.head, p.v_strides,
                          unit.request};
      fill_rows(p, v, base + range.lo, base + range.hi, next_v_rows + range.lo);
    }
    const auto repeat = [&](int begin, int end) {
      for (int j = begin; j < end; ++j) {
        next_k_rows[j] = next_k_rows[range.lo];
        if constexpr (!kValuesAreKeys) next_v_rows[j] = next_v_rows[range.lo];
      }
    };
    repeat(0, range.lo);
    repeat(range.hi, kPieceSize);
  }

  /// Scales of the keys of `range` of the piece at `base`, one a key, to `to`; 0 elsewhere, where
  /// no query looks.
  ATTEND_NOINLINE void load_scales(const float* scales, const KvStrides& strides, KeyRange range,
                                   int base, float* to) const {
    std::memset(to, 0, sizeof(float) * kPieceSize);
    const HeadRows<float> rows_of_one{scales + u.kv_head * strides.head, strides, u.request};
    for_each_key(p, rows_of_one, base + range.lo, base + range.hi,
                 [&](int j, const float* scale) ATTEND_LAMBDA { to[j - base] = *scale; });
  }

  /// Fetches what load_scales will read for a unit, once a line.
  ATTEND_NOINLINE void fetch_scales(const WorkUnit& unit, const float* scales,
                                    const KvStrides& strides, KeyRange range, int base) const {
    const HeadRows<float> rows_of_one{scales + unit.kv_head * strides.head, strides, unit.request};
    std::uintptr_t last = 0;
    for_each_key(p, rows_of_one, base + range.lo, base + range.hi,
                 [&](int, const float* scale) ATTEND_LAMBDA {
                   const std::uintptr_t line = reinterpret_cast<std::uintptr_t>(scale) / 64;
                   if (line != last) __builtin_prefetch(scale, 0, 2);
                   last = line;
                 });
  }

  /// Elements of a stored key.
  int row_step() const {
    if constexpr (kValuesAreKeys) {
      return p.coded.format->step;
    } else {
      return p.head_dim_qk;
    }
  }

  /// Fetches the scales of the keys of `range` that lie apart from them.
  ATTEND_NOINLINE void fetch_coded_scales(KeyRange range) const {
    if constexpr (kValuesAreKeys) {
      if (!p.coded.format->scales_apart) return;
      const Decoder<K> decoder(p);
      for (int j = range.lo; j < range.hi; ++j)
        __builtin_prefetch(decoder.scales_of(next_k_rows[j]), 0, 2);
    }
  }

  /// A single tile means decode, bound by memory: it fetches the next piece meanwhile.
  bool fetches() const { return rows <= Simd::kTileRows; }
  bool paired_columns() const {
    return p.carry == nullptr && has_paired_columns<T>(rows, p.head_dim_v);
  }

#if ATTEND_VBMI
  /// A single tile reads each panel once: codes are decoded on their way into it.
  static constexpr bool kMayPackCodes = std::is_same_v<K, fp8_e4m3> || std::is_same_v<K, fp8_e5m2>;
#else
  static constexpr bool kMayPackCodes = false;
#endif
  bool packs_codes() const { return kMayPackCodes && fetches() && p.head_dim_qk % 32 == 0; }

#if ATTEND_BF16_PAIRS
  /// A single tile reads each panel once.
  static constexpr bool kMayPackPairs = std::is_same_v<T, bf16>;
  bool packs_pairs() const { return kMayPackPairs && fetches() && p.head_dim_qk % 16 == 0; }
#endif

  ATTEND_NOINLINE float* k_panel(int panel, bool keep_all) {
    float* to = k_panels + (keep_all ? std::int64_t{panel} * plan::kPanelKeys * p.head_dim_qk : 0);
    if (keep_all && packed_panel[panel]) return to;
    packed_panel[panel] = true;
    const InPhase packing(clock, Phase::pack);
    const int first = panel * plan::kPanelKeys;
    NoPrefetch none;
    for (int j = 0; j < plan::kPanelKeys; j += Simd::kLanes) {
#if ATTEND_VBMI
      if constexpr (kMayPackCodes) {
        if (packs_codes()) {
          CodeTable<K>().template pack_pairs<plan::kPanelKeys>(stored_k_rows + first + j,
                                                               p.head_dim_qk, to + j, next);
          continue;
        }
      }
#endif
      const T* const* keys = k_rows + first + j;
#if ATTEND_BF16_PAIRS
      if constexpr (kMayPackPairs) {
        if (packs_pairs()) {
          Simd::template pack_pairs<plan::kPanelKeys>(keys, p.head_dim_qk, to + j, next);
          continue;
        }
      }
#endif
      if (fetches()) {
        Simd::pack_transposed<plan::kPanelKeys>(keys, p.head_dim_qk, to + j, next);
      } else {
        Simd::pack_transposed<plan::kPanelKeys>(keys, p.head_dim_qk, to + j, none);
      }
    }
    return to;
  }

  ATTEND_NOINLINE void pack_values(KeyRange range) {
    const InPhase packing(clock, Phase::pack);
    bool bad = false;
    for (int j = range.lo; j < range.hi; ++j) {
      const T* from = v_rows[j];
      for (int c = 0; c < dv_padded; c += Simd::kLanes) {
        Simd::F x = Simd::zero();
        if (c + Simd::kLanes <= p.head_dim_v) x = Simd::widen(from + c);
#if ATTEND_HALF_VECTOR
        else if (c < p.head_dim_v)
          x = Simd::widen_half(from + c);
#endif
        bad |= Simd::any_nonfinite(x);
        float* panel =
            v_panels + std::int64_t{c / plan::kPanelCols} * kPieceSize * plan::kPanelCols;
        Simd::store(panel + j * plan::kPanelCols + c % plan::kPanelCols, x);
      }
    }
    values_finite = !bad;
    values_packed = values_scanned = true;
  }

  /// True if every value of `range` is finite: then a masked key's 0 * value is exactly 0.
  bool all_values_finite(KeyRange range) {
    if (values_scanned) return values_finite;
    bool bad = false;
    for (int j = range.lo; j < range.hi; ++j) {
#if ATTEND_HALF_VECTOR
      for (int c = 0; c < p.head_dim_v; c += 8)
        bad |= Simd::any_nonfinite(Simd::widen_half(v_rows[j] + c));
#else
      for (int c = 0; c < p.head_dim_v; c += Simd::kLanes)
        bad |= Simd::any_nonfinite(Simd::widen(v_rows[j] + c));
#endif
    }
    values_scanned = true;
    return values_finite = !bad;
  }

  /// Keys of the piece at `base` that each tile of rows [begin, end) sees; {0, 0} for none.
  static constexpr int kBlockTiles = plan::kBlockRows / Simd::kTileRows;
  void tile_ranges(int begin, int end, int base, KeyRange* tiles) const {
    for (int i = 0; i < kBlockTiles; ++i) {
      const int r = begin + i * Simd::kTileRows;
      const int tile_end = r + Simd::kTileRows < end ? r + Simd::kTileRows : end;
      tiles[i] = r < end ? piece_range(r, tile_end, base) : KeyRange{0, 0};
      if (tiles[i].lo >= tiles[i].hi) tiles[i] = {0, 0};
    }
  }

  template <typename Self>
  void logits(Self& self, int begin, int end, int base, bool keep_panels) {
    const KeyRange range = piece_range(begin, end, base);
    KeyRange tiles[kBlockTiles];
    tile_ranges(begin, end, base, tiles);
    for (int panel = range.lo / plan::kPanelKeys; panel * plan::kPanelKeys < range.hi; ++panel) {
      const auto* keys = self.k_panel(panel, keep_panels);
      const int key_begin = panel * plan::kPanelKeys;
      for (int i = 0; i < kBlockTiles; ++i) {
        if (key_begin >= tiles[i].hi || key_begin + plan::kPanelKeys <= tiles[i].lo) continue;
        const int r = begin + i * Simd::kTileRows;
        float* sr = s + std::int64_t{r - begin} * kPieceSize + key_begin;
        with_tile_rows(end - r, [&](auto height) ATTEND_LAMBDA {
          self.template multiply_panel<decltype(height)::value>(r, keys, key_begin, sr);
        });
      }
    }
  }

  /// Logits of rows [r, r + R) and one panel.
  template <int R>
  void multiply_panel(int r, const float* keys, int /*key_begin*/, float* sr) {
    const float* qr = query(r);
#if ATTEND_VBMI
    if constexpr (kMayPackCodes) {
      if (packs_codes()) {
        qk_tile<R, sizeof(K)>(qr, p.head_dim_qk, CodePairKeyPanel{keys}, sr, next);
        return;
      }
    }
#endif
#if ATTEND_BF16_PAIRS
    if constexpr (kMayPackPairs) {
      if (packs_pairs()) {
        qk_tile<R, sizeof(K)>(qr, p.head_dim_qk, PairedKeyPanel{keys}, sr, next);
        return;
      }
    }
#endif
    if (fetches()) {
      qk_tile<R, sizeof(K)>(qr, p.head_dim_qk, KeyPanel{keys}, sr, next);
    } else {
      NoPrefetch none;
      qk_tile<R, sizeof(K)>(qr, p.head_dim_qk, KeyPanel{keys}, sr, none);
    }
  }

  /// Whether logits are more than scaled products.
  bool has_extra_terms() const { return p.softcap != 0.0F || p.alibi_slopes != nullptr; }
  LogitTerms logit_terms(int r, int base, float factor) const {
    LogitTerms t{factor, 0.0F, 0.0F, 0.0F, false};
    if (!has_extra_terms()) return t;
    t.softcap_log2 = p.softcap * kLog2e;
    t.position = static_cast<float>(this->position(request[r], this->token(r)) - base);
    t.alibi_sqrt = p.alibi_sqrt;
    if (p.alibi_slopes != nullptr)
      t.alibi_log2 =
          kLog2e *
          p.alibi_slopes[request[r] * p.alibi_stride_request + this->head(r) * p.alibi_stride_head];
    return t;
  }

  template <typename Self>
  void probabilities(Self& self, int begin, int end, int base) {
    for (int r0 = begin; r0 < end; r0 += Self::kTile) {
      const int tile_end = r0 + Self::kTile < end ? r0 + Self::kTile : end;
      const KeyRange tile = piece_range(r0, tile_end, base);
      const KeyRange span{tile.lo / Self::kSpan * Self::kSpan,
                          static_cast<int>(plan::round_up(tile.hi, Self::kSpan))};
      self.finish_rows(self, r0, tile_end, begin, span, base);
    }
    const int tiles_end = begin + static_cast<int>(plan::round_up(end - begin, Self::kTile));
    if constexpr (Self::kClearsTail)
      for (int r = end; r < tiles_end; ++r) self.clear_row(r - begin);
    const int vec_end = begin + static_cast<int>(plan::round_up(end - begin, 16));
    for (int r = end; r < vec_end; ++r) {
      piece_m[r] = -std::numeric_limits<float>::infinity();
      piece_l[r] = 0.0F;
    }
    merge_rows(vec_end - begin, m + begin, l + begin, piece_m + begin, piece_l + begin,
               keep + begin, take + begin);
  }

  /// Weights and sums of rows [r, end) of the block from `begin` on.
  template <typename Self>
  ATTEND_INLINE void finish_rows(Self& self, int r, int end, int begin, KeyRange span, int base) {
    for (; r + kRowsAtOnce <= end; r += kRowsAtOnce)
      self.template finish_some<kRowsAtOnce>(self, r, r - begin, span, base);
    for (; r < end; ++r) self.template finish_some<1>(self, r, r - begin, span, base);
  }
  void fetch_beside_row() { next.template lines<16>(); }

  /// Weights and sums of N rows from r on, which is row `at` of its block.
  template <int N, typename Self>
  ATTEND_NOINLINE void finish_some(Self& self, int r, int at, KeyRange span, int base) {
    float* each[N];
    float max[N], sums[N];
    for (int i = 0; i < N; ++i) {
      if (self.fetches()) self.fetch_beside_row();
      each[i] = s + std::int64_t{at + i} * kPieceSize;
      max[i] = self.finish_row(r + i, each[i], span, base);
    }
    weigh_rows<N>(each, max, span, sums);
    for (int i = 0; i < N; ++i) self.keep_row(r + i, at + i, span, base, {max[i], sums[i]});
  }

  /// Logits of row r, and their maximum.
  float finish_row(int r, float* sr, KeyRange span, int base) const {
    if (p.k_scale != nullptr) multiply_by(sr, key_scales, span);
    return finish_scaled_row(r, sr, span, base);
  }
  float finish_scaled_row(int r, float* sr, KeyRange span, int base) const {
    const KeyRange visible{lo[r] - base, hi[r] - base};
    const LogitTerms t = logit_terms(r, base, 1.0F);
    return has_extra_terms() ? finish_logits<true, false>(sr, span, visible, t)
                             : finish_logits<false, false>(sr, span, visible, t);
  }
  /// Weights of row r, which is row `at` of its block, with their sums.
  void keep_row(int r, int at, KeyRange span, int base, RowSums row) {
    piece_m[r] = row.max;
    piece_l[r] = row.sum;
    // A masked key's scale may be NaN: its weight stays 0.
    if (p.v_scale != nullptr)
      multiply_visible_by(s + std::int64_t{at} * kPieceSize, value_scales, span,
                          {lo[r] - base, hi[r] - base});
  }
  void clear_row(int at) {
    std::memset(s + std::int64_t{at} * kPieceSize, 0, sizeof(float) * kPieceSize);
  }

  PvRows pv_rows(int r, int begin) const {
    return {s + std::int64_t{r - begin} * kPieceSize, acc + std::int64_t{r} * dv_padded, dv_padded,
            keep + r, take + r};
  }

  /// Adds the piece's packed values to rows [r, r + R) over keys `tile`, one step of columns.
  template <int R>
  void add_packed_values(int r, int begin, int col, KeyRange tile) const {
    const float* panel =
        v_panels + std::int64_t{col / plan::kPanelCols} * kPieceSize * plan::kPanelCols;
    NoPrefetch none;
    pv_tile<R, Simd::kTileVecs>(pv_rows(r, begin).at(col),
                                PackedValues{panel + col % plan::kPanelCols}, tile.lo, tile.hi,
                                none);
  }

  /// Adds the piece's values to rows [r, r + R) over keys `tile`. All columns of a few keys at a
  /// time: whole rows follow each other in memory, which is what hardware prefetchers like. The
  /// panels are free and hold the sums between two groups of keys.
  template <int R>
  void add_values(int r, int begin, KeyRange tile) {
    PvRows t = pv_rows(r, begin);
    t.parked = v_panels;
    for (int from = tile.lo; from < tile.hi;) {
      const int group_end = (from / plan::kPanelKeys + 1) * plan::kPanelKeys;
      const int to = group_end < tile.hi ? group_end : tile.hi;
      if constexpr (kStagedValues) {
        if (values_late) decode_values({from, to});
      }
      t.first = from == tile.lo;
      t.last = to == tile.hi;
      add_cached_values<R>(t, KeyRange{from, to});
      from = to;
    }
  }

  /// The columns of add_values for keys as they lie in the cache.
  template <int R>
  ATTEND_INLINE void add_cached_values(PvRows t, KeyRange keys) {
    constexpr int kStep = kColumnStep;
    const auto columns = [&](auto values) ATTEND_LAMBDA {
      if constexpr (2 * R <= Simd::kTileRows)
        for (; values.col + 2 * kStep <= p.head_dim_v; values.col += 2 * kStep)
          pv_tile<R, 2 * Simd::kTileVecs>(t.at(values.col), values, keys.lo, keys.hi, next);
      for (; values.col + kStep <= p.head_dim_v; values.col += kStep)
        pv_tile<R, Simd::kTileVecs>(t.at(values.col), values, keys.lo, keys.hi, next);
      return values.col;
    };
    if constexpr (std::is_same_v<T, bf16>) {
      if (paired_columns()) {
        columns(CachedPairs<sizeof(V)>{v_rows, 0});
        return;
      }
    }
    CachedValues<T> rest{v_rows, columns(CachedValues<T>{v_rows, 0})};
    for (; rest.col + Simd::kLanes <= p.head_dim_v; rest.col += Simd::kLanes)
      pv_tile<R, 1>(t.at(rest.col), rest, keys.lo, keys.hi, next);
#if ATTEND_HALF_VECTOR
    if (rest.col < p.head_dim_v)
      pv_tile<R, 1>(t.at(rest.col), CachedValuesHalf<T>{v_rows, rest.col}, keys.lo, keys.hi, next);
#endif
  }

  /// Whether rows [begin, end) see the same keys of the piece at `base`.
  bool same_masks(int begin, int end, int base) const {
    const KeyRange first = piece_range(begin, begin + 1, base);
    bool same = true;
    for (int i = begin + 1; i < end; ++i) {
      const KeyRange own = piece_range(i, i + 1, base);
      same &= own.lo == first.lo && own.hi == first.hi;
    }
    return same;
  }

  void outputs(int begin, int end, int base, KeyRange unit_range) {
    if (rows > Simd::kTileRows && !values_packed) pack_values(unit_range);
    KeyRange tiles[kBlockTiles];
    tile_ranges(begin, end, base, tiles);
    for (int i = 0; i < kBlockTiles; ++i) {
      if (tiles[i].lo >= tiles[i].hi) continue;
      const int r = begin + i * Simd::kTileRows;
      const int tile_end = r + Simd::kTileRows < end ? r + Simd::kTileRows : end;
      if (same_masks(r, tile_end, base) || all_values_finite(unit_range)) continue;
      add_to_each(r, tile_end, begin, base);
      tiles[i] = {0, 0};
    }
    if (values_packed) {
      add_packed_to_tiles(begin, end, tiles);
    } else if (tiles[0].lo < tiles[0].hi) {
      with_tile_rows(end - begin, [&](auto height) ATTEND_LAMBDA {
        add_values<decltype(height)::value>(begin, begin, tiles[0]);
      });
    }
  }

  /// Adds the values to each row by itself: an infinite or NaN value behind one row's mask must not
  /// reach that row through 0 * inf.
  ATTEND_NOINLINE void add_to_each(int r, int end, int begin, int base) {
    for (; r < end; ++r) {
      const KeyRange own = piece_range(r, r + 1, base);
      if (own.lo >= own.hi) continue;
      if (!values_packed) {
        add_values<1>(r, begin, own);
        continue;
      }
      for (int c = 0; c < dv_padded; c += kColumnStep) add_packed_values<1>(r, begin, c, own);
    }
  }

  /// A panel of values stays in the nearest cache until all tiles of the block have it.
  void add_packed_to_tiles(int begin, int end, const KeyRange* tiles) const {
    for (int c = 0; c < dv_padded; c += kColumnStep) {
      for (int i = 0; i < kBlockTiles; ++i) {
        if (tiles[i].lo >= tiles[i].hi) continue;
        const int r = begin + i * Simd::kTileRows;
        with_tile_rows(end - r, [&](auto height) ATTEND_LAMBDA {
          add_packed_values<decltype(height)::value>(r, begin, c, tiles[i]);
        });
      }
    }
  }

  void stage(int piece) {
    if constexpr (kStagedKeys) {
      decode_rows(piece);
    } else {
      k_rows = stored_k_rows;
      v_rows = stored_v_rows;
    }
  }

  /// Decodes the visible rows of a piece; the others repeat the first, as in point_rows.
  ATTEND_NOINLINE void decode_rows(int piece) {
    const int base = piece * kPieceSize;
    const KeyRange range = piece_range(0, rows, base);
    if (range.lo >= range.hi) return;
    values_late = !kValuesAreKeys && fetches() && same_masks(0, rows, base);
    for (int j = 0; j < kPieceSize; ++j) {
      const bool visible = j >= range.lo && j < range.hi;
      const std::int64_t row = visible ? j : range.lo;
      k_rows[j] = staged_k + row * p.head_dim_qk;
      v_rows[j] = kValuesAreKeys ? k_rows[j] : staged_v + row * p.head_dim_v;
    }
    if (!packs_codes()) {
      const Decoder<K> decoder(p);
      for (int j = range.lo; j < range.hi; ++j) {
        if (fetches()) next.template lines<1>();
        decoder.decode(stored_k_rows[j], p.head_dim_qk, staged_k + std::int64_t{j} * p.head_dim_qk);
      }
    }
    if constexpr (!kValuesAreKeys) {
      if (!values_late) decode_values(range);
    }
  }

  ATTEND_INLINE void decode_values(KeyRange range) {
    const Decoder<V> decoder(p);
    for (int j = range.lo; j < range.hi; ++j) {
      if (fetches()) next.template lines<1>();
      decoder.decode(stored_v_rows[j], p.head_dim_v, staged_v + std::int64_t{j} * p.head_dim_v);
    }
  }

  template <typename Self>
  ATTEND_NOINLINE void run_piece(Self& self, int piece) {
    const int base = piece * kPieceSize;
    const KeyRange range = piece_range(0, rows, base);
    if (range.lo >= range.hi) return;
    const bool one_block = rows <= Self::kBlock;
    std::memset(packed_panel, 0, sizeof packed_panel);
    values_packed = values_scanned = false;
    if (p.k_scale != nullptr) load_scales(p.k_scale, p.k_scale_strides, range, base, key_scales);
    if (p.v_scale != nullptr) load_scales(p.v_scale, p.v_scale_strides, range, base, value_scales);
    for (int begin = 0; begin < rows; begin += Self::kBlock) {
      const int end = begin + Self::kBlock < rows ? begin + Self::kBlock : rows;
      this->enter(Phase::qk);
      self.logits(self, begin, end, base, !one_block);
      this->enter(Phase::softmax);
      probabilities(self, begin, end, base);
      this->enter(Phase::pv);
      self.outputs(begin, end, base, range);
    }
  }

  template <typename Self>
  void write_outputs(Self& self) const {
    if constexpr (Self::kAnyOut) {
      with_float_dtype(p.out_dtype, [&](auto element) ATTEND_LAMBDA {
        write_outputs_as<decltype(element)>(self);
      });
    } else {
      write_outputs_as<T>(self);
    }
  }
  static constexpr bool kAnyOut = kStagedKeys;

  template <typename Out, typename Self>
  void write_outputs_as(Self& self) const {
    int r = 0;
    for (int tok = u.q_begin; tok < u.q_end; ++tok) {
      for (int g = 0; g < p.group_size; ++g, ++r) {
        const int head = u.kv_head * p.group_size + g;
        Out* to =
            static_cast<Out*>(p.out) + p.out_layout.offset(p.query_start_loc, u.request, tok, head);
        const RowState state{m[r], l[r], self.full_sum(r)};
        const RowTotal total = row_total(p, u.request, head, state);
        float* from = acc + std::int64_t{r} * dv_padded;
        scale_channels(p, u.kv_head, from);
        write_row(p, from, total, self.paired_columns(), to);
        if (p.lse != nullptr)
          p.lse[p.lse_layout.offset(p.query_start_loc, u.request, tok, head)] = total.lse;
        write_max_logit(p, u.request, tok, head, state);
      }
    }
  }

  /// Sum of a row's weights before they were rounded.
  float full_sum(int r) const { return l[r]; }

  /// Stores the state as the unit's partials number `index`.
  template <typename Self>
  void store_partials(Self& self, std::int64_t index, float* partials) const {
    const std::int64_t width = plan::partial_row_floats(p.head_dim_v);
    const bool paired = self.paired_columns();
    float* to = partials + (u.partial_slot + index * u.partial_stride) * width;
    for (int r = 0; r < rows; ++r, to += width) {
      to[0] = m[r];
      to[1] = l[r];
      to[2] = self.full_sum(r);
      float* columns = to + plan::kPartialHeader;
      const float* from = acc + std::int64_t{r} * dv_padded;
      if (l[r] == 0.0F) {
        std::memset(columns, 0, sizeof(float) * p.head_dim_v);
      } else if (paired) {
        for (int c = 0; c < p.head_dim_v; c += 2 * Simd::kLanes)
          Simd::narrow_pairs(columns + c, Simd::load(from + c),
                             Simd::load(from + c + Simd::kLanes));
      } else {
        std::memcpy(columns, from, sizeof(float) * p.head_dim_v);
      }
    }
  }

  /// Visible keys of a unit's first piece, relative to it; none if it has more rows than decode.
  KeyRange first_range(const WorkUnit& unit, int max_rows) const {
    if ((unit.q_end - unit.q_begin) * p.group_size > max_rows) return {0, 0};
    const int base = unit.piece_begin * kPieceSize;
    KeyRange range{kPieceSize, 0};
    int own = unit.request;
    for (int i = unit.q_begin; i < unit.q_end; ++i) {
      const int tok = p.query_start_loc[unit.request] + i;
      while (tok >= p.query_start_loc[own + 1]) ++own;
      const KeyRange visible = visible_keys(p, own, this->position(own, tok));
      const int begin = visible.lo - base, end = visible.hi - base;
      range.lo = begin < range.lo ? begin : range.lo;
      range.hi = end > range.hi ? end : range.hi;
    }
    return {range.lo < 0 ? 0 : range.lo, range.hi > kPieceSize ? kPieceSize : range.hi};
  }

  /// Points at the rows of a piece, or, if the unit has no more, at those of the first piece of the
  /// unit that follows.
  template <typename Self>
  void point_next(Self& self, int piece) {
    const bool own = piece < u.piece_end;
    has_next = false;
    if (!own && (following == nullptr || !self.fetches())) return;
    const WorkUnit& unit = own ? u : *following;
    const int base = (own ? piece : unit.piece_begin) * kPieceSize;
    next_range = own ? piece_range(0, rows, base) : first_range(unit, Self::kTile);
    if (next_range.lo >= next_range.hi) return;
    point_rows(unit, next_range, base);
    if (p.k_scale != nullptr) fetch_scales(unit, p.k_scale, p.k_scale_strides, next_range, base);
    if (p.v_scale != nullptr) fetch_scales(unit, p.v_scale, p.v_scale_strides, next_range, base);
    fetch_coded_scales(next_range);
    has_next = true;
  }

  /// Fetches what comes next beside this piece. If that is not known, the values of a piece that
  /// nothing fetched before.
  void start_fetching(int piece) {
    KeyRange range = next_range;
    if (!has_next) {
      range = piece_range(0, rows, piece * kPieceSize);
      if (piece > u.piece_begin || fetched || range.lo >= range.hi) range = {0, 0};
    }
    next = {has_next ? next_k_rows : stored_k_rows,
            has_next ? next_v_rows : stored_v_rows,
            row_step(),
            p.head_dim_v,
            range.lo,
            range.hi,
            p.values_in_keys ? 0 : range.hi,
            s,
            has_next ? range.lo : kPieceSize};
  }

  /// State of row r in memory that outlives the call.
  float* carried(int r) const {
    const std::int64_t num_heads = std::int64_t{p.carry_heads};
    return p.carry +
           (this->token(r) * num_heads + this->head(r)) * (p.head_dim_v + plan::kCarryHeader);
  }
  void load_carry() {
    if (p.resumes == nullptr || !p.resumes[u.request]) return;
    for (int r = 0; r < rows; ++r) {
      const float* from = carried(r);
      m[r] = from[0];
      l[r] = from[1];
      std::memcpy(acc + std::int64_t{r} * dv_padded, from + plan::kCarryHeader,
                  sizeof(float) * p.head_dim_v);
    }
  }
  void store_carry() const {
    for (int r = 0; r < rows; ++r)
      keep_state(p, m[r], l[r], acc + std::int64_t{r} * dv_padded, carried(r));
  }

  template <typename Self>
  void run(Self& self, float* partials) {
    const InPhase own(clock, Phase::rows);
    load_queries(self);
    const bool stores = u.partial_slot >= 0, merges = u.partial_stride == 0;
    if (p.carry != nullptr && !stores) load_carry();
    point_next(self, u.piece_begin);
    for (int piece = u.piece_begin; piece < u.piece_end; ++piece) {
      this->enter(Phase::pack);
      exchange(stored_k_rows, next_k_rows);
      exchange(stored_v_rows, next_v_rows);
      point_next(self, piece + 1);
      start_fetching(piece);
      if (self.fetches() && has_next) next.touch_pages();
      next.next_run();
      self.stage(piece);
      run_piece(self, piece);
      if (stores && !merges) {
        this->enter(Phase::merge);
        store_partials(self, piece - u.piece_begin, partials);
        self.reset();
      }
    }
    this->enter(stores ? Phase::merge : Phase::rows);
    if (!stores && p.keeps_state) {
      store_carry();
    } else if (!stores) {
      write_outputs(self);
    } else if (merges) {
      store_partials(self, 0, partials);
    }
  }
};
