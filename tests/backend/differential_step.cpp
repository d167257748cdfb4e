// SPDX-License-Identifier: Apache-2.0
#include "backend/differential_step.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <set>

#include "attend/backend/selector.h"
#include "attend/cache/differential.h"
#include "attend/oracle/differential.h"
#include "backends/common/kv_cache_dtype.h"

namespace attend::testing {
namespace {

constexpr int kPoison = 0xFF;  // NaN in every type
constexpr std::int32_t kGarbage = 1 << 28;

int sum(const std::vector<int>& v) { return std::accumulate(v.begin(), v.end(), 0); }

std::vector<int> add(const std::vector<int>& a, const std::vector<int>& b) {
  std::vector<int> r(a.size());
  for (std::size_t i = 0; i < a.size(); ++i) r[i] = a[i] + b.at(i);
  return r;
}

int blocks(int tokens, int block_size) { return (tokens + block_size - 1) / block_size; }

KvCacheSpec cache_spec(const DifferentialOptions& o) {
  KvCacheSpec spec;
  spec.num_blocks = 2;  // never used: must stay as they are
  for (const int len : add(o.query_lens, o.context_lens))
    spec.num_blocks += blocks(len, o.block_size);
  spec.block_size = o.block_size;
  spec.num_kv_heads = o.num_kv_heads;
  spec.head_size = o.head_size;
  spec.dtype = resolve_kv_cache_dtype(o.kv_cache_dtype, o.dtype).value().dtype;
  spec.num_layers = o.num_layers;
  return spec;
}

std::vector<std::int64_t> cache_shape(const DifferentialOptions& o) {
  return o.variant == DifferentialVariant::v1 ? differential_cache_shape(cache_spec(o))
                                              : flash_attn_cache_shape(cache_spec(o));
}

std::int64_t num_elements(const std::vector<std::int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), std::int64_t{1}, std::multiplies<>());
}

int table_width(const DifferentialOptions& o) {
  const auto lens = add(o.query_lens, o.context_lens);
  return blocks(*std::max_element(lens.begin(), lens.end()), o.block_size) + 2;
}

std::size_t row_bytes(const ConstTensorView& row) {
  return static_cast<std::size_t>(row.shape[0]) * size_of(row.dtype);
}

void copy_row(const TensorView& to, const ConstTensorView& from) {
  std::memcpy(to.data, from.data, row_bytes(from));
}

TensorView head_row(const TensorView& t, std::int64_t token, std::int64_t head) {
  return t.select(0, token).select(0, head);
}

void copy_token(const TensorView& to, std::int64_t to_token, const TensorView& from,
                std::int64_t from_token) {
  for (std::int64_t h = 0; h < from.shape[1]; ++h)
    copy_row(head_row(to, to_token, h), head_row(from, from_token, h));
}

bool is_poison(const ConstTensorView& row) {
  const auto* p = row.as<unsigned char>();
  return std::all_of(p, p + row_bytes(row), [](unsigned char byte) { return byte == kPoison; });
}

double decoded(const ConstTensorView& row, int d) {
  if (row.dtype == DType::fp8_e4m3) return to_f32(row.as<fp8_e4m3>()[d]);
  if (row.dtype == DType::fp8_e5m2) return to_f32(row.as<fp8_e5m2>()[d]);
  return get(row, {d});
}

std::vector<float> normal_values(Rng& rng, int count, float scale) {
  std::vector<float> v(static_cast<std::size_t>(count));
  for (float& x : v) x = scale * rng.normal();
  return v;
}

/// The last layer of a cache whose dimensions lie in memory in that order; with layers it has more
/// dimensions than a view.
TensorView last_layer(const TensorView& memory, const std::vector<std::int64_t>& shape,
                      const std::vector<int>& order, bool layered) {
  std::vector<std::int64_t> strides(shape.size());
  std::int64_t stride = 1;
  for (auto dim = order.rbegin(); dim != order.rend(); ++dim) {
    strides[static_cast<std::size_t>(*dim)] = stride;
    stride *= shape[static_cast<std::size_t>(*dim)];
  }
  const std::size_t first = layered ? 1 : 0;
  const std::int64_t begin = layered ? (shape[0] - 1) * strides[0] : 0;
  TensorView view(memory.slice(0, begin, 1).data, memory.dtype, std::span(shape).subspan(first));
  std::copy(strides.begin() + static_cast<std::ptrdiff_t>(first), strides.end(),
            view.strides.begin());
  return view;
}

}  // namespace

const differential::DifferentialMetadata& as_differential(const Metadata& metadata) {
  return dynamic_cast<const differential::DifferentialMetadata&>(metadata);
}

