// SPDX-License-Identifier: Apache-2.0
#include "differential_batch.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace attend::testing {
namespace {

constexpr int kSpareBlocks = 3;

using Options = DifferentialBatchOptions;
using Requests = std::vector<DifferentialRequest>;

std::int64_t blocks_of(const Options& o, const DifferentialRequest& r) {
  return o.block_size == 0 ? 0 : (r.keys + o.block_size - 1) / o.block_size;
}

std::int64_t num_tokens(const Requests& requests) {
  std::int64_t n = 0;
  for (const DifferentialRequest& r : requests) n += r.query;
  return n;
}

/// Of the memory of keys and values: ragged [2, S, Hk, D]; else a cache, heads before tokens if
/// HND.
std::vector<std::int64_t> kv_shape(const Options& o, const Requests& requests) {
  std::int64_t blocks = kSpareBlocks, keys = 0;
  for (const DifferentialRequest& r : requests) {
    blocks += blocks_of(o, r);
    keys += r.keys;
  }
  if (o.block_size == 0) return {2, keys, o.kv_heads, o.dim};
  const std::int64_t heads = o.is_v2() ? o.kv_heads : o.kv_heads / 2;
  const std::int64_t first = o.hnd ? heads : o.block_size;
  const std::int64_t second = o.hnd ? o.block_size : heads;
  if (o.is_v2()) return {2, blocks, first, second, o.dim};
  return {2, 2, blocks, first, second, o.dim};
}

std::int64_t table_width(const Options& o, const Requests& requests) {
  std::int64_t n = 0;
  for (const DifferentialRequest& r : requests) n = std::max(n, blocks_of(o, r));
  return n + 1;
}

Rng rng_of(int id, int position, unsigned kind) {
  return Rng((static_cast<std::uint64_t>(id) << 40) +
             (static_cast<std::uint64_t>(position + 1000) << 8) + kind);
}

void fill_row(const TensorView& row, Rng& rng) {
  if (is_fp8(row.dtype)) {
    // Either type's magnitudes below 2.
    const unsigned char most = row.dtype == DType::fp8_e4m3 ? 0x3f : 0x3e;
    for (std::int64_t i = 0; i < row.shape[0]; ++i)
      row.as<unsigned char>()[i] =
          static_cast<unsigned char>(rng.integer(0, most) | (rng.chance(0.5) ? 0x80 : 0));
    return;
  }
  HostTensor values(row.dtype, {row.shape[0]});
  values.fill_normal(rng);
  std::memcpy(row.data, values.view().data, values.bytes());
}

void copy_row(const ConstTensorView& from, const TensorView& to) {
  std::memcpy(to.data, from.data, static_cast<std::size_t>(from.shape[0]) * size_of(from.dtype));
}

}  // namespace

DifferentialBatch::DifferentialBatch(const Options& o, const Requests& reqs)
    : options(o),
      requests(reqs),
      q(o.dtype, {num_tokens(reqs), o.q_heads(), o.dim}),
      kv(o.cache, kv_shape(o, reqs)),
      block_table(DType::i32, {static_cast<std::int64_t>(reqs.size()), table_width(o, reqs)}),
      query_start_loc(DType::i32, {static_cast<std::int64_t>(reqs.size()) + 1}),
      seq_lens(DType::i32, {static_cast<std::int64_t>(reqs.size())}),
      key_start_loc(DType::i32, {static_cast<std::int64_t>(reqs.size()) + 1}),
      out(o.dtype, {num_tokens(reqs), o.is_v2() ? o.q_heads() / 2 : o.q_heads(), o.dim}),
      maps(DType::f32, {num_tokens(reqs), o.q_heads(), o.width()}),
      lse(DType::f32, {num_tokens(reqs), o.q_heads()}),
      token_lambda(DType::f32, {num_tokens(reqs), o.q_heads() / 2}),
      norm_weight(DType::f32, {o.width()}),
      descale(DType::f32, {static_cast<std::int64_t>(reqs.size()), o.kv_heads}) {
  std::int64_t token = 0;
  for (std::size_t r = 0; r < reqs.size(); ++r) {
    for (int i = 0; i < reqs[r].query; ++i, ++token) {
      Rng rng = rng_of(reqs[r].id, reqs[r].keys - reqs[r].query + i, 0);
      for (int h = 0; h < o.q_heads(); ++h) fill_row(q.view().select(0, token).select(0, h), rng);
      HostTensor lambdas(DType::f32, {o.q_heads() / 2});
      lambdas.fill_normal(rng);
      copy_row(lambdas, token_lambda.view().select(0, token));
    }
    query_start_loc.as<std::int32_t>()[r + 1] = static_cast<std::int32_t>(token);
    seq_lens.as<std::int32_t>()[r] = reqs[r].keys;
    key_start_loc.as<std::int32_t>()[r + 1] = key_start_loc.as<std::int32_t>()[r] + reqs[r].keys;
    for (int h = 0; h < o.kv_heads; ++h)
      descale.as<float>()[r * static_cast<std::size_t>(o.kv_heads) + static_cast<std::size_t>(h)] =
          0.5F + 0.25F * static_cast<float>(h);
  }
  Rng rng(77);
  norm_weight.fill_uniform(rng, 0.5F, 1.5F);
  params.causal = true;
  combine.lambda = 0.4F;
  combine.norm = !o.is_v2();
  combine.out_scale = o.is_v2() ? 1.0F : 0.3F;
  if (o.is_v2()) combine.token_lambda = token_lambda;
  if (!o.is_v2()) combine.norm_weight = norm_weight;
  place_keys();
}

