// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "attend/ops/differential.h"
#include "attend/plan/kernel_choice.h"
#include "core/check.h"
#include "ops/differential_checks.h"
#include "ops/isa_choice.h"

namespace attend {
namespace {

constexpr std::string_view kOp = "differential_combine";

// Combining alone for as long as waking the workers takes.
constexpr std::int64_t kParallelElements = 64 << 10;

ops::PairShape check_maps(const DifferentialCombineArgs& a) {
  const check::Where where{kOp, "maps"};
  check::tensor(where, a.maps, 3, {DType::f32, DType::f16, DType::bf16});
  check::unit_last_stride(where, a.maps);
  const std::int64_t width = a.maps.shape[2];
  const int branches = a.variant == DifferentialVariant::v1 ? 2 : 1;
  check::require(
      width > 0 && width % (8 * branches) == 0 && width <= branches * kMaxDifferentialHeadDim,
      where,
      [&] {
        return fmt::format("a last dimension that is a multiple of {} in [{}, {}]", 8 * branches,
                           8 * branches, branches * kMaxDifferentialHeadDim);
      },
      width);
  const ops::PairShape shape{a.variant, a.pairing, a.maps.shape[0], a.maps.shape[1],
                             width / branches};
  check::require(shape.heads > 0 && shape.heads % 2 == 0 && shape.heads <= 1 << 20, where,
                 "an even number of heads, which are pairs", shape.heads);
  return shape;
}

}  // namespace

void differential_combine(const DifferentialCombineArgs& a, Executor* executor,
                          const KernelOptions& kernels) {
  const ops::PairShape shape = check_maps(a);
  ops::check_pairing(kOp, shape);
  ops::check_combine(kOp, shape, a.combine);
  check::tensor({kOp, "out"}, a.out, 3, {DType::f32, DType::f16, DType::bf16});
  ops::check_combined(kOp, shape, a.combine, a.out);
  check::no_overlap({kOp, "out"}, a.out, "maps", a.maps);
  const IsaLevel level = ops::checked_level(kOp, kernels.isa);

  constexpr static std::int32_t kOneRequest[] = {0, 0};
  cpu::AttentionProblem p;
  ops::place_pairs(p, shape, a.combine);
  p.group_size = static_cast<int>(shape.heads);
  p.query_start_loc = kOneRequest;
  p.q = a.maps.data;
  p.q_dtype = a.maps.dtype;
  p.q_layout = {true, 0, a.maps.strides[0], a.maps.strides[1]};
  p.out = a.out.data;
  p.out_dtype = a.out.dtype;
  p.out_layout = {true, 0, a.out.strides[0], a.out.strides[1]};
  const cpu::CombineMapsFn combine = cpu::combine_maps_of(level);
  const std::int64_t tokens = shape.tokens;
  if (tokens * shape.heads * shape.width() < kParallelElements) {
    combine(p, 0, static_cast<int>(tokens));
    return;
  }
  Executor& workers = executor != nullptr ? *executor : default_executor();
  const std::int64_t n = workers.num_workers();
  workers.run([&](int worker) {
    combine(p, static_cast<int>(tokens * worker / n), static_cast<int>(tokens * (worker + 1) / n));
  });
}

}  // namespace attend
