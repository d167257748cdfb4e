// SPDX-License-Identifier: Apache-2.0
#include "conformance/kvcache_problem.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <utility>

namespace attend::conformance {
namespace {

ShapeLimits decode_like() {
  ShapeLimits limits;
  limits.uniform_query_len = true;
  return limits;
}

}  // namespace

KvCacheOptions random_kvcache_options(Rng& rng, int head_dim) {
  KvCacheOptions o;
  o.paged = rng.chance(0.5);
  o.hnd = rng.chance(0.5);
  o.block_size = random_block_size(rng);
  o.padded = rng.chance(0.4);
  o.append = rng.chance(0.6);
  o.rotary = o.append && head_dim >= 16 && rng.chance(0.6);
  o.rotary_interleaved = rng.chance(0.5);
  o.leftpad = !o.paged && rng.chance(0.4);
  o.batch_idx = !o.paged && rng.chance(0.4);
  o.whole_cache = !o.paged && !o.append && rng.chance(0.2);
  o.lse = rng.chance(0.8);
  return o;
}

KvCacheProblem::KvCacheProblem(Rng& rng) : shape(random_shape(rng, decode_like())) {
  options = random_kvcache_options(rng, shape.head_dim);
  choose_lengths(rng);
  const std::int64_t requests = shape.num_reqs(), query_len = shape.query_lens.front();
  Layout rows;
  rows.padded = options.padded;
  q = Storage(rng, shape.dtype, {requests, query_len, shape.q_heads(), shape.head_dim}, rows);
  q.set_random(rng, shape.query_magnitude);
  out = Storage(rng, shape.dtype, {requests, query_len, shape.q_heads(), shape.head_dim_v}, rows);
  if (options.lse) lse = Storage(rng, DType::f32, {requests, shape.q_heads(), query_len}, rows);
  params = make_params(rng, shape, head_values);
  make_caches(rng);
  fill_caches(rng);
  if (options.append) make_append(rng);
  if (options.rotary) make_rotary(rng);
  out.freeze();
  k_cache.freeze();
  v_cache.freeze();
  if (options.lse) lse.freeze();
}

void KvCacheProblem::choose_lengths(Rng& rng) {
  if (options.append) num_appended = rng.chance(0.5) ? shape.query_lens.front() : rng.range(1, 20);
  if (options.whole_cache) {
    // A cache that is read whole has at least one row.
    const auto longest =
        std::max(1, *std::max_element(shape.seq_lens.begin(), shape.seq_lens.end()));
    std::fill(shape.seq_lens.begin(), shape.seq_lens.end(), longest);
  }
  for (std::int32_t& n : shape.seq_lens) {
    n = std::max(n, num_appended);
    left_pad.push_back(options.leftpad ? rng.range(0, 40) : 0);
    // One padding for all keeps the rows of a cache that is read whole equally long.
    if (options.whole_cache) left_pad.back() = left_pad.front();
    cached.push_back(n - num_appended + left_pad.back());
  }
}

void KvCacheProblem::make_caches(Rng& rng) {
  Layout cache;
  cache.padded = options.padded;
  if (options.hnd) cache.order = {0, 2, 1, 3};
  std::vector<std::int32_t> slots = cached;
  for (std::int32_t& n : slots) n += num_appended;
  std::int64_t rows = 0, row_size = 0;
  if (options.paged) {
    std::vector<std::int32_t> untouched = shape.hidden_keys();
    for (std::size_t r = 0; r < cached.size(); ++r)
      untouched[r] = std::min(untouched[r], cached[r]);
    RandomBlocks blocks(rng, slots, untouched, options.block_size, options.padded);
    rows = blocks.num_blocks;
    row_size = options.block_size;
    block_table = std::move(blocks.table);
  } else {
    rows = shape.num_reqs() + (options.batch_idx ? rng.range(0, 3) : 0);
    row_size = *std::max_element(slots.begin(), slots.end());
    if (!options.whole_cache) row_size += rng.range(1, 30);
    cache_row = shuffled(rng, options.batch_idx ? rows : 0);
    cache_row.resize(options.batch_idx ? shape.query_lens.size() : 0);
    if (options.batch_idx) cache_batch_idx = int_storage(rng, cache_row);
    if (options.leftpad) cache_leftpad = int_storage(rng, left_pad);
  }
  if (!options.whole_cache) cache_seqlens = int_storage(rng, cached);
  k_cache = Storage(rng, shape.dtype, {rows, row_size, shape.kv_heads, shape.head_dim}, cache);
  v_cache = Storage(rng, shape.dtype, {rows, row_size, shape.kv_heads, shape.head_dim_v}, cache);
}

std::int64_t KvCacheProblem::cache_offset(const Storage& cache, int request, std::int64_t row,
                                          int head) const {
  if (options.paged) {
    const std::int64_t entry = block_table.offset({request, row / options.block_size});
    const std::int64_t block = block_table.view().as<std::int32_t>()[entry];
    return cache.offset({block, row % options.block_size, head, 0});
  }
  const auto r = static_cast<std::size_t>(request);
  return cache.offset({options.batch_idx ? cache_row[r] : request, row, head, 0});
}

void KvCacheProblem::fill_caches(Rng& rng) {
  for (int r = 0; r < shape.num_reqs(); ++r) {
    const auto request = static_cast<std::size_t>(r);
    const std::int64_t first = left_pad[request] + shape.first_visible_key(r);
    for (std::int64_t row = first; row < cached[request]; ++row) {
      for (int h = 0; h < shape.kv_heads; ++h) {
        k_cache.set_random(rng, cache_offset(k_cache, r, row, h), shape.head_dim, 1.0);
        v_cache.set_random(rng, cache_offset(v_cache, r, row, h), shape.head_dim_v,
                           shape.value_magnitude);
      }
    }
  }
}

void KvCacheProblem::make_append(Rng& rng) {
  Layout rows;
  rows.padded = options.padded;
  const std::int64_t requests = shape.num_reqs();
  k_new = Storage(rng, shape.dtype, {requests, num_appended, shape.kv_heads, shape.head_dim}, rows);
  v_new =
      Storage(rng, shape.dtype, {requests, num_appended, shape.kv_heads, shape.head_dim_v}, rows);
  k_new.set_random(rng, 1.0);
  v_new.set_random(rng, shape.value_magnitude);
}

void KvCacheProblem::make_rotary(Rng& rng) {
  const std::int64_t pairs = 8 * rng.range(1, shape.head_dim / 16);
  const std::int64_t last = *std::max_element(cached.begin(), cached.end()) +
                            std::max(num_appended, shape.query_lens.front());
  Layout rows;
  rows.padded = options.padded;
  rotary_cos = Storage(rng, shape.dtype, {last + rng.range(0, 3), pairs}, rows);
  rotary_sin = Storage(rng, shape.dtype, {rotary_cos.view().shape[0], pairs}, rows);
  for (std::int64_t position = 0; position < last; ++position) {
    for (std::int64_t i = 0; i < pairs; ++i) {
      const double angle = 6.3 * rng.uniform();
      rotary_cos.set(rotary_cos.offset({position, i}), std::cos(angle));
      rotary_sin.set(rotary_sin.offset({position, i}), std::sin(angle));
    }
  }
}

FlashAttnWithKvCacheArgs KvCacheProblem::args() const {
  FlashAttnWithKvCacheArgs a;
  a.q = q.view();
  a.k_cache = k_cache.view();
  a.v_cache = v_cache.view();
  a.k_new = k_new.view();
  a.v_new = v_new.view();
  a.out = out.view();
  a.lse = lse.view();
  a.cache_seqlens = cache_seqlens.view();
  a.cache_batch_idx = cache_batch_idx.view();
  a.cache_leftpad = cache_leftpad.view();
  a.block_table = block_table.view();
  a.rotary_cos = rotary_cos.view();
  a.rotary_sin = rotary_sin.view();
  a.rotary_interleaved = options.rotary_interleaved;
  a.params = params;
  return a;
}

void KvCacheProblem::reset() {
  out.reset();
  k_cache.reset();
  v_cache.reset();
  if (options.lse) lse.reset();
}

std::string KvCacheProblem::describe() const {
  std::string text = fmt::format("{} cached [{}] append {}", shape.describe(),
                                 fmt::join(cached, ","), num_appended);
  text += options.paged ? fmt::format(" paged block_size {}", options.block_size) : " dense";
  if (options.hnd) text += " HND";
  if (options.padded) text += " padded";
  if (options.rotary) text += options.rotary_interleaved ? " rotary interleaved" : " rotary halves";
  if (options.leftpad) text += fmt::format(" leftpad [{}]", fmt::join(left_pad, ","));
  if (options.batch_idx) text += fmt::format(" batch_idx [{}]", fmt::join(cache_row, ","));
  if (options.whole_cache) text += " whole cache";
  return text;
}

}  // namespace attend::conformance