DifferentialStep::DifferentialStep(const DifferentialOptions& o)
    : options(o),
      seq_lens(add(o.query_lens, o.context_lens)),
      block_table(DType::i32, {num_reqs() + o.padding, table_width(o)}),
      query(o.dtype, {sum(o.query_lens) + o.padding, o.num_q_heads, o.head_size}),
      key(o.dtype, {sum(o.query_lens) + o.padding, o.num_kv_heads, o.head_size}),
      value(o.dtype, {sum(o.query_lens) + o.padding, o.num_kv_heads, o.head_size}),
      token_lambda(o.dtype, {sum(o.query_lens) + o.padding, o.num_q_heads / 2}),
      output(o.dtype,
             {sum(o.query_lens) + o.padding, o.num_q_heads / (is_v1() ? 1 : 2), o.head_size}),
      lse(DType::f32, {sum(o.query_lens) + o.padding, o.num_q_heads}),
      cache_memory(cache_spec(o).dtype, {num_elements(cache_shape(o))}),
      executor(make_thread_pool(o.num_workers)) {
  builder_config.num_q_heads = o.num_q_heads;
  builder_config.cache = cache_spec(o);
  builder_config.num_workers = o.num_workers;
  builder_config.differential = DifferentialBuilderConfig{o.variant};
  if (o.sliding_window) {
    builder_config.window_left = *o.sliding_window - 1;
    builder_config.window_right = 0;
  }
  for (HostTensor* t : {&query, &key, &value, &token_lambda, &output, &lse, &cache_memory})
    t->fill_bytes(kPoison);
  fill_layer();
  fill_tokens();
  fill_batch();
  fill_cache();
}

void DifferentialStep::fill_layer() {
  Rng rng(options.seed + 2);
  impl_config.num_q_heads = options.num_q_heads;
  impl_config.num_kv_heads = options.num_kv_heads;
  impl_config.head_size = options.head_size;
  impl_config.softcap = options.softcap;
  impl_config.sliding_window = options.sliding_window;
  impl_config.alibi_slopes = options.alibi_slopes;
  impl_config.sinks = options.sinks;
  impl_config.dtype = options.dtype;
  impl_config.kv_cache_dtype = options.kv_cache_dtype;
  if (is_fp8_cache()) {
    for (int h = 0; h < options.num_kv_heads; ++h) {
      impl_config.k_scale.push_back(rng.uniform(0.01F, 0.02F));
      impl_config.v_scale.push_back(rng.uniform(0.01F, 0.02F));
    }
  }
  DifferentialLayerConfig layer;
  layer.variant = options.variant;
  layer.pairing = options.pairing;
  layer.norm = is_v1();
  if (is_v1()) {
    for (auto* v : {&layer.lambda_q1, &layer.lambda_k1, &layer.lambda_q2, &layer.lambda_k2})
      *v = normal_values(rng, options.head_size, 0.1F);
    layer.lambda_init = 0.6;
    layer.norm_weight = normal_values(rng, 2 * options.head_size, 1.0F);
  }
  impl_config.differential = layer;
}

void DifferentialStep::fill_tokens() {
  Rng rng(options.seed);
  std::int64_t token = 0;
  for (std::size_t r = 0; r < seq_lens.size(); ++r) {
    const auto rows = [&](std::vector<HostTensor>& all) {
      all.emplace_back(options.dtype, std::initializer_list<std::int64_t>{
                                          seq_lens[r], options.num_kv_heads, options.head_size});
      all.back().fill_normal(rng);
      for (int j = 0; j < options.shared_keys; ++j) copy_token(all.back(), j, all.front(), j);
    };
    rows(keys_);
    rows(values_);
    HostTensor q(options.dtype, {options.query_lens[r], options.num_q_heads, options.head_size});
    q.fill_normal(rng);
    HostTensor lambdas(options.dtype, {options.query_lens[r], options.num_q_heads / 2});
    lambdas.fill_normal(rng);
    for (int t = 0; t < options.query_lens[r]; ++t, ++token) {
      copy_token(query, token, q, t);
      copy_token(key, token, keys_.back(), options.context_lens[r] + t);
      copy_token(value, token, values_.back(), options.context_lens[r] + t);
      copy_row(token_lambda.view().select(0, token), lambdas.view().select(0, t));
    }
  }
}

