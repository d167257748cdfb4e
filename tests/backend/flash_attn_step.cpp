// SPDX-License-Identifier: Apache-2.0
#include "backend/flash_attn_step.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <set>

#include "attend/backend/selector.h"
#include "attend/oracle/attention.h"
#include "backends/flash_attn/metadata.h"

namespace attend::testing {
namespace {

constexpr int kPoison = 0xFF;  // NaN in f32, f16 and bf16
constexpr std::int32_t kGarbage = 1 << 28;

int sum(const std::vector<int>& v) { return std::accumulate(v.begin(), v.end(), 0); }

std::vector<int> add(const std::vector<int>& a, const std::vector<int>& b) {
  std::vector<int> r(a.size());
  for (std::size_t i = 0; i < a.size(); ++i) r[i] = a[i] + b.at(i);
  return r;
}

int blocks(int tokens, int block_size) { return (tokens + block_size - 1) / block_size; }

std::vector<int> lengths_of_keys(const StepOptions& o) {
  return o.encoder_lens.empty() ? add(o.query_lens, o.context_lens) : o.encoder_lens;
}

std::vector<std::int64_t> token_shape(const StepOptions& o, int heads) {
  return {sum(o.query_lens) + o.padding, heads, o.head_size};
}

std::vector<std::int64_t> key_shape(const StepOptions& o) {
  if (o.encoder_lens.empty()) return token_shape(o, o.num_kv_heads);
  std::int64_t rows = o.padding;
  for (std::size_t r = 0; r < o.encoder_lens.size(); ++r) {
    if (o.new_encoder.at(r) != 0) rows += o.encoder_lens[r];
  }
  return {rows, o.num_kv_heads, o.head_size};
}

std::int64_t num_blocks(const StepOptions& o, const std::vector<int>& seq_lens) {
  std::int64_t n = 2;  // never used: must stay as they are
  for (const int len : seq_lens) n += blocks(len, o.block_size);
  return n;
}

int table_width(const StepOptions& o, const std::vector<int>& seq_lens) {
  const int longest = *std::max_element(seq_lens.begin(), seq_lens.end());
  return blocks(longest, o.block_size) + 2;
}

KvCacheSpec cache_spec(const StepOptions& o, const std::vector<int>& seq_lens) {
  KvCacheSpec spec;
  spec.num_blocks = num_blocks(o, seq_lens);
  spec.block_size = o.block_size;
  spec.num_kv_heads = o.num_kv_heads;
  spec.head_size = o.head_size;
  spec.dtype = o.dtype;
  spec.num_layers = o.num_layers;
  return spec;
}

void copy_row(const TensorView& to, const ConstTensorView& from) {
  std::memcpy(to.data, from.data, static_cast<std::size_t>(from.shape[0]) * size_of(from.dtype));
}

bool is_poison(const ConstTensorView& row) {
  const auto* p = row.as<unsigned char>();
  return std::all_of(p, p + static_cast<std::size_t>(row.shape[0]) * size_of(row.dtype),
                     [](unsigned char byte) { return byte == kPoison; });
}

bool same_bytes(const ConstTensorView& a, const ConstTensorView& b) {
  return std::memcmp(a.data, b.data, static_cast<std::size_t>(a.shape[0]) * size_of(a.dtype)) == 0;
}

}  // namespace

Step::Step(const StepOptions& o)
    : options(o),
      seq_lens(add(o.query_lens, o.context_lens)),
      key_lens(lengths_of_keys(o)),
      block_table(DType::i32, {num_reqs() + o.padding, table_width(o, key_lens)}),
      query(o.dtype, token_shape(o, o.num_q_heads)),
      key(o.dtype, key_shape(o)),
      value(o.dtype, key_shape(o)),
      output(o.dtype, token_shape(o, o.num_q_heads)),
      lse(DType::f32, {sum(o.query_lens) + o.padding, o.num_q_heads}),
      cache_memory(o.dtype, flash_attn_cache_shape(cache_spec(o, key_lens))),
      executor(make_thread_pool(o.num_workers)) {
  builder_config.num_q_heads = o.num_q_heads;
  builder_config.cache = cache_spec(o, key_lens);
  builder_config.attn_type = o.attn_type;
  builder_config.num_workers = o.num_workers;
  if (o.sliding_window) {
    builder_config.window_left = *o.sliding_window - 1;
    builder_config.window_right =
        o.attn_type == AttentionType::encoder_only ? builder_config.window_left : 0;
  }
  impl_config.num_q_heads = o.num_q_heads;
  impl_config.num_kv_heads = o.num_kv_heads;
  impl_config.head_size = o.head_size;
  impl_config.softcap = o.softcap;
  impl_config.sliding_window = o.sliding_window;
  impl_config.alibi_slopes = o.alibi_slopes;
  impl_config.attn_type = o.attn_type;
  impl_config.dtype = o.dtype;
  for (HostTensor* t : {&query, &key, &value, &output, &lse, &cache_memory}) t->fill_bytes(kPoison);
  fill_tokens();
  fill_batch();
  fill_cache();
}

int Step::first_new_key(int request) const {
  const auto i = static_cast<std::size_t>(request);
  if (!is_cross()) return options.context_lens[i];
  return options.new_encoder[i] != 0 ? 0 : key_lens[i];
}

void Step::fill_tokens() {
  Rng rng(options.seed);
  std::int64_t token = 0, new_key = 0;
  for (int r = 0; r < num_reqs(); ++r) {
    const auto i = static_cast<std::size_t>(r);
    const int query_len = options.query_lens[i];
    keys_.emplace_back(options.dtype, std::initializer_list<std::int64_t>{
                                          key_lens[i], options.num_kv_heads, options.head_size});
    values_.emplace_back(options.dtype, std::initializer_list<std::int64_t>{
                                            key_lens[i], options.num_kv_heads, options.head_size});
    keys_.back().fill_normal(rng);
    values_.back().fill_normal(rng);
    for (int j = 0; j < options.shared_keys && r > 0; ++j) {
      for (int h = 0; h < options.num_kv_heads; ++h) {
        copy_row(keys_[i].view().select(0, j).select(0, h),
                 keys_[0].view().select(0, j).select(0, h));
        copy_row(values_[i].view().select(0, j).select(0, h),
                 values_[0].view().select(0, j).select(0, h));
      }
    }
    HostTensor q(options.dtype, {query_len, options.num_q_heads, options.head_size});
    q.fill_normal(rng);
    for (int t = 0; t < query_len; ++t, ++token) {
      for (int h = 0; h < options.num_q_heads; ++h) {
        copy_row(query.view().select(0, token).select(0, h), q.view().select(0, t).select(0, h));
      }
    }
    for (int j = first_new_key(r); j < key_lens[i]; ++j, ++new_key) {
      for (int h = 0; h < options.num_kv_heads; ++h) {
        copy_row(key.view().select(0, new_key).select(0, h),
                 keys_.back().view().select(0, j).select(0, h));
        copy_row(value.view().select(0, new_key).select(0, h),
                 values_.back().view().select(0, j).select(0, h));
      }
    }
  }
}

void Step::fill_batch() {
  // Blocks in a shuffled order; the first and the last block of the cache stay free.
  Rng rng(options.seed + 1);
  std::vector<std::int32_t> free(static_cast<std::size_t>(builder_config.cache.num_blocks - 2));
  std::iota(free.begin(), free.end(), 1);
  for (std::size_t i = free.size(); i > 1; --i) {
    std::swap(free[i - 1],
              free[static_cast<std::size_t>(rng.integer(0, static_cast<std::int64_t>(i) - 1))]);
  }
  const auto table = block_table.as<std::int32_t>();
  std::fill(table.begin(), table.end(), kGarbage);
  const auto width = static_cast<std::size_t>(block_table.view().shape[1]);
  batch.query_start_loc = {0};
  for (int r = 0; r < num_reqs(); ++r) {
    const auto i = static_cast<std::size_t>(r);
    for (int b = 0; b < blocks(key_lens[i], options.block_size); ++b) {
      const auto column = static_cast<std::size_t>(b);
      if (r > 0 && b < options.shared_keys / options.block_size) {
        table[i * width + column] = table[column];
        continue;
      }
      table[i * width + column] = free.back();
      free.pop_back();
    }
    batch.query_start_loc.push_back(batch.query_start_loc.back() + options.query_lens[i]);
    batch.seq_lens.push_back(seq_lens[i]);
  }
  batch.num_reqs = num_reqs();
  batch.num_tokens = sum(options.query_lens);
  batch.max_query_len = *std::max_element(options.query_lens.begin(), options.query_lens.end());
  batch.max_seq_len = *std::max_element(seq_lens.begin(), seq_lens.end()) + 100;
  batch.causal = options.causal;
  batch.request_causal = options.request_causal;
  if (!is_encoder()) {
    batch.block_table = block_table;
    auto& slots = is_cross() ? batch.encoder_slot_mapping : batch.slot_mapping;
    for (int r = 0; r < num_reqs(); ++r) {
      for (int j = first_new_key(r); j < key_lens[static_cast<std::size_t>(r)]; ++j) {
        slots.push_back(slot(r, j));
      }
    }
    slots.resize(slots.size() + static_cast<std::size_t>(options.padding), -1);
  }
  if (is_cross()) {
    batch.encoder_seq_lens.assign(key_lens.begin(), key_lens.end());
    // What the decoder's own layers would be given: no business of cross attention.
    batch.slot_mapping.assign(static_cast<std::size_t>(batch.num_tokens), kGarbage);
  }
  for (int p = 0; p < options.padding; ++p) {
    batch.query_start_loc.push_back(-kGarbage);
    batch.seq_lens.push_back(kGarbage);
    if (is_cross()) batch.encoder_seq_lens.push_back(kGarbage);
  }
}

void Step::fill_cache() {
  const auto shape = flash_attn_cache_shape(builder_config.cache);
  const bool layered = options.num_layers > 0;
  const Backend& backend = find_backend("FLASH_ATTN");
  cache = cache_view(cache_memory.view().data, options.dtype, shape,
                     backend.kv_cache_stride_order(options.layout, layered, KvFormat::plain));
  if (layered) cache = cache.select(0, options.num_layers - 1);
  for (int r = 0; r < num_reqs(); ++r) {
    const auto i = static_cast<std::size_t>(r);
    for (int t = 0; t < first_new_key(r); ++t) {
      const std::int64_t s = slot(r, t);
      for (int h = 0; h < options.num_kv_heads; ++h) {
        const auto row = [&](int plane) {
          return cache.select(0, plane)
              .select(0, s / options.block_size)
              .select(0, s % options.block_size)
              .select(0, h);
        };
        copy_row(row(0), keys_[i].view().select(0, t).select(0, h));
        copy_row(row(1), values_[i].view().select(0, t).select(0, h));
      }
    }
  }
}

std::int64_t Step::slot(int request, int position) const {
  const auto index = request * block_table.view().shape[1] + position / options.block_size;
  return std::int64_t{block_table.as<std::int32_t>()[static_cast<std::size_t>(index)]} *
             options.block_size +
         position % options.block_size;
}

ForwardArgs Step::forward_args() {
  ForwardArgs args;
  args.query = query;
  args.key = key;
  args.value = value;
  if (!is_encoder()) args.kv_cache = cache;
  args.output = output;
  args.lse = lse;
  args.workspace = workspace.workspace();
  args.executor = executor.get();
  return args;
}

std::unique_ptr<Metadata> Step::build(int common_prefix_len) {
  auto metadata =
      find_backend("FLASH_ATTN").make_builder(builder_config)->build(common_prefix_len, batch);
  workspace.reserve(metadata->workspace_bytes());
  return metadata;
}

void Step::run() {
  const auto metadata = build();
  find_backend("FLASH_ATTN").make_impl(impl_config)->forward(forward_args(), metadata.get());
}

DecodePrefillSplit Step::run_parts(const std::vector<StepPart>& parts,
                                   std::optional<std::uint64_t> changed_keys) {
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
    std::memcpy(table.view().select(0, static_cast<std::int64_t>(p)).data,
                block_table.view().select(0, parts[p].request).data,
                static_cast<std::size_t>(table.view().shape[1]) * sizeof(std::int32_t));
  }
  part.num_tokens = static_cast<int>(rows.size());
  part.block_table = table;
  const auto metadata = find_backend("FLASH_ATTN").make_builder(builder_config)->build(0, part);
  workspace.reserve(metadata->workspace_bytes());

