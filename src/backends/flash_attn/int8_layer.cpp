// SPDX-License-Identifier: Apache-2.0
#include "backends/flash_attn/int8_layer.h"

#include "attend/cache/int8_mixed_cache.h"
#include "attend/ops/quant.h"
#include "core/check.h"

namespace attend::flash_attn {

Int8Layer::Int8Layer(const ImplConfig& config, const AttentionParams& params,
                     const ForwardArgs& args, const FlashAttnMetadata& metadata)
    : config_(config), params_(params), args_(args), m_(metadata) {
  check::require(
      args.workspace.data != nullptr && args.workspace.size >= m_.workspace_bytes(),
      {"FLASH_ATTN.forward", "workspace"},
      [&] { return fmt::format("at least {} bytes", m_.workspace_bytes()); },
      [&] { return fmt::format("{} bytes", args.workspace.size); });
  const Int8Scratch::Views at = m_.int8_scratch.at(args.workspace, m_.plan->workspace_bytes);
  const std::int64_t tokens = m_.num_tokens, rows = m_.num_new_keys, d = config.head_size;
  q_codes_ = {at.q_codes, DType::i8, {tokens, config.num_q_heads, d}};
  q_scale_ = {at.q_scale, DType::f32, {config.num_q_heads, tokens}};
  k_codes_ = {at.k_codes, DType::i8, {rows, config.num_kv_heads, d}};
  k_scale_ = {at.k_scale, DType::f32, {rows, config.num_kv_heads}};
  v_codes_ = {at.v_codes, DType::i8, {rows, config.num_kv_heads, d}};
}

void Int8Layer::forward(bool writes, Executor& executor) const {
  if (m_.num_tokens > 0) validate(attention_args(), *m_.plan, args_.workspace, executor);
  if (writes) {
    quantize_new_rows(executor);
    if (m_.format == KvFormat::int8_level1) {
      reshape_and_cache_flash_int8(cache_args(), &executor);
    } else {
      reshape_and_cache_flash_mix(cache_args(), &executor);
    }
  }
  if (m_.num_tokens == 0) return;
  quantize_queries(executor);
  flash_attn_varlen_int8(attention_args(), *m_.plan, args_.workspace, executor);
}

void Int8Layer::quantize_queries(Executor& executor) const {
  ScaledInt8QuantArgs q;
  q.input = args_.query.slice(0, 0, m_.num_tokens);
  q.output = q_codes_;
  q.scale = q_scale_;
  q.transpose_scale = true;
  scaled_int8_quant_for_attn(q, &executor);
}

void Int8Layer::quantize_new_rows(Executor& executor) const {
  // Values first: a NaN among them has no code and is refused.
  if (m_.format == KvFormat::int8_level1) {
    ScaledInt8QuantArgs v;
    v.input = args_.value.slice(0, 0, m_.num_new_keys);
    v.output = v_codes_;
    v.mode = Int8QuantMode::per_channel;
    v.static_scale = value_scales();
    scaled_int8_quant_for_attn(v, &executor);
  }
  ScaledInt8QuantArgs k;
  k.input = args_.key.slice(0, 0, m_.num_new_keys);
  k.output = k_codes_;
  k.scale = k_scale_;
  scaled_int8_quant_for_attn(k, &executor);
}

TensorView Int8Layer::key_cache() const {
  return m_.format == KvFormat::int8_level1 ? args_.kv_cache.select(0, 0)
                                            : int8_mixed_key_view(args_.kv_cache);
}

TensorView Int8Layer::value_cache() const {
  return m_.format == KvFormat::int8_level1 ? args_.kv_cache.select(0, 1)
                                            : int8_mixed_value_view(args_.kv_cache, config_.dtype);
}

ConstTensorView Int8Layer::value_scales() const {
  if (m_.format != KvFormat::int8_level1) return {};
  return {config_.value_scales.data(), DType::f32, {config_.num_kv_heads, config_.head_size}};
}

FlashAttnVarlenInt8Args Int8Layer::attention_args() const {
  FlashAttnVarlenInt8Args a;
  a.q = q_codes_;
  a.q_scale = q_scale_;
  a.k = key_cache();
  a.k_scale = args_.kv_scale_cache;
  a.v = value_cache();
  a.v_scale = value_scales();
  a.out = args_.output.slice(0, 0, m_.num_tokens);
  if (args_.lse.defined()) a.lse = args_.lse.slice(0, 0, m_.num_tokens);
  a.block_table = m_.block_table;
  a.params = params_;
  return a;
}

ReshapeAndCacheInt8Args Int8Layer::cache_args() const {
  ReshapeAndCacheInt8Args a;
  a.key = k_codes_;
  a.value = m_.format == KvFormat::int8_level1 ? ConstTensorView(v_codes_)
                                               : args_.value.slice(0, 0, m_.num_new_keys);
  a.k_scale = k_scale_;
  a.key_cache = key_cache();
  a.value_cache = value_cache();
  a.key_scale_cache = args_.kv_scale_cache;
  a.slot_mapping = ConstTensorView(m_.slot_mapping.data(), DType::i64, {m_.num_new_keys});
  return a;
}

}  // namespace attend::flash_attn
