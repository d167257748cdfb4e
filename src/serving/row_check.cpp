// SPDX-License-Identifier: Apache-2.0
#include "serving/row_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>

#include "attend/oracle/attention.h"
#include "serving/differential_row_check.h"
#include "serving/index_check.h"
#include "serving/mla_row_check.h"
#include "serving/row_problem.h"

namespace attend::serving {
namespace {

/// Of int8_level1: weights are rounded to n / 127 of the largest of their 256 keys.
constexpr int kWeightLevels = 127;

/// Cross attention has queries of the decoder and keys of the encoder.
bool has_encoder_keys(const SampledRow& row) {
  return row.type == AttentionType::encoder || row.type == AttentionType::encoder_decoder;
}

ExpectedRow recompute(const SampledRow& row, const ModelPreset& model,
                      const ValueGenerator& generator, const KvStorage& storage) {
  const int kv_head = row.head / (model.num_q_heads / model.num_kv_heads);
  // An encoder has no cache through which its keys would go.
  const KvStorage stored =
      row.type == AttentionType::encoder ? KvStorage{generator.dtype()} : storage;
  const auto rows = [&](ValueKind kind, LayerHead place) {
    return RegeneratedRows(row, kind, place, model.head_dim, generator, stored);
  };
  const LayerHead kv{model.cache_of(row.layer), kv_head};
  RegeneratedRows query = rows(ValueKind::query, {row.layer, row.head});
  RegeneratedRows keys = rows(ValueKind::key, kv);
  RegeneratedRows values = rows(ValueKind::value, kv);

  oracle::RowProblem p = make_row_problem(row, model, row.head);
  p.split_weights = oracle::splits_weights(stored.dtype);
  if (stored.format == KvFormat::int8_level1) p.weight_levels = kWeightLevels;
  p.q = [&](int d) { return query(row.position, d); };
  p.k = [&](std::int64_t j, int d) { return keys(j, d); };
  p.v = [&](std::int64_t j, int d) { return values(j, d); };
  const oracle::RowResult r = oracle::attention_row(p);
  ExpectedRow expected{r.out, {}, r.lse, oracle::lse_error_bound(r, model.head_dim)};
  for (int d = 0; d < model.head_dim; ++d) {
    expected.out_bound.push_back(oracle::out_error_bound(r, d, model.head_dim, generator.dtype()));
  }
  return expected;
}

struct RowOutcome {
  double worst_error = 0.0;
  double worst_ratio = 0.0;
  std::string where;  // the element with the worst ratio
};

/// |got - want| / bound; infinite if they differ although the bound is 0 or if got is NaN.
double ratio_to_bound(double got, double want, double bound) {
  if (got == want) return 0.0;  // infinities of the same sign too
  const double ratio = std::abs(got - want) / bound;
  return std::isnan(ratio) ? std::numeric_limits<double>::infinity() : ratio;
}

RowOutcome compare(const SampledRow& row, const ModelPreset& model, const ValueGenerator& generator,
                   const KvStorage& storage) {
  if (model.indexer) {
    std::string wrong = check_chosen(row, model, generator);
    if (!wrong.empty()) {
      constexpr double kInfinity = std::numeric_limits<double>::infinity();
      return {kInfinity, kInfinity, std::move(wrong)};
    }
  }
  const auto again = model.differential ? recompute_differential
                     : model.mla        ? recompute_mla
                                        : recompute;
  const ExpectedRow want = again(row, model, generator, storage);
  RowOutcome outcome;
  const auto note = [&](double got, double reference, double bound, std::string_view what) {
    const double ratio = ratio_to_bound(got, reference, bound);
    if (ratio <= outcome.worst_ratio) return;
    outcome.worst_ratio = ratio;
    outcome.where = fmt::format("{} is {}, expected {} +- {:.3g}", what, got, reference, bound);
  };
  for (std::size_t d = 0; d < want.out.size(); ++d) {
    const double got = row.out[d];
    const double error = std::abs(got - want.out[d]);
    outcome.worst_error = std::max(
        outcome.worst_error, std::isnan(error) ? std::numeric_limits<double>::infinity() : error);
    note(got, want.out[d], want.out_bound[d], fmt::format("out[{}]", d));
  }
  note(row.lse, want.lse, want.lse_bound, "lse");
  note(row.second_lse, want.second_lse, want.second_lse_bound, "lse of the second map");
  return outcome;
}

}  // namespace

std::uint64_t key_content(const SampledRow& row, std::int64_t position) {
  if (has_encoder_keys(row)) return encoder_content_id(*row.request);
  return position < row.first_rejected ? content_id(*row.request, position)
                                       : draft_content_id(*row.request, row.first_rejected);
}

std::uint64_t query_content(const SampledRow& row) {
  if (row.type == AttentionType::encoder) return encoder_content_id(*row.request);
  return row.position < row.first_rejected ? own_content_id(*row.request)
                                           : draft_content_id(*row.request, row.first_rejected);
}

ReservoirSampler::ReservoirSampler(std::int64_t capacity, std::uint64_t seed)
    : capacity_(capacity), state_(mix64(seed ^ 0x726573657276ULL)) {
  if (capacity_ <= 0) next_ = std::numeric_limits<std::int64_t>::max();
}

double ReservoirSampler::uniform() {
  state_ += 0x9e3779b97f4a7c15ULL;
  return (static_cast<double>(mix64(state_) >> 11) + 0.5) * 0x1p-53;
}

void ReservoirSampler::skip() {
  weight_ *= std::exp(std::log(uniform()) / static_cast<double>(capacity_));
  const double gap = std::floor(std::log(uniform()) / std::log1p(-weight_));
  constexpr double most = 1e18;  // the stream never gets that long
  next_ += 1 + static_cast<std::int64_t>(std::min(gap, most));
}

std::int64_t ReservoirSampler::choose_slot() {
  const std::int64_t item = next_;
  if (item + 1 < capacity_) {
    ++next_;
    return item;
  }
  skip();
  if (item < capacity_) return item;
  const auto slot = static_cast<std::int64_t>(uniform() * static_cast<double>(capacity_));
  return std::min(slot, capacity_ - 1);
}

CheckSummary check_rows(const std::vector<SampledRow>& rows, const ModelPreset& model,
                        const ValueGenerator& generator, const KvStorage& storage,
                        Executor& executor) {
  std::vector<RowOutcome> outcomes(rows.size());
  std::atomic<std::size_t> next{0};
  executor.run([&](int) {
    for (std::size_t i = next++; i < rows.size(); i = next++) {
      outcomes[i] = compare(rows[i], model, generator, storage);
    }
  });
  CheckSummary summary;
  summary.rows = static_cast<std::int64_t>(rows.size());
  for (std::size_t i = 0; i < rows.size(); ++i) {
    summary.worst_error = std::max(summary.worst_error, outcomes[i].worst_error);
    summary.worst_ratio_to_bound = std::max(summary.worst_ratio_to_bound, outcomes[i].worst_ratio);
    if (outcomes[i].worst_ratio <= 1.0) continue;
    ++summary.failed;
    summary.failures.push_back(fmt::format("request {} position {} layer {} {} {} (step {}): {}",
                                           rows[i].request->id, rows[i].position, rows[i].layer,
                                           model.differential ? "pair" : "head", rows[i].head,
                                           rows[i].step, outcomes[i].where));
  }
  return summary;
}

}  // namespace attend::serving
