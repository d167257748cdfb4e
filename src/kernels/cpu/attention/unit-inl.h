// SPDX-License-Identifier: Apache-2.0
// One unit of the plan: for each piece of keys pack, multiply, softmax, multiply, merge. Included
// inside an ISA namespace.

template <typename T>
struct UnitRunner : UnitState<T> {
  using UnitState<T>::UnitState;
  using Base = UnitState<T>;
  using Base::acc, Base::dv_padded, Base::hi, Base::k_panels, Base::k_rows, Base::keep, Base::l,
      Base::lo, Base::m, Base::next_k_rows, Base::next_v_rows, Base::p, Base::piece_l,
      Base::piece_m, Base::q, Base::rows, Base::s, Base::take, Base::u, Base::v_panels,
      Base::v_rows;

  bool packed_panel[plan::kPanels];
  bool values_packed;
  bool values_finite;
  bool values_scanned;
  KeyRange next_range;  // of the next piece, relative to it; empty = no next piece

  void load_queries() {
    // With softcap the tile computes its argument, else the logit in log2 units.
    const float logit_scale = p.softcap > 0.0F ? p.scale / p.softcap : p.scale * kLog2e;
    const int d_step = Simd::kLanes;
    const Simd::F factor = Simd::set1(logit_scale);
    for (int r = 0; r < rows; ++r) {
      const int tok = this->token(r);
      const T* from = static_cast<const T*>(p.q) +
                      p.q_layout.offset(p.query_start_loc, u.request, tok, this->head(r));
      float* to = q + std::int64_t{r} * p.head_dim_qk;
      int d = 0;
      for (; d + d_step <= p.head_dim_qk; d += d_step)
        Simd::store(to + d, Simd::mul(Simd::widen(from + d), factor));
      for (; d < p.head_dim_qk; ++d) to[d] = to_f32(from[d]) * logit_scale;
      const KeyRange visible = visible_keys(p, u.request, this->position(tok));
      lo[r] = visible.lo;
      hi[r] = visible.hi;
    }
    const int padded = static_cast<int>(plan::round_up(rows, Simd::kTileRows));
    for (int r = rows; r < padded; ++r) {
      lo[r] = hi[r] = 0;
      std::memset(q + std::int64_t{r} * p.head_dim_qk, 0, sizeof(float) * p.head_dim_qk);
    }
    reset();
  }

