// SPDX-License-Identifier: Apache-2.0
#include "bench/peers/attend_side.h"

#include <fmt/format.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <utility>

#include "attend/core/error.h"
#include "attend/ops/cache.h"
#include "attend/ops/int8_cache.h"
#include "attend/ops/quant.h"
#include "bench/random_fill.h"

namespace attend::bench {
namespace {

Buffer read_bf16(const std::string& path, std::int64_t count) {
  Buffer b(static_cast<std::size_t>(count) * size_of(DType::bf16));
  std::ifstream file(path, std::ios::binary);
  file.read(static_cast<char*>(b.data()), static_cast<std::streamsize>(b.size()));
  if (!file) throw Error(fmt::format("cannot read {} bytes from '{}'", b.size(), path));
  return b;
}

template <typename T>
void convert(const bf16* from, void* to, std::int64_t count, Executor& executor) {
  executor.run([&](int worker) {
    const std::int64_t workers = executor.num_workers();
    for (std::int64_t i = count * worker / workers; i < count * (worker + 1) / workers; ++i)
      static_cast<T*>(to)[i] = from_f32<T>(to_f32(from[i]));
  });
}

Buffer as_dtype(Buffer from, DType dtype, std::int64_t count, Executor& executor) {
  if (dtype == DType::bf16) return from;
  Buffer to(static_cast<std::size_t>(count) * size_of(dtype));
  const auto* values = static_cast<const bf16*>(from.data());
  if (dtype == DType::f32) convert<float>(values, to.data(), count, executor);
  if (dtype == DType::f16) convert<f16>(values, to.data(), count, executor);
  return to;
}

Buffer floats(std::int64_t count) {
  return Buffer(static_cast<std::size_t>(count) * sizeof(float));
}

DType dtype_of(const nlohmann::json& j, const char* key) {
  const auto name = j.at(key).get<std::string>();
  const std::optional<DType> dtype = parse_dtype(name);
  if (!dtype) throw Error(fmt::format("'{}': unknown dtype '{}'", key, name));
  return *dtype;
}

}  // namespace

PeerProblem read_peer_problem(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw Error("cannot read '" + path + "'");
  const nlohmann::json j = nlohmann::json::parse(file);
  PeerProblem p;
  p.dtype = dtype_of(j, "dtype");
  p.kv_dtype = dtype_of(j, "kv_dtype");
  p.batch = j.at("batch");
  p.query_len = j.at("query_len");
  p.seq_len = j.at("seq_len");
  p.num_q_heads = j.at("num_q_heads");
  p.num_kv_heads = j.at("num_kv_heads");
  p.head_dim = j.at("head_dim");
  p.block_size = j.at("block_size");
  p.q_file = j.at("q_file");
  p.k_file = j.at("k_file");
  p.v_file = j.at("v_file");
  return p;
}

AttendSide::AttendSide(PeerProblem problem, Executor& executor)
    : p_(std::move(problem)), executor_(executor) {
  for (int r = 0; r <= p_.batch; ++r) query_start_.push_back(r * p_.query_len);
  seq_lens_.assign(static_cast<std::size_t>(p_.batch), p_.seq_len);
  make_table();
  const std::int64_t d = p_.head_dim, q_count = tokens() * p_.num_q_heads * d;
  const std::int64_t kv_count = keys() * p_.num_kv_heads * d;
  q_ = as_dtype(read_bf16(p_.q_file, q_count), p_.dtype, q_count, executor_);
  out_ = Buffer(q_.size());
  // Keys and values in the order of their files; a cache of blocks is then filled from them.
  Buffer k = as_dtype(read_bf16(p_.k_file, kv_count), p_.dtype, kv_count, executor_);
  Buffer v = as_dtype(read_bf16(p_.v_file, kv_count), p_.dtype, kv_count, executor_);
  const ConstTensorView k_rows(k.data(), p_.dtype, {keys(), p_.num_kv_heads, d});
  const ConstTensorView v_rows(v.data(), p_.dtype, {keys(), p_.num_kv_heads, d});
  if (p_.kv_dtype == DType::i8) {
    fill_int8_cache(k_rows, v_rows);
  } else if (p_.block_size > 0) {
    fill_float_cache(k_rows, v_rows);
  } else {
    bind(k_rows, v_rows);
    k_rows_ = std::move(k);
    v_rows_ = std::move(v);
  }
  make_plan();
}

/// Shuffled blocks, as a cache has them after some hours of serving.
void AttendSide::make_table() {
  if (p_.block_size == 0) return;
  if (p_.seq_len % p_.block_size != 0) throw Error("seq_len must be a multiple of block_size");
  table_.resize(static_cast<std::size_t>(keys() / p_.block_size));
  std::iota(table_.begin(), table_.end(), 0);
  for (std::size_t i = table_.size() - 1; i > 0; --i)
    std::swap(table_[i], table_[hash64(i) % (i + 1)]);
}

std::vector<std::int64_t> AttendSide::slots() const {
  std::vector<std::int64_t> slots;
  for (const std::int32_t block : table_)
    for (int i = 0; i < p_.block_size; ++i)
      slots.push_back(std::int64_t{block} * p_.block_size + i);
  return slots;
}

void AttendSide::fill_float_cache(const ConstTensorView& k, const ConstTensorView& v) {
  const std::int64_t d = p_.head_dim, blocks = keys() / p_.block_size;
  const auto bytes = static_cast<std::size_t>(k.numel()) * size_of(p_.kv_dtype);
  k_ = CacheMemory(bytes, {.executor = &executor_});
  v_ = CacheMemory(bytes, {.executor = &executor_});
  const auto hnd = [&](const CacheMemory& b) {
    return TensorView(b.data(), p_.kv_dtype, {blocks, p_.num_kv_heads, p_.block_size, d})
        .permute({0, 2, 1, 3});
  };
  const std::vector<std::int64_t> slot = slots();
  const float one = 1.0F;
  ReshapeAndCacheFlashArgs args;
  args.key = k;
  args.value = v;
  args.key_cache = hnd(k_);
  args.value_cache = hnd(v_);
  args.slot_mapping = {slot.data(), DType::i64, {keys()}};
  if (is_fp8(p_.kv_dtype)) args.k_scale = args.v_scale = {&one, DType::f32, {1}};
  reshape_and_cache_flash(args, &executor_);
  bind(hnd(k_), hnd(v_));
}

void AttendSide::bind(const ConstTensorView& k, const ConstTensorView& v) {
  args_.q = {q_.data(), p_.dtype, {tokens(), p_.num_q_heads, p_.head_dim}};
  args_.out = {out_.data(), p_.dtype, {tokens(), p_.num_q_heads, p_.head_dim}};
  args_.k = k;
  args_.v = v;
  args_.params.causal = true;
  if (p_.block_size > 0)
    args_.block_table = {table_.data(), DType::i32, {p_.batch, p_.seq_len / p_.block_size}};
}

void AttendSide::fill_int8_cache(const ConstTensorView& k, const ConstTensorView& v) {
  if (p_.block_size == 0) throw Error("int8 caches are paged: block_size must not be 0");
  const std::int64_t heads = p_.num_kv_heads, d = p_.head_dim, blocks = keys() / p_.block_size;
  const auto count = static_cast<std::size_t>(k.numel());
  Buffer k_codes(count), v_codes(count), k_row_scale = floats(keys() * heads);
  v_scale_ = floats(heads * d);
  const TensorView k_rows(k_codes.data(), DType::i8, {keys(), heads, d});
  const TensorView v_rows(v_codes.data(), DType::i8, {keys(), heads, d});
  const TensorView k_scales(k_row_scale.data(), DType::f32, {keys(), heads});
  const TensorView v_scales(v_scale_.data(), DType::f32, {heads, d});
  scaled_int8_quant_for_attn({.input = k, .output = k_rows, .scale = k_scales}, &executor_);
  scaled_int8_quant_for_attn(
      {.input = v, .output = v_rows, .mode = Int8QuantMode::per_channel, .scale = v_scales},
      &executor_);

  k_ = CacheMemory(count, {.executor = &executor_});
  v_ = CacheMemory(count, {.executor = &executor_});
  k_scale_ = floats(keys() * heads);
  const TensorView k_cache(k_.data(), DType::i8, {blocks, heads, p_.block_size, d});
  const TensorView v_cache(v_.data(), DType::i8, {blocks, heads, p_.block_size, d});
  const TensorView scale_cache(k_scale_.data(), DType::f32, {blocks, heads, p_.block_size});
  const std::vector<std::int64_t> slot = slots();
  const ConstTensorView mapping(slot.data(), DType::i64, {keys()});
  reshape_and_cache_flash_int8({k_rows, v_rows, k_scales, k_cache, v_cache, scale_cache, mapping},
                               &executor_);

  q_codes_ = Buffer(static_cast<std::size_t>(tokens() * p_.num_q_heads * d));
  q_scale_ = floats(tokens() * p_.num_q_heads);
  FlashAttnVarlenInt8Args& a = int8_args_;
  a.q = {q_codes_.data(), DType::i8, {tokens(), p_.num_q_heads, d}};
  a.q_scale = {q_scale_.data(), DType::f32, {p_.num_q_heads, tokens()}};
  a.k = k_cache;
  a.k_scale = scale_cache;
  a.v = v_cache;
  a.v_scale = v_scales;
  a.out = {out_.data(), p_.dtype, {tokens(), p_.num_q_heads, d}};
  a.block_table = {table_.data(), DType::i32, {p_.batch, p_.seq_len / p_.block_size}};
  a.params.causal = true;
}

void AttendSide::make_plan() {
  AttentionPlanInput in;
  in.query_start_loc = query_start_;
  in.seq_lens = seq_lens_;
  in.num_q_heads = p_.num_q_heads;
  in.num_kv_heads = p_.num_kv_heads;
  in.head_dim_qk = in.head_dim_v = p_.head_dim;
  in.num_workers = executor_.num_workers();
  plan_ = plan_attention(in);
  workspace_ = Buffer(plan_.workspace_bytes);
}

void AttendSide::run() {
  if (p_.kv_dtype != DType::i8) {
    flash_attn_varlen(args_, plan_, workspace_.workspace(), executor_);
    return;
  }
  // Queries are new in every step: to quantise them is part of the work.
  const std::int64_t d = p_.head_dim;
  scaled_int8_quant_for_attn({.input = {q_.data(), p_.dtype, {tokens(), p_.num_q_heads, d}},
                              .output = {q_codes_.data(), DType::i8, {tokens(), p_.num_q_heads, d}},
                              .scale = {q_scale_.data(), DType::f32, {p_.num_q_heads, tokens()}},
                              .transpose_scale = true},
                             &executor_);
  flash_attn_varlen_int8(int8_args_, plan_, workspace_.workspace(), executor_);
}

void AttendSide::write_output(const std::string& path) const {
  const std::int64_t count = tokens() * p_.num_q_heads * p_.head_dim;
  std::vector<float> values(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i)
    values[static_cast<std::size_t>(i)] = value_at(out_.data(), p_.dtype, i);
  std::ofstream file(path, std::ios::binary);
  file.write(reinterpret_cast<const char*>(values.data()),
             static_cast<std::streamsize>(values.size() * sizeof(float)));
  file.flush();
  if (!file) throw Error("cannot write '" + path + "'");
}

}  // namespace attend::bench
