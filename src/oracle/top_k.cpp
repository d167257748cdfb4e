// SPDX-License-Identifier: Apache-2.0
#include "attend/oracle/top_k.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

namespace attend::oracle {

void top_k(std::span<const double> values, std::span<std::int64_t> indices) {
  std::vector<std::int64_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  const auto above = [&](std::int64_t a, std::int64_t b) {
    const double x = values[static_cast<std::size_t>(a)], y = values[static_cast<std::size_t>(b)];
    return std::isnan(y) ? !std::isnan(x) : x > y;
  };
  std::sort(order.begin(), order.end(),
            [&](std::int64_t a, std::int64_t b) { return above(a, b) || (!above(b, a) && a < b); });
  order.resize(std::min(order.size(), indices.size()));
  std::sort(order.begin(), order.end());
  std::fill(std::copy(order.begin(), order.end(), indices.begin()), indices.end(), -1);
}

}  // namespace attend::oracle
