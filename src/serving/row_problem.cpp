// SPDX-License-Identifier: Apache-2.0
#include "serving/row_problem.h"

#include <cmath>

#include "attend/oracle/quantize.h"

namespace attend::serving {
namespace {

/// Of one (token, head).
using Values = std::vector<double>;

/// The numbers that a row's codes stand for, with a scale of its own.
void quantise(Values& row) {
  const float scale = oracle::int8_scale(row);
  for (double& x : row) x = oracle::int8_code(x, scale) * static_cast<double>(scale);
}

void quantise_by(const float* scales, Values& row) {
  for (std::size_t d = 0; d < row.size(); ++d) {
    row[d] = oracle::int8_code(row[d], scales[d]) * static_cast<double>(scales[d]);
  }
}

}  // namespace

RegeneratedRows::RegeneratedRows(const SampledRow& row, ValueKind kind, LayerHead place,
                                 int head_dim, const ValueGenerator& generator,
                                 const KvStorage& storage)
    : row_(row),
      kind_(kind),
      place_(place),
      generator_(generator),
      storage_(storage),
      generated_(static_cast<std::size_t>(head_dim)) {}

void RegeneratedRows::load(std::int64_t j) {
  position_ = j;
  const std::uint64_t content =
      kind_ == ValueKind::query ? query_content(row_) : key_content(row_, j);
  generator_.fill_f32({content, j, place_.layer, place_.head, kind_},
                      static_cast<int>(generated_.size()), generated_.data());
  values_.assign(generated_.begin(), generated_.end());
  encode();
}

void RegeneratedRows::encode() {
  switch (kind_) {
    case ValueKind::query:
      if (is_int8_level(storage_.format)) quantise(values_);
      return;
    case ValueKind::key:
      storage_.format == KvFormat::plain ? round() : quantise(values_);
      return;
    case ValueKind::value:
      encode_value();
      return;
    case ValueKind::weight:
    case ValueKind::index_query:
    case ValueKind::index_key:
    case ValueKind::index_weight:
      return;  // no cache of attention holds any
  }
}

/// Generated values fit every type but fp8.
void RegeneratedRows::round() {
  if (!is_fp8(storage_.dtype)) return;
  for (double& x : values_)
    x = oracle::fp8_value(storage_.dtype, oracle::fp8_code(storage_.dtype, x, 1.0F));
}

void RegeneratedRows::encode_value() {
  switch (storage_.format) {
    case KvFormat::plain:
    case KvFormat::fp8_ds_mla:  // has no values apart from keys
      round();
      return;
    case KvFormat::int8_level1:
      quantise_by(storage_.value_scales->layer(place_.layer).select(0, place_.head).as<float>(),
                  values_);
      return;
    case KvFormat::int8_level2:
      return;  // 16 bits, as generated
    case KvFormat::int8_per_token_head:
      quantise(values_);
  }
}

oracle::RowProblem make_row_problem(const SampledRow& row, const ModelPreset& model, int head) {
  oracle::RowProblem p;
  p.head_dim_qk = p.head_dim_v = model.head_dim;
  p.position = row.position;
  p.num_keys = row.num_keys;
  p.scale = model.scale ? static_cast<double>(*model.scale) : 1.0 / std::sqrt(model.head_dim);
  p.causal = row.type == AttentionType::decoder;
  const auto window = row.type == model.attn_type ? model.window_of(row.layer) : std::nullopt;
  if (window) {
    p.window_left = *window - 1;
    p.window_right = p.causal ? 0 : *window - 1;
  }
  p.softcap = model.softcap;
  if (model.alibi) {
    p.alibi_slope = alibi_slopes(model.num_q_heads)[static_cast<std::size_t>(head)];
    p.alibi_sqrt = model.alibi_sqrt;
  }
  if (model.sinks) p.sink = sink_logits(model.num_q_heads)[static_cast<std::size_t>(head)];
  return p;
}

}  // namespace attend::serving
