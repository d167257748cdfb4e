// SPDX-License-Identifier: Apache-2.0
#include "conformance/indexer_problem.h"

#include <fmt/format.h>

#include <cmath>

#include "attend/oracle/quantize.h"

namespace attend::conformance {

void set_codes(Rng& rng, const RandomCodes& kind, void* to) {
  auto* codes = static_cast<std::uint8_t*>(to);
  for (int d = 0; d < 128; ++d)
    codes[d] = oracle::fp8_code(DType::fp8_e4m3, kind.magnitude * rng.bell(), 1.0F);
  if (rng.chance(kind.nan_chance)) codes[rng.range(0, 127)] = rng.chance(0.5) ? 0x7F : 0xFF;
}

float random_scale(Rng& rng) {
  if (rng.chance(0.01)) return rng.chance(0.5) ? 0.0F : -0.5F;
  return rng.chance(0.5) ? std::exp2(static_cast<float>(rng.range(-22, 2)))
                         : static_cast<float>(std::exp2(8.0 * rng.uniform() - 8.0));
}

Storage random_weights(Rng& rng, std::int64_t rows, std::int64_t heads, const Layout& layout) {
  Storage weights(rng, DType::f32, {rows, heads}, layout);
  weights.set_random(rng, std::exp2(rng.range(-8, 1)));
  return weights;
}

void compare_logits(Outcome& outcome, Storage& got, const oracle::IndexerLogits& expected,
                    bool clean) {
  const auto offsets = got.offsets();
  const std::int64_t columns = got.view().shape[1];
  for (std::size_t i = 0; i < offsets.size(); ++i) {
    const double wanted = expected.logits[i];
    if (std::isnan(wanted)) {
      got.expect_bits(offsets[i], 0x7FC00000);
    } else if (std::isinf(wanted) && expected.bound[i] == 0.0) {
      if (clean) got.expect_value(offsets[i], wanted);
    } else {
      compare(outcome, got.get(offsets[i]), wanted, expected.bound[i], [&] {
        const auto at = static_cast<std::int64_t>(i);
        return fmt::format("logits[{}, {}]", at / columns, at % columns);
      });
      got.accept(offsets[i]);
    }
  }
  expect_undamaged(outcome, "logits", got);
}

}  // namespace attend::conformance
