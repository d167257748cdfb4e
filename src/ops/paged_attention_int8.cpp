// SPDX-License-Identifier: Apache-2.0
#include <vector>

#include "attend/ops/int8_attention.h"
#include "attend/ops/int8_cache.h"
#include "core/check.h"
#include "ops/attention_problem.h"
#include "ops/int8_attention_problem.h"
#include "ops/int8_rows.h"

namespace attend {
namespace {

/// The same problem for the op that does not save.
FlashAttnVarlenInt8Args attention_args(const PagedAttentionInt8Args& a) {
  FlashAttnVarlenInt8Args v;
  v.q = a.q;
  v.q_scale = a.q_scale.permute({1, 0});
  v.k = a.key_cache;
  v.k_scale = a.key_scale_cache;
  v.v = a.value_cache;
  v.v_scale = a.v_scale;
  v.k_mean = a.k_mean;
  v.out = a.out;
  v.lse = a.lse;
  v.query_start_loc = a.query_start_loc;
  v.seq_lens = a.seq_lens;
  v.block_table = a.block_table;
  v.params = a.params;
  return v;
}

/// Whether there are rows to save. @throws InvalidArgument for one or two of the three tensors.
bool saves(std::string_view op, const PagedAttentionInt8Args& a) {
  const bool all = a.save_key.defined() && a.save_value.defined() && a.save_key_scale.defined();
  const bool any = a.save_key.defined() || a.save_value.defined() || a.save_key_scale.defined();
  check::require(all == any, {op, "save_key"},
                 "save_key, save_value and save_key_scale together or none", "some of them");
  return all;
}

/// Slot of every new row. @pre the plan and the block table have been checked.
std::vector<std::int64_t> save_slots(std::string_view op, const PagedAttentionInt8Args& a,
                                     const AttentionPlan& plan) {
  const std::int64_t block_size = a.key_cache.shape[2];
  std::vector<std::int64_t> slots;
  slots.reserve(static_cast<std::size_t>(plan.num_tokens()));
  for (std::size_t r = 0; r < plan.seq_lens.size(); ++r) {
    const std::int64_t seq_len = plan.seq_lens[r];
    const std::int64_t query_len = plan.query_start_loc[r + 1] - plan.query_start_loc[r];
    check::require(
        seq_len >= query_len, {op, "seq_lens"},
        [&] { return fmt::format("at least {} at index {}: the new keys count", query_len, r); },
        seq_len);
    const std::int32_t* table =
        a.block_table.as<std::int32_t>() + static_cast<std::int64_t>(r) * a.block_table.strides[0];
    for (std::int64_t position = seq_len - query_len; position < seq_len; ++position)
      slots.push_back(table[position / block_size] * block_size + position % block_size);
  }
  return slots;
}

void run(std::string_view op, const PagedAttentionInt8Args& a, bool int8_values, Executor* executor,
         std::optional<IsaLevel> isa) {
  Executor& run_on = executor != nullptr ? *executor : default_executor();
  check::tensor({op, "q_scale"}, a.q_scale, 2, {DType::f32});
  check::require((a.value_cache.dtype == DType::i8) == int8_values, {op, "value_cache"},
                 int8_values ? "i8" : "f16 or bf16", to_string(a.value_cache.dtype));
  const FlashAttnVarlenInt8Args args = attention_args(a);
  ops::check_int8_tensors(op, args);
  const AttentionPlan plan = ops::plan_int8(op, args, run_on.num_workers(), isa);
  const Workspace workspace = ops::thread_workspace(plan.workspace_bytes);
  ops::check_int8_planned(op, args, plan, workspace, run_on);
  if (saves(op, a)) {
    const std::vector<std::int64_t> slots = save_slots(op, a, plan);
    const ConstTensorView slot_mapping(slots.data(), DType::i64,
                                       {static_cast<std::int64_t>(slots.size())});
    const ops::Int8Rows rows = ops::check_int8_rows(
        {.op = op, .key = "save_key", .value = "save_value", .k_scale = "save_key_scale"},
        {a.save_key, a.save_value, a.save_key_scale, a.key_cache, a.value_cache, a.key_scale_cache,
         slot_mapping},
        int8_values);
    for (const auto& [name, t] : {std::pair{"save_key", a.save_key},
                                  {"save_value", a.save_value},
                                  {"save_key_scale", a.save_key_scale}}) {
      check::no_overlap({op, "out"}, a.out, name, t);
      if (a.lse.defined()) check::no_overlap({op, "lse"}, a.lse, name, t);
    }
    cache_rows::copy(rows.targets, rows.slots, &run_on);
  }
  ops::run_plan(ops::int8_problem(args, plan), plan, workspace, run_on);
}

}  // namespace

void paged_attention_int8(const PagedAttentionInt8Args& args, Executor* executor,
                          std::optional<IsaLevel> isa) {
  run("paged_attention_int8", args, true, executor, isa);
}

void paged_attention_mix(const PagedAttentionInt8Args& args, Executor* executor,
                         std::optional<IsaLevel> isa) {
  run("paged_attention_mix", args, false, executor, isa);
}

}  // namespace attend
