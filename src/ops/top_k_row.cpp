// SPDX-License-Identifier: Apache-2.0
#include "ops/top_k_row.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <numeric>

namespace attend::top_k {
namespace {

// Orders as the logits do: 0 for NaN, the same for 0 and -0.
std::uint32_t key_of(float x) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(x + 0.0F);
  const std::uint32_t ordered = (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
  return std::isnan(x) ? 0U : ordered;
}

// Entries above `key` are chosen, and the first `ties` of those equal to it.
struct Threshold {
  std::uint32_t key = 0;
  std::int64_t ties = 0;
};

// The k-th highest of n keys, digit by digit from the top. @pre 1 <= k <= n.
template <typename KeyAt>
Threshold find_threshold(std::int64_t n, std::int64_t k, KeyAt&& key_at) noexcept {
  constexpr int kBits = 11;
  std::array<std::int32_t, 1 << kBits> counts;
  Threshold found{0, k};
  std::uint32_t known = 0;  // mask of the digits in found.key
  for (int shift = 32 - kBits; known != 0xFFFFFFFFU; shift = std::max(shift - kBits, 0)) {
    counts.fill(0);
    // The last digit overlaps the one before it, where all that count agree.
    for (std::int64_t i = 0; i < n; ++i) {
      const std::uint32_t key = key_at(i);
      if ((key & known) == found.key) ++counts[(key >> shift) & (counts.size() - 1)];
    }
    std::uint32_t digit = static_cast<std::uint32_t>(counts.size()) - 1;
    for (; counts[digit] < found.ties; --digit) found.ties -= counts[digit];
    found.key |= digit << shift;
    known |= static_cast<std::uint32_t>(counts.size() - 1) << shift;
  }
  return found;
}

// Writes the chosen ones of n entries.
template <typename KeyAt, typename IndexAt>
void write_chosen(std::int64_t n, Threshold t, std::int64_t k, std::int32_t* out, KeyAt&& key_at,
                  IndexAt&& index_at) noexcept {
  for (std::int64_t i = 0, chosen = 0; chosen < k; ++i) {
    if (i >= n) return;
    const std::uint32_t key = key_at(i);
    if (key < t.key || (key == t.key && t.ties-- <= 0)) continue;
    out[chosen++] = index_at(i);
  }
}

void select_from_all(const float* logits, std::int64_t n, std::int64_t k,
                     std::int32_t* out) noexcept {
  const auto key_at = [=](std::int64_t i) { return key_of(logits[i]); };
  write_chosen(n, find_threshold(n, k, key_at), k, out, key_at,
               [](std::int64_t i) { return static_cast<std::int32_t>(i); });
}

// Long rows: a guess at the threshold from a sample leaves a few candidates, found in one pass.
constexpr std::int64_t kSample = 1024;
constexpr std::int64_t kMaxCandidates = 8192;
// A guess for more than k, so that it rarely leaves fewer.
constexpr std::int64_t kMargin = 2;

// A number that about kMargin * k of the logits reach. The sample is spread over the row, the same
// in every run; a bad guess costs time only.
float guess_threshold(const float* logits, std::int64_t n, std::int64_t k) noexcept {
  std::array<float, kSample> sample;
  for (std::int64_t i = 0; i < kSample; ++i) {
    const float x = logits[i * n / kSample];
    sample[static_cast<std::size_t>(i)] = std::isnan(x) ? -INFINITY : x;
  }
  const std::int64_t rank = kMargin * k * kSample / n + 8;
  const auto at = sample.begin() + std::min(rank, kSample - 1);
  std::nth_element(sample.begin(), at, sample.end(), std::greater<>());
  return *at;
}

// False if the guess was no good; nothing is written then.
bool select_from_candidates(const float* logits, std::int64_t n, std::int64_t k,
                            std::int32_t* out) noexcept {
  constexpr std::int64_t kStep = 256;
  std::array<std::int32_t, kMaxCandidates + kStep> candidates;
  const float threshold = guess_threshold(logits, n, k);
  std::int64_t count = 0;
  for (std::int64_t begin = 0; begin < n; begin += kStep) {
    if (count > kMaxCandidates) return false;
    const std::int64_t end = std::min(begin + kStep, n);
    for (std::int64_t i = begin; i < end; ++i) {
      // Stored in any case: a branch would be hard to predict.
      candidates[static_cast<std::size_t>(count)] = static_cast<std::int32_t>(i);
      count += logits[i] >= threshold ? 1 : 0;
    }
  }
  if (count < k || count > kMaxCandidates) return false;
  std::array<std::uint32_t, kMaxCandidates> keys;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto at = static_cast<std::size_t>(i);
    keys[at] = key_of(logits[candidates[at]]);
  }
  const auto key_at = [&](std::int64_t i) { return keys[static_cast<std::size_t>(i)]; };
  write_chosen(count, find_threshold(count, k, key_at), k, out, key_at,
               [&](std::int64_t i) { return candidates[static_cast<std::size_t>(i)]; });
  return true;
}

}  // namespace

void select_row(const float* logits, std::int64_t n, std::int64_t k, std::int32_t* out) noexcept {
  if (n <= k) {
    std::iota(out, out + n, 0);
    std::fill(out + n, out + k, -1);
    return;
  }
  // Below that the sample is no cheaper than the row.
  const bool worth_a_guess = n >= 8 * kSample && kMargin * k <= kMaxCandidates * 3 / 4;
  if (worth_a_guess && select_from_candidates(logits, n, k, out)) return;
  select_from_all(logits, n, k, out);
}

}  // namespace attend::top_k