int DifferentialBatch::head(int pair, int branch, int heads) const noexcept {
  const bool interleaved = options.is_v2() || options.pairing == HeadPairing::interleaved;
  return interleaved ? 2 * pair + branch : pair + branch * heads / 2;
}

/// The cache as the op sees it, with K and V first: [2, (2 branches,) num_blocks, block_size,
/// heads, D].
TensorView DifferentialBatch::cache_view() const {
  TensorView t = kv;
  if (options.block_size == 0) return t;
  if (!options.is_v2()) {
    std::swap(t.shape[0], t.shape[1]);
    std::swap(t.strides[0], t.strides[1]);
  }
  if (options.hnd) {
    const int heads = t.rank - 3;
    std::swap(t.shape[static_cast<std::size_t>(heads)],
              t.shape[static_cast<std::size_t>(heads) + 1]);
    std::swap(t.strides[static_cast<std::size_t>(heads)],
              t.strides[static_cast<std::size_t>(heads) + 1]);
  }
  return t;
}

/// Row of a kv head in k or v.
TensorView DifferentialBatch::key_row(const TensorView& t, std::int64_t block, std::int64_t offset,
                                      int kv_head) const {
  if (options.block_size == 0) return t.select(0, offset).select(0, kv_head);
  if (options.is_v2()) return t.select(0, block).select(0, offset).select(0, kv_head);
  const bool interleaved = options.pairing == HeadPairing::interleaved;
  const int pairs = options.kv_heads / 2;
  const int pair = interleaved ? kv_head / 2 : kv_head % pairs;
  const int branch = interleaved ? kv_head % 2 : kv_head / pairs;
  return t.select(0, branch).select(0, block).select(0, offset).select(0, pair);
}

void DifferentialBatch::place_keys() {
  kv.fill_bytes(0xff);
  block_table.fill_bytes(0xb3);
  const TensorView cache = cache_view();
  std::vector<std::int32_t> free;
  const std::int64_t blocks =
      options.block_size == 0 ? 0 : cache.shape[static_cast<std::size_t>(cache.rank) - 4];
  for (std::int64_t b = 0; b < blocks; ++b) free.push_back(static_cast<std::int32_t>(b));
  Rng rng(options.placement);
  for (std::size_t b = free.size(); options.placement != 0 && b > 1; --b)
    std::swap(free[b - 1], free[static_cast<std::size_t>(rng.integer(0, static_cast<int>(b) - 1))]);
  for (std::size_t r = 0; r < requests.size(); ++r) {
    auto* table = block_table.view().select(0, static_cast<std::int64_t>(r)).as<std::int32_t>();
    for (int p = 0; p < requests[r].keys; ++p) {
      std::int64_t block = 0, offset = key_start_loc.as<std::int32_t>()[r] + p;
      if (options.block_size != 0) {
        std::int32_t& entry = table[p / options.block_size];
        if (p % options.block_size == 0) {
          entry = free.back();
          free.pop_back();
        }
        block = entry;
        offset = p % options.block_size;
      }
      for (int h = 0; h < options.kv_heads; ++h) {
        Rng key = rng_of(requests[r].id, p, 2 * static_cast<unsigned>(h) + 1);
        fill_row(key_row(cache.select(0, 0), block, offset, h), key);
        fill_row(key_row(cache.select(0, 1), block, offset, h), key);
      }
    }
  }
}

