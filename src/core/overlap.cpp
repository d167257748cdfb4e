// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <cstdlib>

#include "core/check.h"

namespace attend::check {
namespace {

// An unknown integer n in [low, high] that counts for n * step bytes.
struct Term {
  std::int64_t step = 0;  ///< > 0
  std::int64_t low = 0, high = 0;
};

// Whether the addresses of two views can be equal: sum of i_d * a_step_d minus sum of j_d *
// b_step_d = distance, for indices inside the shapes. Solved by trying the term with the largest
// step first; the terms behind it must cover the rest, which leaves very few values of n to try in
// tensors whose dimensions nest.
class AddressEquation {
 public:
  AddressEquation(const ConstTensorView& a, const ConstTensorView& b) noexcept {
    add_view(a, 1);
    add_view(b, -1);
    const auto distance =
        reinterpret_cast<std::uintptr_t>(b.data) - reinterpret_cast<std::uintptr_t>(a.data);
    distance_ = static_cast<std::int64_t>(distance);
    std::sort(terms_.begin(), terms_.begin() + count_,
              [](const Term& x, const Term& y) { return x.step > y.step; });
    for (int i = count_; i-- > 0;) {
      const Term& t = term(i);
      low_[at(i)] = low_[at(i + 1)] + t.step * t.low;
      high_[at(i)] = high_[at(i + 1)] + t.step * t.high;
    }
  }

  bool has_solution() noexcept { return solve(0, distance_); }

 private:
  static constexpr int kMaxTerms = 2 * (kMaxRank + 1);
  static constexpr int kMaxTries = 1 << 14;

  static std::size_t at(int i) noexcept { return static_cast<std::size_t>(i); }
  const Term& term(int i) const noexcept { return terms_[at(i)]; }

  void add_view(const ConstTensorView& t, int sign) noexcept {
    const auto item = static_cast<std::int64_t>(size_of(t.dtype));
    for (int d = 0; d < t.rank; ++d) add(t.strides[d] * item * sign, t.shape[d]);
    add(sign, item);  // bytes of an element
  }

  void add(std::int64_t step, std::int64_t size) noexcept {
    if (step == 0 || size < 2) return;
    Term* same = std::find_if(terms_.begin(), terms_.begin() + count_,
                              [&](const Term& t) { return t.step == std::abs(step); });
    if (same == terms_.begin() + count_) {
      same->step = std::abs(step);
      ++count_;
    }
    (step > 0 ? same->high : same->low) += step > 0 ? size - 1 : 1 - size;
  }

  // Terms i and later must sum up to `rest`.
  bool solve(int i, std::int64_t rest) noexcept {
    if (rest < low_[at(i)] || rest > high_[at(i)]) return false;
    if (i == count_) return true;
    if (++tries_ > kMaxTries) return true;
    const Term& t = term(i);
    // n * step must lie within rest - [low, high] of the later terms.
    const std::int64_t first = std::max(t.low, divide_up(rest - high_[at(i + 1)], t.step));
    const std::int64_t last = std::min(t.high, divide_down(rest - low_[at(i + 1)], t.step));
    for (std::int64_t n = first; n <= last; ++n) {
      if (solve(i + 1, rest - n * t.step)) return true;
    }
    return false;
  }

  static std::int64_t divide_down(std::int64_t x, std::int64_t step) noexcept {
    return x / step - (x % step < 0 ? 1 : 0);
  }
  static std::int64_t divide_up(std::int64_t x, std::int64_t step) noexcept {
    return x / step + (x % step > 0 ? 1 : 0);
  }

  std::array<Term, kMaxTerms> terms_{};
  int count_ = 0;
  int tries_ = 0;
  std::int64_t distance_ = 0;
  std::array<std::int64_t, kMaxTerms + 1> low_{}, high_{};  // what terms i and later can sum up to
};

}  // namespace

ByteRange byte_range(const ConstTensorView& t) noexcept {
  if (t.numel() == 0) return {};
  std::int64_t low = 0;
  std::int64_t high = 1;
  for (int i = 0; i < t.rank; ++i) {
    const std::int64_t step = t.strides[i] * (t.shape[i] - 1);
    (step < 0 ? low : high) += step;
  }
  const auto address = reinterpret_cast<std::uintptr_t>(t.data);
  const auto item = static_cast<std::int64_t>(size_of(t.dtype));
  return {address + static_cast<std::uintptr_t>(low * item),
          address + static_cast<std::uintptr_t>(high * item)};
}

bool overlaps(const ConstTensorView& a, const ConstTensorView& b) noexcept {
  const ByteRange x = byte_range(a);
  const ByteRange y = byte_range(b);
  if (x.begin == x.end || y.begin == y.end || x.begin >= y.end || y.begin >= x.end) return false;
  return AddressEquation(a, b).has_solution();
}

}  // namespace attend::check
