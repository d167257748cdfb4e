// SPDX-License-Identifier: Apache-2.0
#include "conformance/attention_shape.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <limits>

namespace attend::conformance {
namespace {

std::vector<std::int32_t> start_loc(const std::vector<std::int32_t>& lens) {
  std::vector<std::int32_t> start{0};
  for (const std::int32_t n : lens) start.push_back(start.back() + n);
  return start;
}

int random_head_dim(Rng& rng) {
  return rng.chance(0.5) ? rng.pick({64, 128, 80, 96, 256}) : 8 * rng.range(1, 32);
}

struct Lengths {
  int query, seq;
};

/// One request in the manner of a serving step.
Lengths random_lengths(Rng& rng) {
  switch (rng.range(0, 7)) {
    case 0:
    case 1:  // decode
      return {1, rng.range(1, 1500)};
    case 2: {  // several new tokens at once
      const int query = rng.range(2, 9);
      return {query, query + rng.range(0, 1200)};
    }
    case 3: {  // prefill
      const int query = rng.range(1, 300);
      return {query, query};
    }
    case 4: {  // chunked prefill
      const int query = rng.range(1, 300);
      return {query, query + rng.range(0, 800)};
    }
    case 5:  // around the piece boundary
      return {rng.range(1, 4), 256 * rng.range(1, 3) + rng.range(-2, 2)};
    case 6: {  // rows without keys
      const int query = rng.range(1, 40);
      return {query, rng.range(0, query)};
    }
    default:  // nothing to ask, or nothing to see
      return rng.chance(0.5) ? Lengths{0, rng.range(0, 50)} : Lengths{rng.range(1, 5), 0};
  }
}

/// Shortens the query so that the request costs at most `products` multiplications.
Lengths fit(Lengths n, std::int64_t cost_per_pair, std::int64_t products) {
  const std::int64_t pairs = std::max<std::int64_t>(1, products / cost_per_pair);
  n.seq = static_cast<int>(std::min<std::int64_t>(n.seq, pairs));
  if (n.seq > 0) n.query = static_cast<int>(std::min<std::int64_t>(n.query, pairs / n.seq));
  return n;
}

void random_lengths_of_batch(Rng& rng, const ShapeLimits& limits, AttentionShape& s) {
  const int requests = rng.chance(0.3) ? 1 : rng.range(2, 6);
  const std::int64_t cost = static_cast<std::int64_t>(s.q_heads()) * (s.head_dim + s.head_dim_v);
  int common_query_len = 0;
  for (int r = 0; r < requests; ++r) {
    Lengths n = fit(random_lengths(rng), cost, limits.products / requests);
    if (limits.uniform_query_len) {
      if (r == 0) common_query_len = std::max(1, n.query);
      n.query = common_query_len;
      n = {n.query, fit(n, cost * n.query, limits.products / requests).seq};
    }
    if (limits.keys_cover_queries) n.seq = std::max(n.seq, n.query);
    s.query_lens.push_back(n.query);
    s.seq_lens.push_back(n.seq);
  }
}

void random_mask(Rng& rng, AttentionShape& s) {
  s.causal = rng.chance(0.6);
  if (rng.chance(0.35)) s.window_left = rng.chance(0.3) ? rng.range(0, 3) : rng.range(4, 400);
  // Queries stand at the end of the keys: a wide window to the right would hide nothing.
  if (rng.chance(0.4)) s.window_right = rng.chance(0.7) ? rng.range(0, 5) : rng.range(6, 100);
  if (rng.chance(0.3)) s.softcap = rng.pick({0.5F, 5.0F, 30.0F, 50.0F});
  if (rng.chance(0.3)) {
    s.alibi = rng.chance(0.5) ? AlibiSlopes::per_head : AlibiSlopes::per_request_and_head;
    s.alibi_sqrt = rng.chance(0.4);
  }
  if (rng.chance(0.3)) {
    s.sinks = true;
    s.lse_includes_sink = rng.chance(0.5);
  }
}

}  // namespace

std::vector<std::int32_t> AttentionShape::query_start_loc() const { return start_loc(query_lens); }
std::vector<std::int32_t> AttentionShape::key_start_loc() const { return start_loc(seq_lens); }

std::int32_t AttentionShape::first_visible_key(int request) const noexcept {
  const auto r = static_cast<std::size_t>(request);
  if (query_lens[r] == 0) return seq_lens[r];
  if (window_left < 0) return 0;
  return std::clamp(seq_lens[r] - query_lens[r] - window_left, 0, seq_lens[r]);
}

std::vector<std::int32_t> AttentionShape::hidden_keys() const {
  std::vector<std::int32_t> hidden;
  for (int r = 0; r < num_reqs(); ++r) hidden.push_back(first_visible_key(r));
  return hidden;
}

std::string AttentionShape::describe() const {
  std::string text = fmt::format("{} heads {}/{} head_dim {}/{} query_lens [{}] seq_lens [{}]",
                                 to_string(dtype), q_heads(), kv_heads, head_dim, head_dim_v,
                                 fmt::join(query_lens, ","), fmt::join(seq_lens, ","));
  if (causal) text += " causal";
  if (window_left >= 0 || window_right >= 0) {
    text += fmt::format(" window ({},{})", window_left, window_right);
  }
  if (softcap > 0.0F) text += fmt::format(" softcap {}", softcap);
  if (alibi == AlibiSlopes::per_head) text += " alibi [Hq]";
  if (alibi == AlibiSlopes::per_request_and_head) text += " alibi [B,Hq]";
  if (alibi_sqrt) text += " sqrt";
  if (sinks) text += lse_includes_sink ? " sinks in lse" : " sinks";
  return text;
}

AttentionShape random_shape(Rng& rng, const ShapeLimits& limits) {
  AttentionShape s;
  s.dtype = rng.pick({DType::f32, DType::f16, DType::bf16});
  s.group_size = rng.pick({1, 2, 3, 4, 5, 7, 8, 12});
  s.kv_heads = rng.range(1, s.group_size > 4 ? 2 : 3);
  s.head_dim = random_head_dim(rng);
  s.head_dim_v = limits.same_head_dims || rng.chance(0.7) ? s.head_dim : random_head_dim(rng);
  random_mask(rng, s);
  random_lengths_of_batch(rng, limits, s);
  s.default_scale = rng.chance(0.6);
  s.query_magnitude = rng.pick({0.3, 1.0, 1.0, 4.0});
  s.value_magnitude = rng.pick({1.0, 1.0, 0.01, 100.0});
  return s;
}

AttentionParams make_params(Rng& rng, const AttentionShape& shape, HeadValues& values) {
  AttentionParams p;
  p.causal = shape.causal;
  p.window_left = shape.window_left;
  p.window_right = shape.window_right;
  p.softcap = shape.softcap;
  if (!shape.default_scale) {
    p.scale = static_cast<float>((0.3 + rng.uniform()) / std::sqrt(shape.head_dim));
  }
  if (shape.sinks) {
    values.sinks = Storage(rng, DType::f32, {shape.q_heads()});
    for (const std::int64_t offset : values.sinks.offsets()) {
      // Far above every logit, far below, absent, or of their size.
      const double usual = 8.0 * rng.uniform() - 2.0;
      values.sinks.set(offset, rng.pick({usual, usual, 300.0, -300.0,
                                         -std::numeric_limits<double>::infinity()}));
    }
    p.sinks = values.sinks.view();
    p.lse_includes_sink = shape.lse_includes_sink;
  }
  if (shape.alibi == AlibiSlopes::none) return p;
  p.alibi_sqrt = shape.alibi_sqrt;
  Storage& slopes = values.slopes;
  if (shape.alibi == AlibiSlopes::per_head) {
    slopes = Storage(rng, DType::f32, {shape.q_heads()});
  } else {
    slopes = Storage(rng, DType::f32, {shape.num_reqs(), shape.q_heads()});
  }
  for (const std::int64_t offset : slopes.offsets()) {
    slopes.set(offset, std::exp2(-8.0 * rng.uniform()));
  }
  p.alibi_slopes = slopes.view();
  return p;
}

int random_block_size(Rng& rng) { return rng.pick({1, 4, 8, 16, 16, 32, 48, 64, 256}); }

}  // namespace attend::conformance