void DifferentialStep::fill_batch() {
  // Blocks in a shuffled order; the first and the last block of the cache stay free.
  Rng rng(options.seed + 1);
  std::vector<std::int32_t> free(static_cast<std::size_t>(builder_config.cache.num_blocks - 2));
  std::iota(free.begin(), free.end(), 1);
  for (std::size_t i = free.size(); i > 1; --i)
    std::swap(free[i - 1],
              free[static_cast<std::size_t>(rng.integer(0, static_cast<std::int64_t>(i) - 1))]);
  const auto table = block_table.as<std::int32_t>();
  std::fill(table.begin(), table.end(), kGarbage);
  const auto width = static_cast<std::size_t>(block_table.view().shape[1]);
  batch.query_start_loc = {0};
  for (std::size_t r = 0; r < seq_lens.size(); ++r) {
    for (std::size_t b = 0; std::cmp_less(b, blocks(seq_lens[r], options.block_size)); ++b) {
      const bool shared = r > 0 && std::cmp_less(b, options.shared_keys / options.block_size);
      table[r * width + b] = shared ? table[b] : free.back();
      if (!shared) free.pop_back();
    }
    batch.query_start_loc.push_back(batch.query_start_loc.back() + options.query_lens[r]);
    batch.seq_lens.push_back(seq_lens[r]);
  }
  batch.num_reqs = num_reqs();
  batch.num_tokens = sum(options.query_lens);
  batch.max_query_len = *std::max_element(options.query_lens.begin(), options.query_lens.end());
  batch.max_seq_len = *std::max_element(seq_lens.begin(), seq_lens.end()) + 100;
  batch.request_causal = options.request_causal;
  batch.block_table = block_table;
  for (int r = 0; r < num_reqs(); ++r) {
    const auto i = static_cast<std::size_t>(r);
    for (int j = options.context_lens[i]; j < seq_lens[i]; ++j)
      batch.slot_mapping.push_back(slot(r, j));
  }
  for (int p = 0; p < options.padding; ++p) {
    batch.query_start_loc.push_back(-kGarbage);
    batch.seq_lens.push_back(kGarbage);
    batch.slot_mapping.push_back(-1);
  }
}

void DifferentialStep::fill_cache() {
  const bool layered = options.num_layers > 0;
  const auto order = is_v1() ? find_backend("DIFFERENTIAL_FLASH_ATTN")
                                   .kv_cache_stride_order(options.layout, layered, KvFormat::plain)
                             : flash_attn_stride_order(options.layout, layered);
  cache = last_layer(cache_memory, cache_shape(options), order, layered);
  if (is_fp8_cache()) return;
  for (int r = 0; r < num_reqs(); ++r) {
    const auto i = static_cast<std::size_t>(r);
    for (int t = 0; t < options.context_lens[i]; ++t) {
      for (int h = 0; h < options.num_kv_heads; ++h) {
        copy_row(cache_row(0, slot(r, t), h), head_row(keys_[i], t, h));
        copy_row(cache_row(1, slot(r, t), h), head_row(values_[i], t, h));
      }
    }
  }
}

std::int64_t DifferentialStep::slot(int request, int position) const {
  const auto index = request * block_table.view().shape[1] + position / options.block_size;
  return std::int64_t{block_table.as<std::int32_t>()[static_cast<std::size_t>(index)]} *
             options.block_size +
         position % options.block_size;
}

TensorView DifferentialStep::cache_row(int plane, std::int64_t s, int head) const {
  TensorView rows = cache;
  if (is_v1()) {
    const int pairs = options.num_kv_heads / 2;
    const bool halves = options.pairing == HeadPairing::halves;
    rows = cache.select(0, halves ? head / pairs : head % 2);
    head = halves ? head % pairs : head / 2;
  }
  return rows.select(0, plane)
      .select(0, s / options.block_size)
      .select(0, s % options.block_size)
      .select(0, head);
}

ForwardArgs DifferentialStep::forward_args() {
  ForwardArgs args;
  args.query = query;
  args.key = key;
  args.value = value;
  if (!is_v1()) args.token_lambda = token_lambda;
  args.kv_cache = cache;
  args.output = output;
  args.lse = lse;
  args.workspace = workspace.workspace();
  args.executor = executor.get();
  return args;
}

std::unique_ptr<Metadata> DifferentialStep::build(int common_prefix_len) {
  return find_backend("DIFFERENTIAL_FLASH_ATTN")
      .make_builder(builder_config)
      ->build(common_prefix_len, batch);
}

void DifferentialStep::forward(const Metadata& metadata) {
  workspace.reserve(metadata.workspace_bytes());
  find_backend("DIFFERENTIAL_FLASH_ATTN")
      .make_impl(impl_config)
      ->forward(forward_args(), &metadata);
}

