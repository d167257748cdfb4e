// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "attend/core/executor.h"
#include "serving/content.h"
#include "serving/kv_storage.h"
#include "serving/model_presets.h"

namespace attend::serving {

/// Chooses `capacity` of a stream of items whose number is not known before, each with the same
/// chance, depending only on the seed (reservoir sampling with skips, "algorithm L").
class ReservoirSampler {
 public:
  ReservoirSampler(std::int64_t capacity, std::uint64_t seed);

  /// The next `count` items of the stream pass: calls take(offset, slot) for each one chosen, with
  /// its offset in 0 .. count - 1 and the slot 0 .. capacity - 1 that it now holds.
  template <typename Take>
  void pass(std::int64_t count, Take&& take) {
    while (next_ < seen_ + count) {
      const std::int64_t item = next_;
      take(item - seen_, choose_slot());
    }
    seen_ += count;
  }

 private:
  std::int64_t choose_slot();
  double uniform();
  void skip();

  std::int64_t capacity_;
  std::uint64_t state_;
  double weight_ = 1.0;
  std::int64_t seen_ = 0;  // items passed
  std::int64_t next_ = 0;  // index of the next chosen item
};

/// One (token, head) row as the kernel computed it; of differential attention one (token, pair).
struct SampledRow {
  const Request* request = nullptr;
  std::int64_t step = 0;
  std::int64_t position = 0;
  std::int64_t num_keys = 0;  ///< keys of the request in that step, those that it attends to
  /// Keys from this position on are rejected drafts; num_keys if there are none.
  std::int64_t first_rejected = 0;
  bool mla_decode = false;  ///< as StepToken::mla_decode
  int layer = 0;
  int head = 0;  ///< or pair
  AttentionType type = AttentionType::decoder;
  std::vector<std::int32_t> chosen;  ///< sparse attention: as the indexer gave them
  std::vector<float> out;            ///< [row_dim() of the model]
  float lse = 0.0F;
  float second_lse =
      0.0F;  ///< differential attention: of a pair's second map; `lse` is the first's
};

/// Whose values the query and the key at a position of a row are, as content_id() counts.
std::uint64_t query_content(const SampledRow& row);
std::uint64_t key_content(const SampledRow& row, std::int64_t position);

/// What a row should be, and how far it may be from that.
struct ExpectedRow {
  std::vector<double> out, out_bound;  ///< [row_dim() of the model]
  double lse = 0.0, lse_bound = 0.0;
  double second_lse = 0.0, second_lse_bound = 0.0;
};

struct CheckSummary {
  std::int64_t rows = 0;
  std::int64_t failed = 0;
  double worst_error = 0.0;           ///< largest |out - reference| of any element
  double worst_ratio_to_bound = 0.0;  ///< of outputs and LSE, each over its own bound; <= 1 passes
  std::vector<std::string> failures;  ///< one line each
};

/// Computes every row again in float64 from the generator, never from the cache, and compares
/// against the oracle's error bounds. Keys and values are rounded as the cache stores them, and
/// queries and weights as `storage` demands: the bounds are those of the arithmetic, not of the
/// quantisation.
CheckSummary check_rows(const std::vector<SampledRow>& rows, const ModelPreset& model,
                        const ValueGenerator& generator, const KvStorage& storage,
                        Executor& executor);

}  // namespace attend::serving