  const auto gathered = [&](const HostTensor& from) {
    HostTensor to(from.view().dtype, {part.num_tokens, from.view().shape[1], options.head_size});
    for (std::size_t i = 0; i < rows.size(); ++i) {
      for (std::int64_t h = 0; h < from.view().shape[1]; ++h) {
        copy_row(to.view().select(0, static_cast<std::int64_t>(i)).select(0, h),
                 from.view().select(0, rows[i]).select(0, h));
      }
    }
    return to;
  };
  const HostTensor q = gathered(query), out = gathered(output);
  HostTensor k = gathered(key), v = gathered(value);
  HostTensor part_lse(DType::f32, {part.num_tokens, options.num_q_heads});
  if (changed_keys) {
    Rng noise(*changed_keys);
    k.fill_normal(noise);
    v.fill_normal(noise);
  }
  ForwardArgs args = forward_args();
  args.query = q;
  args.key = k;
  args.value = v;
  args.output = out.view();
  args.lse = part_lse;
  find_backend("FLASH_ATTN").make_impl(impl_config)->forward(args, metadata.get());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const auto from = static_cast<std::int64_t>(i);
    for (std::int64_t h = 0; h < options.num_q_heads; ++h) {
      copy_row(output.view().select(0, rows[i]).select(0, h),
               args.output.select(0, from).select(0, h));
    }
    copy_row(lse.view().select(0, rows[i]), part_lse.view().select(0, from));
  }
  return dynamic_cast<const flash_attn::FlashAttnMetadata&>(*metadata).split;
}

