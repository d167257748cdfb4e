// SPDX-License-Identifier: Apache-2.0
#include "conformance/quantised_op.h"

#include <array>
#include <cstdint>

#include "attend/core/float_types.h"
#include "attend/ops/attention.h"

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

std::vector<double> run_fp8(const AttentionData& data, const QuantScheme& scheme, IsaLevel isa,
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
  args.k_descale = {k.scales.data(), DType::f32, {1, 1}};
  args.v_descale = {v.scales.data(), DType::f32, {1, 1}};
  flash_attn_varlen(args, &executor, isa);
  return as_doubles(out);
}

constexpr std::array kOps = {
    QuantisedOp{"flash_attn_varlen", "fp8_e4m3 KV per tensor", run_fp8},
    QuantisedOp{"flash_attn_varlen", "fp8_e5m2 KV per tensor", run_fp8},
};

}  // namespace

std::span<const QuantisedOp> quantised_ops() noexcept { return kOps; }

}  // namespace attend::conformance
