// SPDX-License-Identifier: Apache-2.0
#include "configs.h"

#include "attend/ops/mla_weights.h"

namespace attend::python {
namespace {

/// A word that `parse` turns into an optional value.
template <typename T, typename Parse>
T read_word(Arguments& call, const char* name, T otherwise, std::string_view expected,
            Parse&& parse) {
  const std::optional<std::string> word = call.text(name);
  if (!word) return otherwise;
  const std::optional<T> value = parse(*word);
  if (!value) call.refuse(name, expected, *word);
  return *value;
}

AttentionType read_attention_type(Arguments& call) {
  return read_word(call, "attn_type", AttentionType::decoder,
                   "decoder, encoder, encoder_only or encoder_decoder", parse_attention_type);
}

Platform read_platform(Arguments& call) {
  const std::string text = call.text("platform").value_or("cpu");
  try {
    return Platform::parse(text);
  } catch (const InvalidArgument&) {
    call.refuse("platform", "cpu, cuda:MAJOR.MINOR (like cuda:9.0) or rocm:ARCH (like rocm:gfx942)",
                text);
  }
}

MlaDims read_mla_dims(Arguments& call) {
  MlaDims d;
  d.kv_lora_rank = call.small_integer("kv_lora_rank", 0);
  d.qk_nope_head_dim = call.small_integer("qk_nope_head_dim", 0);
  d.qk_rope_head_dim = call.small_integer("qk_rope_head_dim", 0);
  d.v_head_dim = call.small_integer("v_head_dim", 0);
  return d;
}

DifferentialVariant read_variant(Arguments& call) {
  return read_word(call, "variant", DifferentialVariant::v1, "v1 or v2",
                   [](std::string_view word) -> std::optional<DifferentialVariant> {
                     if (word == "v1") return DifferentialVariant::v1;
                     if (word == "v2") return DifferentialVariant::v2;
                     return std::nullopt;
                   });
}

HeadPairing read_pairing(Arguments& call) {
  return read_word(call, "pairing", HeadPairing::interleaved, "interleaved or halves",
                   [](std::string_view word) -> std::optional<HeadPairing> {
                     if (word == "interleaved") return HeadPairing::interleaved;
                     if (word == "halves") return HeadPairing::halves;
                     return std::nullopt;
                   });
}

MlaBuilderConfig read_mla_builder(Arguments& call) {
  MlaBuilderConfig c;
  c.dims = read_fields(call, "dims", read_mla_dims);
  c.dtype = call.dtype("dtype").value_or(c.dtype);
  c.prefill_backend = call.text("prefill_backend").value_or(c.prefill_backend);
  c.platform = read_platform(call);
  c.max_model_len = call.integer("max_model_len", 0);
  c.max_num_seqs = call.small_integer("max_num_seqs", 0);
  c.workspace_tokens = call.integer("workspace_tokens", 0);
  c.decode_threshold = call.small_integer("decode_threshold", 0);
  c.short_extends_decode = call.boolean("short_extends_decode", true);
  c.quant_output = call.boolean("quant_output", false);
  return c;
}

SparseBuilderConfig read_sparse_builder(Arguments& call) {
  SparseBuilderConfig c;
  c.topk = call.small_integer("topk", 0);
  c.max_num_batched_tokens = call.small_integer("max_num_batched_tokens", 0);
  c.strategy = read_word(call, "strategy", c.strategy, "automatic, mixed or separate",
                         parse_sparse_strategy);
  c.num_processors = call.small_integer("num_processors", 0);
  c.max_gathered_keys = call.integer("max_gathered_keys", c.max_gathered_keys);
  c.max_logits_bytes = call.integer("max_logits_bytes", c.max_logits_bytes);
  return c;
}

AotLimits read_capture(Arguments& call) {
  AotLimits limits;
  limits.max_reqs = call.small_integer("max_reqs", 0);
  limits.max_tokens = call.small_integer("max_tokens", 0);
  limits.max_seq_len = call.small_integer("max_seq_len", 0);
  return limits;
}

DifferentialBuilderConfig read_differential_builder(Arguments& call) {
  return {.variant = read_variant(call)};
}

MlaLayerConfig read_mla_layer(Arguments& call) {
  KvBProjArgs weights;
  weights.weight = call.in("kv_b_proj");
  weights.weight_scale = call.in("kv_b_proj_scale");
  weights.dims = read_fields(call, "dims", read_mla_dims);
  weights.num_heads = call.small_integer("num_heads", 0);
  weights.dtype = call.dtype("dtype").value_or(weights.dtype);
  MlaLayerConfig c;
  c.prefill_backend = call.text("prefill_backend").value_or(c.prefill_backend);
  c.platform = read_platform(call);
  call.done();
  const nb::gil_scoped_release without_gil;  // packing takes a while
  c.weights = MlaWeights::from_kv_b_proj(weights);
  return c;
}

DifferentialLayerConfig read_differential_layer(Arguments& call) {
  DifferentialLayerConfig c;
  c.variant = read_variant(call);
  c.pairing = read_pairing(call);
  c.lambda_q1 = call.numbers("lambda_q1");
  c.lambda_k1 = call.numbers("lambda_k1");
  c.lambda_q2 = call.numbers("lambda_q2");
  c.lambda_k2 = call.numbers("lambda_k2");
  c.lambda_init = call.number("lambda_init", c.lambda_init);
  c.lambda_rounding = call.dtype("lambda_rounding");
  c.norm = call.boolean("norm", c.norm);
  c.norm_weight = call.numbers("norm_weight");
  c.norm_eps = static_cast<float>(call.number("norm_eps", static_cast<double>(c.norm_eps)));
  return c;
}

/// A struct that may be missing.
template <typename Read>
auto read_optional(Arguments& call, const char* name, Read&& read)
    -> std::optional<decltype(read(call))> {
  if (!call.object(name).is_valid()) return std::nullopt;
  return read_fields(call, name, read);
}

}  // namespace

KvLayout read_layout(Arguments& call, const char* name) {
  return read_word(call, name, KvLayout::nhd, "nhd or hnd", parse_kv_layout);
}

KvFormat read_format(Arguments& call, const char* name) {
  return read_word(call, name, KvFormat::plain,
                   "plain, int8_level1, int8_level2, int8_per_token_head or fp8_ds_mla",
                   parse_kv_format);
}

KvCacheSpec read_cache_spec(Arguments& call) {
  KvCacheSpec s;
  s.num_blocks = call.integer("num_blocks", s.num_blocks);
  s.block_size = call.small_integer("block_size", s.block_size);
  s.num_kv_heads = call.small_integer("num_kv_heads", s.num_kv_heads);
  s.head_size = call.small_integer("head_size", s.head_size);
  s.format = read_format(call, "format");
  s.dtype = stored_dtype(s.format, call.dtype("dtype").value_or(s.dtype));
  s.num_layers = call.small_integer("num_layers", s.num_layers);
  return s;
}

AttentionConfig read_attention_config(Arguments& call) {
  AttentionConfig c;
  c.platform = read_platform(call);
  c.head_size = call.small_integer("head_size", c.head_size);
  c.dtype = call.dtype("dtype").value_or(c.dtype);
  c.kv_cache_dtype = call.text("kv_cache_dtype").value_or(c.kv_cache_dtype);
  c.block_size = call.optional_integer("block_size");
  c.attn_type = read_attention_type(call);
  c.use_mla = call.boolean("use_mla", false);
  c.has_sink = call.boolean("has_sink", false);
  c.use_sparse = call.boolean("use_sparse", false);
  c.use_differential = call.boolean("use_differential", false);
  c.use_mm_prefix = call.boolean("use_mm_prefix", false);
  c.use_per_head_quant_scales = call.boolean("use_per_head_quant_scales", false);
  c.use_non_causal = call.boolean("use_non_causal", false);
  c.use_alibi_sqrt = call.boolean("use_alibi_sqrt", false);
  c.batch_invariant = call.boolean("batch_invariant", false);
  c.use_kv_connector = call.boolean("use_kv_connector", false);
  return c;
}

MlaPrefillConfig read_mla_prefill_config(Arguments& call) {
  MlaPrefillConfig c;
  c.platform = read_platform(call);
  c.dtype = call.dtype("dtype").value_or(c.dtype);
  c.dims = read_fields(call, "dims", read_mla_dims);
  c.batch_invariant = call.boolean("batch_invariant", false);
  c.quant_output = call.boolean("quant_output", false);
  return c;
}

BuilderConfig read_builder_config(Arguments& call) {
  BuilderConfig c;
  c.num_q_heads = call.small_integer("num_q_heads", 0);
  c.cache = read_fields(call, "cache", read_cache_spec);
  c.window_left = call.small_integer("window_left", -1);
  c.window_right = call.small_integer("window_right", -1);
  c.num_speculative_tokens = call.small_integer("num_speculative_tokens", 0);
  c.num_workers = call.small_integer("num_workers", 1);
  c.attn_type = read_attention_type(call);
  c.cascade =
      read_word(call, "cascade", c.cascade, "auto, vllm, off or always", parse_cascade_mode);
  c.use_alibi = call.boolean("use_alibi", false);
  c.capture = read_optional(call, "capture", read_capture).value_or(AotLimits{});
  c.max_num_splits = call.small_integer("max_num_splits", 0);
  c.arithmetic =
      read_word(call, "arithmetic", c.arithmetic, "automatic, exact or fast", parse_arithmetic);
  c.mla = read_optional(call, "mla", read_mla_builder);
  c.sparse = read_optional(call, "sparse", read_sparse_builder);
  c.differential = read_optional(call, "differential", read_differential_builder);
  return c;
}

ImplConfig read_impl_config(Arguments& call) {
  ImplConfig c;
  c.num_q_heads = call.small_integer("num_q_heads", 0);
  c.num_kv_heads = call.small_integer("num_kv_heads", 0);
  c.head_size = call.small_integer("head_size", 0);
  c.scale = call.optional_number("scale");
  c.softcap = static_cast<float>(call.number("softcap", 0.0));
  c.sliding_window = call.optional_integer("sliding_window");
  c.alibi_slopes = call.numbers("alibi_slopes");
  c.use_alibi_sqrt = call.boolean("use_alibi_sqrt", false);
  c.sinks = call.numbers("sinks");
  c.lse_includes_sink = call.boolean("lse_includes_sink", false);
  c.attn_type = read_attention_type(call);
  c.dtype = call.dtype("dtype").value_or(c.dtype);
  c.kv_cache_dtype = call.text("kv_cache_dtype").value_or(c.kv_cache_dtype);
  c.shares_kv_cache = call.boolean("shares_kv_cache", false);
  c.k_scale = call.numbers("k_scale");
  c.v_scale = call.numbers("v_scale");
  c.value_scales = call.numbers("value_scales");
  c.mla = read_optional(call, "mla", read_mla_layer);
  c.differential = read_optional(call, "differential", read_differential_layer);
  return c;
}

}  // namespace attend::python