void DifferentialStep::run_parts(const std::vector<DifferentialPart>& parts) {
  CommonMetadata part;
  part.query_start_loc = {0};
  part.num_reqs = static_cast<int>(parts.size());
  std::vector<std::int64_t> rows;  // of this step
  HostTensor table(DType::i32, {part.num_reqs, block_table.view().shape[1]});
  for (std::size_t p = 0; p < parts.size(); ++p) {
    const auto r = static_cast<std::size_t>(parts[p].request);
    for (int t = parts[p].begin; t < parts[p].end; ++t) {
      rows.push_back(batch.query_start_loc[r] + t);
      part.slot_mapping.push_back(slot(parts[p].request, options.context_lens[r] + t));
    }
    part.query_start_loc.push_back(static_cast<std::int32_t>(rows.size()));
    part.seq_lens.push_back(options.context_lens[r] + parts[p].end);
    part.max_query_len = std::max(part.max_query_len, parts[p].end - parts[p].begin);
    part.max_seq_len = std::max(part.max_seq_len, part.seq_lens.back());
    copy_row(table.view().select(0, static_cast<std::int64_t>(p)),
             block_table.view().select(0, parts[p].request));
  }
  part.num_tokens = static_cast<int>(rows.size());
  part.block_table = table;
  const Backend& backend = find_backend("DIFFERENTIAL_FLASH_ATTN");
  const auto metadata = backend.make_builder(builder_config)->build(0, part);
  workspace.reserve(metadata->workspace_bytes());
  const auto empty_like = [&](const TensorView& t) {
    std::vector<std::int64_t> shape(t.shape.begin(), t.shape.begin() + t.rank);
    shape[0] = part.num_tokens;
    return HostTensor(t.dtype, shape);
  };
  const HostTensor q = empty_like(query), k = empty_like(key), v = empty_like(value);
  const HostTensor out = empty_like(output), part_lse = empty_like(lse);
  const HostTensor lambdas = empty_like(token_lambda);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto to = static_cast<std::int64_t>(i);
    copy_token(q, to, query, rows[i]);
    copy_token(k, to, key, rows[i]);
    copy_token(v, to, value, rows[i]);
    copy_row(lambdas.view().select(0, to), token_lambda.view().select(0, rows[i]));
  }
  ForwardArgs args = forward_args();
  args.query = q;
  args.key = k;
  args.value = v;
  if (!is_v1()) args.token_lambda = lambdas;
  args.output = out;
  args.lse = part_lse;
  backend.make_impl(impl_config)->forward(args, metadata.get());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    copy_token(output, rows[i], out, static_cast<std::int64_t>(i));
    copy_row(lse.view().select(0, rows[i]),
             part_lse.view().select(0, static_cast<std::int64_t>(i)));
  }
}

