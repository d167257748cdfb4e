// SPDX-License-Identifier: Apache-2.0
#include "bench/int8_problem.h"

namespace attend::bench {
namespace {

Case int8_case(std::string name, std::string description, Bound bound, Int8Shape shape) {
  return {std::move(name), std::move(description), bound,
          [shape = std::move(shape)](Executor& executor) {
            return std::make_unique<Int8Problem>(shape, executor);
          }};
}

}  // namespace

std::vector<Case> int8_cases() {
  return {
      int8_case("prefill_int8l1_gqa4_d128_4k",
                "prefill_bf16_gqa4_d128_4k with int8 queries, keys and values", Bound::int8_compute,
                {requests(1, 4096, 4096)}),
      int8_case("decode_int8l1_gqa8_d128_32k",
                "decode_bf16_gqa8_d128_32k with int8 queries, keys and values", Bound::memory,
                {requests(4, 1, 32768), {32, 4, 128}}),
      int8_case("decode_int8l1_gqa4_8x32k",
                "decode_bf16_gqa4_8x32k with int8 queries, keys and values", Bound::memory,
                {requests(8, 1, 32768), {}, 32}),
      int8_case("decode_int8l2_gqa4_8x32k", "the same with bf16 values", Bound::memory,
                {requests(8, 1, 32768), {}, 32, DType::bf16}),
  };
}

}  // namespace attend::bench
