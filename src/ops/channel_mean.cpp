// SPDX-License-Identifier: Apache-2.0
#include <vector>

#include "attend/ops/quant.h"
#include "core/check.h"
#include "ops/int8_encode.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "channel_mean";

void validate(const ChannelMeanArgs& a) {
  check::tensor({kOp, "input"}, a.input, 3, {DType::f32, DType::f16, DType::bf16});
  check::unit_last_stride({kOp, "input"}, a.input);
  const check::Where where{kOp, "start_loc"};
  const auto starts = check::i32_array(where, a.start_loc, -1);
  check::require(
      !starts.empty() && starts.front() == 0 && starts.back() == a.input.shape[0], where,
      [&] { return fmt::format("0 first and {} last", a.input.shape[0]); },
      [&] {
        return starts.empty() ? std::string("no entries")
                              : fmt::format("{} and {}", starts.front(), starts.back());
      });
  for (std::size_t r = 1; r < starts.size(); ++r)
    check::require(starts[r] >= starts[r - 1], where, "no decrease", [&] {
      return fmt::format("{} then {} at index {}", starts[r - 1], starts[r], r);
    });
  check::tensor({kOp, "mean"}, a.mean, 3, {DType::f32});
  check::shape({kOp, "mean"}, a.mean,
               {static_cast<std::int64_t>(starts.size()) - 1, a.input.shape[1], a.input.shape[2]});
  check::contiguous({kOp, "mean"}, a.mean);
  check::no_overlap({kOp, "mean"}, a.mean, "input", a.input);
  check::no_overlap({kOp, "mean"}, a.mean, "start_loc", a.start_loc);
}

/// Heads of requests: unit = request * H + head.
template <typename T>
void mean_of(const ChannelMeanArgs& a, std::int64_t unit, std::vector<double>& sum) {
  const std::int64_t heads = a.input.shape[1], dim = a.input.shape[2];
  const std::int64_t request = unit / heads, head = unit % heads;
  const std::int32_t* starts = a.start_loc.as<std::int32_t>();
  const std::int64_t begin = starts[request], end = starts[request + 1];
  sum.assign(static_cast<std::size_t>(dim), 0.0);
  for (std::int64_t t = begin; t < end; ++t) {
    const T* row = a.input.as<T>() + t * a.input.strides[0] + head * a.input.strides[1];
    for (std::int64_t d = 0; d < dim; ++d)
      sum[static_cast<std::size_t>(d)] += static_cast<double>(to_f32(row[d]));
  }
  float* mean = a.mean.as<float>() + unit * dim;
  const double count = begin < end ? static_cast<double>(end - begin) : 1.0;
  for (std::int64_t d = 0; d < dim; ++d)
    mean[d] = static_cast<float>(sum[static_cast<std::size_t>(d)] / count);
}

}  // namespace

void channel_mean(const ChannelMeanArgs& a, Executor* executor) {
  validate(a);
  const std::int64_t units = a.mean.shape[0] * a.mean.shape[1];
  Executor& workers = executor != nullptr ? *executor : default_executor();
  const std::int64_t parts = workers.num_workers();
  int8::with_type(a.input.dtype, [&]<typename T>(T) {
    workers.run([&](int worker) {
      std::vector<double> sum;
      for (std::int64_t i = units * worker / parts; i < units * (worker + 1) / parts; ++i)
        mean_of<T>(a, i, sum);
    });
  });
}

}  // namespace attend
