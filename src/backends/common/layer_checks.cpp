// SPDX-License-Identifier: Apache-2.0
#include "backends/common/layer_checks.h"

#include <fmt/format.h>

#include <cmath>
#include <limits>
#include <utility>

namespace attend {

void check_kv_scales(std::string_view op, const ImplConfig& c, bool allowed) {
  for (const auto& [name, scales] : {std::pair{"k_scale", &c.k_scale}, {"v_scale", &c.v_scale}}) {
    const check::Where where{op, name};
    check::require(allowed || scales->empty(), where, "none: the cache is not fp8", scales->size());
    check::require(
        scales->empty() || scales->size() == 1 ||
            scales->size() == static_cast<std::size_t>(c.num_kv_heads),
        where, [&] { return fmt::format("none, 1 or {}, one a kv head", c.num_kv_heads); },
        scales->size());
    for (std::size_t h = 0; h < scales->size(); ++h) {
      const float x = (*scales)[h];
      check::require(std::isfinite(x) && x > 0.0F, where, "finite values > 0",
                     [&] { return fmt::format("{} at index {}", x, h); });
    }
  }
  check::require(
      c.k_scale.size() == c.v_scale.size(), {op, "v_scale"},
      [&] { return fmt::format("{} values, as many as k_scale", c.k_scale.size()); },
      c.v_scale.size());
}

void spread_kv_scales(ImplConfig& config) {
  for (std::vector<float>* scales : {&config.k_scale, &config.v_scale}) {
    const float one = scales->empty() ? 1.0F : (*scales)[0];
    if (scales->size() < 2) scales->assign(static_cast<std::size_t>(config.num_kv_heads), one);
  }
}

void check_softmax(std::string_view op, const ImplConfig& c) {
  const auto at = [&](std::string_view argument) { return check::Where{op, argument}; };
  const auto one_a_head = [&] {
    return fmt::format("none or {}, one a query head", c.num_q_heads);
  };
  const auto heads = static_cast<std::size_t>(c.num_q_heads);
  if (c.scale) {
    check::require(std::isfinite(*c.scale) && *c.scale > 0.0F, at("scale"), "finite and > 0",
                   *c.scale);
  }
  check::require(std::isfinite(c.softcap) && c.softcap >= 0.0F, at("softcap"), "finite and >= 0",
                 c.softcap);
  if (c.sliding_window) {
    check::require(*c.sliding_window >= 1, at("sliding_window"), "unset or >= 1",
                   *c.sliding_window);
  }
  const auto& slopes = c.alibi_slopes;
  check::require(slopes.empty() || slopes.size() == heads, at("alibi_slopes"), one_a_head,
                 slopes.size());
  for (std::size_t h = 0; h < slopes.size(); ++h) {
    check::require(std::isfinite(slopes[h]), at("alibi_slopes"), "finite slopes",
                   [&] { return fmt::format("{} at index {}", slopes[h], h); });
  }
  check::require(c.sinks.empty() || c.sinks.size() == heads, at("sinks"), one_a_head,
                 c.sinks.size());
  for (std::size_t h = 0; h < c.sinks.size(); ++h) {
    check::require(c.sinks[h] < std::numeric_limits<float>::infinity(), at("sinks"),
                   "finite or -infinity",
                   [&] { return fmt::format("{} at index {}", c.sinks[h], h); });
  }
}

void check_layer(check::Where where, const AttentionMetadata& m, const ImplConfig& c,
                 int window_left, int window_right) {
  check::require(
      m.attn_type == c.attn_type, where,
      [&] { return fmt::format("attention type {}", to_string(c.attn_type)); },
      to_string(m.attn_type));
  const auto heads = [](int q, int kv, int size) {
    return fmt::format("{} query heads, {} kv heads, head_size {}", q, kv, size);
  };
  check::require(
      m.num_q_heads == c.num_q_heads && m.num_kv_heads == c.num_kv_heads &&
          m.head_size == c.head_size,
      where, [&] { return heads(c.num_q_heads, c.num_kv_heads, c.head_size); },
      [&] { return heads(m.num_q_heads, m.num_kv_heads, m.head_size); });
  const auto window = [](int left, int right) {
    return fmt::format("window ({}, {})", left, right);
  };
  check::require(
      m.window_left == window_left && (m.window_right == window_right || m.all_causal), where,
      [&] { return window(window_left, window_right); },
      [&] { return window(m.window_left, m.window_right); });
}

void check_rows(check::Where where, const ConstTensorView& t, const ImplConfig& config, int heads,
                int num_tokens) {
  check::tensor(where, t, 3, {config.dtype});
  check::shape(where, t, {-1, heads, config.head_size});
  check::unit_last_stride(where, t);
  check::require(
      t.shape[0] >= num_tokens, where, [&] { return fmt::format("at least {} rows", num_tokens); },
      [&] { return describe(t); });
}

void check_results(std::string_view op, const ForwardArgs& args, const ImplConfig& config,
                   int num_heads) {
  check_rows({op, "output"}, args.output, config, num_heads, 0);
  check::distinct_elements({op, "output"}, args.output);
  if (!args.lse.defined()) return;
  const check::Where where{op, "lse"};
  check::tensor(where, args.lse, 2, {DType::f32});
  check::shape(where, args.lse, {args.output.shape[0], config.num_q_heads});
  check::distinct_elements(where, args.lse);
  check::no_overlap(where, args.lse, "output", args.output);
}

AttentionParams attention_params(const ImplConfig& config, const AttentionMetadata& m) {
  AttentionParams p;
  p.scale = config.scale;
  p.causal = m.causal;
  p.window_left = m.window_left;
  p.window_right = m.window_right;
  p.softcap = config.softcap;
  if (!config.alibi_slopes.empty()) {
    p.alibi_slopes = ConstTensorView(config.alibi_slopes.data(), DType::f32, {config.num_q_heads});
    p.alibi_sqrt = config.use_alibi_sqrt;
  }
  if (!config.sinks.empty()) {
    p.sinks = ConstTensorView(config.sinks.data(), DType::f32, {config.num_q_heads});
    p.lse_includes_sink = config.lse_includes_sink;
  }
  return p;
}

ConstTensorView per_request(const std::vector<float>& scales, int num_reqs) {
  ConstTensorView view(scales.data(), DType::f32,
                       {num_reqs, static_cast<std::int64_t>(scales.size())});
  view.strides[0] = 0;
  return view;
}

ConstTensorView per_kv_head(const std::vector<float>& scales) {
  return {scales.data(), DType::f32, {static_cast<std::int64_t>(scales.size())}};
}

}  // namespace attend
