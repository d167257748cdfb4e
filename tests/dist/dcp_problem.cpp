// SPDX-License-Identifier: Apache-2.0
#include "dist/dcp_problem.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "attend/ops/cache.h"

namespace attend::testing {
namespace {

constexpr double kUnit = 0x1p-24;

std::int64_t sum(const std::vector<int>& lengths) {
  return std::accumulate(lengths.begin(), lengths.end(), std::int64_t{0});
}

std::int64_t requests(const DcpShape& s) { return static_cast<std::int64_t>(s.query_lens.size()); }

/// Table columns that the longest request needs.
std::int64_t used_columns(const DcpShape& s, std::size_t request) {
  const std::int64_t covered = std::int64_t{s.block_size} * s.layout.world_size;
  return (s.context_lens[request] + s.query_lens[request] + covered - 1) / covered;
}

std::int64_t table_columns(const DcpShape& s) {
  std::int64_t most = 0;
  for (std::size_t r = 0; r < s.query_lens.size(); ++r) most = std::max(most, used_columns(s, r));
  return most + 1;
}

void copy_row(const HostTensor& to, std::int64_t to_row, const HostTensor& from,
              std::int64_t from_row) {
  const TensorView source = from.view().select(0, from_row);
  std::memcpy(to.view().select(0, to_row).data, source.data,
              static_cast<std::size_t>(source.numel()) * size_of(source.dtype));
}

}  // namespace

DcpProblem::DcpProblem(const DcpShape& s, Rng& rng)
    : shape(s),
      tokens(sum(s.query_lens)),
      keys(sum(s.query_lens) + sum(s.context_lens)),
      q(s.dtype, {tokens, s.heads(), s.dim}),
      k(s.dtype, {keys, s.kv_heads, s.dim}),
      v(s.dtype, {keys, s.kv_heads, s.dim_v}),
      k_new(s.dtype, {tokens, s.kv_heads, s.dim}),
      v_new(s.dtype, {tokens, s.kv_heads, s.dim_v}),
      out(s.dtype, {tokens, s.heads(), s.dim_v}),
      lse(DType::f32, {tokens, s.heads()}),
      whole_out(s.dtype, {tokens, s.heads(), s.dim_v}),
      whole_lse(DType::f32, {tokens, s.heads()}),
      query_start_loc(DType::i32, {requests(s) + 1}),
      seq_lens(DType::i32, {requests(s)}),
      cu_seqlens_kv(DType::i32, {requests(s) + 1}),
      block_table(DType::i32, {requests(s), table_columns(s)}) {
  q.fill_normal(rng, 1.5F);
  k.fill_normal(rng);
  v.fill_normal(rng);
  for (std::size_t r = 0; r < s.query_lens.size(); ++r) {
    const std::int32_t length = s.context_lens[r] + s.query_lens[r];
    seq_lens.as<std::int32_t>()[r] = length;
    query_start_loc.as<std::int32_t>()[r + 1] =
        query_start_loc.as<std::int32_t>()[r] + s.query_lens[r];
    cu_seqlens_kv.as<std::int32_t>()[r + 1] = cu_seqlens_kv.as<std::int32_t>()[r] + length;
    for (int i = 0; i < s.query_lens[r]; ++i) {
      const std::int64_t token = query_start_loc.as<std::int32_t>()[r] + i;
      const std::int64_t key = cu_seqlens_kv.as<std::int32_t>()[r] + s.context_lens[r] + i;
      copy_row(k_new, token, k, key);
      copy_row(v_new, token, v, key);
    }
  }
  place_blocks(rng);
  fill_caches();
}

void DcpProblem::place_blocks(Rng& rng) {
  std::int64_t blocks = 2;  // some stay unused
  for (std::size_t r = 0; r < shape.query_lens.size(); ++r) blocks += used_columns(shape, r);
  std::vector<std::int32_t> free(static_cast<std::size_t>(blocks));
  std::iota(free.begin(), free.end(), 0);
  for (std::size_t i = free.size() - 1; i > 0; --i) {
    std::swap(free[i], free[static_cast<std::size_t>(rng.integer(0, static_cast<int>(i)))]);
  }
  const std::int64_t columns = block_table.view().shape[1];
  for (std::size_t r = 0; r < shape.query_lens.size(); ++r) {
    for (std::int64_t c = 0; c < columns; ++c) {
      std::int32_t& entry = block_table.as<std::int32_t>()[r * static_cast<std::size_t>(columns) +
                                                           static_cast<std::size_t>(c)];
      entry = std::numeric_limits<std::int32_t>::max();
      if (c >= used_columns(shape, r)) continue;
      entry = free.back();
      free.pop_back();
    }
  }
  for (int rank = 0; rank < shape.layout.world_size; ++rank) {
    k_cache.emplace_back(shape.dtype, std::array<std::int64_t, 4>{blocks, shape.block_size,
                                                                  shape.kv_heads, shape.dim});
    v_cache.emplace_back(shape.dtype, std::array<std::int64_t, 4>{blocks, shape.block_size,
                                                                  shape.kv_heads, shape.dim_v});
    k_cache.back().fill_bytes(0xFF);  // NaN in every type
    v_cache.back().fill_bytes(0xFF);
  }
}

void DcpProblem::fill_caches() {
  HostTensor positions(DType::i64, {keys});
  HostTensor slots(DType::i64, {keys});
  for (std::size_t r = 0; r < shape.query_lens.size(); ++r) {
    const std::int32_t first = cu_seqlens_kv.as<std::int32_t>()[r];
    for (std::int32_t i = first; i < cu_seqlens_kv.as<std::int32_t>()[r + 1]; ++i) {
      positions.as<std::int64_t>()[static_cast<std::size_t>(i)] = i - first;
    }
  }
  for (int rank = 0; rank < shape.layout.world_size; ++rank) {
    dcp_slot_mapping({.positions = positions,
                      .query_start_loc = cu_seqlens_kv,
                      .block_table = block_table,
                      .block_size = shape.block_size,
                      .layout = shape.layout,
                      .rank = rank,
                      .slot_mapping = slots});
    reshape_and_cache_flash({.key = k,
                             .value = v,
                             .key_cache = k_cache[static_cast<std::size_t>(rank)],
                             .value_cache = v_cache[static_cast<std::size_t>(rank)],
                             .slot_mapping = slots});
  }
}

FlashAttnVarlenArgs DcpProblem::whole() const {
  FlashAttnVarlenArgs a;
  a.q = q;
  a.k = k;
  a.v = v;
  a.out = whole_out;
  a.lse = whole_lse;
  a.query_start_loc = query_start_loc;
  a.cu_seqlens_kv = cu_seqlens_kv;
  a.params.causal = shape.causal;
  a.params.softcap = shape.softcap;
  return a;
}

DcpAttentionArgs DcpProblem::args(int rank) const {
  const std::int64_t heads = shape.heads_a_rank;
  DcpAttentionArgs a;
  a.q = q.view().slice(1, rank * heads, heads);
  a.k_cache = k_cache[static_cast<std::size_t>(rank)];
  a.v_cache = v_cache[static_cast<std::size_t>(rank)];
  a.k_new = k_new;
  a.v_new = v_new;
  a.out = out.view().slice(1, rank * heads, heads);
  a.lse = lse.view().slice(1, rank * heads, heads);
  a.query_start_loc = query_start_loc;
  a.seq_lens = seq_lens;
  a.block_table = block_table;
  a.request_causal = shape.request_causal;
  a.interleave = shape.layout.interleave;
  a.params.causal = shape.causal;
  a.params.softcap = shape.softcap;
  return a;
}

void DcpProblem::run(DcpCombine combine, int threads) {
  out.fill_bytes(0xFF);
  lse.fill_bytes(0xFF);
  run_in_process(shape.layout.world_size, [&](Communicator& c) {
    const auto pool = make_thread_pool(threads);
    DcpAttentionArgs a = args(c.rank());
    a.combine = combine;
    dcp_attention(a, c, pool.get());
  });
}

namespace {

double norm(const TensorView& row) {
  double squares = 0.0;
  for (std::int64_t d = 0; d < row.shape[0]; ++d) squares += std::pow(get(row, {d}), 2);
  return std::sqrt(squares);
}

/// Whole problem with |v|: gives sum_j p_j |v_j|, the magnitude that errors are relative to.
oracle::Result magnitudes(const DcpProblem& p, const FlashAttnVarlenArgs& whole) {
  HostTensor absolute(p.shape.dtype, std::span(p.v.view().shape.data(), 3));
  std::int64_t next = 0;
  absolute.fill([&] {
    const std::int64_t i = next++;
    const std::int64_t row = i / p.shape.dim_v;
    return std::abs(static_cast<float>(
        get(p.v.view(), {row / p.shape.kv_heads, row % p.shape.kv_heads, i % p.shape.dim_v})));
  });
  FlashAttnVarlenArgs a = whole;
  a.v = absolute;
  return oracle::flash_attn_varlen(a);
}

/// Adds to the oracle's bounds what splitting over ranks costs; derived in docs/numerics.md.
void widen(const DcpProblem& p, const FlashAttnVarlenArgs& whole, oracle::Result& result) {
  const DcpShape& s = p.shape;
  const oracle::Result magnitude = magnitudes(p, whole);
  const double type_unit = s.dtype == DType::f32 ? kUnit : s.dtype == DType::f16 ? 0x1p-11 : 0x1p-8;
  const double least = s.dtype == DType::f16 ? 0x1p-25 : 0.0;
  double longest_key = 0.0;
  for (std::int64_t j = 0; j < p.keys; ++j) {
    for (int h = 0; h < s.kv_heads; ++h) {
      longest_key = std::max(longest_key, norm(p.k.view().select(0, j).select(0, h)));
    }
  }
  for (std::int64_t row = 0; row < p.tokens * s.heads(); ++row) {
    const auto i = static_cast<std::size_t>(row);
    const TensorView query = p.q.view().select(0, row / s.heads()).select(0, row % s.heads());
    const double largest = norm(query) * longest_key / std::sqrt(static_cast<double>(s.dim)) +
                           std::log(static_cast<double>(p.keys + 1));
    const double lse_error = result.lse_bound[i] + 8 * kUnit * largest;
    result.lse_bound[i] = lse_error + 4 * kUnit * largest;
    const double relative =
        6 * lse_error + (s.layout.world_size + 10) * kUnit + 2 * kUnit * largest;
    for (int d = 0; d < s.dim_v; ++d) {
      const std::size_t at = i * static_cast<std::size_t>(s.dim_v) + static_cast<std::size_t>(d);
      result.out_bound[at] +=
          2 * relative * magnitude.out[at] + 1.01 * 2 * (type_unit * magnitude.out[at] + least);
    }
  }
}

}  // namespace

oracle::Result expected(const DcpProblem& p) {
  FlashAttnVarlenArgs whole = p.whole();
  const auto result_for = [&](bool causal) {
    whole.params.causal = causal;
    oracle::Result result = oracle::flash_attn_varlen(whole);
    widen(p, whole, result);
    return result;
  };
  oracle::Result result = result_for(p.shape.causal);
  if (p.shape.request_causal.empty()) return result;
  // Requests with the other flag come from a second run of the oracle.
  const oracle::Result other = result_for(!p.shape.causal);
  const auto heads = static_cast<std::size_t>(p.shape.heads());
  const auto width = heads * static_cast<std::size_t>(p.shape.dim_v);
  const auto starts = p.query_start_loc.as<std::int32_t>();
  for (std::size_t r = 0; r < p.shape.request_causal.size(); ++r) {
    if ((p.shape.request_causal[r] != 0) == p.shape.causal) continue;
    const auto take = [&](std::vector<double>& to, const std::vector<double>& from,
                          std::size_t row) {
      const auto begin = static_cast<std::ptrdiff_t>(static_cast<std::size_t>(starts[r]) * row);
      const auto end = static_cast<std::ptrdiff_t>(static_cast<std::size_t>(starts[r + 1]) * row);
      std::copy(from.begin() + begin, from.begin() + end, to.begin() + begin);
    };
    take(result.out, other.out, width);
    take(result.out_bound, other.out_bound, width);
    take(result.lse, other.lse, heads);
    take(result.lse_bound, other.lse_bound, heads);
  }
  return result;
}

}  // namespace attend::testing
