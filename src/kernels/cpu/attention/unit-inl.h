// SPDX-License-Identifier: Apache-2.0
// One unit of the plan: for each piece of keys pack, multiply, softmax, multiply, merge. Included
// inside an ISA namespace.

/// A derived runner hides what it does differently; whatever calls such a function takes the
/// runner as `self`.
template <typename T, typename K, typename V>
struct UnitRunner : UnitRows<T, K, V> {
  using Base = UnitRows<T, K, V>;
  using Base::acc, Base::clock, Base::dv_padded, Base::fetched, Base::following, Base::hi,
      Base::k_panels, Base::k_rows, Base::keep, Base::key_scales, Base::kStagedKeys,
      Base::kStagedValues, Base::kValuesAreKeys, Base::l, Base::lo, Base::m, Base::map_rows,
      Base::next_k_rows, Base::next_v_rows, Base::p, Base::piece_l, Base::piece_m,
      Base::piece_range, Base::q, Base::request, Base::rows, Base::s, Base::staged_k,
      Base::staged_v, Base::stored_k_rows, Base::stored_v_rows, Base::take, Base::u, Base::v_panels,
      Base::v_rows, Base::value_scales;
  using Base::Base;

  /// Whether rows that fill up a tile have to be cleared.
  static constexpr bool kClearsTail = true;
  /// Rows that see the same span of keys, rows whose logits are held at once, and the divisor of a
  /// span's bounds.
  static constexpr int kTile = Simd::kTileRows, kBlock = plan::kBlockRows, kSpan = 16;
  static constexpr int kColumnStep = Simd::kTileVecs * Simd::kLanes;

  bool packed_panel[2 * plan::kPanels];  // of two branches at most
  bool values_packed;
  bool values_late;  // staged: decoded a few rows at a time, where they are multiplied
  bool values_finite;
  bool values_scanned;
  bool has_next;  // the next_ pointers are set, for
  KeyRange next_range;
  PrefetchRows<K, V> next;

  template <typename Self>
  void load_queries(Self& self) {
    for (int first = 0; first < rows; first += map_rows) load_map(self, first);
    if constexpr (Self::kClearsTail) {
      const int padded = static_cast<int>(plan::round_up(rows, Self::kTile));
      for (int r = rows; r < padded; ++r) {  // rows that fill up the last tile see nothing
        lo[r] = hi[r] = 0;
        self.clear_query(r);
      }
    }
    self.reset();
  }

  /// Loads the rows of one map, from `first` on.
  template <typename Self>
  void load_map(Self& self, int first) {
    int r = first;
    const int end = first + this->own_rows();
    int own = u.request;
    for (int tok = this->token(0); r < end; ++tok) {
      while (tok >= p.query_start_loc[own + 1]) ++own;
      const KeyRange visible = visible_keys(p, own, this->position(own, tok));
      for (int g = 0; g < this->members; ++g, ++r) {
        lo[r] = visible.lo;
        hi[r] = visible.hi;
        request[r] = own;
        self.load_query(r, tok - p.query_start_loc[own]);
      }
    }
    if constexpr (Self::kClearsTail) {
      // Rows up to the next map see what the last row sees: equal masks are quick.
      for (; r < rows && r < first + map_rows; ++r) {
        lo[r] = lo[end - 1];
        hi[r] = hi[end - 1];
        request[r] = request[end - 1];
        self.clear_query(r);
      }
    }
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
    const int branch = p.branches == 2 ? this->map(r) : 0;
    const float scale =
        p.scale * (p.q_descale.at(own, u.kv_head, branch) * p.k_descale.at(own, u.kv_head, branch));
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
    for (int b = 0; b < p.branches; ++b)
      bad |= pack_branch(v_rows + b * kPieceSize, range,
                         v_panels + std::int64_t{b} * kPieceSize * this->branch_columns);
    values_finite = !bad;
    values_packed = values_scanned = true;
  }

  /// Packs the values of a branch; true if one is not finite.
  ATTEND_INLINE bool pack_branch(const T* const* from_rows, KeyRange range, float* panels) const {
    bool bad = false;
    const int columns = this->branch_columns;
    for (int j = range.lo; j < range.hi; ++j) {
      const T* from = from_rows[j];
      for (int c = 0; c < columns; c += Simd::kLanes) {
        Simd::F x = Simd::zero();
        if (c + Simd::kLanes <= p.head_dim_v) x = Simd::widen(from + c);
#if ATTEND_HALF_VECTOR
        else if (c < p.head_dim_v)
          x = Simd::widen_half(from + c);
#endif
        bad |= Simd::any_nonfinite(x);
        float* panel = panels + std::int64_t{c / plan::kPanelCols} * kPieceSize * plan::kPanelCols;
        Simd::store(panel + j * plan::kPanelCols + c % plan::kPanelCols, x);
      }
    }
    return bad;
  }

