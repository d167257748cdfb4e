// SPDX-License-Identifier: Apache-2.0
#include "conformance/quantised_op.h"

#include <array>
#include <cmath>
#include <cstdint>
#include <numeric>

#include "attend/core/float_types.h"
#include "attend/ops/attention.h"
#include "attend/ops/int8_attention.h"

namespace attend::conformance {
namespace {

std::vector<bf16> as_bf16(const std::vector<double>& values) {
  std::vector<bf16> result;
  result.reserve(values.size());
  for (const double x : values) result.push_back(to_bf16(static_cast<float>(x)));
  return result;
}

std::vector<double> as_doubles(const std::vector<bf16>& values) {
  std::vector<double> result;
  result.reserve(values.size());
  for (const bf16 x : values) result.push_back(static_cast<double>(to_f32(x)));
  return result;
}

/// Codes of keys or values, each key with a scale of its own or all with one.
void set_scales(const QuantisedTensor& t, std::int64_t keys, ConstTensorView& descale,
                ConstTensorView& token_scale) {
  if (t.scales.size() == 1) {
    descale = {t.scales.data(), DType::f32, {1, 1}};
  } else {
    token_scale = {t.scales.data(), DType::f32, {keys, 1}};
  }
}

/// Codes as keys and values of one head, ragged.
std::vector<double> run_varlen(const AttentionData& data, const QuantScheme& scheme, IsaLevel isa,
                               Executor& executor) {
  const DataShape& s = data.shape;
  const std::vector<bf16> q = as_bf16(data.q);
  const QuantisedTensor k = quantise(data.k, s.head_size, scheme.k);
  const QuantisedTensor v = quantise(data.v, s.head_size, scheme.v);
  std::vector<bf16> out(q.size());
  const std::array<std::int32_t, 2> query_start{0, s.queries}, key_start{0, s.keys};
  FlashAttnVarlenArgs args;
  args.q = {q.data(), DType::bf16, {s.queries, 1, s.head_size}};
  args.k = {k.codes.data(), *scheme.k.format, {s.keys, 1, s.head_size}};
  args.v = {v.codes.data(), *scheme.v.format, {s.keys, 1, s.head_size}};
  args.out = {out.data(), DType::bf16, {s.queries, 1, s.head_size}};
  args.query_start_loc = {query_start.data(), DType::i32, {2}};
  args.cu_seqlens_kv = {key_start.data(), DType::i32, {2}};
  set_scales(k, s.keys, args.k_descale, args.k_token_scale);
  set_scales(v, s.keys, args.v_descale, args.v_token_scale);
  flash_attn_varlen(args, &executor, isa);
  return as_doubles(out);
}

/// Queries and keys as codes; values too (level 1) or in 16 bits (level 2). One head in blocks that
/// lie in order, so that a cache is the rows with room for a whole number of blocks.
std::vector<double> run_varlen_int8(const AttentionData& data, const QuantScheme& scheme,
                                    IsaLevel isa, Executor& executor) {
  const DataShape& s = data.shape;
  constexpr std::int64_t kBlock = 16;
  const std::int64_t blocks = (s.keys + kBlock - 1) / kBlock;
  const auto cache_size = static_cast<std::size_t>(blocks * kBlock * s.head_size);
  std::vector<double> keys = data.k;
  std::vector<float> mean;
  if (scheme.smooth_k) mean = subtract_mean(keys, s.head_size);
  const QuantisedTensor q = quantise(data.q, s.head_size, scheme.q);
  QuantisedTensor k = quantise(keys, s.head_size, scheme.k);
  k.codes.resize(cache_size);
  k.scales.resize(static_cast<std::size_t>(blocks * kBlock), NAN);
  QuantisedTensor v;
  std::vector<bf16> v_rows;
  FlashAttnVarlenInt8Args args;
  if (scheme.v.format) {
    v = quantise(data.v, s.head_size, scheme.v);
    v.codes.resize(cache_size);
    args.v = {v.codes.data(), DType::i8, {blocks, 1, kBlock, s.head_size}};
    args.v_scale = {v.scales.data(), DType::f32, {1, s.head_size}};
  } else {
    v_rows = as_bf16(data.v);
    v_rows.resize(cache_size, to_bf16(NAN));
    args.v = {v_rows.data(), DType::bf16, {blocks, 1, kBlock, s.head_size}};
  }
  std::vector<std::int32_t> table(static_cast<std::size_t>(blocks));
  std::iota(table.begin(), table.end(), 0);
  std::vector<bf16> out(data.q.size());
  const std::array<std::int32_t, 2> query_start{0, s.queries};
  const std::array<std::int32_t, 1> seq_lens{s.keys};
  args.q = {q.codes.data(), DType::i8, {s.queries, 1, s.head_size}};
  args.q_scale = {q.scales.data(), DType::f32, {1, s.queries}};
  args.k = {k.codes.data(), DType::i8, {blocks, 1, kBlock, s.head_size}};
  args.k_scale = {k.scales.data(), DType::f32, {blocks, 1, kBlock}};
  if (scheme.smooth_k) args.k_mean = {mean.data(), DType::f32, {1, 1, s.head_size}};
  args.out = {out.data(), DType::bf16, {s.queries, 1, s.head_size}};
  args.query_start_loc = {query_start.data(), DType::i32, {2}};
  args.seq_lens = {seq_lens.data(), DType::i32, {1}};
  args.block_table = {table.data(), DType::i32, {1, blocks}};
  flash_attn_varlen_int8(args, &executor, isa);
  return as_doubles(out);
}

constexpr std::array kOps = {
    QuantisedOp{"flash_attn_varlen", "fp8_e4m3 KV per tensor", run_varlen},
    QuantisedOp{"flash_attn_varlen", "fp8_e4m3 KV per token", run_varlen},
    QuantisedOp{"flash_attn_varlen", "fp8_e5m2 KV per tensor", run_varlen},
    QuantisedOp{"flash_attn_varlen", "int8 KV per token and head", run_varlen},
    QuantisedOp{"flash_attn_varlen_int8", "int8 level 1", run_varlen_int8},
    QuantisedOp{"flash_attn_varlen_int8", "int8 level 1, K smooth", run_varlen_int8},
    QuantisedOp{"flash_attn_varlen_int8", "int8 level 2", run_varlen_int8},
    QuantisedOp{"flash_attn_varlen_int8", "int8 level 2, K smooth", run_varlen_int8},
};

}  // namespace

std::span<const QuantisedOp> quantised_ops() noexcept { return kOps; }

}  // namespace attend::conformance
