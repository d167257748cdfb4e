// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "bench/attention_problem.h"

namespace attend::bench {
namespace {

constexpr DType kE4m3 = DType::fp8_e4m3, kE5m2 = DType::fp8_e5m2;

/// One token for each of `batch` requests of `keys` keys in blocks of 32.
AttentionShape decode(int batch, int keys, Heads heads = {}) {
  AttentionShape shape;
  shape.requests = requests(batch, 1, keys);
  shape.heads = heads;
  shape.layout = Layout::hnd;
  shape.block_size = 32;
  return shape;
}

AttentionShape decode_gqa8(DType kv_dtype) {
  AttentionShape shape = decode(4, 32768, {32, 4, 128});
  shape.block_size = 128;
  shape.kv_dtype = kv_dtype;
  return shape;
}

AttentionShape decode_32k(DType kv_dtype) {
  AttentionShape shape = decode(8, 32768);
  shape.kv_dtype = kv_dtype;
  if (kv_dtype == DType::f16) shape.dtype = DType::f16;
  return shape;
}

AttentionShape windowed(int batch, int keys, int keys_seen) {
  AttentionShape shape = decode(batch, keys);
  shape.window_left = keys_seen - 1;
  return shape;
}

AttentionShape nhd(AttentionShape shape) {
  shape.layout = Layout::nhd;
  return shape;
}

/// Decodes of 200 to 32768 keys, each longer than the one before by the same factor, and two chunks
/// of 512 tokens of prompts of which 512 are cached.
AttentionShape batch_mix() {
  constexpr int kDecodes = 64, kChunk = 512;
  AttentionShape shape = decode(0, 0);
  for (int i = 0; i < kDecodes; ++i)
    shape.requests.push_back({1, static_cast<int>(std::lround(
                                     200.0 * std::pow(32768.0 / 200.0, i / (kDecodes - 1.0))))});
  shape.requests.insert(shape.requests.end(), 2, Request{kChunk, 2 * kChunk});
  shape.first_prefill = kDecodes;
  return shape;
}

}  // namespace

std::vector<Case> decode_cases() {
  const auto decode_case = [](std::string name, std::string description, AttentionShape shape) {
    return attention_case(std::move(name), std::move(description), Bound::memory, std::move(shape));
  };
  std::vector<Case> cases = {
      decode_case("decode_bf16_gqa8_d128_32k",
                  "one token for each of 4 requests of 32768 keys, 32 query and 4 kv heads, "
                  "shuffled blocks of 128",
                  decode_gqa8(DType::bf16)),
      decode_case("decode_fp8_gqa8_d128_32k", "the same with fp8_e4m3 keys and values",
                  decode_gqa8(kE4m3)),
      decode_case("decode_fp8_e5m2_gqa8_d128_32k", "the same with fp8_e5m2 keys and values",
                  decode_gqa8(kE5m2)),
      decode_case("decode_bf16_gqa4_8x32k",
                  "8 requests of 32768 keys, 32 query and 8 kv heads, shuffled blocks of 32",
                  decode_32k(DType::bf16)),
      decode_case("decode_f16_gqa4_8x32k", "the same in float16", decode_32k(DType::f16)),
      decode_case("decode_fp8_e4m3_gqa4_8x32k", "the same with fp8_e4m3 keys and values, bf16",
                  decode_32k(kE4m3)),
      decode_case("decode_fp8_e5m2_gqa4_8x32k", "the same with fp8_e5m2 keys and values, bf16",
                  decode_32k(kE5m2)),
      decode_case("decode_bf16_nhd_gqa4_8x32k",
                  "flash_attn_with_kvcache on a cache of [blocks, block, heads, dim]",
                  nhd(decode_32k(DType::bf16))),
      decode_case("decode_bf16_64x512", "64 requests of 512 keys", decode(64, 512)),
      decode_case("decode_bf16_nhd_64x512", "the same by flash_attn_with_kvcache",
                  nhd(decode(64, 512))),
      decode_case("decode_bf16_gqa4_1x128k", "one request of 131072 keys, split over the threads",
                  decode(1, 131072)),
      decode_case("decode_bf16_window4k_8x32k", "8 requests of 32768 keys that see 4096 of them",
                  windowed(8, 32768, 4096)),
      decode_case("decode_bf16_gqa4_d64_8x32k", "head size 64", decode(8, 32768, {32, 8, 64})),
      decode_case("decode_bf16_gqa4_d256_8x32k", "head size 256, 16 query and 4 kv heads",
                  decode(8, 32768, {16, 4, 256})),
      decode_case("decode_bf16_gqa5_8x8k", "8 requests of 8192 keys, 40 query and 8 kv heads",
                  decode(8, 8192, {40, 8, 128})),
      decode_case("decode_bf16_gqa7_8x8k", "28 query and 4 kv heads",
                  decode(8, 8192, {28, 4, 128})),
      decode_case("decode_bf16_gqa12_8x8k", "48 query and 4 kv heads",
                  decode(8, 8192, {48, 4, 128})),
      attention_case("batch_mix",
                     "64 decodes at 200 to 32768 keys and 2 prefill chunks of 512 tokens at 1024 "
                     "keys",
                     Bound::parts, batch_mix()),
      decode_case("single_token_128", "one token, 128 keys, 32 query and 8 kv heads, bf16: latency",
                  decode(1, 128)),
      decode_case("single_token_128_1t", "the same on one thread", decode(1, 128)),
  };
  cases.back().threads = 1;
  return cases;
}

}  // namespace attend::bench