  /// True if every value of `range` is finite: then a masked key's 0 * value is exactly 0.
  bool all_values_finite(KeyRange range) {
    if (values_scanned) return values_finite;
    bool bad = false;
    for (int at = range.lo; at < p.branches * kPieceSize; at += kPieceSize) {
      for (int j = at; j < at + range.hi - range.lo; ++j) {
#if ATTEND_HALF_VECTOR
        for (int c = 0; c < p.head_dim_v; c += 8)
          bad |= Simd::any_nonfinite(Simd::widen_half(v_rows[j] + c));
#else
        for (int c = 0; c < p.head_dim_v; c += Simd::kLanes)
          bad |= Simd::any_nonfinite(Simd::widen(v_rows[j] + c));
#endif
      }
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
      const int key_begin = panel * plan::kPanelKeys;
      for (int branch = 0; branch < p.branches; ++branch) {
        if (!meets_branch(begin, end, branch)) continue;
        const auto* keys = self.k_panel(branch * plan::kPanels + panel, keep_panels);
        for (int i = 0; i < kBlockTiles; ++i) {
          if (key_begin >= tiles[i].hi || key_begin + plan::kPanelKeys <= tiles[i].lo) continue;
          const int tile = begin + i * Simd::kTileRows;
          const auto [r, rows_end] = rows_of_branch(tile, end, branch);
          if (r >= rows_end) continue;
          float* sr = s + std::int64_t{r - begin} * kPieceSize + key_begin;
          with_tile_rows(rows_end - r, [&, r = r](auto height) ATTEND_LAMBDA {
            self.template multiply_panel<decltype(height)::value>(r, keys, key_begin, sr);
          });
        }
      }
    }
  }

