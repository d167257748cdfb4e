// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "attend/ops/indexer.h"
#include "attend/oracle/top_k.h"
#include "conformance/check.h"
#include "conformance/storage.h"

namespace attend::conformance {
namespace {

class IndexerShortRowsCase final : public Case {
 public:
  explicit IndexerShortRowsCase(Rng& rng)
      : rows_(rng.range(0, 300)), k_(rng.pick({1, 5, 64, 512, 2048})) {
    for (int t = 0; t < rows_; ++t) {
      const std::int32_t near = rng.pick({k_ - 1, k_, k_ + 1, 0, -3});
      lengths_.push_back(rng.chance(0.1) ? rng.pick({std::numeric_limits<std::int32_t>::min(),
                                                     std::numeric_limits<std::int32_t>::max()})
                                         : (rng.chance(0.4) ? near : rng.range(0, 2 * k_)));
    }
    lengths_storage_ = int_storage(rng, lengths_);
    Layout layout;
    layout.padded = rng.chance(0.5);
    out_ = Storage(rng, DType::i32, {rows_, k_}, layout);
    out_.freeze();
  }

  Outcome run(const KernelOptions&, Executor& executor) override {
    out_.reset();
    const std::int64_t longer =
        indexer_short_rows({lengths_storage_.view(), out_.view()}, &executor);
    Outcome outcome;
    std::int64_t expected_longer = 0;
    for (int t = 0; t < rows_; ++t) {
      const std::int32_t length = std::max(lengths_[static_cast<std::size_t>(t)], 0);
      if (length > k_) {
        ++expected_longer;
        continue;
      }
      // Any logits: all are chosen.
      std::vector<std::int64_t> indices(static_cast<std::size_t>(k_));
      oracle::top_k(std::vector<double>(static_cast<std::size_t>(length), 1.0), indices);
      std::int64_t to = out_.offset({t, 0});
      for (const std::int64_t index : indices)
        out_.expect_bits(to++, static_cast<std::uint64_t>(index));
    }
    if (longer != expected_longer)
      outcome.fail(fmt::format("{} rows are longer, expected {}", longer, expected_longer));
    expect_undamaged(outcome, "out", out_);
    return outcome;
  }

  std::string describe() const override { return fmt::format("{} rows, k {}", rows_, k_); }

 private:
  int rows_, k_;
  std::vector<std::int32_t> lengths_;
  Storage lengths_storage_, out_;
};

}  // namespace

Op op_indexer_short_rows() {
  return {"indexer_short_rows", false,
          [](Rng& rng) { return std::make_unique<IndexerShortRowsCase>(rng); }};
}

}  // namespace attend::conformance