void Step::expect_oracle() const {
  for (int r = 0; r < num_reqs(); ++r) expect_request(r);
  expect_poison_behind(output);
  for (std::int64_t t = batch.num_tokens; t < lse.view().shape[0]; ++t) {
    EXPECT_TRUE(is_poison(lse.view().select(0, t))) << "LSE of padding row " << t;
  }
}

void Step::expect_request(int request) const {
  const auto i = static_cast<std::size_t>(request);
  const std::int32_t query_len = options.query_lens[i];
  if (query_len == 0) return;
  const std::int32_t first = batch.query_start_loc[i];
  const std::int32_t query_start_loc[] = {0, query_len};
  const std::int32_t cu_seqlens_kv[] = {0, key_lens[i]};
  FlashAttnVarlenArgs a;
  a.q = query.view().slice(0, first, query_len);
  a.k = keys_[i];
  a.v = values_[i];
  a.out = output.view().slice(0, first, query_len);
  a.query_start_loc = ConstTensorView(query_start_loc, DType::i32, {2});
  a.cu_seqlens_kv = ConstTensorView(cu_seqlens_kv, DType::i32, {2});
  a.params.causal =
      !is_encoder() && !is_cross() &&
      (options.request_causal.empty() ? options.causal : options.request_causal[i] != 0);
  a.params.window_left = builder_config.window_left;
  a.params.window_right = builder_config.window_right;
  a.params.softcap = options.softcap;
  if (!options.alibi_slopes.empty()) {
    a.params.alibi_slopes =
        ConstTensorView(options.alibi_slopes.data(), DType::f32, {options.num_q_heads});
  }
  const oracle::Result want = oracle::flash_attn_varlen(a);
  std::size_t n = 0, rows = 0;
  for (std::int64_t t = 0; t < query_len; ++t) {
    for (std::int64_t h = 0; h < options.num_q_heads; ++h, ++rows) {
      const double got_lse = get(lse, {first + t, h});
      if (std::isinf(want.lse[rows])) {
        ASSERT_EQ(got_lse, want.lse[rows]);
      } else {
        ASSERT_NEAR(got_lse, want.lse[rows], want.lse_bound[rows])
            << "LSE of request " << request << ", token " << t << ", head " << h;
      }
      for (std::int64_t d = 0; d < options.head_size; ++d, ++n) {
        ASSERT_NEAR(get(output, {first + t, h, d}), want.out[n], want.out_bound[n])
            << "request " << request << ", token " << t << ", head " << h << ", dim " << d;
      }
    }
  }
}

