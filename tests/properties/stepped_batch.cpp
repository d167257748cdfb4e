// SPDX-License-Identifier: Apache-2.0
#include "properties/stepped_batch.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

namespace attend::testing {
namespace {

void copy_elements(Storage& to, std::int64_t to_offset, const Storage& from,
                   std::int64_t from_offset, int n) {
  const std::size_t item = size_of(to.view().dtype);
  std::memcpy(to.view().as<std::byte>() + static_cast<std::size_t>(to_offset) * item,
              from.view().as<std::byte>() + static_cast<std::size_t>(from_offset) * item,
              static_cast<std::size_t>(n) * item);
}

ConstTensorView ints(const std::vector<std::int32_t>& values) {
  return {values.data(), DType::i32, {static_cast<std::int64_t>(values.size())}};
}

}  // namespace

BatchData::BatchData(Rng& rng, AttentionShape batch_shape) : shape(std::move(batch_shape)) {
  const std::int64_t tokens = shape.query_start_loc().back(), keys = shape.key_start_loc().back();
  q = Storage(rng, shape.dtype, {tokens, shape.q_heads(), shape.head_dim});
  k = Storage(rng, shape.dtype, {keys, shape.kv_heads, shape.head_dim});
  v = Storage(rng, shape.dtype, {keys, shape.kv_heads, shape.head_dim_v});
  q.set_random(rng, shape.query_magnitude);
  k.set_random(rng, 1.0);
  v.set_random(rng, shape.value_magnitude);
  params = conformance::make_params(rng, shape, head_values);
}

SteppedBatch::SteppedBatch(Rng& rng, const BatchData& data, const StepOptions& options)
    : data_(data),
      options_(options),
      query_start_(data.shape.query_start_loc()),
      key_start_(data.shape.key_start_loc()),
      written_(data.shape.seq_lens.size(), 0) {
  const AttentionShape& s = data.shape;
  out_ = Storage(rng, s.dtype, {query_start_.back(), s.q_heads(), s.head_dim_v});
  lse_ = Storage(rng, DType::f32, {query_start_.back(), s.q_heads()});
  if (options.kv == KvStorage::ragged) return;
  const std::vector<std::int32_t> all_touched(s.seq_lens.size(), 0);
  blocks_.emplace(rng, s.seq_lens, all_touched, options.block_size, false);
  conformance::Layout layout;
  if (options.kv == KvStorage::paged_hnd) layout.order = {0, 2, 1, 3};
  const std::int64_t n = blocks_->num_blocks;
  k_cache_ = Storage(rng, s.dtype, {n, options.block_size, s.kv_heads, s.head_dim}, layout);
  v_cache_ = Storage(rng, s.dtype, {n, options.block_size, s.kv_heads, s.head_dim_v}, layout);
}

void SteppedBatch::write_keys(int request, std::int64_t end) {
  const AttentionShape& s = data_.shape;
  const auto r = static_cast<std::size_t>(request);
  for (std::int64_t& j = written_[r]; j < end; ++j) {
    const std::int64_t block = blocks_->block(request, j), slot = j % options_.block_size;
    for (int h = 0; h < s.kv_heads; ++h) {
      copy_elements(k_cache_, k_cache_.offset({block, slot, h, 0}), data_.k,
                    data_.k.offset({key_start_[r] + j, h, 0}), s.head_dim);
      copy_elements(v_cache_, v_cache_.offset({block, slot, h, 0}), data_.v,
                    data_.v.offset({key_start_[r] + j, h, 0}), s.head_dim_v);
    }
  }
}

/// Ragged keys and values of the parts, one after the other.
void SteppedBatch::gather_keys(const std::vector<Part>& parts, FlashAttnVarlenArgs& args) {
  const AttentionShape& s = data_.shape;
  Rng unused(0);
  part_k_ = Storage(unused, s.dtype, {part_key_start_.back(), s.kv_heads, s.head_dim});
  part_v_ = Storage(unused, s.dtype, {part_key_start_.back(), s.kv_heads, s.head_dim_v});
  for (std::size_t p = 0; p < parts.size(); ++p) {
    const std::int64_t first = key_start_[static_cast<std::size_t>(parts[p].request)];
    const int keys = part_seq_lens_[p];
    copy_elements(part_k_, part_k_.offset({part_key_start_[p], 0, 0}), data_.k,
                  data_.k.offset({first, 0, 0}), keys * s.kv_heads * s.head_dim);
    copy_elements(part_v_, part_v_.offset({part_key_start_[p], 0, 0}), data_.v,
                  data_.v.offset({first, 0, 0}), keys * s.kv_heads * s.head_dim_v);
  }
  args.k = part_k_.view();
  args.v = part_v_.view();
  args.cu_seqlens_kv = ints(part_key_start_);
}

void SteppedBatch::step(const std::vector<Part>& parts) {
  const AttentionShape& s = data_.shape;
  part_query_start_ = {0};
  part_key_start_ = {0};
  part_seq_lens_.clear();
  part_slopes_.clear();
  part_table_.clear();
  for (const Part& p : parts) {
    const auto r = static_cast<std::size_t>(p.request);
    part_query_start_.push_back(part_query_start_.back() + p.end - p.begin);
    part_seq_lens_.push_back(s.seq_lens[r] - s.query_lens[r] + p.end);
    part_key_start_.push_back(part_key_start_.back() + part_seq_lens_.back());
    for (int h = 0; h < s.q_heads() && data_.head_values.slopes.view().rank == 2; ++h) {
      part_slopes_.push_back(static_cast<float>(
          data_.head_values.slopes.get(data_.head_values.slopes.offset({p.request, h}))));
    }
    if (!blocks_) continue;
    write_keys(p.request, part_seq_lens_.back());
    const TensorView row = blocks_->table.view().select(0, p.request);
    part_table_.insert(part_table_.end(), row.as<std::int32_t>(),
                       row.as<std::int32_t>() + row.shape[0]);
  }
  Rng unused(0);
  const std::int64_t tokens = part_query_start_.back();
  part_q_ = Storage(unused, s.dtype, {tokens, s.q_heads(), s.head_dim});
  part_out_ = Storage(unused, s.dtype, {tokens, s.q_heads(), s.head_dim_v});
  part_lse_ = Storage(unused, DType::f32, {tokens, s.q_heads()});
  FlashAttnVarlenArgs args;
  args.q = part_q_.view();
  args.out = part_out_.view();
  args.lse = part_lse_.view();
  args.query_start_loc = ints(part_query_start_);
  args.params = data_.params;
  const auto num_parts = static_cast<std::int64_t>(parts.size());
  if (!part_slopes_.empty()) {
    args.params.alibi_slopes = {part_slopes_.data(), DType::f32, {num_parts, s.q_heads()}};
  }
  if (blocks_) {
    args.k = k_cache_.view();
    args.v = v_cache_.view();
    args.seq_lens = ints(part_seq_lens_);
    args.block_table = {
        part_table_.data(), DType::i32, {num_parts, blocks_->table.view().shape[1]}};
  } else {
    gather_keys(parts, args);
  }
  const auto for_rows = [&](const auto& copy) {
    for (std::size_t p = 0; p < parts.size(); ++p) {
      const int first = query_start_[static_cast<std::size_t>(parts[p].request)] + parts[p].begin;
      copy(first, part_query_start_[p], parts[p].end - parts[p].begin);
    }
  };
  for_rows([&](int whole, int part, int n) {
    copy_elements(part_q_, part_q_.offset({part, 0, 0}), data_.q, data_.q.offset({whole, 0, 0}),
                  n * s.q_heads() * s.head_dim);
  });
  flash_attn_varlen(args, options_.executor, options_.kernels);
  for_rows([&](int whole, int part, int n) {
    copy_elements(out_, out_.offset({whole, 0, 0}), part_out_, part_out_.offset({part, 0, 0}),
                  n * s.q_heads() * s.head_dim_v);
    copy_elements(lse_, lse_.offset({whole, 0}), part_lse_, part_lse_.offset({part, 0}),
                  n * s.q_heads());
  });
}

void SteppedBatch::run_whole() {
  std::vector<Part> parts;
  for (int r = 0; r < data_.shape.num_reqs(); ++r) {
    parts.push_back({r, 0, data_.shape.query_lens[static_cast<std::size_t>(r)]});
  }
  step(parts);
}

std::vector<std::byte> SteppedBatch::row(int request, int query) const {
  const std::int64_t token = query_start_[static_cast<std::size_t>(request)] + query;
  std::vector<std::byte> bytes;
  const auto append = [&](const Storage& s, std::int64_t elements) {
    const std::size_t n = static_cast<std::size_t>(elements) * size_of(s.view().dtype);
    const auto* first = s.view().as<std::byte>() + static_cast<std::size_t>(token) * n;
    bytes.insert(bytes.end(), first, first + n);
  };
  append(out_, std::int64_t{data_.shape.q_heads()} * data_.shape.head_dim_v);
  append(lse_, data_.shape.q_heads());
  return bytes;
}

AttentionShape random_steps_shape(Rng& rng, std::int64_t products, bool any_mask) {
  AttentionShape s;
  s.dtype = rng.pick({DType::f32, DType::f16, DType::bf16});
  s.group_size = rng.pick({1, 2, 3, 4, 5, 7, 8});
  s.kv_heads = rng.range(1, 2);
  s.head_dim = rng.chance(0.5) ? rng.pick({64, 128}) : 8 * rng.range(1, 32);
  s.head_dim_v = rng.chance(0.7) ? s.head_dim : 8 * rng.range(1, 32);
  s.causal = !any_mask || rng.chance(0.5);
  if (rng.chance(any_mask ? 0.7 : 0.4)) s.window_left = rng.range(0, 400);
  if (any_mask && rng.chance(0.7)) s.window_right = rng.range(0, 20);
  if (rng.chance(0.3)) s.softcap = rng.pick({5.0F, 30.0F});
  if (rng.chance(0.3)) {
    s.alibi = rng.pick(
        {conformance::AlibiSlopes::per_head, conformance::AlibiSlopes::per_request_and_head});
    s.alibi_sqrt = rng.chance(0.4);
  }
  s.sinks = rng.chance(0.3);
  s.lse_includes_sink = rng.chance(0.5);
  s.query_magnitude = rng.pick({1.0, 4.0});
  const int requests = rng.range(1, 4);
  const std::int64_t pairs =
      products / (std::int64_t{requests} * s.q_heads() * (s.head_dim + s.head_dim_v));
  for (int r = 0; r < requests; ++r) {
    const int seq_len =
        rng.chance(0.3) ? 256 * rng.range(1, 3) + rng.range(-1, 1) : rng.range(1, 800);
    const auto most = static_cast<int>(std::max<std::int64_t>(1, pairs / seq_len));
    s.query_lens.push_back(rng.range(1, std::min({most, seq_len, 600})));
    s.seq_lens.push_back(seq_len);
  }
  return s;
}

Executor& executor_of(int num_threads) {
  static const std::array<std::unique_ptr<Executor>, 3> pools{
      make_thread_pool(1), make_thread_pool(2), make_thread_pool(3)};
  return *pools.at(static_cast<std::size_t>(num_threads) - 1);
}

}  // namespace attend::testing
