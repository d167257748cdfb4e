// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <cstdio>
#include <exception>
#include <stdexcept>

#include "attend/core/cpu.h"
#include "bench/attention_problem.h"
#include "bench/int8_problem.h"

/// The problems of scripts/gates/instructions. Without an argument: their names. With a name: runs
/// that problem on one thread and checks its result; callgrind counts what attend_counted_run does.
namespace {

using namespace attend;
using namespace attend::bench;

constexpr Heads kGqa4{8, 2, 128};

AttentionShape prefill(DType dtype, Heads heads = kGqa4) {
  AttentionShape shape;
  shape.requests = requests(1, 192, 192);
  shape.heads = heads;
  shape.dtype = shape.kv_dtype = dtype;
  return shape;
}

AttentionShape decode(int batch, int keys, DType kv_dtype = DType::bf16) {
  AttentionShape shape;
  shape.requests = requests(batch, 1, keys);
  shape.heads = kGqa4;
  shape.kv_dtype = kv_dtype;
  shape.layout = Layout::hnd;
  shape.block_size = 32;
  return shape;
}

AttentionShape cascade() {
  AttentionShape shape = decode(16, 544);
  shape.shared_keys = 512;
  return shape;
}

std::vector<Case> counted_cases() {
  const auto float_case = [](std::string name, AttentionShape shape) {
    return attention_case(std::move(name), "", Bound::compute, std::move(shape));
  };
  return {
      float_case("prefill_f32", prefill(DType::f32)),
      float_case("prefill_bf16", prefill(DType::bf16)),
      float_case("prefill_f16", prefill(DType::f16)),
      float_case("prefill_small_heads", prefill(DType::bf16, {8, 8, 32})),
      float_case("decode_bf16", decode(4, 600)),
      float_case("decode_fp8_e4m3", decode(4, 600, DType::fp8_e4m3)),
      {"decode_int8l1", "", Bound::memory,
       [](Executor& executor) {
         return std::make_unique<Int8Problem>(Int8Shape{requests(4, 1, 600), kGqa4, 32}, executor);
       }},
      float_case("cascade_decode", cascade()),
  };
}

}  // namespace

/// What is counted, found by its name. It does not end with the call, so that its own end is seen.
extern "C" [[gnu::noinline]] void attend_counted_run(attend::bench::Problem& problem) {
  problem.run();
  __asm__ volatile("" ::: "memory");
}

int main(int argc, char** argv) try {
  const std::vector<Case> cases = counted_cases();
  if (argc < 2) {
    for (const Case& c : cases) fmt::print("{}\n", c.name);
    return 0;
  }
  for (const Case& c : cases) {
    if (c.name != argv[1]) continue;
    const auto executor = make_thread_pool(1);
    const auto problem = c.make(*executor);
    problem->run();  // what happens at first use only
    attend_counted_run(*problem);
    if (const std::string wrong = problem->verify(); !wrong.empty())
      throw std::runtime_error(wrong);
    fmt::print("{}\n", to_string(active_isa()));
    return 0;
  }
  throw std::invalid_argument(fmt::format("no problem is called {}", argv[1]));
} catch (const std::exception& e) {
  fmt::print(stderr, "attend_instructions: {}\n", e.what());
  return 1;
}