void Step::expect_poison_behind(const HostTensor& t) const {
  for (std::int64_t row = batch.num_tokens; row < t.view().shape[0]; ++row) {
    for (std::int64_t h = 0; h < t.view().shape[1]; ++h) {
      EXPECT_TRUE(is_poison(t.view().select(0, row).select(0, h))) << "padding row " << row;
    }
  }
}

void Step::expect_cache() const {
  std::set<std::int64_t> used;
  const auto row = [&](int plane, std::int64_t s, int h) {
    return cache.select(0, plane)
        .select(0, s / options.block_size)
        .select(0, s % options.block_size)
        .select(0, h);
  };
  for (int r = 0; r < num_reqs(); ++r) {
    const auto i = static_cast<std::size_t>(r);
    for (int t = 0; t < key_lens[i]; ++t) {
      const std::int64_t s = slot(r, t);
      used.insert(s);
      for (int h = 0; h < options.num_kv_heads; ++h) {
        ASSERT_TRUE(same_bytes(row(0, s, h), keys_[i].view().select(0, t).select(0, h)))
            << "key of request " << r << ", token " << t << ", head " << h;
        ASSERT_TRUE(same_bytes(row(1, s, h), values_[i].view().select(0, t).select(0, h)))
            << "value of request " << r << ", token " << t << ", head " << h;
      }
    }
  }
  const std::int64_t capacity = builder_config.cache.num_blocks * options.block_size;
  for (std::int64_t s = 0; s < capacity; ++s) {
    if (used.contains(s)) continue;
    for (int h = 0; h < options.num_kv_heads; ++h) {
      ASSERT_TRUE(is_poison(row(0, s, h)) && is_poison(row(1, s, h))) << "free slot " << s;
    }
  }
  // Other layers of the same memory: one layer's share of the bytes is all that may have changed.
  if (options.num_layers > 1) {
    const auto shape = flash_attn_cache_shape(builder_config.cache);
    const TensorView all = cache_view(cache_memory.view().data, options.dtype, shape,
                                      flash_attn_stride_order(options.layout, true));
    for (std::int64_t s = 0; s < capacity; ++s) {
      const ConstTensorView k = all.select(0, 0)
                                    .select(0, 0)
                                    .select(0, s / options.block_size)
                                    .select(0, s % options.block_size)
                                    .select(0, 0);
      ASSERT_TRUE(is_poison(k)) << "slot " << s << " of layer 0";
    }
  }
}

}  // namespace attend::testing
