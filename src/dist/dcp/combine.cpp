// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "attend/core/float_types.h"
#include "attend/core/workspace.h"
#include "attend/dist/decode_context_parallel.h"
#include "core/check.h"
#include "dist/dcp/reserve.h"

namespace attend {
namespace {

using dcp::reserve;

constexpr double kEmpty = -std::numeric_limits<double>::infinity();

struct Shape {
  std::int64_t ranks = 1, tokens = 0, heads = 0, dim = 0;
  std::int64_t heads_a_rank() const noexcept { return heads / ranks; }
};

/// Memory of one call; a thread reuses it.
struct Scratch {
  Buffer lse_send, lse_recv, out_send, out_recv;
};
Scratch& thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

Shape checked_shape(std::string_view op, const DcpCombineArgs& a, const Communicator& comm,
                    bool scatter) {
  check::tensor({op, "out"}, a.out, 3, {DType::f32, DType::f16, DType::bf16});
  check::unit_last_stride({op, "out"}, a.out);
  const Shape s{comm.size(), a.out.shape[0], a.out.shape[1], a.out.shape[2]};
  check::require(
      s.heads % s.ranks == 0, {op, "out"},
      [&] { return fmt::format("a number of heads that {} ranks can share", s.ranks); }, s.heads);
  check::tensor({op, "lse"}, a.lse, 2, {DType::f32});
  check::shape({op, "lse"}, a.lse, {s.tokens, s.heads});
  const std::int64_t kept = scatter ? s.heads_a_rank() : s.heads;
  check::tensor({op, "combined"}, a.combined, 3, {a.out.dtype});
  check::shape({op, "combined"}, a.combined, {s.tokens, kept, s.dim});
  check::unit_last_stride({op, "combined"}, a.combined);
  check::distinct_elements({op, "combined"}, a.combined);
  check::no_overlap({op, "combined"}, a.combined, "out", a.out);
  check::no_overlap({op, "combined"}, a.combined, "lse", a.lse);
  if (a.combined_lse.defined()) {
    const check::Where where{op, "combined_lse"};
    check::tensor(where, a.combined_lse, 2, {DType::f32});
    check::shape(where, a.combined_lse, {s.tokens, kept});
    check::distinct_elements(where, a.combined_lse);
    check::no_overlap(where, a.combined_lse, "out", a.out);
    check::no_overlap(where, a.combined_lse, "lse", a.lse);
    check::no_overlap(where, a.combined_lse, "combined", a.combined);
  }
  return s;
}

/// The LSEs that the ranks have for one row, `stride` apart. In double, as it is one computation
/// for a whole row of elements.
class RowLses {
 public:
  RowLses(const float* lse, std::int64_t stride, std::int64_t ranks, LseBase base) noexcept
      : lse_(lse), stride_(stride), base_(base) {
    for (std::int64_t r = 0; r < ranks; ++r) largest_ = std::max(largest_, at(r));
    if (largest_ == kEmpty) return;
    for (std::int64_t r = 0; r < ranks; ++r) sum_ += power(at(r) - largest_);
  }

  /// Share of rank r's output in the combined one; exactly 0 if that part is empty.
  float weight(std::int64_t r) const noexcept {
    return largest_ == kEmpty ? 0.0F : static_cast<float>(power(at(r) - largest_) / sum_);
  }
  float combined() const noexcept {
    if (largest_ == kEmpty) return -std::numeric_limits<float>::infinity();
    return static_cast<float>(largest_ + (base_ == LseBase::e ? std::log(sum_) : std::log2(sum_)));
  }

 private:
  double at(std::int64_t r) const noexcept {
    const double lse = lse_[r * stride_];
    return std::isfinite(lse) ? lse : kEmpty;
  }
  double power(double x) const noexcept { return base_ == LseBase::e ? std::exp(x) : std::exp2(x); }

