// SPDX-License-Identifier: Apache-2.0
#include "ops/top_k_row.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <numeric>

#include "attend/core/cpu.h"
#include "kernels/cpu/top_k/top_k.h"

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
  bool all_ties = false;  ///< known that there are no more than those
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

// Memory for so many candidates.
constexpr std::int64_t kMaxCandidates = 8192;

// The same of keys in memory, all in [lowest, highest]. Buckets as wide as that range allows leave
// a few keys beside the one that is looked for.
Threshold find_threshold_between(const std::uint32_t* keys, std::int64_t n, std::int64_t k,
                                 std::uint32_t lowest, std::uint32_t highest) noexcept {
  constexpr int kBits = 11;
  const int shift = std::max(static_cast<int>(std::bit_width(highest - lowest)) - kBits, 0);
  std::array<std::int32_t, 1 << kBits> counts{};
  for (std::int64_t i = 0; i < n; ++i) ++counts[(keys[i] - lowest) >> shift];
  std::uint32_t bucket = (highest - lowest) >> shift;
  for (; counts[bucket] < k; --bucket) k -= counts[bucket];
  if (shift == 0) return {lowest + bucket, k, counts[bucket] == k};
  std::array<std::uint32_t, kMaxCandidates> left;
  std::int64_t count = 0;
  for (std::int64_t i = 0; i < n; ++i) {
    if ((keys[i] - lowest) >> shift == bucket) left[static_cast<std::size_t>(count++)] = keys[i];
  }
  const auto end = left.begin() + count, at = left.begin() + (k - 1);
  std::nth_element(left.begin(), at, end, std::greater<>());
  const auto equal = [&](std::uint32_t key) { return key == *at; };
  const std::int64_t ties = std::count_if(left.begin(), at + 1, equal);
  return {*at, ties, std::none_of(at + 1, end, equal)};
}

// Writes the chosen ones of n entries. `out` has room for k.
template <typename KeyAt, typename IndexAt>
void write_chosen(std::int64_t n, Threshold t, std::int64_t k, std::int32_t* out, KeyAt&& key_at,
                  IndexAt&& index_at) noexcept {
  std::int64_t chosen = 0;
  // Stored in any case: a branch would be hard to predict.
  if (t.all_ties) {
    for (std::int64_t i = 0; i < n && chosen < k; ++i) {
      out[chosen] = index_at(i);
      chosen += key_at(i) >= t.key ? 1 : 0;
    }
    return;
  }
  for (std::int64_t i = 0; i < n && chosen < k; ++i) {
    const std::uint32_t key = key_at(i);
    const bool tie = key == t.key;
    out[chosen] = index_at(i);
    chosen += key > t.key || (tie && t.ties > 0) ? 1 : 0;
    t.ties -= tie ? 1 : 0;
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
// A guess for so many halves of k, so that it rarely leaves fewer.
constexpr std::int64_t kMargin = 3;

// A number that about kMargin / 2 * k of the logits reach, and some more. The sample is runs of
// neighbours, which lie in few cache lines, spread over the row, the same in every call; a bad
// guess costs time only.
float guess_threshold(const float* logits, std::int64_t n, std::int64_t k) noexcept {
  constexpr std::int64_t kRun = 16, kRuns = kSample / kRun;
  std::array<std::uint32_t, kSample> sample;
  for (std::int64_t r = 0; r < kRuns; ++r) {
    const float* run = logits + r * (n - kRun) / (kRuns - 1);
    for (std::int64_t i = 0; i < kRun; ++i)
      sample[static_cast<std::size_t>(r * kRun + i)] = key_of(run[i]);
  }
  const std::int64_t rank = std::min(k * kMargin / 2 * kSample / n + 8, kSample);
  const auto [lowest, highest] = std::minmax_element(sample.begin(), sample.end());
  const std::uint32_t key =
      find_threshold_between(sample.data(), kSample, rank, *lowest, *highest).key;
  const std::uint32_t bits = (key & 0x80000000U) != 0 ? key & 0x7FFFFFFFU : ~key;
  return key == 0 ? -INFINITY : std::bit_cast<float>(bits);
}

// False if the guess was no good; nothing is written then.
bool select_from_candidates(const float* logits, std::int64_t n, std::int64_t k,
                            std::int32_t* out) noexcept {
  std::array<std::int32_t, kMaxCandidates + cpu::kCollectSlack> candidates;
  const cpu::CollectFn collect = cpu::collect_of(active_isa());
  const float threshold = guess_threshold(logits, n, k);
  const std::int64_t count = collect(logits, n, threshold, candidates.data(), kMaxCandidates);
  if (count < k || count > kMaxCandidates) return false;
  std::array<std::uint32_t, kMaxCandidates> keys;
  std::uint32_t lowest = ~0U, highest = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto at = static_cast<std::size_t>(i);
    keys[at] = key_of(logits[candidates[at]]);
    lowest = std::min(lowest, keys[at]);
    highest = std::max(highest, keys[at]);
  }
  write_chosen(
      count, find_threshold_between(keys.data(), count, k, lowest, highest), k, out,
      [&](std::int64_t i) { return keys[static_cast<std::size_t>(i)]; },
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
  const bool worth_a_guess = n >= 8 * kSample && 2 * k <= kMaxCandidates * 3 / 4;
  if (worth_a_guess && select_from_candidates(logits, n, k, out)) return;
  select_from_all(logits, n, k, out);
}

}  // namespace attend::top_k
