// SPDX-License-Identifier: Apache-2.0
// flash_attn_varlen, also with int8 queries and keys, and a plan that attends to shared prefixes
// once: right, and the bits of a plan without them.
#include <fmt/format.h>

#include <cstring>

#include "attend/ops/attention.h"
#include "attend/ops/int8_attention.h"
#include "attend/oracle/attention.h"
#include "attend/plan/attention_plan.h"
#include "conformance/check.h"
#include "conformance/int8_problem.h"
#include "conformance/shared_prefixes.h"
#include "conformance/varlen_problem.h"

namespace attend::conformance {
namespace {

VarlenOptions paged_options(Rng& rng) {
  VarlenOptions o = random_varlen_options(rng);
  o.kv = rng.pick({KvStorage::paged_nhd, KvStorage::paged_hnd});
  o.share_prefixes = true;
  return o;
}

std::vector<std::byte> bytes_of(const Storage& s) {
  std::vector<std::byte> bytes;
  if (!s.view().defined()) return bytes;
  for (const std::int64_t offset : s.offsets()) {
    const auto* at =
        s.view().as<std::byte>() + static_cast<std::size_t>(offset) * size_of(s.view().dtype);
    bytes.insert(bytes.end(), at, at + size_of(s.view().dtype));
  }
  return bytes;
}

oracle::Result expected_of(const VarlenProblem& p) { return oracle::flash_attn_varlen(p.args()); }
oracle::Result expected_of(const Int8Problem& p) {
  return oracle::flash_attn_varlen_int8(p.args());
}

void attend_to(const VarlenProblem& p, const AttentionPlan& plan, Workspace ws, Executor& e) {
  flash_attn_varlen(p.args(), plan, ws, e);
}
void attend_to(const Int8Problem& p, const AttentionPlan& plan, Workspace ws, Executor& e) {
  flash_attn_varlen_int8(p.args(), plan, ws, e);
}

std::optional<KernelKind> kind_of(const VarlenProblem& p) { return p.kind(); }
std::optional<KernelKind> kind_of(const Int8Problem&) { return std::nullopt; }

template <typename Problem, typename Options>
class SharedCase final : public Case {
 public:
  SharedCase(Rng& rng, const Options& options)
      : problem_(rng, random_shared_shape(rng), options),
        planned_workers_(rng.pick({1, 2, 3, 16})),
        expected_(expected_of(problem_)) {}

  Outcome run(const KernelOptions& kernels, Executor& /*executor*/) override {
    run_plan(kernels, {});
    const std::vector<std::byte> out = bytes_of(problem_.out);
    const std::vector<std::byte> lse = bytes_of(problem_.lse);
    run_plan(kernels, problem_.shared_prefixes);
    Outcome outcome;
    if (bytes_of(problem_.out) != out) outcome.fail("out has other bits than without sharing");
    if (bytes_of(problem_.lse) != lse) outcome.fail("lse has other bits than without sharing");
    compare_written(outcome, "out", problem_.out, expected_.out, expected_.out_bound);
    if (problem_.options.lse) {
      compare_written(outcome, "lse", problem_.lse, expected_.lse, expected_.lse_bound);
    }
    return outcome;
  }

  std::optional<KernelKind> kind() const override { return kind_of(problem_); }

  std::string describe() const override {
    std::string text = problem_.describe() + " shared";
    for (const SharedPrefix& p : problem_.shared_prefixes)
      text += fmt::format(" [{},{})x{}", p.request_begin, p.request_end, p.num_keys);
    return text + fmt::format(" workers {}", planned_workers_);
  }

 private:
  void run_plan(const KernelOptions& kernels, std::span<const SharedPrefix> prefixes) {
    problem_.reset();
    const AttentionShape& s = problem_.shape;
    const std::vector<std::int32_t> query_start_loc = s.query_start_loc();
    AttentionPlanInput input;
    input.query_start_loc = query_start_loc;
    input.seq_lens = s.seq_lens;
    input.num_q_heads = s.q_heads();
    input.num_kv_heads = s.kv_heads;
    input.head_dim_qk = s.head_dim;
    input.head_dim_v = s.head_dim_v;
    input.causal = s.causal;
    input.window_left = s.window_left;
    input.window_right = s.window_right;
    input.num_workers = planned_workers_;
    input.isa = kernels.isa;
    input.arithmetic = kernels.arithmetic;
    input.shared_prefixes = prefixes;
    const AttentionPlan plan = plan_attention(input);
    Buffer workspace(plan.workspace_bytes);
    if (workspace.size() > 0) std::memset(workspace.data(), 0xff, workspace.size());
    const std::unique_ptr<Executor> workers = make_thread_pool(planned_workers_);
    attend_to(problem_, plan, workspace.workspace(), *workers);
  }

  Problem problem_;
  int planned_workers_;  ///< more of them cut the work into more units
  oracle::Result expected_;
};

std::unique_ptr<Case> make_case(Rng& rng) {
  if (rng.chance(0.3)) {
    Int8Options options = random_int8_options(rng);
    options.share_prefixes = true;
    return std::make_unique<SharedCase<Int8Problem, Int8Options>>(rng, options);
  }
  return std::make_unique<SharedCase<VarlenProblem, VarlenOptions>>(rng, paged_options(rng));
}

}  // namespace

Op op_shared_prefixes() { return {"shared_prefixes", true, make_case, true}; }

}  // namespace attend::conformance
