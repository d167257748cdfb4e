// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/merge.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "attend/core/float_types.h"
#include "core/check.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "merge_attn_states";
constexpr std::int64_t kParallelBytes = 256 << 10;
constexpr double kEmpty = -std::numeric_limits<double>::infinity();

void require_written(std::string_view name, const TensorView& written,
                     const MergeAttnStatesArgs& a) {
  struct Input {
    std::string_view name;
    const ConstTensorView* view;
  };
  for (const Input& in : {Input{"prefix_out", &a.prefix_out}, Input{"prefix_lse", &a.prefix_lse},
                          Input{"suffix_out", &a.suffix_out}, Input{"suffix_lse", &a.suffix_lse}}) {
    // Element by element in place is fine: each element is read before it is written.
    if (!check::same_view(written, *in.view)) {
      check::no_overlap({kOp, name}, written, in.name, *in.view);
    }
  }
}

void validate(const MergeAttnStatesArgs& a) {
  check::tensor({kOp, "out"}, a.out, 3, {DType::f32, DType::f16, DType::bf16});
  check::unit_last_stride({kOp, "out"}, a.out);
  check::distinct_elements({kOp, "out"}, a.out);
  const std::int64_t tokens = a.out.shape[0];
  const std::int64_t heads = a.out.shape[1];
  const auto require_out = [&](std::string_view name, const ConstTensorView& t) {
    check::tensor({kOp, name}, t, 3, {a.out.dtype});
    check::shape({kOp, name}, t, {tokens, heads, a.out.shape[2]});
    check::unit_last_stride({kOp, name}, t);
  };
  const auto require_lse = [&](std::string_view name, const ConstTensorView& t) {
    check::tensor({kOp, name}, t, 2, {DType::f32});
    check::shape({kOp, name}, t, {tokens, heads});
  };
  require_out("prefix_out", a.prefix_out);
  require_lse("prefix_lse", a.prefix_lse);
  require_out("suffix_out", a.suffix_out);
  require_lse("suffix_lse", a.suffix_lse);
  check::require(
      a.prefill_tokens_with_context >= -1 && a.prefill_tokens_with_context <= tokens,
      {kOp, "prefill_tokens_with_context"},
      [&] { return fmt::format("a number from 0 to {} tokens, or -1 for all", tokens); },
      a.prefill_tokens_with_context);
  require_written("out", a.out, a);
  if (a.lse.defined()) {
    require_lse("lse", a.lse);
    check::distinct_elements({kOp, "lse"}, a.lse);
    require_written("lse", a.lse, a);
    check::no_overlap({kOp, "lse"}, a.lse, "out", a.out);
  }
}

struct Weights {
  float prefix = 0.0F;
  float suffix = 0.0F;
  float lse = -std::numeric_limits<float>::infinity();
};

// In double, since it is one computation for a whole row of elements.
Weights merge_weights(double prefix_lse, double suffix_lse) noexcept {
  const double p = std::isfinite(prefix_lse) ? prefix_lse : kEmpty;
  const double s = std::isfinite(suffix_lse) ? suffix_lse : kEmpty;
  const double largest = std::max(p, s);
  if (largest == kEmpty) return {};
  const double a = std::exp(p - largest);
  const double b = std::exp(s - largest);
  return {static_cast<float>(a / (a + b)), static_cast<float>(b / (a + b)),
          static_cast<float>(largest + std::log(a + b))};
}

// A side of weight 0 is not read: its row may hold NaN.
template <typename T>
void merge_row(T* out, const T* prefix, const T* suffix, const Weights& w,
               std::int64_t dim) noexcept {
  if (w.prefix == 0.0F && w.suffix == 0.0F) {
    for (std::int64_t d = 0; d < dim; ++d) out[d] = T{};
  } else if (w.prefix == 0.0F) {
    for (std::int64_t d = 0; d < dim; ++d) out[d] = suffix[d];
  } else if (w.suffix == 0.0F) {
    for (std::int64_t d = 0; d < dim; ++d) out[d] = prefix[d];
  } else {
    for (std::int64_t d = 0; d < dim; ++d) {
      out[d] = from_f32<T>(w.prefix * to_f32(prefix[d]) + w.suffix * to_f32(suffix[d]));
    }
  }
}

// Rows are numbered token by token, head by head.
template <typename T>
void merge_rows(const MergeAttnStatesArgs& a, std::int64_t begin, std::int64_t end) noexcept {
  const std::int64_t heads = a.out.shape[1];
  const std::int64_t with_prefix =
      a.prefill_tokens_with_context < 0 ? a.out.shape[0] : a.prefill_tokens_with_context;
  const auto row = [](const auto& t, std::int64_t token, std::int64_t head) {
    return t.template as<T>() + token * t.strides[0] + head * t.strides[1];
  };
  const auto lse = [](const auto& t, std::int64_t token, std::int64_t head) {
    return t.template as<float>() + token * t.strides[0] + head * t.strides[1];
  };
  for (std::int64_t i = begin; i < end; ++i) {
    const std::int64_t t = i / heads;
    const std::int64_t h = i % heads;
    const double prefix_lse = t < with_prefix ? *lse(a.prefix_lse, t, h) : kEmpty;
    const Weights w = merge_weights(prefix_lse, *lse(a.suffix_lse, t, h));
    merge_row(row(a.out, t, h), row(a.prefix_out, t, h), row(a.suffix_out, t, h), w,
              a.out.shape[2]);
    if (a.lse.defined()) *lse(a.lse, t, h) = w.lse;
  }
}

using MergeRows = void (*)(const MergeAttnStatesArgs&, std::int64_t, std::int64_t) noexcept;

MergeRows merge_rows_for(DType dtype) noexcept {
  if (dtype == DType::f16) return merge_rows<f16>;
  if (dtype == DType::bf16) return merge_rows<bf16>;
  return merge_rows<float>;
}

}  // namespace

void merge_attn_states(const MergeAttnStatesArgs& a, Executor* executor) {
  validate(a);
  const MergeRows merge = merge_rows_for(a.out.dtype);
  const std::int64_t rows = a.out.shape[0] * a.out.shape[1];
  const std::int64_t bytes = a.out.numel() * static_cast<std::int64_t>(size_of(a.out.dtype));
  if (bytes < kParallelBytes) {
    merge(a, 0, rows);
    return;
  }
  // A row is computed alone, so that its bits do not depend on how the rows are shared out.
  Executor& workers = executor != nullptr ? *executor : default_executor();
  const std::int64_t n = workers.num_workers();
  workers.run([&](int worker) { merge(a, rows * worker / n, rows * (worker + 1) / n); });
}

}  // namespace attend