  const float* lse_;
  std::int64_t stride_;
  LseBase base_;
  double largest_ = kEmpty;
  double sum_ = 0.0;
};

/// weight * x, and 0 where the weight is 0: x may be NaN then.
template <typename T>
float weighed(float weight, T x) noexcept {
  return weight == 0.0F ? 0.0F : weight * to_f32(x);
}

template <typename View>
auto* row(const View& t, std::int64_t token, std::int64_t head, auto type) noexcept {
  using T = decltype(type);
  return t.template as<T>() + token * t.strides[0] + head * t.strides[1];
}

/// Calls `use(rank, token, head, position)` for all heads, `head` counted over all ranks, in the
/// order of [N, T, H / N]; `position` counts the rows.
template <typename Use>
void for_each_row_by_rank(const Shape& s, Use&& use) {
  std::int64_t position = 0;
  for (std::int64_t r = 0; r < s.ranks; ++r) {
    for (std::int64_t t = 0; t < s.tokens; ++t) {
      for (std::int64_t h = 0; h < s.heads_a_rank(); ++h, ++position) {
        use(t, r * s.heads_a_rank() + h, position);
      }
    }
  }
}

/// All ranks' LSEs, [N, T, H].
const float* gather_lse(const DcpCombineArgs& a, const Shape& s, Communicator& comm) {
  Scratch& scratch = thread_scratch();
  const TensorView send = reserve(scratch.lse_send, DType::f32, {s.tokens, s.heads});
  const TensorView recv = reserve(scratch.lse_recv, DType::f32, {s.ranks, s.tokens, s.heads});
  for (std::int64_t t = 0; t < s.tokens; ++t) {
    for (std::int64_t h = 0; h < s.heads; ++h) {
      *row(send, t, h, float{}) = *row(a.lse, t, h, float{});
    }
  }
  comm.all_gather(send, recv);
  return recv.as<float>();
}

/// Writes a float32 row of [T, heads, D] in the output's type.
template <typename T>
void write_row(T* to, const float* from, std::int64_t dim) noexcept {
  for (std::int64_t d = 0; d < dim; ++d) to[d] = from_f32<T>(from[d]);
}

/// Heads [first, first + kept) of the gathered LSEs, combined.
void write_lse(const DcpCombineArgs& a, const Shape& s, const float* gathered, std::int64_t first) {
  if (!a.combined_lse.defined()) return;
  for (std::int64_t t = 0; t < s.tokens; ++t) {
    for (std::int64_t h = 0; h < a.combined_lse.shape[1]; ++h) {
      const RowLses lses(gathered + t * s.heads + first + h, s.tokens * s.heads, s.ranks,
                         a.lse_base);
      *row(a.combined_lse, t, h, float{}) = lses.combined();
    }
  }
}

/// Both functions that gather the LSEs and sum weighed outputs: scattered over heads, or not.
template <typename T>
void gather_and_reduce(const DcpCombineArgs& a, const Shape& s, Communicator& comm, bool scatter) {
  const float* gathered = gather_lse(a, s, comm);
  Scratch& scratch = thread_scratch();
  const std::int64_t kept = scatter ? s.heads_a_rank() : s.heads;
  const TensorView send = reserve(scratch.out_send, DType::f32, {s.tokens * s.heads, s.dim});
  const TensorView recv = reserve(scratch.out_recv, DType::f32, {s.tokens, kept, s.dim});
  for_each_row_by_rank(s, [&](std::int64_t t, std::int64_t h, std::int64_t position) {
    const RowLses lses(gathered + t * s.heads + h, s.tokens * s.heads, s.ranks, a.lse_base);
    const float weight = lses.weight(comm.rank());
    const T* from = row(a.out, t, h, T{});
    // What is scattered is ordered by rank, what is not by token.
    float* to = send.as<float>() + (scatter ? position : t * s.heads + h) * s.dim;
    for (std::int64_t d = 0; d < s.dim; ++d) to[d] = weighed(weight, from[d]);
  });
  if (scatter) {
    comm.reduce_scatter(send, recv);
  } else {
    comm.all_reduce(send, recv);
  }
  for (std::int64_t t = 0; t < s.tokens; ++t) {
    for (std::int64_t h = 0; h < kept; ++h) {
      write_row(row(a.combined, t, h, T{}), row(recv, t, h, float{}), s.dim);
    }
  }
  write_lse(a, s, gathered, scatter ? comm.rank() * kept : 0);
}

/// Sums what the ranks sent for this rank's heads, [N, T, H / N, D] with LSEs [N, T, H / N].
template <typename T>
void reduce_received(const DcpCombineArgs& a, const Shape& s, const T* outs, const float* lses) {
  const std::int64_t heads = s.heads_a_rank();
  const std::int64_t rows = s.tokens * heads;
  std::vector<float> sum(static_cast<std::size_t>(s.dim));
  for (std::int64_t i = 0; i < rows; ++i) {
    const RowLses row_lses(lses + i, rows, s.ranks, a.lse_base);
    for (std::int64_t r = 0; r < s.ranks; ++r) {
      const float weight = row_lses.weight(r);
      const T* from = outs + (r * rows + i) * s.dim;
      for (std::int64_t d = 0; d < s.dim; ++d) {
        float& total = sum[static_cast<std::size_t>(d)];
        // As a reduction does it: the first value is taken, not added to 0.
        total = r == 0 ? weighed(weight, from[d]) : total + weighed(weight, from[d]);
      }
    }
    write_row(row(a.combined, i / heads, i % heads, T{}), sum.data(), s.dim);
    if (a.combined_lse.defined()) {
      *row(a.combined_lse, i / heads, i % heads, float{}) = row_lses.combined();
    }
  }
}

template <typename T>
void exchange_and_reduce(const DcpCombineArgs& a, const Shape& s, Communicator& comm) {
  Scratch& scratch = thread_scratch();
  const std::int64_t rows = s.tokens * s.heads;
  const TensorView lse_send = reserve(scratch.lse_send, DType::f32, {rows});
  const TensorView lse_recv = reserve(scratch.lse_recv, DType::f32, {rows});
  const TensorView out_send = reserve(scratch.out_send, a.out.dtype, {rows, s.dim});
  const TensorView out_recv = reserve(scratch.out_recv, a.out.dtype, {rows, s.dim});
  for_each_row_by_rank(s, [&](std::int64_t t, std::int64_t h, std::int64_t position) {
    lse_send.as<float>()[position] = *row(a.lse, t, h, float{});
    std::copy_n(row(a.out, t, h, T{}), s.dim, out_send.as<T>() + position * s.dim);
  });
  comm.all_to_all(lse_send, lse_recv);
  comm.all_to_all(out_send, out_recv);
  reduce_received(a, s, out_recv.as<T>(), lse_recv.as<float>());
}

/// Calls `run(T{})` with the element type of the output.
template <typename Run>
void with_type(DType dtype, Run&& run) {
  if (dtype == DType::f32) return run(float{});
  if (dtype == DType::f16) return run(f16{});
  run(bf16{});
}

}  // namespace

void cp_lse_ag_out_rs(const DcpCombineArgs& a, Communicator& comm) {
  const Shape s = checked_shape("cp_lse_ag_out_rs", a, comm, true);
  with_type(a.out.dtype, [&](auto type) { gather_and_reduce<decltype(type)>(a, s, comm, true); });
}

void cp_lse_ag_out_ar(const DcpCombineArgs& a, Communicator& comm) {
  const Shape s = checked_shape("cp_lse_ag_out_ar", a, comm, false);
  with_type(a.out.dtype, [&](auto type) { gather_and_reduce<decltype(type)>(a, s, comm, false); });
}

void dcp_a2a_lse_reduce(const DcpCombineArgs& a, Communicator& comm) {
  const Shape s = checked_shape("dcp_a2a_lse_reduce", a, comm, true);
  with_type(a.out.dtype, [&](auto type) { exchange_and_reduce<decltype(type)>(a, s, comm); });
}

}  // namespace attend
