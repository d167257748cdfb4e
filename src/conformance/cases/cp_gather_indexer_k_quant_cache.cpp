// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstring>
#include <vector>

#include "attend/ops/indexer_cache.h"
#include "conformance/check.h"
#include "conformance/random_blocks.h"

namespace attend::conformance {
namespace {

std::vector<std::int32_t> random_lengths(Rng& rng) {
  std::vector<std::int32_t> lengths(static_cast<std::size_t>(rng.range(0, 6)));
  for (std::int32_t& n : lengths) {
    if (rng.chance(0.85)) n = static_cast<std::int32_t>(rng.range(1, 900));
  }
  return lengths;
}

class CpGatherIndexerKQuantCacheCase final : public Case {
 public:
  explicit CpGatherIndexerKQuantCacheCase(Rng& rng)
      : lengths_(random_lengths(rng)),
        blocks_(rng, lengths_, std::vector<std::int32_t>(lengths_.size()),
                rng.pick({1, 3, 16, 64, 128}), rng.chance(0.5)) {
    Layout layout;
    layout.padded = rng.chance(0.5);
    bytes_ = Storage(rng, DType::u8, {blocks_.num_blocks, 132 * blocks_.block_size}, layout);
    bytes_.set_random_bits(rng);
    std::vector<std::int32_t> cu{0};
    for (const std::int32_t n : lengths_) cu.push_back(cu.back() + n);
    cu_seq_lens_ = int_storage(rng, cu);
    const std::int64_t rows = cu.back() + rng.range(0, 5);
    dst_k_ = Storage(rng, DType::fp8_e4m3, {rows, 128}, layout);
    dst_scale_ = Storage(rng, DType::f32, {rows});
    dst_k_.freeze();
    dst_scale_.freeze();
  }

  Outcome run(const KernelOptions&, Executor& executor) override {
    dst_k_.reset();
    dst_scale_.reset();
    const TensorView bytes = bytes_.view();
    TensorView cache(bytes.data, DType::u8, {bytes.shape[0], blocks_.block_size, 132});
    cache.strides[0] = bytes.strides[0];
    cp_gather_indexer_k_quant_cache({.kv_cache = cache,
                                     .dst_k = dst_k_.view(),
                                     .dst_scale = dst_scale_.view(),
                                     .block_table = blocks_.table.view(),
                                     .cu_seq_lens = cu_seq_lens_.view()},
                                    &executor);
    std::int64_t row = 0;
    for (std::size_t r = 0; r < lengths_.size(); ++r) {
      for (std::int64_t token = 0; token < lengths_[r]; ++token)
        expect_row(row++, blocks_.block(static_cast<int>(r), token), token % blocks_.block_size);
    }
    Outcome outcome;
    expect_undamaged(outcome, "dst_k", dst_k_);
    expect_undamaged(outcome, "dst_scale", dst_scale_);
    return outcome;
  }

  std::string describe() const override {
    return fmt::format("requests of {} tokens, block_size {}", lengths_, blocks_.block_size);
  }

 private:
  void expect_row(std::int64_t row, std::int64_t block, std::int64_t offset) {
    const std::int64_t to = dst_k_.offset({row, 0});
    for (std::int64_t i = 0; i < 128; ++i)
      dst_k_.expect_copy(to + i, bytes_, bytes_.offset({block, 128 * offset + i}));
    const auto* bytes = bytes_.view().as<std::uint8_t>();
    std::uint32_t scale;
    std::memcpy(&scale, bytes + bytes_.offset({block, 128 * blocks_.block_size + 4 * offset}), 4);
    dst_scale_.expect_bits(row, scale);
  }

  std::vector<std::int32_t> lengths_;
  RandomBlocks blocks_;
  Storage bytes_, cu_seq_lens_, dst_k_, dst_scale_;
};

}  // namespace

Op op_cp_gather_indexer_k_quant_cache() {
  return {"cp_gather_indexer_k_quant_cache", false,
          [](Rng& rng) { return std::make_unique<CpGatherIndexerKQuantCacheCase>(rng); }};
}

}  // namespace attend::conformance