void DifferentialStep::expect_oracle() const {
  const DifferentialLayerConfig& layer = *impl_config.differential;
  const auto view = [](const std::vector<float>& v) {
    return ConstTensorView(v.data(), DType::f32, {static_cast<std::int64_t>(v.size())});
  };
  for (int r = 0; r < num_reqs(); ++r) {
    const auto i = static_cast<std::size_t>(r);
    const std::int32_t first = batch.query_start_loc[i], query_len = options.query_lens[i];
    if (query_len == 0) continue;
    const std::int32_t query_start_loc[] = {0, query_len};
    const std::int32_t cu_seqlens_kv[] = {0, seq_lens[i]};
    DifferentialAttentionArgs a;
    a.q = query.view().slice(0, first, query_len);
    a.out = output.view().slice(0, first, query_len);
    a.lse = lse.view().slice(0, first, query_len);
    a.query_start_loc = ConstTensorView(query_start_loc, DType::i32, {2});
    if (is_fp8_cache()) {
      a.k = cache.select(is_v1() ? 1 : 0, 0);
      a.v = cache.select(is_v1() ? 1 : 0, 1);
      a.seq_lens = ConstTensorView(&seq_lens[i], DType::i32, {1});
      a.block_table = block_table.view().slice(0, r, 1);
      a.k_descale =
          ConstTensorView(impl_config.k_scale.data(), DType::f32, {1, options.num_kv_heads});
      a.v_descale =
          ConstTensorView(impl_config.v_scale.data(), DType::f32, {1, options.num_kv_heads});
    } else {
      a.k = keys_[i];
      a.v = values_[i];
      a.cu_seqlens_kv = ConstTensorView(cu_seqlens_kv, DType::i32, {2});
    }
    a.variant = layer.variant;
    a.pairing = layer.pairing;
    a.combine.norm = layer.norm;
    if (is_v1()) {
      double dots[2] = {0.0, 0.0};
      for (std::size_t d = 0; d < layer.lambda_q1.size(); ++d) {
        dots[0] += double{layer.lambda_q1[d]} * layer.lambda_k1[d];
        dots[1] += double{layer.lambda_q2[d]} * layer.lambda_k2[d];
      }
      a.combine.lambda =
          static_cast<float>(std::exp(dots[0]) - std::exp(dots[1]) + layer.lambda_init);
      a.combine.norm_weight = view(layer.norm_weight);
      a.combine.out_scale = static_cast<float>(1.0 - layer.lambda_init);
    } else {
      a.combine.token_lambda = token_lambda.view().slice(0, first, query_len);
    }
    a.params.causal = options.request_causal.empty() || options.request_causal[i] != 0;
    a.params.window_left = builder_config.window_left;
    a.params.window_right = builder_config.window_right;
    a.params.softcap = options.softcap;
    if (!options.alibi_slopes.empty()) a.params.alibi_slopes = view(options.alibi_slopes);
    if (!options.sinks.empty()) a.params.sinks = view(options.sinks);
    const oracle::Result want = oracle::differential_attention(a);
    std::size_t n = 0, row = 0;
    for (std::int64_t t = 0; t < query_len; ++t) {
      for (int h = 0; h < options.num_q_heads; ++h, ++row)
        ASSERT_NEAR(get(lse, {first + t, h}), want.lse[row], want.lse_bound[row])
            << "LSE of request " << r << ", token " << t << ", head " << h;
      for (std::int64_t h = 0; h < output.view().shape[1]; ++h) {
        for (std::int64_t d = 0; d < options.head_size; ++d, ++n)
          ASSERT_NEAR(get(output, {first + t, h, d}), want.out[n], want.out_bound[n])
              << "request " << r << ", token " << t << ", head " << h << ", dim " << d;
      }
    }
  }
  for (std::int64_t t = batch.num_tokens; t < output.view().shape[0]; ++t) {
    EXPECT_TRUE(is_poison(lse.view().select(0, t))) << "LSE of padding row " << t;
    for (std::int64_t h = 0; h < output.view().shape[1]; ++h)
      EXPECT_TRUE(is_poison(head_row(output, t, h))) << "padding row " << t;
  }
}

void DifferentialStep::expect_cache() const {
  std::set<std::int64_t> used;
  // Of a normal number: 3 bits of e4m3 behind the leading one, 2 of e5m2.
  const double relative = builder_config.cache.dtype == DType::fp8_e4m3 ? 0x1p-4 : 0x1p-3;
  const auto expect_row = [&](int plane, std::int64_t s, int head, const TensorView& want) {
    const TensorView got = cache_row(plane, s, head);
    if (!is_fp8_cache()) return std::memcmp(got.data, want.data, row_bytes(want)) == 0;
    const float scale =
        (plane == 0 ? impl_config.k_scale : impl_config.v_scale)[static_cast<std::size_t>(head)];
    for (int d = 0; d < options.head_size; ++d) {
      const double x = get(want, {d}) / scale;
      if (std::abs(decoded(got, d) - x) > relative * std::max(std::abs(x), 0x1p-5)) return false;
    }
    return true;
  };
  for (int r = 0; r < num_reqs(); ++r) {
    const auto i = static_cast<std::size_t>(r);
    for (int t = 0; t < seq_lens[i]; ++t) {
      used.insert(slot(r, t));
      for (int h = 0; h < options.num_kv_heads; ++h) {
        ASSERT_TRUE(expect_row(0, slot(r, t), h, head_row(keys_[i], t, h)))
            << "key of request " << r << ", token " << t << ", head " << h;
        ASSERT_TRUE(expect_row(1, slot(r, t), h, head_row(values_[i], t, h)))
            << "value of request " << r << ", token " << t << ", head " << h;
      }
    }
  }
  for (std::int64_t s = 0; s < builder_config.cache.num_blocks * options.block_size; ++s) {
    if (used.contains(s)) continue;
    for (int h = 0; h < options.num_kv_heads; ++h)
      ASSERT_TRUE(is_poison(cache_row(0, s, h)) && is_poison(cache_row(1, s, h))) << "slot " << s;
  }
  // Other layers of the same memory: what is not a row of this one must still be poison.
  const auto bytes = cache_memory.snapshot();
  const std::int64_t written = std::ssize(used) * 2 * options.num_kv_heads * options.head_size *
                               static_cast<std::int64_t>(size_of(cache.dtype));
  EXPECT_GE(std::ranges::count(bytes, kPoison), std::ssize(bytes) - written);
}

}  // namespace attend::testing
