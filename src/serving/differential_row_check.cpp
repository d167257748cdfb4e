// SPDX-License-Identifier: Apache-2.0
#include "serving/differential_row_check.h"

#include <utility>
#include <vector>

#include "attend/oracle/differential.h"
#include "serving/differential_layer.h"
#include "serving/row_problem.h"

namespace attend::serving {
namespace {

oracle::DifferentialRowCombine combine_of(const DifferentialLayerConfig& layer) {
  const auto view = [](const std::vector<float>& v) {
    return ConstTensorView(v.data(), DType::f32, {static_cast<std::int64_t>(v.size())});
  };
  const oracle::Number lambda = oracle::differential_lambda(
      {view(layer.lambda_q1), view(layer.lambda_k1), view(layer.lambda_q2), view(layer.lambda_k2),
       layer.lambda_init, layer.lambda_rounding});
  oracle::DifferentialRowCombine c;
  c.lambda = lambda.value;
  c.lambda_error = lambda.bound;
  c.norm_weight.assign(layer.norm_weight.begin(), layer.norm_weight.end());
  c.norm_eps = layer.norm_eps;
  c.out_scale = static_cast<float>(1.0 - layer.lambda_init);
  return c;
}

/// Keys and values of a kv pair.
struct PairRows {
  RegeneratedRows keys[2], values[2];
};

}  // namespace

ExpectedRow recompute_differential(const SampledRow& row, const ModelPreset& model,
                                   const ValueGenerator& generator, const KvStorage& storage) {
  const int pair = row.head, dim = model.head_dim;
  const int kv_pair = pair / (model.num_q_heads / model.num_kv_heads);
  const auto rows_of = [&](ValueKind kind, int branch) {
    const LayerHead place =
        kind == ValueKind::query
            ? LayerHead{row.layer, model.head_of(pair, branch, model.num_q_heads)}
            : LayerHead{model.cache_of(row.layer),
                        model.head_of(kv_pair, branch, model.num_kv_heads)};
    return RegeneratedRows(row, kind, place, dim, generator, storage);
  };
  PairRows kv{{rows_of(ValueKind::key, 0), rows_of(ValueKind::key, 1)},
              {rows_of(ValueKind::value, 0), rows_of(ValueKind::value, 1)}};
  RegeneratedRows queries[2] = {rows_of(ValueKind::query, 0), rows_of(ValueKind::query, 1)};
  oracle::RowProblem maps[2];
  for (int b = 0; b < 2; ++b) {
    oracle::RowProblem& p = maps[b];
    p = make_row_problem(row, model, model.head_of(pair, b, model.num_q_heads));
    p.head_dim_v = 2 * dim;
    p.q = [&, b](int d) { return queries[b](row.position, d); };
    p.k = [&, b](std::int64_t j, int d) { return kv.keys[b](j, d); };
    p.v = [&](std::int64_t j, int d) { return kv.values[d / dim](j, d % dim); };
  }
  oracle::DifferentialRow r = oracle::differential_row(
      maps[0], maps[1], combine_of(make_differential_layer(model, row.layer, generator)),
      generator.dtype());
  ExpectedRow expected{std::move(r.out), std::move(r.out_bound), r.lse[0], r.lse_bound[0]};
  expected.second_lse = r.lse[1];
  expected.second_lse_bound = r.lse_bound[1];
  return expected;
}

}  // namespace attend::serving
