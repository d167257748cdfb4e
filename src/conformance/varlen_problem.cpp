// SPDX-License-Identifier: Apache-2.0
#include "conformance/varlen_problem.h"

#include <fmt/format.h>

#include <cmath>
#include <utility>

#include "conformance/random_blocks.h"
#include "conformance/shared_prefixes.h"

namespace attend::conformance {
namespace {

/// int8 codes of bell-shaped values reach as far as a quantiser would let them.
constexpr double kInt8Size = 127.0 / 3.5;

}  // namespace

VarlenOptions random_varlen_options(Rng& rng) {
  VarlenOptions o;
  o.kv = rng.pick({KvStorage::ragged, KvStorage::paged_nhd, KvStorage::paged_hnd});
  o.block_size = random_block_size(rng);
  o.padded = rng.chance(0.4);
  o.layered = rng.chance(0.3);
  o.lse = rng.chance(0.8);
  o.lse_by_head = rng.chance(0.3);
  if (rng.chance(0.4)) {
    o.codes = rng.pick({DType::fp8_e4m3, DType::fp8_e5m2, DType::i8});
    o.fp8_queries = is_fp8(*o.codes) && rng.chance(0.3);
    o.token_scales = *o.codes == DType::i8 || rng.chance(0.3);
  }
  return o;
}

VarlenProblem::VarlenProblem(Rng& rng, AttentionShape attention_shape, const VarlenOptions& memory)
    : shape(std::move(attention_shape)), options(memory) {
  const std::vector<std::int32_t> start = shape.query_start_loc();
  const std::int64_t tokens = start.back();
  Layout rows;
  rows.padded = options.padded;
  const DType q_dtype = options.fp8_queries ? *options.codes : shape.dtype;
  q = Storage(rng, q_dtype, {tokens, shape.q_heads(), shape.head_dim}, rows);
  q.set_random(rng, shape.query_magnitude);
  out = Storage(rng, shape.dtype, {tokens, shape.q_heads(), shape.head_dim_v}, rows);
  if (options.lse) {
    Layout lse_layout;
    if (options.lse_by_head) lse_layout = {.order = {1, 0}, .padded = options.padded};
    lse = Storage(rng, DType::f32, {tokens, shape.q_heads()}, lse_layout);
  }
  query_start_loc = int_storage(rng, start);
  params = make_params(rng, shape, head_values);
  if (options.codes && is_fp8(*options.codes)) make_descales(rng);
  if (options.kv == KvStorage::ragged) {
    make_ragged(rng);
  } else {
    make_paged(rng);
  }
  out.freeze();
  if (options.lse) lse.freeze();
}

void VarlenProblem::fill_row(Rng& rng, std::initializer_list<std::int64_t> row) {
  const bool int8 = kv_dtype() == DType::i8;
  const double size = int8 ? kInt8Size : 1.0;
  k.set_random(rng, k.offset(row), shape.head_dim, size);
  v.set_random(rng, v.offset(row), shape.head_dim_v, int8 ? size : shape.value_magnitude);
  if (!options.token_scales) return;
  const auto scale = [&](double magnitude) {
    return magnitude / size * std::exp2(2.0 * rng.uniform() - 1.0);
  };
  k_token_scale.set(k_token_scale.offset(row), scale(1.0));
  v_token_scale.set(v_token_scale.offset(row), scale(int8 ? shape.value_magnitude : 1.0));
}

/// `rows`: the shape of k with 1 as its last size. Scales that no query may use stay NaN.
void VarlenProblem::make_token_scales(Rng& rng, const std::vector<std::int64_t>& rows,
                                      const Layout& layout) {
  if (!options.token_scales) return;
  k_token_scale = Storage(rng, DType::f32, rows, layout);
  v_token_scale = Storage(rng, DType::f32, rows, layout);
}

void VarlenProblem::make_descales(Rng& rng) {
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

void VarlenProblem::make_ragged(Rng& rng) {
  const std::vector<std::int32_t> start = shape.key_start_loc();
  cu_seqlens_kv = int_storage(rng, start);
  Layout rows;
  rows.padded = options.padded;
  k = Storage(rng, kv_dtype(), {start.back(), shape.kv_heads, shape.head_dim}, rows);
  v = Storage(rng, kv_dtype(), {start.back(), shape.kv_heads, shape.head_dim_v}, rows);
  make_token_scales(rng, {start.back(), shape.kv_heads, 1}, rows);
  for (int r = 0; r < shape.num_reqs(); ++r) {
    const auto request = static_cast<std::size_t>(r);
    for (std::int64_t j = shape.first_visible_key(r); j < shape.seq_lens[request]; ++j) {
      for (int h = 0; h < shape.kv_heads; ++h) fill_row(rng, {start[request] + j, h, 0});
    }
  }
}

void VarlenProblem::make_paged(Rng& rng) {
  seq_lens = int_storage(rng, shape.seq_lens);
  if (options.share_prefixes)
    shared_prefixes = random_shared_prefixes(rng, shape, options.block_size);
  RandomBlocks blocks(rng, shape.seq_lens, hidden_keys(shape, shared_prefixes), options.block_size,
                      options.padded);
  share_blocks(blocks, shape, shared_prefixes);
  Layout cache;
  if (options.kv == KvStorage::paged_hnd) cache.order = {0, 2, 1, 3};
  cache.padded = options.padded;
  const auto make_cache = [&](int dim) {
    if (options.layered) {
      cache.outer_gap = std::int64_t{3} * options.block_size * shape.kv_heads * dim;
    }
    return Storage(rng, kv_dtype(), {blocks.num_blocks, options.block_size, shape.kv_heads, dim},
                   cache);
  };
  k = make_cache(shape.head_dim);
  v = make_cache(shape.head_dim_v);
  Layout scales = cache;
  scales.outer_gap = 0;
  make_token_scales(rng, {blocks.num_blocks, options.block_size, shape.kv_heads, 1}, scales);
  for (int r = 0; r < shape.num_reqs(); ++r) {
    const std::int64_t seq_len = shape.seq_lens[static_cast<std::size_t>(r)];
    for (std::int64_t j = shape.first_visible_key(r); j < seq_len; ++j) {
      for (int h = 0; h < shape.kv_heads; ++h) {
        fill_row(rng, {blocks.block(r, j), j % options.block_size, h, 0});
      }
    }
  }
  block_table = std::move(blocks.table);
}

FlashAttnVarlenArgs VarlenProblem::args() const {
  FlashAttnVarlenArgs a;
  a.q = q.view();
  a.k = k.view();
  a.v = v.view();
  a.out = out.view();
  if (options.lse) a.lse = lse.view();
  a.query_start_loc = query_start_loc.view();
  if (options.kv == KvStorage::ragged) {
    a.cu_seqlens_kv = cu_seqlens_kv.view();
  } else {
    a.seq_lens = seq_lens.view();
    a.block_table = block_table.view();
  }
  a.q_descale = q_descale.view();
  a.k_descale = k_descale.view();
  a.v_descale = v_descale.view();
  if (options.token_scales) {
    const int last = k_token_scale.view().rank - 1;
    a.k_token_scale = k_token_scale.view().select(last, 0);
    a.v_token_scale = v_token_scale.view().select(last, 0);
  }
  a.params = params;
  return a;
}

void VarlenProblem::reset() {
  out.reset();
  if (options.lse) lse.reset();
}

KernelKind VarlenProblem::kind() const { return kernel_kind(shape.dtype, kv_dtype(), kv_dtype()); }

std::string VarlenProblem::describe() const {
  const char* storage[] = {"ragged", "paged NHD", "paged HND"};
  std::string text = shape.describe() + " " + storage[static_cast<int>(options.kv)];
  if (options.kv != KvStorage::ragged) text += fmt::format(" block_size {}", options.block_size);
  if (options.codes) text += fmt::format(" kv {}", to_string(*options.codes));
  if (options.token_scales) text += " token scales";
  if (options.fp8_queries) text += " q too";
  if (options.padded) text += " padded";
  if (options.layered) text += " layered";
  if (options.lse_by_head) text += " lse [Hq,T]";
  return text;
}

}  // namespace attend::conformance
