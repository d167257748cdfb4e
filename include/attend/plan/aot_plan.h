// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>

#include "attend/plan/attention_plan.h"

namespace attend {

/// What a plan made ahead of time has room for.
struct AotLimits {
  int max_reqs = 0;     ///< >= 1
  int max_tokens = 0;   ///< query tokens of a batch, >= 1
  int max_seq_len = 0;  ///< keys of a request, >= 1
};

/// A plan whose buffers have fixed sizes and addresses, made before the lengths of the batches are
/// known and made again, in place, for each of them: what a captured graph needs. Neither update()
/// nor a call of an op with plan() allocates. Plans of the same batch from here and from
/// plan_attention() give the same bits. Shared prefixes are not supported.
class AotPlan {
 public:
  /// Heads, head sizes, windows, level, arithmetic, num_workers and max_num_splits come from
  /// `shape`; its lengths are not looked at. @throws InvalidArgument, Unsupported as
  /// plan_attention().
  AotPlan(const AttentionPlanInput& shape, const AotLimits& limits);
  ~AotPlan();
  AotPlan(const AotPlan&) = delete;
  AotPlan& operator=(const AotPlan&) = delete;

  /// Plans a batch. @throws InvalidArgument, and leaves the plan as it was, if the batch is larger
  /// than the limits, has shared prefixes or is not of the shape of the constructor.
  void update(const AttentionPlanInput& batch);

  /// The plan of the last batch; empty before the first. workspace_bytes and the data() of its
  /// vectors never change. `units` and `reductions` always have the same size: behind those of the
  /// batch there are zeros, so that nothing is left of an earlier batch.
  const AttentionPlan& plan() const noexcept { return plan_; }
  const AotLimits& limits() const noexcept { return limits_; }

 private:
  struct Scratch;

  AttentionPlan plan_;
  AotLimits limits_;
  std::unique_ptr<Scratch> scratch_;
};

}  // namespace attend
