// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/merge.h"

#include <fmt/format.h>

#include <limits>

#include "attend/oracle/attention.h"
#include "conformance/check.h"

namespace attend::conformance {
namespace {

enum class Alias : std::uint8_t { none, prefix, suffix };

class MergeAttnStatesCase final : public Case {
 public:
  explicit MergeAttnStatesCase(Rng& rng)
      : dtype_(rng.pick({DType::f32, DType::f16, DType::bf16})),
        alias_(rng.pick({Alias::none, Alias::none, Alias::prefix, Alias::suffix})),
        tokens_(rng.range(0, 70)),
        heads_(rng.range(1, 12)),
        dim_(8 * rng.range(1, 32)),
        with_prefix_(rng.chance(0.5) ? -1 : rng.range(0, tokens_)),
        with_lse_(rng.chance(0.8)) {
    Layout rows;
    rows.padded = rng.chance(0.4);
    Layout by_head;
    if (rng.chance(0.5)) by_head = {.order = {1, 0}, .padded = rows.padded};
    for (Storage* s : {&prefix_out_, &suffix_out_, &out_}) {
      *s = Storage(rng, dtype_, {tokens_, heads_, dim_}, rows);
    }
    for (Storage* s : {&prefix_lse_, &suffix_lse_, &lse_}) {
      *s = Storage(rng, DType::f32, {tokens_, heads_}, by_head);
    }
    for (int t = 0; t < tokens_; ++t) {
      const bool has_prefix = with_prefix_ < 0 || t < with_prefix_;
      for (int h = 0; h < heads_; ++h) {
        if (has_prefix) fill(rng, prefix_out_, prefix_lse_, t, h, 0.1);
        fill(rng, suffix_out_, suffix_lse_, t, h, has_prefix ? 0.1 : 0.0);
      }
    }
    expected_ = oracle::merge_attn_states(args());
    for (Storage* s : {&prefix_out_, &suffix_out_, &out_, &lse_}) s->freeze();
  }

  Outcome run(const KernelOptions&, Executor& executor) override {
    for (Storage* s : {&prefix_out_, &suffix_out_, &out_, &lse_}) s->reset();
    merge_attn_states(args(), &executor);
    Outcome outcome;
    compare_written(outcome, "out", target(), expected_.out, expected_.out_bound);
    if (with_lse_) compare_written(outcome, "lse", lse_, expected_.lse, expected_.lse_bound);
    expect_undamaged(outcome, "prefix_out", prefix_out_);
    expect_undamaged(outcome, "suffix_out", suffix_out_);
    return outcome;
  }

  std::string describe() const override {
    const char* alias[] = {"", " out is prefix_out", " out is suffix_out"};
    return fmt::format("{} tokens {} heads {} head_dim {} with prefix {}{}", to_string(dtype_),
                       tokens_, heads_, dim_, with_prefix_, alias[static_cast<int>(alias_)]);
  }

 private:
  /// One partial result; an empty one keeps NaN as its output.
  void fill(Rng& rng, Storage& out, Storage& lse, int t, int h, double empty) const {
    const double infinity = std::numeric_limits<double>::infinity();
    if (rng.chance(empty)) {
      lse.set(lse.offset({t, h}),
              rng.pick({infinity, -infinity, std::numeric_limits<double>::quiet_NaN()}));
      return;
    }
    lse.set(lse.offset({t, h}), rng.pick({1.0, 5.0, 60.0}) * rng.bell());
    out.set_random(rng, out.offset({t, h, 0}), dim_, 1.0);
  }

  Storage& target() {
    if (alias_ == Alias::prefix) return prefix_out_;
    return alias_ == Alias::suffix ? suffix_out_ : out_;
  }

  MergeAttnStatesArgs args() {
    MergeAttnStatesArgs a;
    a.out = target().view();
    if (with_lse_) a.lse = lse_.view();
    a.prefix_out = prefix_out_.view();
    a.prefix_lse = prefix_lse_.view();
    a.suffix_out = suffix_out_.view();
    a.suffix_lse = suffix_lse_.view();
    a.prefill_tokens_with_context = with_prefix_;
    return a;
  }

  DType dtype_;
  Alias alias_;
  int tokens_, heads_, dim_, with_prefix_;
  bool with_lse_;
  Storage prefix_out_, suffix_out_, out_, prefix_lse_, suffix_lse_, lse_;
  oracle::Result expected_;
};

}  // namespace

Op op_merge_attn_states() {
  return {"merge_attn_states", false,
          [](Rng& rng) { return std::make_unique<MergeAttnStatesCase>(rng); }};
}

}  // namespace attend::conformance
