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
  float factor;  // 1; smaller if a sink is larger than every logit. Then times the values' scale
  float sum;     // 0: no key was visible
  float lse;     // natural log
};

/// A row's final state.
struct RowState {
  float m, l;
  float full;  // the sum of the weights before rounding; l if they are not rounded
};

/// Counts the head's sink, once: states are merged without it.
ATTEND_INLINE RowTotal row_total(const AttentionProblem& p, int head, const RowState& row) {
  const float m = row.m;
  // Rounding turned a NaN weight into 0; the full sum has it.
  const float l = row.l + 0.0F * row.full;
  if (p.sinks == nullptr) return {1.0F, l, log_sum(m, row.full)};
  const float sink = p.sinks[head * p.sink_stride];
  if (l == 0.0F) return {1.0F, 0.0F, p.lse_includes_sink ? sink : log_sum(m, l)};
  const float sink_log2 = sink * kLog2e;
  const float top = m > sink_log2 ? m : sink_log2;
  const float factor = exp2_one(m - top);
  const float share = exp2_one(sink_log2 - top);
  return {factor, l * factor + share,
          p.lse_includes_sink ? log_sum(top, row.full * factor + share) : log_sum(m, row.full)};
}

/// Largest logit of a row, in natural units; -inf if no key was visible.
ATTEND_INLINE void write_max_logit(const AttentionProblem& p, int request, int tok, int head,
                                   const RowState& row) {
  if (p.max_logits == nullptr) return;
  p.max_logits[p.max_logits_layout.offset(p.query_start_loc, request, tok, head)] =
      row.l == 0.0F ? -std::numeric_limits<float>::infinity() : kLn2 * row.m;
}

/// The same with the scale of the values of a branch.
ATTEND_INLINE RowTotal branch_total(const AttentionProblem& p, int request, int kv_head, int branch,
                                    RowTotal total) {
  total.factor *= p.v_descale.at(request, kv_head, branch);
  return total;
}

/// Writes the LSE and the largest logit of a row.
ATTEND_INLINE RowTotal finish_state(const AttentionProblem& p, int request, int tok, int head,
                                    const RowState& row) {
  const RowTotal total = row_total(p, head, row);
  if (p.lse != nullptr)
    p.lse[p.lse_layout.offset(p.query_start_loc, request, tok, head)] = total.lse;
  write_max_logit(p, request, tok, head, row);
  return total;
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
