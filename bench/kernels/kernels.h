// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstddef>
#include <cstdint>

/// Loops that do nothing but one kind of instruction; per ISA, like the library's own kernels.
namespace attend::bench {

/// Runs `rounds` rounds and returns the operations done; the results are kept from the optimiser.
using OpLoopFn = double (*)(std::int64_t rounds) noexcept;
/// Reads [data, data + bytes) once.
using ReadLoopFn = void (*)(const void* data, std::size_t bytes) noexcept;

/// Null where this machine cannot run it.
struct CeilingKernels {
  OpLoopFn fma, bf16_dot, int8_dot, bf16_tile;
  ReadLoopFn read;
};
/// Kernels for the best level of this machine.
CeilingKernels ceiling_kernels();

namespace scalar {
double fma_loop(std::int64_t rounds) noexcept;
void read_loop(const void* data, std::size_t bytes) noexcept;
}  // namespace scalar
namespace avx2 {
double fma_loop(std::int64_t rounds) noexcept;
void read_loop(const void* data, std::size_t bytes) noexcept;
}  // namespace avx2
namespace avx512 {
double fma_loop(std::int64_t rounds) noexcept;
double bf16_dot_loop(std::int64_t rounds) noexcept;
double int8_dot_loop(std::int64_t rounds) noexcept;
void read_loop(const void* data, std::size_t bytes) noexcept;
}  // namespace avx512
namespace amx {
double bf16_tile_loop(std::int64_t rounds) noexcept;
}  // namespace amx

}  // namespace attend::bench
