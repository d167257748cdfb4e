// SPDX-License-Identifier: Apache-2.0
#include "conformance/int8_problem.h"

#include <fmt/format.h>

#include <cmath>
#include <utility>

#include "conformance/shared_prefixes.h"

namespace attend::conformance {
namespace {

/// Codes of bell-shaped values reach as far as a quantiser would let them.
constexpr double kCodeSize = 127.0 / 3.5;

double random_scale(Rng& rng, double magnitude) {
  return magnitude / kCodeSize * std::exp2(2.0 * rng.uniform() - 1.0);
}

}  // namespace

Int8Options random_int8_options(Rng& rng) {
  Int8Options o;
  o.values = rng.pick({DType::i8, DType::i8, DType::f16, DType::bf16});
  o.out = rng.pick({DType::f32, DType::f16, DType::bf16});
  o.block_size = random_block_size(rng);
  o.padded = rng.chance(0.4);
  o.lse = rng.chance(0.8);
  o.smooth_keys = rng.chance(0.3);
  return o;
}

Int8Problem::Int8Problem(Rng& rng, AttentionShape attention_shape, const Int8Options& memory)
    : shape(std::move(attention_shape)),
      options(memory),
      shared_prefixes(memory.share_prefixes ? random_shared_prefixes(rng, shape, memory.block_size)
                                            : std::vector<SharedPrefix>()),
      blocks(rng, shape.seq_lens, hidden_keys(shape, shared_prefixes), memory.block_size,
             memory.padded) {
  share_blocks(blocks, shape, shared_prefixes);
  const std::vector<std::int32_t> start = shape.query_start_loc();
  const std::int64_t tokens = start.back();
  Layout rows;
  rows.padded = options.padded;
  q = Storage(rng, DType::i8, {tokens, shape.q_heads(), shape.head_dim}, rows);
  q.set_random(rng, kCodeSize);
  q_scale = Storage(rng, DType::f32, {shape.q_heads(), tokens}, rows);
  for (const std::int64_t offset : q_scale.offsets())
    q_scale.set(offset, random_scale(rng, shape.query_magnitude));
  out = Storage(rng, options.out, {tokens, shape.q_heads(), shape.head_dim_v}, rows);
  if (options.lse) lse = Storage(rng, DType::f32, {tokens, shape.q_heads()}, rows);
  query_start_loc = int_storage(rng, start);
  seq_lens = int_storage(rng, shape.seq_lens);
  params = make_params(rng, shape, head_values);
  fill_cache(rng);
  out.freeze();
  if (options.lse) lse.freeze();
}

void Int8Problem::fill_cache(Rng& rng) {
  Layout cache;
  cache.padded = options.padded;
  const std::int64_t n = blocks.num_blocks, heads = shape.kv_heads, size = options.block_size;
  k = Storage(rng, DType::i8, {n, heads, size, shape.head_dim}, cache);
  k_scale = Storage(rng, DType::f32, {n, heads, size}, cache);
  v = Storage(rng, options.values, {n, heads, size, shape.head_dim_v}, cache);
  const bool int8_values = options.values == DType::i8;
  for (int r = 0; r < shape.num_reqs(); ++r) {
    const std::int64_t seq_len = shape.seq_lens[static_cast<std::size_t>(r)];
    for (std::int64_t j = shape.first_visible_key(r); j < seq_len; ++j) {
      for (int h = 0; h < heads; ++h) {
        const std::int64_t block = blocks.block(r, j), at = j % size;
        k.set_random(rng, k.offset({block, h, at, 0}), shape.head_dim, kCodeSize);
        k_scale.set(k_scale.offset({block, h, at}), random_scale(rng, 1.0));
        v.set_random(rng, v.offset({block, h, at, 0}), shape.head_dim_v,
                     int8_values ? kCodeSize : shape.value_magnitude);
      }
    }
  }
  if (int8_values) {
    v_scale = Storage(rng, DType::f32, {heads, shape.head_dim_v});
    for (const std::int64_t offset : v_scale.offsets())
      v_scale.set(offset, random_scale(rng, shape.value_magnitude));
  }
  if (options.smooth_keys) {
    k_mean = Storage(rng, DType::f32, {shape.num_reqs(), heads, shape.head_dim}, cache);
    k_mean.set_random(rng, 1.0);
  }
}

FlashAttnVarlenInt8Args Int8Problem::args() const {
  FlashAttnVarlenInt8Args a;
  a.q = q.view();
  a.q_scale = q_scale.view();
  a.k = k.view();
  a.k_scale = k_scale.view();
  a.v = v.view();
  a.v_scale = v_scale.view();
  a.k_mean = k_mean.view();
  a.out = out.view();
  if (options.lse) a.lse = lse.view();
  a.query_start_loc = query_start_loc.view();
  a.seq_lens = seq_lens.view();
  a.block_table = blocks.table.view();
  a.params = params;
  return a;
}

void Int8Problem::reset() {
  out.reset();
  if (options.lse) lse.reset();
}

std::string Int8Problem::describe() const {
  std::string text =
      shape.describe() + fmt::format(" values {} out {} block_size {}", to_string(options.values),
                                     to_string(options.out), options.block_size);
  if (options.padded) text += " padded";
  if (options.smooth_keys) text += " smooth keys";
  return text;
}

}  // namespace attend::conformance
