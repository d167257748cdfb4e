// SPDX-License-Identifier: Apache-2.0
// Prefill calls as calls of flash_attn_varlen. Where V is padded or the output becomes codes, the
// kernel reads and writes scratch in front of the plan's workspace:
// [padded V | rows of the output | the plan's].
#include "backends/mla/prefill/common/varlen_prefill.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "attend/ops/attention.h"
#include "backends/common/for_rows.h"
#include "backends/common/quantise_output.h"
#include "core/check.h"

namespace attend::mla_prefill {
namespace {

constexpr std::size_t kAlignment = 64;

std::size_t aligned(std::size_t bytes) noexcept {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

/// One call of either kind.
struct Call {
  std::string_view op;
  bool causal = true;
  const NewTokensArgs& args;
  const AttentionPlan& plan;
  Executor& executor;
};

/// Scratch of a call; undefined views where the kernel works on the caller's tensors.
struct Scratch {
  TensorView v;    ///< [Tk, H, head_dim_v]
  TensorView out;  ///< [T, H, head_dim_v]
  Workspace rest;  ///< for the plan
};

void zero_padded_rows(const ConstTensorView& from, const TensorView& to, Executor& executor) {
  const auto size = size_of(from.dtype);
  const auto used = static_cast<std::size_t>(from.shape[2]) * size;
  const auto row_bytes = static_cast<std::size_t>(to.shape[2]) * size;
  const std::int64_t heads = to.shape[1];
  for_rows(to.shape[0] * heads, static_cast<std::int64_t>(row_bytes), executor,
           [&](std::int64_t begin, std::int64_t end) {
             auto* row =
                 static_cast<std::byte*>(to.data) + begin * static_cast<std::int64_t>(row_bytes);
             for (std::int64_t i = begin; i < end; ++i, row += row_bytes) {
               std::memcpy(row, from.select(0, i / heads).select(0, i % heads).data, used);
               std::memset(row + used, 0, row_bytes - used);
             }
           });
}

/// Copies the columns that `to` has.
void copy_columns(const ConstTensorView& from, const TensorView& to, Executor& executor) {
  const auto bytes = static_cast<std::size_t>(to.shape[2]) * size_of(to.dtype);
  const std::int64_t heads = to.shape[1];
  for_rows(to.shape[0] * heads, static_cast<std::int64_t>(bytes), executor,
           [&](std::int64_t begin, std::int64_t end) {
             for (std::int64_t i = begin; i < end; ++i) {
               const std::int64_t t = i / heads, h = i % heads;
               std::memcpy(to.select(0, t).select(0, h).data, from.select(0, t).select(0, h).data,
                           bytes);
             }
           });
}

class VarlenPrefill final : public MlaPrefill {
 public:
  VarlenPrefill(const MlaPrefillBackend& backend, const MlaPrefillImplConfig& config)
      : config_(config),
        head_dim_v_(backend.requires_v_padding(config.platform)
                        ? std::max(config.dims.v_head_dim, config.dims.qk_head_dim())
                        : config.dims.v_head_dim),
        no_quant_output_(backend.quant_output_reason(config.platform)),
        new_tokens_op_(fmt::format("{}.run_prefill_new_tokens", backend.name())),
        context_chunk_op_(fmt::format("{}.run_prefill_context_chunk", backend.name())) {}

  int head_dim_v() const noexcept override { return head_dim_v_; }

  std::size_t workspace_bytes(std::int64_t num_tokens, std::int64_t num_keys,
                              bool quant_output) const noexcept override {
    const std::size_t v = pads() ? row_bytes(num_keys) : 0;
    const std::size_t out = pads() || quant_output ? row_bytes(num_tokens) : 0;
    // Room to align whatever address the workspace has.
    return v + out == 0 ? 0 : aligned(v) + aligned(out) + kAlignment;
  }

  void run_prefill_new_tokens(const NewTokensArgs& args) const override {
    const std::string_view op = new_tokens_op_;
    if (args.output_scale) check_quant_output(op, args);
    check::require(!args.carry.state.defined() || args.carry.last, {op, "carry"},
                   "last = true: new tokens are a request's last keys", "false");
    run({op, true, args, checked_plan(op, args.plan, true), executor_of(args.executor)});
  }

  void run_prefill_context_chunk(const ContextChunkArgs& args) const override {
    const std::string_view op = context_chunk_op_;
    if (args.carry.state.defined()) {
      check::require(!args.carry.last, {op, "carry"}, "last = false: new tokens follow", "true");
      check::require(!args.out.defined(), {op, "out"}, "undefined: there is a carry", "a tensor");
      check::require(!args.lse.defined(), {op, "lse"}, "undefined: there is a carry", "a tensor");
    } else {
      check::require(args.lse.defined(), {op, "lse"}, "a tensor, or a carry",
                     "an undefined tensor");
    }
    NewTokensArgs a;
    a.q = args.q;
    a.k = args.k;
    a.v = args.v;
    a.out = args.out;
    a.lse = args.lse;
    a.carry = args.carry;
    a.workspace = args.workspace;
    run({op, false, a, checked_plan(op, args.plan, false), executor_of(args.executor)});
  }

 private:
  bool pads() const noexcept { return head_dim_v_ > config_.dims.v_head_dim; }

  std::size_t row_bytes(std::int64_t rows) const noexcept {
    return static_cast<std::size_t>(rows) * static_cast<std::size_t>(config_.num_heads) *
           static_cast<std::size_t>(head_dim_v_) * size_of(config_.dtype);
  }

  static Executor& executor_of(Executor* executor) {
    return executor != nullptr ? *executor : default_executor();
  }

  void check_quant_output(std::string_view op, const NewTokensArgs& a) const {
    if (no_quant_output_) throw Unsupported(op, {*no_quant_output_});
    const float scale = *a.output_scale;
    check::require(std::isfinite(scale) && scale > 0.0F, {op, "output_scale"}, "a finite value > 0",
                   scale);
    if (a.carry.state.defined() || a.lse.defined()) {
      throw Unsupported(op, {"fused quantised output not supported with context: what is merged "
                             "cannot be codes"});
    }
  }

  const AttentionPlan& checked_plan(std::string_view op, const AttentionPlan* plan,
                                    bool causal) const {
    const check::Where where{op, "plan"};
    check::require(plan != nullptr, where,
                   causal ? "the plan of the new tokens" : "the plan of this chunk of context",
                   "null");
    const int heads = config_.num_heads;
    const int qk = config_.dims.qk_head_dim();
    const auto shape = [](int q_heads, int kv_heads, int size_qk, int size_v) {
      return fmt::format("{} query heads, {} kv heads, head sizes {} and {}", q_heads, kv_heads,
                         size_qk, size_v);
    };
    check::require(
        plan->num_q_heads == heads && plan->num_kv_heads == heads && plan->head_dim_qk == qk &&
            plan->head_dim_v == head_dim_v_,
        where, [&] { return shape(heads, heads, qk, head_dim_v_); },
        [&] {
          return shape(plan->num_q_heads, plan->num_kv_heads, plan->head_dim_qk, plan->head_dim_v);
        });
    check::require(
        plan->window_left < 0 && (causal || plan->window_right < 0), where, "no window",
        [&] { return fmt::format("window ({}, {})", plan->window_left, plan->window_right); });
    const auto& flags = plan->request_causal;
    const auto wrong = std::find_if(flags.begin(), flags.end(),
                                    [&](std::uint8_t flag) { return (flag != 0) != causal; });
    check::require(
        wrong == flags.end(), where, causal ? "causal requests" : "requests that are not causal",
        [&] { return fmt::format("another mask for request {}", wrong - flags.begin()); });
    return *plan;
  }

  void check_rows(check::Where where, const ConstTensorView& t, std::int64_t head_dim,
                  DType dtype) const {
    check::tensor(where, t, 3, {dtype});
    check::shape(where, t, {-1, config_.num_heads, head_dim});
    check::unit_last_stride(where, t);
  }

  /// What the op does not know, and shapes that must be known before scratch is laid out.
  void check_tensors(const Call& c) const {
    const NewTokensArgs& a = c.args;
    const int qk = config_.dims.qk_head_dim();
    check_rows({c.op, "q"}, a.q, qk, config_.dtype);
    check::shape({c.op, "q"}, a.q, {c.plan.num_tokens(), -1, -1});
    check_rows({c.op, "k"}, a.k, qk, config_.dtype);
    check_rows({c.op, "v"}, a.v, config_.dims.v_head_dim, config_.dtype);
    check::shape({c.op, "v"}, a.v, {a.k.shape[0], -1, -1});
    const std::int64_t num_keys = c.plan.key_start_loc.back();
    check::require(
        a.k.shape[0] >= num_keys, {c.op, "k"},
        [&] { return fmt::format("at least {} rows, the plan's keys", num_keys); },
        [&] { return describe(a.k); });
    if (a.carry.state.defined()) check::tensor({c.op, "carry"}, a.carry.state, 3, {DType::f32});
    if (writes_out(a)) check_out(c);
  }

  /// The op sees the scratch in its place.
  void check_out(const Call& c) const {
    const NewTokensArgs& a = c.args;
    const check::Where out{c.op, "out"}, lse{c.op, "lse"};
    check_rows(out, a.out, config_.dims.v_head_dim,
               a.output_scale ? DType::fp8_e4m3 : config_.dtype);
    check::shape(out, a.out, {a.q.shape[0], -1, -1});
    check::distinct_elements(out, a.out);
    if (a.lse.defined()) {
      check::tensor(lse, a.lse, 2, {DType::f32});
      check::shape(lse, a.lse, {a.q.shape[0], config_.num_heads});
      check::no_overlap(lse, a.lse, "v", a.v);
    }
    for (const auto& [name, t] : {std::pair<const char*, ConstTensorView>{"q", a.q},
                                  {"k", a.k},
                                  {"v", a.v},
                                  {"lse", a.lse},
                                  {"carry", a.carry.state}}) {
      if (t.defined()) check::no_overlap(out, a.out, name, t);
    }
  }

  static bool writes_out(const NewTokensArgs& a) noexcept {
    return !a.carry.state.defined() || a.carry.last;
  }

  Scratch scratch(const Call& c) const {
    const NewTokensArgs& a = c.args;
    const std::int64_t num_keys = c.plan.key_start_loc.back();
    const std::int64_t num_rows = writes_out(a) ? c.plan.num_tokens() : 0;
    const bool quant = a.output_scale.has_value();
    const std::size_t own = workspace_bytes(num_rows, num_keys, quant);
    const std::size_t needed = own + c.plan.workspace_bytes;
    check::require(
        a.workspace.size >= needed && a.workspace.data != nullptr, {c.op, "workspace"},
        [&] { return fmt::format("at least {} bytes", needed); },
        [&] {
          return fmt::format("{} bytes{}", a.workspace.size,
                             a.workspace.data == nullptr ? " at null" : "");
        });
    if (own == 0) return {{}, {}, a.workspace};
    auto* begin = static_cast<std::byte*>(a.workspace.data);
    auto* next = begin + (kAlignment - reinterpret_cast<std::uintptr_t>(begin) % kAlignment);
    const auto take = [&](std::int64_t rows) {
      TensorView t(next, config_.dtype, {rows, config_.num_heads, head_dim_v_});
      next += aligned(row_bytes(rows));
      return t;
    };
    Scratch s;
    if (pads()) s.v = take(num_keys);
    if (num_rows > 0) s.out = take(num_rows);
    s.rest = {next, a.workspace.size - static_cast<std::size_t>(next - begin)};
    return s;
  }

  void run(const Call& c) const {
    const NewTokensArgs& a = c.args;
    check_tensors(c);
    const Scratch s = scratch(c);
    if (c.plan.num_tokens() == 0) return;
    const std::int64_t num_keys = c.plan.key_start_loc.back();
    FlashAttnVarlenArgs attention;
    attention.q = a.q;
    attention.k = a.k.slice(0, 0, num_keys);
    attention.v = s.v.defined() ? ConstTensorView(s.v) : a.v.slice(0, 0, num_keys);
    attention.out = s.out.defined() ? s.out : a.out;
    attention.lse = a.lse;
    attention.carry = a.carry;
    attention.params.scale = config_.scale;
    attention.params.causal = c.causal;
    // Scratch may be filled in vain: nothing else is written before the op has checked the rest.
    if (s.v.defined()) zero_padded_rows(a.v.slice(0, 0, num_keys), s.v, c.executor);
    flash_attn_varlen(attention, c.plan, s.rest, c.executor);
    if (!s.out.defined()) return;
    if (a.output_scale) {
      quantise_output(s.out, *a.output_scale, a.out, c.executor);
    } else {
      copy_columns(s.out, a.out, c.executor);
    }
  }

  MlaPrefillImplConfig config_;
  int head_dim_v_;
  std::optional<std::string> no_quant_output_;
  std::string new_tokens_op_, context_chunk_op_;
};

}  // namespace

std::unique_ptr<MlaPrefill> make_varlen_prefill(const MlaPrefillBackend& backend,
                                                const MlaPrefillImplConfig& config) {
  return std::make_unique<VarlenPrefill>(backend, config);
}

}  // namespace attend::mla_prefill
