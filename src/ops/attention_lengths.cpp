// SPDX-License-Identifier: Apache-2.0
#include "ops/attention_lengths.h"

#include <span>

#include "core/check.h"

namespace attend::ops {

void plan_lengths(std::string_view op, const Lengths& a, AttentionPlanInput& in,
                  std::vector<std::int32_t>& storage) {
  const bool paged = a.block_table.defined();
  const bool both = a.cu_seqlens_kv.defined() && a.seq_lens.defined();
  check::require(!both && (a.cu_seqlens_kv.defined() || a.seq_lens.defined()),
                 {op, "cu_seqlens_kv"}, "exactly one of cu_seqlens_kv and seq_lens",
                 both ? "both" : "neither");
  check::require(a.seq_lens.defined() == paged, {op, "block_table"},
                 "seq_lens and block_table together (paged) or neither (ragged)",
                 paged ? "block_table without seq_lens" : "seq_lens without block_table");
  in.op = op.data();
  in.query_start_loc = check::i32_array({op, "query_start_loc"}, a.query_start_loc, -1);
  const auto num_reqs = static_cast<std::int64_t>(in.query_start_loc.size()) - 1;
  if (a.seq_lens.defined()) {
    in.seq_lens = check::i32_array({op, "seq_lens"}, a.seq_lens, num_reqs);
    return;
  }
  const auto starts = check::i32_array({op, "cu_seqlens_kv"}, a.cu_seqlens_kv, num_reqs + 1);
  for (std::size_t r = 0; r + 1 < starts.size(); ++r) {
    check::require(starts[r + 1] >= starts[r] && starts[0] == 0, {op, "cu_seqlens_kv"},
                   "0 at index 0 and no decrease", [&] {
                     return fmt::format("{} then {} at index {}", starts[r], starts[r + 1], r + 1);
                   });
    storage.push_back(starts[r + 1] - starts[r]);
  }
  in.seq_lens = storage;
}

void plan_options(const AttentionParams& params, int num_workers, const KernelOptions& kernels,
                  AttentionPlanInput& in) {
  in.causal = params.causal;
  in.window_left = params.window_left;
  in.window_right = params.window_right;
  in.num_workers = num_workers;
  in.isa = kernels.isa;
  in.arithmetic = kernels.arithmetic;
}

void check_ragged(std::string_view op, const ConstTensorView& cu_seqlens_kv, std::int64_t rows,
                  const AttentionPlan& plan) {
  const check::Where where{op, "cu_seqlens_kv"};
  std::span<const std::int32_t> starts(plan.key_start_loc);
  if (cu_seqlens_kv.defined()) {
    starts = check::i32_array(where, cu_seqlens_kv, plan.num_reqs() + 1);
    for (std::size_t r = 0; r + 1 < starts.size(); ++r) {
      check::require(
          starts[r + 1] - starts[r] == plan.seq_lens[r], where,
          [&] { return fmt::format("{} keys for request {}, as planned", plan.seq_lens[r], r); },
          starts[r + 1] - starts[r]);
    }
    check::require(starts.empty() || starts[0] == 0, where, "0 at index 0", starts[0]);
  }
  check::require(
      starts.back() <= rows, where,
      [&] { return fmt::format("at most {} keys in all, the rows of k", rows); }, starts.back());
}

cpu::KvStrides kv_strides(const ConstTensorView& t, bool paged) {
  if (!t.defined()) return {};
  return paged ? cpu::KvStrides{t.strides[0], t.strides[1], t.strides[2]}
               : cpu::KvStrides{0, t.strides[0], t.strides[1]};
}

}  // namespace attend::ops