DifferentialAttentionArgs DifferentialBatch::args() const {
  DifferentialAttentionArgs a;
  a.q = q;
  a.k = cache_view().select(0, 0);
  a.v = cache_view().select(0, 1);
  (options.maps ? a.maps : a.out) = result();
  a.lse = lse;
  a.query_start_loc = query_start_loc;
  if (options.block_size == 0) {
    a.cu_seqlens_kv = key_start_loc;
  } else {
    a.seq_lens = seq_lens;
    a.block_table = block_table;
  }
  if (is_fp8(options.cache)) a.k_descale = a.v_descale = descale;
  a.variant = options.variant;
  a.pairing = options.pairing;
  a.combine = combine;
  a.params = params;
  return a;
}

AttentionPlanInput DifferentialBatch::plan_input(int num_workers) const {
  AttentionPlanInput in;
  in.query_start_loc = query_start_loc.as<std::int32_t>();
  in.seq_lens = seq_lens.as<std::int32_t>();
  in.causal = params.causal;
  in.window_left = params.window_left;
  in.window_right = params.window_right;
  in.num_workers = num_workers;
  differential_plan_shape(in, options.variant, options.q_heads(), options.kv_heads, options.dim);
  return in;
}

DifferentialBatch::Rows DifferentialBatch::rows() const {
  Rows rows;
  std::int64_t token = 0;
  for (const DifferentialRequest& r : requests) {
    for (int p = r.keys - r.query; p < r.keys; ++p, ++token) {
      auto& to = rows[{r.id, p}];
      for (const TensorView& row : {result().select(0, token), lse.view().select(0, token)}) {
        const auto* bytes = static_cast<const unsigned char*>(row.data);
        to.insert(to.end(), bytes,
                  bytes + static_cast<std::size_t>(row.numel()) * size_of(row.dtype));
      }
    }
  }
  return rows;
}

void DifferentialBatch::poison() noexcept {
  for (HostTensor* t : {&out, &maps, &lse}) t->fill_bytes(0xff);
}

DifferentialBatch::Rows DifferentialBatch::run(Executor* executor, const KernelOptions& kernels) {
  poison();
  differential_attention(args(), executor, kernels);
  return rows();
}

DifferentialBatch::Rows DifferentialBatch::run(const AttentionPlan& plan, Executor& executor) {
  poison();
  Buffer memory(plan.workspace_bytes);
  std::fill_n(static_cast<unsigned char*>(memory.data()), memory.size(), 0xff);
  differential_attention(args(), plan, memory.workspace(), executor);
  return rows();
}

namespace {

/// Heads of a batch by branch, then by pair, as in HeadPairing::halves; of variant v2 as they are.
struct Plain {
  explicit Plain(const DifferentialBatch& batch)
      : b(batch), ragged(ragged_options(batch), batch.requests) {}

  static Options ragged_options(const DifferentialBatch& batch) {
    Options o = batch.options;
    o.block_size = 0;
    return o;
  }
  /// Head of the batch that is head h here, of `heads`.
  int head(int h, int heads) const noexcept {
    return b.options.is_v2() ? h : b.head(h % (heads / 2), h / (heads / 2), heads);
  }
  /// Head of the batch whose values are part `part` of those of kv head h here.
  int value_head(int h, int part) const noexcept {
    const int heads = b.options.kv_heads;
    return b.options.is_v2() ? h : b.head(h % (heads / 2), part, heads);
  }
  /// [N, heads, D] of the heads that `from(h)` names.
  template <typename From>
  static HostTensor heads_of(const TensorView& t, const From& from) {
    HostTensor to(t.dtype, {t.shape[0], t.shape[1], t.shape[2]});
    for (std::int64_t i = 0; i < t.shape[0]; ++i)
      for (int h = 0; h < t.shape[1]; ++h)
        copy_row(t.select(0, i).select(0, from(h)), to.view().select(0, i).select(0, h));
    return to;
  }
  /// f32 [.., heads] likewise.
  template <typename From>
  static HostTensor numbers_of(const ConstTensorView& t, const From& from) {
    const std::int64_t heads = t.shape[t.rank - 1], rows = t.numel() / heads;
    HostTensor to(DType::f32, std::span(t.shape.data(), static_cast<std::size_t>(t.rank)));
    for (std::int64_t r = 0; r < rows; ++r)
      for (int h = 0; h < heads; ++h)
        to.view().as<float>()[r * heads + h] = t.as<float>()[r * heads + from(h)];
    return to;
  }
  /// Adds a part of the maps and their LSE to `to`.
  void attend(int part, IsaLevel level, PlainMaps& to) const;

