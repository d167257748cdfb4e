// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <vector>

#include "attend/core/dtype.h"
#include "serving/request.h"

/// Synthetic queries, keys and values as a function of what they belong to, so that any row can be
/// computed again without the cache and shared prefixes really share values.
namespace attend::serving {

/// Bijective 64-bit mixer (the finaliser of splitmix64).
constexpr std::uint64_t mix64(std::uint64_t x) noexcept {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

/// Identity of a request's own tokens: those that it shares with nobody.
std::uint64_t own_content_id(const Request& request) noexcept;
/// Identity of the token at `position` (prompt or generated): its segment's, or the request's own.
std::uint64_t content_id(const Request& request, std::int64_t position) noexcept;
/// Identity of the rejected drafts of the step in which `first_rejected` is the position of the
/// first of them: nobody's tokens. A position is the first rejected one at most once in a request.
std::uint64_t draft_content_id(const Request& request, std::int64_t first_rejected) noexcept;
/// Identity of a request's encoder tokens: nobody else has them.
std::uint64_t encoder_content_id(const Request& request) noexcept;
/// Chained hash of the contents of tokens [begin, end) that follow the block hashed as `parent`.
/// Blocks with equal hashes hold equal keys and values.
std::uint64_t block_hash(std::uint64_t parent, const Request& request, std::int64_t begin,
                         std::int64_t end) noexcept;

enum class ValueKind : std::uint8_t {
  query,
  key,
  value,
  weight,
  index_query,
  index_key,
  index_weight
};

/// Names one row of head_dim values.
struct RowKey {
  std::uint64_t content = 0;
  std::int64_t position = 0;
  int layer = 0;
  int head = 0;
  ValueKind kind = ValueKind::query;
};

/// Counter-based generator: uniform values of mean 0 and variance 1, rounded to `dtype`.
class ValueGenerator {
 public:
  /// @throws InvalidArgument unless dtype is f32, f16 or bf16.
  ValueGenerator(std::uint64_t seed, DType dtype);

  /// Writes `count` elements of the row, of the generator's dtype.
  void fill(const RowKey& key, int count, void* row) const noexcept;
  /// Writes the same values, rounded to the dtype, as float32.
  void fill_f32(const RowKey& key, int count, float* row) const noexcept;
  DType dtype() const noexcept { return dtype_; }

 private:
  std::uint64_t row_state(const RowKey& key) const noexcept;

  std::uint64_t seed_;
  DType dtype_;
  // One entry a distinct value: looking a value up costs the same for every dtype.
  std::vector<std::uint16_t> table16_;  // bits of a 16-bit dtype; empty for f32
  std::vector<float> table32_;
};

}  // namespace attend::serving
