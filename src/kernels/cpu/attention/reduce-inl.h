// SPDX-License-Identifier: Apache-2.0
// Partials of split units to output rows. Included inside an ISA namespace.

/// A query row whose partials are merged.
struct ReducedRow {
  int tok, member;  ///< of the request, of the group
};

/// Merges the stored partials of a row in ascending order, exactly as a whole unit would.
ATTEND_INLINE RowState merge_partials(const AttentionProblem& p, const Reduction& u,
                                      const KernelWorkspace& ws, ReducedRow row, float* carried,
                                      float* acc) {
  const int columns = p.value_width();
  const std::int64_t width = plan::partial_row_floats(columns);
  const int r = (row.tok - u.q_begin) * p.group_size + row.member;
  float state[4][16] = {};  // m, l, piece m, piece l, unused lanes stay 0
  float keep[16], take[16];
  state[0][0] = -std::numeric_limits<float>::infinity();
  if (carried != nullptr && p.resumes != nullptr && p.resumes[u.request]) {
    state[0][0] = carried[0];
    state[1][0] = carried[1];
    std::memcpy(acc, carried + plan::kCarryHeader, sizeof(float) * columns);
  }
  float full = state[1][0];
  for (int run = u.run_begin; run < u.run_end; ++run) {
    const PartialRun& partials = ws.runs[run];
    const float* from = ws.partials + (partials.slot + r) * width;
    for (int piece = 0; piece < partials.num_pieces; ++piece, from += partials.stride * width) {
      state[2][0] = from[0];
      state[3][0] = from[1];
      merge_rows(1, state[0], state[1], state[2], state[3], keep, take);
      full = fma_one(full, keep[0], from[2] * take[0]);
      const Simd::F a = Simd::set1(keep[0]), b = Simd::set1(take[0]);
      // The last vector may run over the row's end: into the next row or the buffer's padding.
      for (int c = 0; c < columns; c += Simd::kLanes) {
        const Simd::F part = Simd::mul(Simd::load(from + plan::kPartialHeader + c), b);
        Simd::store(acc + c, keep[0] == 0.0F ? part : Simd::fma(Simd::load(acc + c), a, part));
      }
    }
  }
  return {state[0][0], state[1][0], full};
}

/// Merges the partials of a row and writes what belongs to it, its columns to `to`; nothing of
/// that if the state is kept.
template <typename Out>
ATTEND_INLINE void reduce_row(const AttentionProblem& p, const Reduction& u,
                              const KernelWorkspace& ws, ReducedRow row, Out* to) {
  const int head = p.head(u.kv_head, row.member);
  float* acc = ws.scratch + ws.layout.acc;
  float* carried = nullptr;
  if (p.carry != nullptr) {
    const std::int64_t at =
        (std::int64_t{p.query_start_loc[u.request]} + row.tok) * p.carry_heads + head;
    carried = p.carry + at * (p.head_dim_v + plan::kCarryHeader);
  }
  const RowState state = merge_partials(p, u, ws, row, carried, acc);
  if (p.keeps_state) return keep_state(p, state.m, state.l, acc, carried);
  const RowTotal total = finish_state(p, u.request, row.tok, head, state);
  scale_channels(p, u.kv_head, acc);
  for (int b = 0; b < p.branches; ++b)
    write_row(p, acc + b * p.head_dim_v, branch_total(p, u.request, u.kv_head, b, total), false,
              to + b * p.head_dim_v);
}

/// Merges the partials of some rows.
template <typename T>
void reduce_unit(const AttentionProblem& p, const Reduction& u,
                 const KernelWorkspace& ws) noexcept {
  const InPhase merging(ws.clock, Phase::merge);
  const bool pairs = p.maps == 2 && !p.differential.writes_maps;
  for (int tok = u.q_begin; tok < u.q_end; ++tok) {
    for (int member = 0; member < (pairs ? p.group_size / 2 : p.group_size); ++member) {
      if (pairs) {
        PairMaps maps;
        for (int map = 0; map < 2; ++map)
          reduce_row(p, u, ws, {tok, map * (p.group_size / 2) + member}, maps.of[map]);
        combine_pair<T>(p, u.request, {tok, u.kv_head, member}, maps);
        continue;
      }
      const int head = p.head(u.kv_head, member);
      reduce_row(
          p, u, ws, {tok, member},
          static_cast<T*>(p.out) + p.out_layout.offset(p.query_start_loc, u.request, tok, head));
    }
  }
}