  void reset() {
    const auto padded = static_cast<std::size_t>(plan::round_up(rows, plan::kBlockRows));
    for (std::size_t r = 0; r < padded; ++r) {
      m[r] = -std::numeric_limits<float>::infinity();
      l[r] = 0.0F;
    }
    std::memset(acc, 0, sizeof(float) * padded * static_cast<std::size_t>(dv_padded));
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

  /// Pointers for the keys of `range`; other entries up to full panels repeat the first, so that
  /// packing never reads a row that no query sees.
  void point_rows(KeyRange range, int base, const T** k_to, const T** v_to) const {
    fill_rows(p, p.k_strides, p.k, u.request, u.kv_head, base + range.lo, base + range.hi,
              k_to + range.lo);
    fill_rows(p, p.v_strides, p.v, u.request, u.kv_head, base + range.lo, base + range.hi,
              v_to + range.lo);
    const int begin = range.lo / plan::kPanelKeys * plan::kPanelKeys;
    const int end = static_cast<int>(plan::round_up(range.hi, plan::kPanelKeys));
    for (int j = begin; j < end; ++j) {
      if (j >= range.lo && j < range.hi) continue;
      k_to[j] = k_to[range.lo];
      v_to[j] = v_to[range.lo];
    }
  }

  ATTEND_NOINLINE float* k_panel(int panel, bool keep_all) {
    float* to = k_panels + (keep_all ? std::int64_t{panel} * plan::kPanelKeys * p.head_dim_qk : 0);
    if (keep_all && packed_panel[panel]) return to;
    packed_panel[panel] = true;
    const int first = panel * plan::kPanelKeys;
    for (int j = 0; j < plan::kPanelKeys; j += Simd::kLanes)
      Simd::pack_transposed(k_rows + first + j, v_rows + first + j, p.head_dim_qk, to + j,
                            plan::kPanelKeys);
    return to;
  }

  ATTEND_NOINLINE void pack_values(KeyRange range) {
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
    for (int j = range.lo; j < range.hi; ++j)
      for (int c = 0; c + 8 <= p.head_dim_v; c += 8)
        for (int i = 0; i < 8; i += Simd::kLanes < 8 ? Simd::kLanes : 8) {
#if ATTEND_HALF_VECTOR
          bad |= Simd::any_nonfinite(Simd::widen_half(v_rows[j] + c));
#else
          bad |= Simd::any_nonfinite(Simd::widen(v_rows[j] + c + i));
#endif
        }
    values_scanned = true;
    return values_finite = !bad;
  }

  void logits(int begin, int end, int base, bool keep_panels) {
    const KeyRange range = piece_range(begin, end, base);
    for (int panel = range.lo / plan::kPanelKeys; panel * plan::kPanelKeys < range.hi; ++panel) {
      const float* keys = k_panel(panel, keep_panels);
      const int key_begin = panel * plan::kPanelKeys;
      for (int r = begin; r < end; r += Simd::kTileRows) {
        const int tile_end = r + Simd::kTileRows < end ? r + Simd::kTileRows : end;
        const KeyRange tile = piece_range(r, tile_end, base);
        if (key_begin >= tile.hi || key_begin + plan::kPanelKeys <= tile.lo) continue;
        const float* qr = q + std::int64_t{r} * p.head_dim_qk;
        float* sr = s + std::int64_t{r - begin} * kPieceSize + key_begin;
        with_tile_rows(tile_end - r, [&](auto height) ATTEND_LAMBDA {
          qk_tile<decltype(height)::value>(qr, p.head_dim_qk, keys, sr);
        });
      }
    }
  }

  void probabilities(int begin, int end, int base) {
    const bool extra = p.softcap > 0.0F || p.alibi_slopes != nullptr;
    for (int r0 = begin; r0 < end; r0 += Simd::kTileRows) {
      const int tile_end = r0 + Simd::kTileRows < end ? r0 + Simd::kTileRows : end;
      const KeyRange tile = piece_range(r0, tile_end, base);
      const int from = tile.lo / 16 * 16;
      const int to = static_cast<int>(plan::round_up(tile.hi, 16));
      for (int r = r0; r < tile_end; ++r) {
        float* sr = s + std::int64_t{r - begin} * kPieceSize;
        if (!extra) {
          softmax_row<false>(sr, from, to, lo[r] - base, hi[r] - base, {}, piece_m + r,
                             piece_l + r);
          continue;
        }
        LogitTerms t{p.softcap * kLog2e, 0.0F,
                     static_cast<float>(this->position(this->token(r)) - base)};
        if (p.alibi_slopes != nullptr)
          t.alibi_log2 = kLog2e * p.alibi_slopes[u.request * p.alibi_stride_request +
                                                 this->head(r) * p.alibi_stride_head];
        softmax_row<true>(sr, from, to, lo[r] - base, hi[r] - base, t, piece_m + r, piece_l + r);
      }
    }
    const int tiles_end = begin + static_cast<int>(plan::round_up(end - begin, Simd::kTileRows));
    for (int r = end; r < tiles_end; ++r) {  // padding rows of the last tile
      float* sr = s + std::int64_t{r - begin} * kPieceSize;
      std::memset(sr, 0, sizeof(float) * kPieceSize);
    }
    const int vec_end = begin + static_cast<int>(plan::round_up(end - begin, 16));
    for (int r = end; r < vec_end || r < tiles_end; ++r) {
      piece_m[r] = -std::numeric_limits<float>::infinity();
      piece_l[r] = 0.0F;
    }
    merge_rows(vec_end - begin, m + begin, l + begin, piece_m + begin, piece_l + begin,
               keep + begin, take + begin);
  }

  /// Adds the piece's values to rows [r, r + height) over keys `tile`.
  template <int R>
  void add_values(int r, int begin, KeyRange tile) {
    const float* probs = s + std::int64_t{r - begin} * kPieceSize;
    PvRows t{probs, acc + std::int64_t{r} * dv_padded, dv_padded, keep + r, take + r};
    constexpr int kStep = Simd::kTileVecs * Simd::kLanes;
    if (values_packed) {
      for (int c = 0; c < dv_padded; c += kStep, t.acc += kStep) {
        const float* panel =
            v_panels + std::int64_t{c / plan::kPanelCols} * kPieceSize * plan::kPanelCols;
        pv_tile<R, Simd::kTileVecs>(t, PackedValues{panel + c % plan::kPanelCols}, tile.lo,
                                    tile.hi);
      }
      return;
    }
    CachedValues<T> values{v_rows, next_range.hi > 0 ? next_k_rows : nullptr, next_range, 0};
    if constexpr (2 * R <= Simd::kTileRows)
      for (; values.col + 2 * kStep <= p.head_dim_v; values.col += 2 * kStep, t.acc += 2 * kStep)
        pv_tile<R, 2 * Simd::kTileVecs>(t, values, tile.lo, tile.hi);
    for (; values.col + kStep <= p.head_dim_v; values.col += kStep, t.acc += kStep)
      pv_tile<R, Simd::kTileVecs>(t, values, tile.lo, tile.hi);
    for (; values.col + Simd::kLanes <= p.head_dim_v;
         values.col += Simd::kLanes, t.acc += Simd::kLanes)
      pv_tile<R, 1>(t, values, tile.lo, tile.hi);
#if ATTEND_HALF_VECTOR
    if (values.col < p.head_dim_v)
      pv_tile<R, 1>(t, CachedValuesHalf<T>{v_rows, values.col}, tile.lo, tile.hi);
#endif
  }

  void outputs(int begin, int end, int base, KeyRange unit_range) {
    for (int r = begin; r < end; r += Simd::kTileRows) {
      const int tile_end = r + Simd::kTileRows < end ? r + Simd::kTileRows : end;
      const KeyRange tile = piece_range(r, tile_end, base);
      if (tile.lo >= tile.hi) continue;
      bool same = true;
      for (int i = r; i < tile_end; ++i) same &= lo[i] == lo[r] && hi[i] == hi[r];
      if (same || all_values_finite(unit_range)) {
        with_tile_rows(tile_end - r, [&](auto height) ATTEND_LAMBDA {
          add_values<decltype(height)::value>(r, begin, tile);
        });
        continue;
      }
      // An infinite or NaN value behind one row's mask must not reach that row through 0 * inf.
      for (int i = r; i < tile_end; ++i) {
        const KeyRange own = piece_range(i, i + 1, base);
        if (own.lo < own.hi) add_values<1>(i, begin, own);
      }
    }
  }

  ATTEND_NOINLINE void run_piece(int piece) {
    const int base = piece * kPieceSize;
    const KeyRange range = piece_range(0, rows, base);
    if (range.lo >= range.hi) return;
    const bool one_block = rows <= plan::kBlockRows;
    std::memset(packed_panel, 0, sizeof packed_panel);
    values_packed = values_scanned = false;
    for (int begin = 0; begin < rows; begin += plan::kBlockRows) {
      const int end = begin + plan::kBlockRows < rows ? begin + plan::kBlockRows : rows;
      logits(begin, end, base, !one_block);
      probabilities(begin, end, base);
      if (!values_packed && rows > Simd::kTileRows) pack_values(range);
      outputs(begin, end, base, range);
    }
  }

  void write_outputs() const {
    for (int r = 0; r < rows; ++r) {
      const int tok = this->token(r), head = this->head(r);
      T* to = static_cast<T*>(p.out) + p.out_layout.offset(p.query_start_loc, u.request, tok, head);
      write_row(p, acc + std::int64_t{r} * dv_padded, l[r], to);
      if (p.lse != nullptr)
        p.lse[p.lse_layout.offset(p.query_start_loc, u.request, tok, head)] = log_sum(m[r], l[r]);
    }
  }

  void store_partials(int piece, float* partials) const {
    const std::int64_t width = plan::partial_row_floats(p.head_dim_v);
    float* to = partials + (u.partial_slot + std::int64_t{piece - u.piece_begin} * rows) * width;
    for (int r = 0; r < rows; ++r, to += width) {
      to[0] = m[r];
      to[1] = l[r];
      std::memcpy(to + 2, acc + std::int64_t{r} * dv_padded, sizeof(float) * p.head_dim_v);
    }
  }

  void point_next(int piece) {
    next_range = KeyRange{0, 0};
    if (piece >= u.piece_end) return;
    const int base = piece * kPieceSize;
    const KeyRange range = piece_range(0, rows, base);
    if (range.lo >= range.hi) return;
    point_rows(range, base, next_k_rows, next_v_rows);
    next_range = range;
  }

  void run(float* partials) {
    load_queries();
    const bool split = u.partial_slot >= 0;
    point_next(u.piece_begin);
    for (int piece = u.piece_begin; piece < u.piece_end; ++piece) {
      const T** k_swap = k_rows;
      const T** v_swap = v_rows;
      k_rows = next_k_rows;
      v_rows = next_v_rows;
      next_k_rows = k_swap;
      next_v_rows = v_swap;
      point_next(piece + 1);
      run_piece(piece);
      if (split) {
        store_partials(piece, partials);
        reset();
      }
    }
    if (!split) write_outputs();
  }
};
