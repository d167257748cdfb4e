// SPDX-License-Identifier: Apache-2.0
#include "serving/mla_row_check.h"

#include <cmath>
#include <utility>

#include "attend/cache/fp8_ds_mla.h"
#include "attend/oracle/mla.h"
#include "attend/oracle/quantize.h"
#include "serving/mla_layer.h"

namespace attend::serving {
namespace {

void store_fp8(DType format, std::vector<float>& row) {
  for (float& x : row)
    x = static_cast<float>(oracle::fp8_value(format, oracle::fp8_code(format, x, 1.0F)));
}

/// Of the latent alone: the format stores a rotated key as it is.
void store_ds_mla(std::vector<float>& latent) {
  const std::vector<double> exact(latent.begin(), latent.end());
  const std::vector<std::uint16_t> rope(fp8_ds_mla::kRope);
  std::vector<std::uint8_t> bytes(fp8_ds_mla::kRowBytes);
  std::vector<double> row(fp8_ds_mla::kDim);
  oracle::fp8_ds_mla_encode(exact, rope, bytes);
  oracle::fp8_ds_mla_decode(bytes, row);
  for (std::size_t l = 0; l < latent.size(); ++l) latent[l] = static_cast<float>(row[l]);
}

/// A token's cache row as attention sees it: one position at a time.
class TokenRows {
 public:
  TokenRows(const SampledRow& row, const MlaDims& dims, const ValueGenerator& generator,
            const KvStorage& storage)
      : row_(row),
        generator_(generator),
        storage_(storage),
        latent_(static_cast<std::size_t>(dims.kv_lora_rank)),
        rotated_(static_cast<std::size_t>(dims.qk_rope_head_dim)) {}

  double latent(std::int64_t j, int l) {
    load(j);
    return latent_[static_cast<std::size_t>(l)];
  }
  double rotated(std::int64_t j, int d) {
    load(j);
    return rotated_[static_cast<std::size_t>(d)];
  }

 private:
  void load(std::int64_t j) {
    if (j == position_) return;
    position_ = j;
    const auto fill = [&](ValueKind kind, std::vector<float>& values) {
      generator_.fill_f32({key_content(row_, j), j, row_.layer, 0, kind},
                          static_cast<int>(values.size()), values.data());
    };
    fill(ValueKind::key, latent_);
    fill(ValueKind::value, rotated_);
    if (storage_.format == KvFormat::fp8_ds_mla) {
      store_ds_mla(latent_);
    } else if (is_fp8(storage_.dtype)) {
      store_fp8(storage_.dtype, latent_);
      store_fp8(storage_.dtype, rotated_);
    }
  }

  const SampledRow& row_;
  const ValueGenerator& generator_;
  const KvStorage& storage_;
  std::int64_t position_ = -1;
  std::vector<float> latent_, rotated_;
};

}  // namespace

ExpectedRow recompute_mla(const SampledRow& row, const ModelPreset& model,
                          const ValueGenerator& generator, const KvStorage& storage) {
  const MlaDims& n = *model.mla;
  std::vector<float> query(static_cast<std::size_t>(n.qk_head_dim()));
  generator.fill_f32({query_content(row), row.position, row.layer, row.head, ValueKind::query},
                     n.qk_head_dim(), query.data());
  const auto rank = static_cast<std::size_t>(n.kv_lora_rank);
  const int weight_rows = n.qk_nope_head_dim + n.v_head_dim;
  std::vector<float> weights(static_cast<std::size_t>(weight_rows) * rank);
  for (int r = 0; r < weight_rows; ++r) {
    fill_weight_row(generator, n, {.layer = row.layer, .head = row.head, .row = r},
                    weights.data() + static_cast<std::size_t>(r) * rank);
  }
  const auto weight = [&](int r, int l) {
    return static_cast<double>(
        weights[static_cast<std::size_t>(r) * rank + static_cast<std::size_t>(l)]);
  };
  TokenRows tokens(row, n, generator, storage);

  oracle::MlaRowProblem p;
  p.dims = n;
  p.position = row.position;
  p.num_keys = row.num_keys;
  p.scale = model.scale ? static_cast<double>(*model.scale) : 1.0 / std::sqrt(n.qk_head_dim());
  p.dtype = generator.dtype();
  p.cache_dtype = storage.dtype;
  p.q = [&](int d) { return static_cast<double>(query[static_cast<std::size_t>(d)]); };
  p.latent = [&](std::int64_t j, int l) { return tokens.latent(j, l); };
  p.k_pe = [&](std::int64_t j, int d) { return tokens.rotated(j, d); };
  p.w_uk = weight;
  p.w_uv = [&](int v, int l) { return weight(n.qk_nope_head_dim + v, l); };
  oracle::MlaRowResult r = model.indexer    ? oracle::mla_sparse_row(p, row.chosen)
                           : row.mla_decode ? oracle::mla_decode_row(p)
                                            : oracle::mla_prefill_row(p);
  return {std::move(r.out), std::move(r.out_bound), r.lse, r.lse_bound};
}

}  // namespace attend::serving
