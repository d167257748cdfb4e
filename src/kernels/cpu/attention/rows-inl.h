// SPDX-License-Identifier: Apache-2.0
// Which rows of memory a unit reads, and in which order results leave it. Included inside an ISA
// namespace.

template <typename T, typename K, typename V>
struct UnitRows : UnitState<T, K, V> {
  using Base = UnitState<T, K, V>;
  using Base::acc, Base::dv_padded, Base::hi, Base::kValuesAreKeys, Base::l, Base::lo, Base::m,
      Base::next_k_rows, Base::next_v_rows, Base::p, Base::request, Base::rows, Base::u;
  using Base::Base;

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
    if (p.branches == 1) return;
    for (int j = 0; j < kPieceSize; ++j) {
      next_k_rows[kPieceSize + j] = next_k_rows[j] + p.differential.k_branch;
      if constexpr (!kValuesAreKeys)
        next_v_rows[kPieceSize + j] = next_v_rows[j] + p.differential.v_branch;
    }
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
};
