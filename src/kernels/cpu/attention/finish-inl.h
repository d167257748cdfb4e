// SPDX-License-Identifier: Apache-2.0
// Accumulators to output rows. Included inside an ISA namespace.

/// to = acc / l in the type of the output; zeros if no key was visible (l = 0). Adding 0 turns -0,
/// which would depend on which masked keys were skipped, into +0.
template <typename T>
ATTEND_INLINE void write_row(const AttentionProblem& p, const float* acc, float l, T* to) {
  const bool empty = l == 0.0F;
  const Simd::F sum = Simd::set1(empty ? 1.0F : l);
  int c = 0;
  for (; c + Simd::kLanes <= p.head_dim_v; c += Simd::kLanes) {
    const Simd::F x = Simd::add(Simd::div(Simd::load(acc + c), sum), Simd::zero());
    Simd::narrow(to + c, empty ? Simd::zero() : x);
  }
#if ATTEND_HALF_VECTOR
  if (c < p.head_dim_v) {
    float tail[Simd::kLanes] = {};
    std::memcpy(tail, acc + c, sizeof(float) * 8);
    const Simd::F x = Simd::add(Simd::div(Simd::load(tail), sum), Simd::zero());
    Simd::narrow_half(to + c, empty ? Simd::zero() : x);
  }
#endif
}

/// Natural-log LSE of a state in log2 units; -inf if no key was visible.
ATTEND_INLINE float log_sum(float m, float l) {
  if (l == 0.0F) return -std::numeric_limits<float>::infinity();
  return kLn2 * (m + __builtin_log2f(l));
}

/// Merges the stored partials of one split unit in ascending order, exactly as a whole unit would.
template <typename T>
void reduce_unit(const AttentionProblem& p, const Reduction& u,
                 const KernelWorkspace& ws) noexcept {
  const std::int64_t width = plan::partial_row_floats(p.head_dim_v);
  const int rows = (u.q_end - u.q_begin) * p.group_size;
  float* acc = ws.scratch + ws.layout.acc;
  float state[5][16] = {};  // m, l, piece m, piece l, unused lanes stay 0
  float keep[16], take[16];
  for (int r = 0; r < rows; ++r) {
    state[0][0] = -std::numeric_limits<float>::infinity();
    state[1][0] = 0.0F;
    std::memset(acc, 0, sizeof(float) * static_cast<std::size_t>(ws.layout.padded_dv));
    for (int piece = 0; piece < u.num_pieces; ++piece) {
      const float* from = ws.partials + (u.partial_slot + std::int64_t{piece} * rows + r) * width;
      state[2][0] = from[0];
      state[3][0] = from[1];
      merge_rows(1, state[0], state[1], state[2], state[3], keep, take);
      const Simd::F a = Simd::set1(keep[0]), b = Simd::set1(take[0]);
      // The last vector may run over the row's end: into the next row or the buffer's padding.
      for (int c = 0; c < p.head_dim_v; c += Simd::kLanes) {
        const Simd::F part = Simd::mul(Simd::load(from + 2 + c), b);
        Simd::store(acc + c, Simd::fma(Simd::load(acc + c), a, part));
      }
    }
    const int tok = u.q_begin + r / p.group_size;
    const int head = u.kv_head * p.group_size + r % p.group_size;
    T* to = static_cast<T*>(p.out) + p.out_layout.offset(p.query_start_loc, u.request, tok, head);
    write_row(p, acc, state[1][0], to);
    if (p.lse != nullptr)
      p.lse[p.lse_layout.offset(p.query_start_loc, u.request, tok, head)] =
          log_sum(state[0][0], state[1][0]);
  }
}
