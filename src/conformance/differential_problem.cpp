// SPDX-License-Identifier: Apache-2.0
#include "conformance/differential_problem.h"

#include <fmt/format.h>

#include <cmath>
#include <utility>

#include "conformance/random_blocks.h"
#include "conformance/shared_prefixes.h"

namespace attend::conformance {

DifferentialCombineProblem::DifferentialCombineProblem(Rng& rng, DifferentialVariant kind,
                                                       std::int64_t tokens, std::int64_t heads,
                                                       int width)
    : variant(kind) {
  const auto any_float = [&] { return rng.pick({DType::f32, DType::f16, DType::bf16}); };
  if (variant == DifferentialVariant::v1) {
    pairing = rng.pick({HeadPairing::interleaved, HeadPairing::halves});
    values.lambda = rng.chance(0.7) ? static_cast<float>(0.2 + 0.6 * rng.uniform())
                                    : rng.pick({0.0F, 1.0F, -0.5F, 7.0F});
    values.norm = rng.chance(0.7);
    values.norm_eps = rng.pick({1e-5F, 1e-6F, 0.3F, 1e-12F});
    values.out_scale = rng.pick({1.0F, 0.8F, 0.2F, -3.0F});
    if (values.norm && rng.chance(0.6)) {
      norm_weight = Storage(rng, any_float(), {width});
      norm_weight.set_random(rng, rng.pick({1.0, 1.0, 30.0}));
    }
  } else {
    values.norm = false;
    values.out_scale = rng.pick({1.0F, 1.0F, 0.3F});
    Layout layout;
    layout.padded = rng.chance(0.4);
    if (rng.chance(0.4)) layout.order = {1, 0};
    token_lambda = Storage(rng, any_float(), {tokens, heads / 2}, layout);
    token_lambda.set_random(rng, rng.pick({1.0, 4.0, 60.0}));
  }
}

DifferentialCombine DifferentialCombineProblem::args() const {
  DifferentialCombine c = values;
  c.token_lambda = token_lambda.view();
  c.norm_weight = norm_weight.view();
  return c;
}

std::string DifferentialCombineProblem::describe() const {
  if (variant == DifferentialVariant::v2) {
    return fmt::format(" v2 token_lambda {} out_scale {}", to_string(token_lambda.view().dtype),
                       values.out_scale);
  }
  std::string text = pairing == HeadPairing::halves ? " halves" : " interleaved";
  text += fmt::format(" lambda {} out_scale {}", values.lambda, values.out_scale);
  if (values.norm) text += fmt::format(" norm eps {}", values.norm_eps);
  if (norm_weight.view().defined())
    text += fmt::format(" weight {}", to_string(norm_weight.view().dtype));
  return text;
}

DifferentialOptions random_differential_options(Rng& rng) {
  DifferentialOptions o;
  o.kv = rng.pick({BranchStorage::ragged, BranchStorage::nhd, BranchStorage::hnd,
                   BranchStorage::layers_nhd, BranchStorage::layers_hnd});
  o.block_size = random_block_size(rng);
  o.padded = rng.chance(0.4);
  o.maps = rng.chance(0.25);
  o.lse = rng.chance(0.7);
  o.lse_by_head = rng.chance(0.3);
  if (rng.chance(0.35)) {
    o.codes = rng.pick({DType::fp8_e4m3, DType::fp8_e5m2});
    o.fp8_queries = rng.chance(0.3);
  }
  o.share_prefixes = o.kv != BranchStorage::ragged && rng.chance(0.3);
  return o;
}

DifferentialProblem::DifferentialProblem(Rng& rng, const DifferentialOptions& memory)
    : options(memory) {
  make_shape(rng);
  query_start_ = shape.query_start_loc();
  const std::int64_t tokens = query_start_.back();
  combine = DifferentialCombineProblem(
      rng, shape.head_dim_v > shape.head_dim ? DifferentialVariant::v1 : DifferentialVariant::v2,
      tokens, shape.q_heads(), shape.head_dim_v);
  Layout rows;
  rows.padded = options.padded;
  const DType q_dtype = options.fp8_queries ? *options.codes : shape.dtype;
  q = Storage(rng, q_dtype, {tokens, shape.q_heads(), shape.head_dim}, rows);
  q.set_random(rng, shape.query_magnitude);
  make_outputs(rng);
  query_start_loc = int_storage(rng, query_start_);
  params = make_params(rng, shape, head_values);
  if (options.codes) make_descales(rng);
  if (options.kv == BranchStorage::ragged) {
    make_ragged(rng);
  } else {
    make_paged(rng);
  }
  for (Storage* s : {&out, &maps, &lse}) s->freeze();
}

/// Lengths and masks of any attention; heads in pairs.
void DifferentialProblem::make_shape(Rng& rng) {
  if (options.share_prefixes) {
    shape = random_shared_shape(rng);
  } else {
    ShapeLimits limits;
    limits.same_head_dims = true;
    limits.products = 500'000;
    shape = random_shape(rng, limits);
  }
  const bool v1 = rng.chance(0.75);
  shape.kv_heads = v1 ? 2 * rng.range(1, 2) : rng.range(1, 3);
  shape.group_size = v1 ? rng.pick({1, 2, 3, 5}) : rng.pick({2, 2, 4, 6});
  shape.head_dim_v = v1 ? 2 * shape.head_dim : shape.head_dim;
}

void DifferentialProblem::make_outputs(Rng& rng) {
  const std::int64_t tokens = query_start_.back();
  Layout rows;
  rows.padded = options.padded;
  if (options.maps) {
    maps = Storage(rng, DType::f32, {tokens, shape.q_heads(), shape.head_dim_v}, rows);
  } else {
    out = Storage(rng, shape.dtype, {tokens, shape.q_heads() / (is_v1() ? 1 : 2), shape.head_dim},
                  rows);
  }
  if (!options.lse) return;
  Layout layout;
  if (options.lse_by_head) layout = {.order = {1, 0}, .padded = options.padded};
  lse = Storage(rng, DType::f32, {tokens, shape.q_heads()}, layout);
}

void DifferentialProblem::make_descales(Rng& rng) {
  const auto make = [&](bool wanted, Storage& s) {
    if (!wanted) return;
    s = Storage(rng, DType::f32, {shape.num_reqs(), shape.kv_heads});
    for (const std::int64_t offset : s.offsets())
      s.set(offset, std::exp2(2.0 * rng.uniform() - 1.0));
  };
  make(options.fp8_queries && rng.chance(0.7), q_descale);
  make(rng.chance(0.7), k_descale);
  make(rng.chance(0.7), v_descale);
}

void DifferentialProblem::make_ragged(Rng& rng) {
  const std::vector<std::int32_t> start = shape.key_start_loc();
  cu_seqlens_kv = int_storage(rng, start);
  Layout rows;
  rows.padded = options.padded;
  for (Storage* s : {&k, &v})
    *s = Storage(rng, kv_dtype(), {start.back(), shape.kv_heads, shape.head_dim}, rows);
  for (int r = 0; r < shape.num_reqs(); ++r) {
    const auto request = static_cast<std::size_t>(r);
    for (std::int64_t j = shape.first_visible_key(r); j < shape.seq_lens[request]; ++j) {
      for (int h = 0; h < shape.kv_heads; ++h) {
        const std::int64_t row = start[request] + j;
        k.set_random(rng, k.offset({row, h, 0}), shape.head_dim, 1.0);
        v.set_random(rng, v.offset({row, h, 0}), shape.head_dim, shape.value_magnitude);
      }
    }
  }
}

void DifferentialProblem::make_paged(Rng& rng) {
  seq_lens = int_storage(rng, shape.seq_lens);
  if (options.share_prefixes)
    shared_prefixes = random_shared_prefixes(rng, shape, options.block_size);
  RandomBlocks blocks(rng, shape.seq_lens, hidden_keys(shape, shared_prefixes), options.block_size,
                      options.padded);
  share_blocks(blocks, shape, shared_prefixes);
  Layout cache;
  cache.padded = options.padded;
  const bool by_head = options.kv == BranchStorage::hnd || options.kv == BranchStorage::layers_hnd;
  const bool layers =
      options.kv == BranchStorage::layers_nhd || options.kv == BranchStorage::layers_hnd;
  const int dim = shape.head_dim;
  if (layers) {
    cache.order = by_head ? std::vector{2, 4, 0, 1, 3, 5} : std::vector{2, 0, 1, 3, 4, 5};
    cache.outer_gap = std::int64_t{3} * options.block_size * shape.kv_heads * dim;
  } else if (by_head) {
    cache.order = {0, 1, 2, 4, 3, 5};
  }
  if (is_v1()) {
    kv = Storage(rng, kv_dtype(),
                 {2, 2, blocks.num_blocks, options.block_size, shape.kv_heads / 2, dim}, cache);
  } else {
    cache.order = by_head ? std::vector{0, 2, 1, 3} : std::vector{0, 1, 2, 3};
    for (Storage* s : {&k, &v})
      *s = Storage(rng, kv_dtype(), {blocks.num_blocks, options.block_size, shape.kv_heads, dim},
                   cache);
  }
  for (int r = 0; r < shape.num_reqs(); ++r) {
    const std::int64_t seq_len = shape.seq_lens[static_cast<std::size_t>(r)];
    for (std::int64_t j = shape.first_visible_key(r); j < seq_len; ++j)
      fill_row(rng, blocks.block(r, j), j % options.block_size);
  }
  block_table = std::move(blocks.table);
}

/// One token of a cache, all heads of it.
void DifferentialProblem::fill_row(Rng& rng, std::int64_t block, std::int64_t offset) {
  const auto fill = [&](Storage& s, std::int64_t at, double magnitude) {
    s.set_random(rng, at, shape.head_dim, magnitude);
  };
  for (int h = 0; h < shape.kv_heads; ++h) {
    if (is_v1()) {
      fill(kv, kv.offset({h % 2, 0, block, offset, h / 2, 0}), 1.0);
      fill(kv, kv.offset({h % 2, 1, block, offset, h / 2, 0}), shape.value_magnitude);
    } else {
      fill(k, k.offset({block, offset, h, 0}), 1.0);
      fill(v, v.offset({block, offset, h, 0}), shape.value_magnitude);
    }
  }
}

DifferentialAttentionArgs DifferentialProblem::args() const {
  DifferentialAttentionArgs a;
  a.q = q.view();
  const bool branches = kv.view().defined();
  a.k = branches ? kv.view().select(1, 0) : k.view();
  a.v = branches ? kv.view().select(1, 1) : v.view();
  a.out = out.view();
  a.maps = maps.view();
  a.lse = lse.view();
  a.query_start_loc = query_start_loc.view();
  a.cu_seqlens_kv = cu_seqlens_kv.view();
  a.seq_lens = seq_lens.view();
  a.block_table = block_table.view();
  a.q_descale = q_descale.view();
  a.k_descale = k_descale.view();
  a.v_descale = v_descale.view();
  a.variant = combine.variant;
  a.pairing = combine.pairing;
  a.combine = combine.args();
  a.params = params;
  return a;
}

AttentionPlanInput DifferentialProblem::plan_input() const {
  AttentionPlanInput in;
  in.query_start_loc = query_start_;
  in.seq_lens = shape.seq_lens;
  in.causal = shape.causal;
  in.window_left = shape.window_left;
  in.window_right = shape.window_right;
  in.shared_prefixes = shared_prefixes;
  differential_plan_shape(in, combine.variant, shape.q_heads(), shape.kv_heads, shape.head_dim);
  return in;
}

void DifferentialProblem::reset() {
  for (Storage* s : {&out, &maps, &lse})
    if (s->view().defined()) s->reset();
}

std::string DifferentialProblem::describe() const {
  const char* storage[] = {"ragged", "NHD", "HND", "layers NHD", "layers HND"};
  std::string text = shape.describe() + " " + storage[static_cast<int>(options.kv)];
  if (options.kv != BranchStorage::ragged)
    text += fmt::format(" block_size {}", options.block_size);
  if (options.codes) text += fmt::format(" kv {}", to_string(*options.codes));
  if (options.fp8_queries) text += " q too";
  if (options.padded) text += " padded";
  if (options.maps) text += " maps";
  if (options.lse_by_head) text += " lse [H,T]";
  for (const SharedPrefix& p : shared_prefixes)
    text += fmt::format(" [{},{})x{}", p.request_begin, p.request_end, p.num_keys);
  return text + combine.describe();
}

}  // namespace attend::conformance
