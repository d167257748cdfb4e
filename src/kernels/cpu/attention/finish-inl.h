// SPDX-License-Identifier: Apache-2.0
// Accumulators to output rows. Included inside an ISA namespace.

/// acc * factor / sum. Adding 0 turns -0, which would depend on which masked keys were skipped,
/// into +0.
ATTEND_INLINE Simd::F normalised(const float* acc, Simd::F factor, Simd::F sum) {
  return Simd::add(Simd::div(Simd::mul(Simd::load(acc), factor), sum), Simd::zero());
}

/// Natural-log LSE of a state in log2 units; -inf if no key was visible.
ATTEND_INLINE float log_sum(float m, float l) {
  if (l == 0.0F) return -std::numeric_limits<float>::infinity();
  return kLn2 * (m + __builtin_log2f(l));
}

ATTEND_INLINE float exp2_one(float x) {
  float lanes[Simd::kLanes];
  Simd::store(lanes, Simd::exp2(Simd::set1(x)));
  return lanes[0];
}

/// a * b + c as the vectors compute it.
ATTEND_INLINE float fma_one(float a, float b, float c) {
  float lanes[Simd::kLanes];
  Simd::store(lanes, Simd::fma(Simd::set1(a), Simd::set1(b), Simd::set1(c)));
  return lanes[0];
}

/// What turns a row's final state into its results: out = acc * factor / sum.
struct RowTotal {
  float factor;  // scale of the values; smaller if a sink is larger than every logit
  float sum;     // 0: no key was visible
  float lse;     // natural log
};

/// A row's final state.
struct RowState {
  float m, l;
  float full;  // the sum of the weights before rounding; l if they are not rounded
};

/// Counts the head's sink and the scale of the values, once: states are merged without them.
ATTEND_INLINE RowTotal row_total(const AttentionProblem& p, int request, int head,
                                 const RowState& row) {
  const float m = row.m;
  // Rounding turned a NaN weight into 0; the full sum has it.
  const float l = row.l + 0.0F * row.full;
  const float value_scale = p.v_descale.at(request, head / p.group_size);
  if (p.sinks == nullptr) return {value_scale, l, log_sum(m, row.full)};
  const float sink = p.sinks[head * p.sink_stride];
  if (l == 0.0F) return {1.0F, 0.0F, p.lse_includes_sink ? sink : log_sum(m, l)};
  const float sink_log2 = sink * kLog2e;
  const float top = m > sink_log2 ? m : sink_log2;
  const float factor = exp2_one(m - top);
  const float share = exp2_one(sink_log2 - top);
  return {factor * value_scale, l * factor + share,
          p.lse_includes_sink ? log_sum(top, row.full * factor + share) : log_sum(m, row.full)};
}

/// Largest logit of a row, in natural units; -inf if no key was visible.
ATTEND_INLINE void write_max_logit(const AttentionProblem& p, int request, int tok, int head,
                                   const RowState& row) {
  if (p.max_logits == nullptr) return;
  p.max_logits[p.max_logits_layout.offset(p.query_start_loc, request, tok, head)] =
      row.l == 0.0F ? -std::numeric_limits<float>::infinity() : kLn2 * row.m;
}

/// int8 values: every column has a scale of its own.
ATTEND_INLINE void scale_channels(const AttentionProblem& p, int kv_head, float* acc) {
  if (p.v_channel_scale == nullptr) return;
  const float* scales = p.v_channel_scale + kv_head * p.v_channel_scale_stride;
  for (int c = 0; c < p.head_dim_v; ++c) acc[c] *= scales[c];
}

/// to = acc * factor / sum in the type of the output; zeros if no key was visible (acc is then not
/// read). `paired`: columns of acc are interleaved.
template <typename T>
ATTEND_INLINE void write_row(const AttentionProblem& p, const float* acc, const RowTotal& total,
                             bool paired, T* to) {
  if (total.sum == 0.0F) {
    for (int c = 0; c < p.head_dim_v; ++c) to[c] = T{};
    return;
  }
  const Simd::F sum = Simd::set1(total.sum), factor = Simd::set1(total.factor);
  int c = 0;
  if (paired) {
    for (; c < p.head_dim_v; c += 2 * Simd::kLanes)
      Simd::narrow_pairs(to + c, normalised(acc + c, factor, sum),
                         normalised(acc + c + Simd::kLanes, factor, sum));
  }
  for (; c + Simd::kLanes <= p.head_dim_v; c += Simd::kLanes)
    Simd::narrow(to + c, normalised(acc + c, factor, sum));
#if ATTEND_HALF_VECTOR
  if (c < p.head_dim_v) Simd::narrow_half(to + c, normalised(acc + c, factor, sum));
#endif
}

/// Stores a row's state for a later call. Accumulators of an empty state hold anything.
ATTEND_INLINE void keep_state(const AttentionProblem& p, float m, float l, const float* acc,
                              float* to) {
  to[0] = m;
  to[1] = l;
  float* columns = to + plan::kCarryHeader;
  if (l == 0.0F) {
    std::memset(columns, 0, sizeof(float) * p.head_dim_v);
  } else {
    std::memcpy(columns, acc, sizeof(float) * p.head_dim_v);
  }
}

/// Merges the stored partials of some rows in ascending order, exactly as a whole unit would.
template <typename T>
void reduce_unit(const AttentionProblem& p, const Reduction& u,
                 const KernelWorkspace& ws) noexcept {
  const InPhase merging(ws.clock, Phase::merge);
  const std::int64_t width = plan::partial_row_floats(p.head_dim_v);
  const int rows = (u.q_end - u.q_begin) * p.group_size;
  float* acc = ws.scratch + ws.layout.acc;
  float state[4][16] = {};  // m, l, piece m, piece l, unused lanes stay 0
  float keep[16], take[16];
  for (int r = 0; r < rows; ++r) {
    const int tok = u.q_begin + r / p.group_size;
    const int head = u.kv_head * p.group_size + r % p.group_size;
    const std::int64_t row =
        (std::int64_t{p.query_start_loc[u.request]} + tok) * p.carry_heads + head;
    float* carried =
        p.carry == nullptr ? nullptr : p.carry + row * (p.head_dim_v + plan::kCarryHeader);
    state[0][0] = -std::numeric_limits<float>::infinity();
    state[1][0] = 0.0F;
    if (carried != nullptr && p.resumes != nullptr && p.resumes[u.request]) {
      state[0][0] = carried[0];
      state[1][0] = carried[1];
      std::memcpy(acc, carried + plan::kCarryHeader, sizeof(float) * p.head_dim_v);
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
        for (int c = 0; c < p.head_dim_v; c += Simd::kLanes) {
          const Simd::F part = Simd::mul(Simd::load(from + plan::kPartialHeader + c), b);
          Simd::store(acc + c, keep[0] == 0.0F ? part : Simd::fma(Simd::load(acc + c), a, part));
        }
      }
    }
    if (p.keeps_state) {
      keep_state(p, state[0][0], state[1][0], acc, carried);
      continue;
    }
    T* to = static_cast<T*>(p.out) + p.out_layout.offset(p.query_start_loc, u.request, tok, head);
    const RowState final_state{state[0][0], state[1][0], full};
    const RowTotal total = row_total(p, u.request, head, final_state);
    scale_channels(p, u.kv_head, acc);
    write_row(p, acc, total, false, to);
    if (p.lse != nullptr)
      p.lse[p.lse_layout.offset(p.query_start_loc, u.request, tok, head)] = total.lse;
    write_max_logit(p, u.request, tok, head, final_state);
  }
}
