// SPDX-License-Identifier: Apache-2.0
#include "latent_batch.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "attend/cache/row_format.h"
#include "attend/ops/mla_cache.h"

namespace attend::testing {
namespace {

constexpr int kSpareBlocks = 3;

std::int64_t blocks_of(const LatentOptions& o, const LatentRequest& r) {
  return (r.keys + o.block_size - 1) / o.block_size;
}

std::int64_t num_tokens(const std::vector<LatentRequest>& requests) {
  std::int64_t n = 0;
  for (const LatentRequest& r : requests) n += r.query;
  return n;
}

std::int64_t num_blocks(const LatentOptions& o, const std::vector<LatentRequest>& requests) {
  std::int64_t n = kSpareBlocks;
  for (const LatentRequest& r : requests) n += blocks_of(o, r);
  return n;
}

/// Of the format with so many elements.
std::int64_t row_bytes(int dim) {
  for (const RowFormat* f : row_formats())
    if (row_dim(*f) == dim) return f->row_bytes;
  return 0;
}

std::int64_t table_width(const LatentOptions& o, const std::vector<LatentRequest>& requests) {
  std::int64_t n = 0;
  for (const LatentRequest& r : requests) n = std::max(n, blocks_of(o, r));
  return n + 1;
}

Rng rng_of(int id, int position, unsigned kind) {
  return Rng((static_cast<std::uint64_t>(id) << 40) +
             (static_cast<std::uint64_t>(position + 1000) << 8) + kind);
}

/// Row `offset` of a block of a cache of bytes.
void fill_coded(const TensorView& block, std::int64_t offset, const RowFormat& f, Rng& rng) {
  auto* row = block.as<unsigned char>() + offset * f.step;
  unsigned char* scales =
      f.scales_apart ? block.as<unsigned char>() + block.shape[0] * f.step + offset * f.scale_bytes
                     : row + f.scales_at;
  for (int i = 0; i < f.latent; ++i) {
    const auto code = static_cast<unsigned char>(rng.integer(0, 255));
    row[i] = (code & 0x7f) == 0x7f ? 0 : code;  // no NaN
  }
  for (int t = 0; t < f.latent / f.tile; ++t) {
    if (f.scale == RowScale::ue8m0) {
      scales[t] = static_cast<unsigned char>(127 + rng.integer(-9, -6));
      continue;
    }
    float scale = rng.uniform(0.001F, 0.02F);
    if (rng.chance(0.3)) scale = std::exp2(static_cast<float>(rng.integer(-9, -6)));
    std::memcpy(scales + 4 * t, &scale, 4);
  }
  HostTensor rope(DType::bf16, {f.rope});
  rope.fill_normal(rng);
  std::memcpy(row + f.rope_at, rope.view().data, rope.bytes());
}

/// The row of a key as it lies in a block of the cache.
void fill_key(const TensorView& block, std::int64_t offset, int id, int position) {
  Rng rng = rng_of(id, position, 1);
  const TensorView row = block.select(0, offset);
  auto* bytes = static_cast<unsigned char*>(row.data);
  if (row.dtype == DType::u8) {
    fill_coded(block, offset, *find_row_format(row.shape[0]), rng);
  } else if (is_fp8(row.dtype)) {
    // Either type's magnitudes below 2.
    const unsigned char most = row.dtype == DType::fp8_e4m3 ? 0x3f : 0x3e;
    for (std::int64_t i = 0; i < row.shape[0]; ++i)
      bytes[i] = static_cast<unsigned char>(rng.integer(0, most) | (rng.chance(0.5) ? 0x80 : 0));
  } else {
    HostTensor values(row.dtype, {row.shape[0]});
    values.fill_normal(rng);
    std::memcpy(row.data, values.view().data, values.bytes());
  }
}

}  // namespace

LatentBatch::LatentBatch(const LatentOptions& o, const std::vector<LatentRequest>& reqs)
    : options(o),
      requests(reqs),
      q(o.dtype, {num_tokens(reqs), o.heads, o.dim}),
      cache(o.cache,
            {num_blocks(o, reqs), o.block_size, o.cache == DType::u8 ? row_bytes(o.dim) : o.dim}),
      block_table(DType::i32, {static_cast<std::int64_t>(reqs.size()), table_width(o, reqs)}),
      query_start_loc(DType::i32, {static_cast<std::int64_t>(reqs.size()) + 1}),
      seq_lens(DType::i32, {static_cast<std::int64_t>(reqs.size())}),
      out(o.dtype, {num_tokens(reqs), o.heads, o.latent}),
      lse(DType::f32, {num_tokens(reqs), o.heads}),
      kv_scale(DType::f32, {1}) {
  kv_scale.as<float>()[0] = 0.75F;
  std::int64_t token = 0;
  for (std::size_t r = 0; r < reqs.size(); ++r) {
    for (int i = 0; i < reqs[r].query; ++i, ++token) {
      Rng rng = rng_of(reqs[r].id, reqs[r].keys - reqs[r].query + i, 0);
      HostTensor row(o.dtype, {o.heads, o.dim});
      row.fill_normal(rng);
      std::memcpy(q.view().select(0, token).data, row.view().data, row.bytes());
    }
    query_start_loc.as<std::int32_t>()[r + 1] = static_cast<std::int32_t>(token);
    seq_lens.as<std::int32_t>()[r] = reqs[r].keys;
  }
  place_keys();
}

void LatentBatch::place_keys() {
  cache.fill_bytes(0xff);
  block_table.fill_bytes(0xb3);
  std::vector<std::int32_t> free(static_cast<std::size_t>(cache.view().shape[0]));
  for (std::size_t b = 0; b < free.size(); ++b) free[b] = static_cast<std::int32_t>(b);
  Rng rng(options.placement);
  for (std::size_t b = free.size(); options.placement != 0 && b > 1; --b)
    std::swap(free[b - 1], free[static_cast<std::size_t>(rng.integer(0, static_cast<int>(b) - 1))]);
  for (std::size_t r = 0; r < requests.size(); ++r) {
    auto* row = block_table.view().select(0, static_cast<std::int64_t>(r)).as<std::int32_t>();
    for (int p = 0; p < requests[r].keys; ++p) {
      std::int32_t& block = row[p / options.block_size];
      if (p % options.block_size == 0) {
        block = free.back();
        free.pop_back();
      }
      fill_key(cache.view().select(0, block), p % options.block_size, requests[r].id, p);
    }
  }
}

MlaDecodeArgs LatentBatch::args() const {
  MlaDecodeArgs a;
  a.q = q;
  a.kv_cache = cache;
  a.block_table = block_table;
  a.query_start_loc = query_start_loc;
  a.seq_lens = seq_lens;
  a.out = out;
  a.lse = lse;
  if (is_fp8(options.cache)) a.kv_scale = kv_scale;
  a.params.scale = 1.0F / std::sqrt(192.0F);
  a.params.causal = options.causal;
  return a;
}

AttentionPlanInput LatentBatch::plan_input(int num_workers) const {
  AttentionPlanInput in;
  in.query_start_loc = query_start_loc.as<std::int32_t>();
  in.seq_lens = seq_lens.as<std::int32_t>();
  in.num_q_heads = options.heads;
  in.num_kv_heads = 1;
  in.head_dim_qk = options.dim;
  in.head_dim_v = options.latent;
  in.causal = options.causal;
  in.num_workers = num_workers;
  return in;
}

LatentBatch::Rows LatentBatch::rows() const {
  Rows rows;
  std::int64_t token = 0;
  for (const LatentRequest& r : requests) {
    for (int p = r.keys - r.query; p < r.keys; ++p, ++token) {
      auto& to = rows[{r.id, p}];
      for (const TensorView& row : {out.view().select(0, token), lse.view().select(0, token)}) {
        const auto* bytes = static_cast<const unsigned char*>(row.data);
        to.insert(to.end(), bytes,
                  bytes + static_cast<std::size_t>(row.numel()) * size_of(row.dtype));
      }
    }
  }
  return rows;
}

LatentBatch::Rows LatentBatch::run(Executor* executor, const KernelOptions& kernels) {
  out.fill_bytes(0xff);
  lse.fill_bytes(0xff);
  mla_decode(args(), executor, kernels);
  return rows();
}

LatentBatch upconverted(const LatentBatch& batch) {
  LatentOptions o = batch.options;
  o.cache = DType::bf16;
  LatentBatch plain(o, batch.requests);
  std::int64_t keys = 0;
  HostTensor starts(DType::i32, {static_cast<std::int64_t>(batch.requests.size())});
  for (std::size_t r = 0; r < batch.requests.size(); ++r) {
    starts.as<std::int32_t>()[r] = static_cast<std::int32_t>(keys);
    keys += batch.requests[r].keys;
  }
  HostTensor gathered(DType::bf16, {keys, o.dim});
  cp_gather_and_upconvert_fp8_kv_cache({batch.cache, gathered, batch.block_table, starts});
  std::int64_t from = 0;
  for (std::size_t r = 0; r < batch.requests.size(); ++r) {
    const auto* row =
        plain.block_table.view().select(0, static_cast<std::int64_t>(r)).as<std::int32_t>();
    for (int p = 0; p < batch.requests[r].keys; ++p, ++from)
      std::memcpy(
          plain.cache.view().select(0, row[p / o.block_size]).select(0, p % o.block_size).data,
          gathered.view().select(0, from).data, sizeof(bf16) * static_cast<std::size_t>(o.dim));
  }
  return plain;
}

}  // namespace attend::testing
