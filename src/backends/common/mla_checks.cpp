// SPDX-License-Identifier: Apache-2.0
#include "backends/common/mla_checks.h"

#include <fmt/format.h>

#include <array>
#include <cmath>
#include <tuple>

#include "attend/cache/fp8_ds_mla.h"
#include "attend/plan/attention_plan.h"
#include "core/check.h"

namespace attend {

void check_mla_dims(std::string_view op, const MlaDims& d, int num_heads, int num_kv_heads,
                    int head_size) {
  constexpr int kMostPrefillDim = 256;
  const auto dim = [&](std::string_view name, int value, int most) {
    check::require(
        value >= 8 && value % 8 == 0 && value <= most, {op, name},
        [&] { return fmt::format("a multiple of 8 in [8, {}]", most); }, value);
  };
  dim("kv_lora_rank", d.kv_lora_rank, kMaxHeadDimV);
  dim("qk_nope_head_dim", d.qk_nope_head_dim, kMostPrefillDim);
  dim("qk_rope_head_dim", d.qk_rope_head_dim, kMostPrefillDim);
  dim("qk_nope_head_dim + qk_rope_head_dim", d.qk_head_dim(), kMostPrefillDim);
  dim("v_head_dim", d.v_head_dim, kMostPrefillDim);
  dim("kv_lora_rank + qk_rope_head_dim", d.cache_dim(), kMaxHeadDimQk);
  check::require(num_heads >= 1, {op, "num_q_heads"}, "a number >= 1", num_heads);
  check::require(num_kv_heads == 1, {op, "num_kv_heads"}, "1: a row is the key of all heads",
                 num_kv_heads);
  check::require(
      head_size == d.cache_dim(), {op, "head_size"},
      [&] { return fmt::format("{}, kv_lora_rank and qk_rope_head_dim together", d.cache_dim()); },
      head_size);
}

void check_mla_format(std::string_view op, const MlaDims& d, KvFormat format) {
  if (format != KvFormat::fp8_ds_mla) return;
  const auto held = [&](std::string_view name, int value, int size) {
    check::require(
        value == size, {op, name}, [&] { return fmt::format("{}, as fp8_ds_mla rows have", size); },
        value);
  };
  held("kv_lora_rank", d.kv_lora_rank, fp8_ds_mla::kLatent);
  held("qk_rope_head_dim", d.qk_rope_head_dim, fp8_ds_mla::kRope);
}

void check_mla_unused(std::string_view op, const ImplConfig& c) {
  const auto at = [&](std::string_view argument) { return check::Where{op, argument}; };
  check::require(c.softcap == 0.0F, at("softcap"), "0", c.softcap);
  check::require(!c.sliding_window, at("sliding_window"), "unset", "a window");
  check::require(c.alibi_slopes.empty(), at("alibi_slopes"), "none", c.alibi_slopes.size());
  check::require(c.sinks.empty(), at("sinks"), "none", c.sinks.size());
  check::require(c.v_scale.empty(), at("v_scale"), "none: values are parts of the keys",
                 c.v_scale.size());
  check::require(c.value_scales.empty(), at("value_scales"), "none", c.value_scales.size());
  check::require(!c.shares_kv_cache, at("shares_kv_cache"), "false", "true");
  check::require(c.attn_type == AttentionType::decoder, at("attn_type"), "decoder",
                 to_string(c.attn_type));
}

void check_mla_rows(std::string_view op, std::string_view argument, const ConstTensorView& t,
                    int num_tokens) {
  check::require(
      t.shape[0] >= num_tokens, {op, argument},
      [&] { return fmt::format("at least {} rows", num_tokens); }, [&] { return describe(t); });
}

void check_mla_inputs(const MlaCall& call, const ForwardArgs& a) {
  const auto at = [&](std::string_view argument) { return check::Where{call.op, argument}; };
  check::tensor(at("query"), a.query, 3, {call.dtype});
  check::shape(at("query"), a.query, {-1, call.num_heads, call.dims.qk_head_dim()});
  check::unit_last_stride(at("query"), a.query);
  check_mla_rows(call.op, "query", a.query, call.num_tokens);
  check::require(!a.key.defined() && !a.value.defined(), at(a.key.defined() ? "key" : "value"),
                 "undefined: MLA layers take kv_c and k_pe", "a tensor");
  check::require(a.kv_c.defined() == a.k_pe.defined(), at(a.kv_c.defined() ? "k_pe" : "kv_c"),
                 "kv_c and k_pe, or neither", "an undefined tensor");
  check::require(!a.kv_scale_cache.defined(), at("kv_scale_cache"),
                 "undefined: no MLA cache has scales beside it", "a tensor");
  if (!a.kv_c.defined()) return;
  for (const auto& [name, t, dim] :
       {std::tuple<const char*, ConstTensorView, int>{"kv_c", a.kv_c, call.dims.kv_lora_rank},
        {"k_pe", a.k_pe, call.dims.qk_rope_head_dim}}) {
    check::tensor(at(name), t, 2, {call.dtype});
    check::shape(at(name), t, {-1, dim});
    check::unit_last_stride(at(name), t);
    check_mla_rows(call.op, name, t, call.num_tokens);
  }
}

void check_mla_results(const MlaCall& call, const ForwardArgs& a) {
  const auto at = [&](std::string_view argument) { return check::Where{call.op, argument}; };
  const DType dtype = a.output_scale ? DType::fp8_e4m3 : call.dtype;
  check::tensor(at("output"), a.output, 3, {dtype});
  check::shape(at("output"), a.output, {-1, call.num_heads, call.dims.v_head_dim});
  check::unit_last_stride(at("output"), a.output);
  check::distinct_elements(at("output"), a.output);
  if (a.output_scale)
    check::require(std::isfinite(*a.output_scale) && *a.output_scale > 0.0F, at("output_scale"),
                   "a finite value > 0", *a.output_scale);
  if (!a.lse.defined()) return;
  check::tensor(at("lse"), a.lse, 2, {DType::f32});
  check::shape(at("lse"), a.lse, {a.output.shape[0], call.num_heads});
  check::distinct_elements(at("lse"), a.lse);
  check::no_overlap(at("lse"), a.lse, "output", a.output);
}

void check_mla_workspace(std::string_view op, Workspace workspace, std::size_t bytes) {
  check::require(
      workspace.size >= bytes && workspace.data != nullptr, {op, "workspace"},
      [&] { return fmt::format("at least {} bytes", bytes); },
      [&] {
        return fmt::format("{} bytes{}", workspace.size,
                           workspace.data == nullptr ? " at null" : "");
      });
}

void check_mla_cache_room(std::string_view op, const ConstTensorView& cache,
                          std::span<const std::int64_t> slots, std::string_view cache_name) {
  const std::int64_t capacity = cache.shape[0] * cache.shape[1];
  for (std::size_t i = 0; i < slots.size(); ++i) {
    check::require(
        slots[i] < capacity, {op, cache_name},
        [&] { return fmt::format("room for slot {} of row {}", slots[i], i); },
        [&] { return describe(cache); });
  }
}

void check_mla_blocks(std::string_view op, const MlaBlocks& b) {
  for (std::size_t r = 0; r < b.seq_lens.size(); ++r) {
    const std::int32_t* row =
        b.table.as<std::int32_t>() + static_cast<std::int64_t>(r) * b.table.strides[0];
    const std::int64_t blocks =
        (std::int64_t{b.seq_lens[r]} + b.tokens_of_entry - 1) / b.tokens_of_entry;
    for (std::int64_t i = 0; i < blocks; ++i) {
      if (row[i] >= 0 && row[i] < b.num_blocks) continue;
      check::fail(
          {op, "block_table"},
          [&] { return fmt::format("block ids in [0, {}) at [{}, {}]", b.num_blocks, r, i); },
          row[i]);
    }
  }
}

}  // namespace attend
