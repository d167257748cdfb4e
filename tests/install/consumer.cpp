// SPDX-License-Identifier: Apache-2.0
// Built outside of the project against an installed package: by CMake and by pkg-config.
#include <attend/attend.h>

#include <array>
#include <cstdint>
#include <cstdio>

int main() {
  // Two keys with equal logits: the output is the mean of their values, lse is ln 2.
  constexpr int kDim = 8;
  const std::array<float, kDim> q{};
  const std::array<float, 2 * kDim> k{};
  std::array<float, 2 * kDim> v{};
  v.fill(1.0F);
  for (int d = 0; d < kDim; ++d) v[static_cast<std::size_t>(d)] = 3.0F;
  std::array<float, kDim> out{};
  float lse = 0.0F;
  const std::array<std::int32_t, 2> query_start_loc{0, 1};
  const std::array<std::int32_t, 2> cu_seqlens_kv{0, 2};

  attend::FlashAttnVarlenArgs args;
  args.q = {q.data(), attend::DType::f32, {1, 1, kDim}};
  args.k = {k.data(), attend::DType::f32, {2, 1, kDim}};
  args.v = {v.data(), attend::DType::f32, {2, 1, kDim}};
  args.out = {out.data(), attend::DType::f32, {1, 1, kDim}};
  args.lse = {&lse, attend::DType::f32, {1, 1}};
  args.query_start_loc = {query_start_loc.data(), attend::DType::i32, {2}};
  args.cu_seqlens_kv = {cu_seqlens_kv.data(), attend::DType::i32, {2}};
  attend::flash_attn_varlen(args);

  bool ok = lse > 0.69314F && lse < 0.69316F;
  for (const float x : out) ok = ok && x > 1.99999F && x < 2.00001F;
  std::printf("attend consumer: out %g, lse %g: %s\n", static_cast<double>(out[0]),
              static_cast<double>(lse), ok ? "ok" : "WRONG");
  return ok ? 0 : 1;
}