  /// Rows [begin, end).
  struct RowRange {
    int begin, end;
  };
  /// The rows of a tile that multiply the keys of a branch, those of its map. A tile alone may hold
  /// rows of both maps, others hold rows of one.
  RowRange rows_of_branch(int tile, int end, int branch) const {
    if (p.branches == 1) return {tile, end};
    if (rows <= Simd::kTileRows)
      return branch == 0 ? RowRange{0, map_rows} : RowRange{map_rows, rows};
    return this->map(tile) == branch ? RowRange{tile, end} : RowRange{tile, tile};
  }
  bool meets_branch(int begin, int end, int branch) const {
    return p.branches == 1 || (branch == 0 ? begin < map_rows : end > map_rows);
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
  ATTEND_INLINE void add_cached_values(const PvRows& t, KeyRange keys) {
    for (int b = 0; b < p.branches; ++b)
      add_cached_branch<R>(t.at(b * this->branch_columns), keys, v_rows + b * kPieceSize);
  }
  template <int R>
  ATTEND_INLINE void add_cached_branch(const PvRows& t, KeyRange keys, const T* const* from) {
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
        columns(CachedPairs<sizeof(V)>{from, 0});
        return;
      }
    }
    CachedValues<T> rest{from, columns(CachedValues<T>{from, 0})};
    for (; rest.col + Simd::kLanes <= p.head_dim_v; rest.col += Simd::kLanes)
      pv_tile<R, 1>(t.at(rest.col), rest, keys.lo, keys.hi, next);
#if ATTEND_HALF_VECTOR
    if (rest.col < p.head_dim_v)
      pv_tile<R, 1>(t.at(rest.col), CachedValuesHalf<T>{from, rest.col}, keys.lo, keys.hi, next);
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
    for (int at = 0; at < p.branches * kPieceSize; at += kPieceSize) {
      for (int j = 0; j < kPieceSize; ++j) {
        const bool visible = j >= range.lo && j < range.hi;
        const std::int64_t row = at + (visible ? j : range.lo);
        k_rows[at + j] = staged_k + row * p.head_dim_qk;
        v_rows[at + j] = kValuesAreKeys ? k_rows[at + j] : staged_v + row * p.head_dim_v;
      }
    }
    if (!packs_codes()) {
      decode(range, stored_k_rows, p.head_dim_qk, staged_k);
    }
    if constexpr (!kValuesAreKeys) {
      if (!values_late) decode_values(range);
    }
  }

  ATTEND_INLINE void decode_values(KeyRange range) {
    decode(range, stored_v_rows, p.head_dim_v, staged_v);
  }
  template <typename Stored>
  ATTEND_INLINE void decode(KeyRange range, const Stored* const* stored, int dim, T* to) {
    const Decoder<Stored> decoder(p);
    for (int at = range.lo; at < p.branches * kPieceSize; at += kPieceSize) {
      for (int j = at; j < at + range.hi - range.lo; ++j) {
        if (fetches()) next.template lines<1>();
        decoder.decode(stored[j], dim, to + std::int64_t{j} * dim);
      }
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
    if (p.k_scale != nullptr)
      this->load_scales(p.k_scale, p.k_scale_strides, range, base, key_scales);
    if (p.v_scale != nullptr)
      this->load_scales(p.v_scale, p.v_scale_strides, range, base, value_scales);
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
    } else if (p.differential.writes_maps) {
      write_outputs_as<float>(self);
    } else {
      write_outputs_as<T>(self);
    }
  }
  static constexpr bool kAnyOut = kStagedKeys;

  template <typename Out, typename Self>
  void write_outputs_as(Self& self) const {
    int i = 0;
    for (int tok = u.q_begin; tok < u.q_end; ++tok) {
      for (int g = 0; g < this->members; ++g, ++i) {
        if (p.maps == 2 && !p.differential.writes_maps) {
          write_pair<Out>(self, i, {tok, u.kv_head, g});
          continue;
        }
        for (int map = 0; map < p.maps; ++map) {
          const int head = p.head(u.kv_head, map * this->members + g);
          write_map(self, map * map_rows + i, tok, head,
                    static_cast<Out*>(p.out) +
                        p.out_layout.offset(p.query_start_loc, u.request, tok, head));
        }
      }
    }
  }
  float* branch_acc(int r, int branch) const {
    return acc + std::int64_t{r} * dv_padded + branch * this->branch_columns;
  }

  /// Finishes row r; its columns go to `to`.
  template <typename Out, typename Self>
  ATTEND_INLINE void write_map(Self& self, int r, int tok, int head, Out* to) const {
    const RowTotal total = finish_state(p, u.request, tok, head, {m[r], l[r], self.full_sum(r)});
    scale_channels(p, u.kv_head, branch_acc(r, 0));
    for (int b = 0; b < p.branches; ++b)
      write_row(p, branch_acc(r, b), branch_total(p, u.request, u.kv_head, b, total),
                self.paired_columns(), to + b * p.head_dim_v);
  }

  /// Finishes row i of both maps; the output is what they become.
  template <typename Out, typename Self>
  ATTEND_NOINLINE void write_pair(Self& self, int i, PairAt at) const {
    PairMaps maps;
    for (int map = 0; map < 2; ++map)
      write_map(self, map * map_rows + i, at.tok,
                p.head(u.kv_head, map * this->members + at.member), maps.of[map]);
    combine_pair<Out>(p, u.request, at, maps);
  }

  /// Sum of a row's weights before they were rounded.
  float full_sum(int r) const { return l[r]; }

  /// Stores the state as the unit's partials number `index`.
  template <typename Self>
  void store_partials(Self& self, std::int64_t index, float* partials) const {
    const std::int64_t width = plan::partial_row_floats(p.value_width());
    float* first = partials + (u.partial_slot + index * u.partial_stride) * width;
    for (int map = 0; map < p.maps; ++map) {
      int r = map * map_rows;
      for (int row = map * this->members, i = 0; i < this->own_rows(); row += p.group_size) {
        for (int g = 0; g < this->members; ++g, ++i, ++r) {
          float* to = first + (row + g) * width;
          to[0] = m[r];
          to[1] = l[r];
          to[2] = self.full_sum(r);
          for (int b = 0; b < p.branches; ++b)
            store_columns(branch_acc(r, b), l[r], self.paired_columns(),
                          to + plan::kPartialHeader + b * p.head_dim_v);
        }
      }
    }
  }
  void store_columns(const float* from, float sum, bool paired, float* to) const {
    if (sum == 0.0F) {
      std::memset(to, 0, sizeof(float) * p.head_dim_v);
    } else if (paired) {
      for (int c = 0; c < p.head_dim_v; c += 2 * Simd::kLanes)
        Simd::narrow_pairs(to + c, Simd::load(from + c), Simd::load(from + c + Simd::kLanes));
    } else {
      std::memcpy(to, from, sizeof(float) * p.head_dim_v);
    }
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
    next_range = own ? piece_range(0, rows, base) : this->first_range(unit, Self::kTile);
    if (next_range.lo >= next_range.hi) return;
    this->point_rows(unit, next_range, base);
    if (p.k_scale != nullptr)
      this->fetch_scales(unit, p.k_scale, p.k_scale_strides, next_range, base);
    if (p.v_scale != nullptr)
      this->fetch_scales(unit, p.v_scale, p.v_scale_strides, next_range, base);
    this->fetch_coded_scales(next_range);
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
            p.branches,
            this->row_step(),
            p.head_dim_v,
            range.lo,
            range.hi,
            p.values_in_keys ? 0 : range.hi,
            s,
            has_next ? range.lo : p.branches * kPieceSize};
  }

  template <typename Self>
  void run(Self& self, float* partials) {
    const InPhase own(clock, Phase::rows);
    load_queries(self);
    const bool stores = u.partial_slot >= 0, merges = u.partial_stride == 0;
    if (p.carry != nullptr && !stores) this->load_carry();
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
      this->store_carry();
    } else if (!stores) {
      write_outputs(self);
    } else if (merges) {
      store_partials(self, 0, partials);
    }
  }
};