  const DifferentialBatch& b;
  DifferentialBatch ragged;  ///< the batch with its keys in one row
};

void Plain::attend(int part, IsaLevel level, PlainMaps& to) const {
  const Options& o = b.options;
  const auto from_q = [&](int h) { return head(h, o.q_heads()); };
  const auto from_k = [&](int h) { return head(h, o.kv_heads); };
  const auto from_v = [&](int h) { return value_head(h, part); };
  const HostTensor q = heads_of(b.q, from_q), k = heads_of(ragged.kv.view().select(0, 0), from_k),
                   v = heads_of(ragged.kv.view().select(0, 1), from_v),
                   k_descale = numbers_of(b.descale.view(), from_k),
                   v_descale = numbers_of(b.descale.view(), from_v),
                   out(to.out.view().dtype, {q.view().shape[0], o.q_heads(), o.dim}),
                   lse(DType::f32, {q.view().shape[0], o.q_heads()});
  HostTensor slopes(DType::f32, {1}), sinks(DType::f32, {1});
  FlashAttnVarlenArgs a;
  a.q = q;
  a.k = k;
  a.v = v;
  a.out = out;
  a.lse = lse;
  a.query_start_loc = b.query_start_loc;
  a.cu_seqlens_kv = b.key_start_loc;
  a.params = b.params;
  if (b.params.alibi_slopes.defined())
    a.params.alibi_slopes = slopes = numbers_of(b.params.alibi_slopes, from_q);
  if (b.params.sinks.defined()) a.params.sinks = sinks = numbers_of(b.params.sinks, from_q);
  if (is_fp8(o.cache)) {
    a.k_descale = k_descale;
    a.v_descale = v_descale;
  }
  flash_attn_varlen(a, nullptr, {level, Arithmetic::exact});
  for (std::int64_t t = 0; t < q.view().shape[0]; ++t) {
    for (int h = 0; h < o.q_heads(); ++h) {
      const TensorView row = to.out.view().select(0, t).select(0, from_q(h));
      copy_row(out.view().select(0, t).select(0, h),
               row.slice(0, std::int64_t{part} * o.dim, o.dim));
      to.lse.view().select(0, t).as<float>()[from_q(h)] = lse.view().select(0, t).as<float>()[h];
    }
  }
}

}  // namespace

PlainMaps::PlainMaps(const DifferentialBatch& b, DType out_dtype, IsaLevel level)
    : out(out_dtype, {b.q.view().shape[0], b.options.q_heads(), b.options.width()}),
      lse(DType::f32, {b.q.view().shape[0], b.options.q_heads()}) {
  const Plain plain(b);
  for (int part = 0; part < (b.options.is_v2() ? 1 : 2); ++part) plain.attend(part, level, *this);
}

bool has_nan(const TensorView& t) {
  switch (t.dtype) {
    case DType::f32:
      return std::any_of(t.as<float>(), t.as<float>() + t.numel(),
                         [](float x) { return std::isnan(x); });
    case DType::f16:
      return std::any_of(t.as<f16>(), t.as<f16>() + t.numel(),
                         [](f16 x) { return std::isnan(to_f32(x)); });
    default:
      return std::any_of(t.as<bf16>(), t.as<bf16>() + t.numel(),
                         [](bf16 x) { return std::isnan(to_f32(x)); });
  }
}

}  // namespace attend::testing
