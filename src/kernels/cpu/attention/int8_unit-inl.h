// SPDX-License-Identifier: Apache-2.0
// One unit of the plan over int8 queries and keys. Included inside an ISA namespace.

/// `V`: f16 or bf16 values, weights as they are (level 2).
template <typename V>
struct Int8UnitRunner : UnitRunner<V, std::int8_t, V> {
  using Base = UnitRunner<V, std::int8_t, V>;
  using Base::Base, Base::p, Base::u, Base::next;
  static constexpr bool kAnyOut = true;

  std::int8_t* codes(int r) const {
    return reinterpret_cast<std::int8_t*>(this->q) + std::int64_t{r} * p.head_dim_qk;
  }

  void load_query(int r, int i) {
    const std::int8_t* from = query_codes(r, i);
    std::int32_t sum = 0;
    for (int d = 0; d < p.head_dim_qk; ++d) sum += from[d];
    std::memcpy(codes(r), from, static_cast<std::size_t>(p.head_dim_qk));
    this->starts[r] = -kKeyBias * sum;
    load_terms(r, i, from);
  }
  /// Row r as it lies in memory, which is query token i of its request.
  const std::int8_t* query_codes(int r, int i) const {
    return static_cast<const std::int8_t*>(p.q) +
           p.q_layout.offset(p.query_start_loc, this->request[r], i, this->head(r));
  }
  /// What makes a logit of a sum of row r, whose codes are at `from`.
  ATTEND_NOINLINE void load_terms(int r, int i, const std::int8_t* from) {
    const int own = this->request[r];
    const float q_scale =
        p.q_scale[p.q_scale_layout.offset(p.query_start_loc, own, i, this->head(r))];
    this->factors[r] = this->log2_factor(p.scale) * q_scale;
    this->offsets[r] = 0.0F;
    if (p.k_mean == nullptr) return;
    const float* mean = p.k_mean + own * p.k_mean_stride_request + u.kv_head * p.k_mean_stride_head;
    float dot = 0.0F;
    for (int d = 0; d < p.head_dim_qk; ++d) dot += static_cast<float>(from[d]) * mean[d];
    this->offsets[r] = this->factors[r] * dot;
  }
  void clear_query(int r) {
    std::memset(codes(r), 0, static_cast<std::size_t>(p.head_dim_qk));
    this->starts[r] = 0;
    this->factors[r] = this->offsets[r] = 0.0F;
  }

  void stage(int /*piece*/) { this->v_rows = this->stored_v_rows; }

  ATTEND_NOINLINE const std::uint8_t* k_panel(int panel, bool keep_all) {
    auto* to = reinterpret_cast<std::uint8_t*>(this->k_panels) +
               (keep_all ? std::int64_t{panel} * plan::kPanelKeys * p.head_dim_qk : 0);
    if (keep_all && this->packed_panel[panel]) return to;
    this->packed_panel[panel] = true;
    const InPhase packing(this->clock, Phase::pack);
    const std::int8_t* const* keys = this->stored_k_rows + panel * plan::kPanelKeys;
    if (this->fetches()) {
      Dot::pack_keys(keys, p.head_dim_qk, to, next);
    } else {
      NoPrefetch none;
      Dot::pack_keys(keys, p.head_dim_qk, to, none);
    }
    return to;
  }

  template <int R>
  void multiply_panel(int r, const std::uint8_t* keys, int key_begin, float* sr) {
    const Int8Queries queries{codes(r), this->starts + r, this->factors + r, this->offsets + r};
    const float* scales = this->key_scales + key_begin;
    if (this->fetches()) {
      int8_qk_tile<R>(queries, p.head_dim_qk, keys, scales, sr, next);
    } else {
      NoPrefetch none;
      int8_qk_tile<R>(queries, p.head_dim_qk, keys, scales, sr, none);
    }
  }

  /// The tiles have multiplied by the keys' scales.
  float finish_row(int r, float* sr, KeyRange span, int base) const {
    return this->finish_scaled_row(r, sr, span, base);
  }
  void keep_row(int r, int /*at*/, KeyRange /*span*/, int /*base*/, RowSums row) {
    this->piece_m[r] = row.max;
    this->piece_l[r] = row.sum;
  }
};

