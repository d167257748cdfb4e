// SPDX-License-Identifier: Apache-2.0
#include "ops/mla_product.h"

#include <algorithm>
#include <array>
#include <cstdint>

namespace attend {
namespace {

using cpu::BatchedProduct;
using cpu::ProductPart;

// What one worker multiplies in about the time that waking the others takes.
constexpr double kParallelProducts = 1e6;
// And what it reads in that time, where there are few rows.
constexpr double kParallelWeights = 1e5;
// A multiple of the heights of all tiles. The weights of a part are read once for so many rows.
constexpr std::int64_t kPartRows = 96;
// Enough for workers to end at about the same time.
constexpr std::int64_t kPartsPerWorker = 8;

/// How a product is cut into parts: heads, then columns, then rows, the last ones fastest, so that
/// a worker's consecutive parts have the same weights.
struct Cut {
  std::int64_t heads = 0, groups = 0, row_parts = 0;
  int panels = 1;  ///< of a group

  Cut(const BatchedProduct& p, std::int64_t wanted) : heads(p.heads) {
    row_parts = (p.rows + kPartRows - 1) / kPartRows;
    for (panels = cpu::kMostPanels; panels > 1; panels /= 2)
      if (heads * ((p.panels() + panels - 1) / panels) * row_parts >= wanted) break;
    groups = (p.panels() + panels - 1) / panels;
  }
  std::int64_t parts() const noexcept { return heads * groups * row_parts; }

  ProductPart part(const BatchedProduct& p, std::int64_t i) const noexcept {
    ProductPart part;
    const std::int64_t group = i / row_parts % groups;
    part.head = static_cast<int>(i / row_parts / groups);
    part.panel_begin = static_cast<int>(group) * panels;
    part.panel_end = std::min(part.panel_begin + panels, p.panels());
    part.row_begin = i % row_parts * kPartRows;
    part.row_end = std::min(part.row_begin + kPartRows, p.rows);
    return part;
  }
};

bool is_small(std::span<const BatchedProduct> products) noexcept {
  double weights = 0.0, multiplied = 0.0;
  for (const BatchedProduct& p : products) {
    const double own = static_cast<double>(p.heads) * p.depth * p.columns;
    weights += own;
    multiplied += own * static_cast<double>(p.rows);
  }
  return multiplied < kParallelProducts && weights < kParallelWeights;
}

/// Share `worker` of `workers` of the parts of a product.
void multiply_share(const BatchedProduct& p, cpu::MultiplyFn multiply, int worker, int workers) {
  const Cut cut(p, kPartsPerWorker * workers);
  const std::int64_t end = cut.parts() * (worker + 1) / workers;
  for (std::int64_t i = cut.parts() * worker / workers; i < end; ++i) multiply(p, cut.part(p, i));
}

}  // namespace

void run_products(std::span<const BatchedProduct> products, IsaLevel level, Executor* executor) {
  if (products.empty() || products.front().rows == 0) return;
  const cpu::MultiplyFn multiply = cpu::multiply_of(level, products.front().dtype);
  if (is_small(products)) {
    for (const BatchedProduct& p : products) multiply_share(p, multiply, 0, 1);
    return;
  }
  Executor& pool = executor != nullptr ? *executor : default_executor();
  const int workers = pool.num_workers();
  const auto task = [&](int worker) {
    for (const BatchedProduct& p : products) multiply_share(p, multiply, worker, workers);
  };
  pool.run(task);
}

}  // namespace attend