/// int8 values and rounded weights (level 1).
struct Int8ValuesRunner : Int8UnitRunner<std::int8_t> {
  using Base = Int8UnitRunner<std::int8_t>;
  using Base::Base;

  void reset() {
    Base::reset();
    const int padded = static_cast<int>(plan::round_up(rows, plan::kBlockRows));
    for (int r = 0; r < padded; ++r) full[r] = 0.0F;
  }

  std::uint8_t* weight_row(int at) const { return weights + std::int64_t{at} * kPieceSize; }

  void keep_row(int r, int at, KeyRange span, int /*base*/, RowSums row) {
    piece_m[r] = row.max;
    piece_full[r] = row.sum;
    piece_l[r] = round_weights(s + std::int64_t{at} * kPieceSize, span, weight_row(at));
  }
  void clear_row(int at) { std::memset(weight_row(at), 0, kPieceSize); }

  float full_sum(int r) const { return full[r]; }

  std::int8_t* panel() const { return reinterpret_cast<std::int8_t*>(v_panels); }

  /// Groups of four keys, whole ones: masked keys weigh 0.
  ATTEND_NOINLINE void pack_values(KeyRange range) {
    const InPhase packing(clock, Phase::pack);
    for (int j = range.lo / kDotBytes * kDotBytes; j < range.hi; j += kDotBytes) {
      std::int8_t* to = panel() + std::int64_t{j} * dv_padded;
      if (fetches()) {
        Dot::pack_values(stored_v_rows + j, p.head_dim_v, to, next);
      } else {
        NoPrefetch none;
        Dot::pack_values(stored_v_rows + j, p.head_dim_v, to, none);
      }
    }
    values_packed = true;
  }

  void outputs(int begin, int end, int base, KeyRange unit_range) {
    for (int r = begin; r < end; ++r) full[r] = fma_one(full[r], keep[r], piece_full[r] * take[r]);
    if (!values_packed) pack_values(unit_range);
    for (int r = begin; r < end; r += Simd::kTileRows) {
      const int tile_end = r + Simd::kTileRows < end ? r + Simd::kTileRows : end;
      const KeyRange tile = piece_range(r, tile_end, base);
      if (tile.lo >= tile.hi) continue;
      const KeyRange keys{tile.lo / kDotBytes * kDotBytes,
                          static_cast<int>(plan::round_up(tile.hi, kDotBytes))};
      with_tile_rows(tile_end - r, [&](auto height) ATTEND_LAMBDA {
        if (fetches()) {
          add_values<decltype(height)::value>(r, begin, keys, next);
        } else {
          NoPrefetch none;
          add_values<decltype(height)::value>(r, begin, keys, none);
        }
      });
    }
  }

  template <int R, typename Prefetch>
  void add_values(int r, int begin, KeyRange keys, Prefetch& prefetch) {
    constexpr int kVecs = Simd::kTileVecs, kStep = kVecs * Simd::kLanes;
    const std::uint8_t* first = weight_row(r - begin);
    const PvRows t{nullptr, acc + std::int64_t{r} * dv_padded, dv_padded, keep + r, take + r};
    int c = 0;
    if constexpr (2 * R <= Simd::kTileRows) {
      for (; c + 2 * kStep <= dv_padded; c += 2 * kStep)
        int8_pv_tile<R, 2 * kVecs>(first, t.at(c), values_from(c), keys, prefetch);
    }
    for (; c < dv_padded; c += kStep)
      int8_pv_tile<R, kVecs>(first, t.at(c), values_from(c), keys, prefetch);
  }
  PackedCodes values_from(int column) const { return {panel() + column * kDotBytes, dv_padded}; }
};

template <typename V>
void run_int8_unit(const AttentionProblem& p, const WorkUnit& u,
                   const KernelWorkspace& ws) noexcept {
  std::conditional_t<std::is_same_v<V, std::int8_t>, Int8ValuesRunner, Int8UnitRunner<V>> runner(
      p, u, ws);
  runner.run(runner, ws.partials);
}

constexpr Int8AttentionKernel make_int8_entry(IsaLevel level) noexcept {
  return {level, &run_int8_unit<std::int8_t>, &run_int8_unit<f16>, &run_int8_unit<bf16>};
}
