// SPDX-License-Identifier: Apache-2.0
#include "arguments.h"
#include "attend/cache/int8_mixed_cache.h"
#include "attend/ops/int8_attention.h"
#include "attend/ops/int8_cache.h"
#include "attend/oracle/attention.h"
#include "attention_params.h"
#include "oracle_result.h"

namespace attend::python {
namespace {

ReshapeAndCacheInt8Args read_rows(Arguments& call) {
  ReshapeAndCacheInt8Args a;
  a.key = call.in("key");
  a.value = call.in("value");
  a.k_scale = call.in("k_scale");
  a.key_cache = call.out("key_cache");
  a.value_cache = call.out("value_cache");
  a.key_scale_cache = call.out("key_scale_cache");
  a.slot_mapping = call.in("slot_mapping");
  return a;
}

FlashAttnVarlenInt8Args read_varlen(Arguments& call) {
  FlashAttnVarlenInt8Args a;
  a.q = call.in("q");
  a.q_scale = call.in("q_scale");
  a.k = call.in("k");
  a.k_scale = call.in("k_scale");
  a.v = call.in("v");
  a.v_scale = call.in("v_scale");
  a.k_mean = call.in("k_mean");
  a.out = call.out("out");
  a.lse = call.out("lse");
  a.query_start_loc = call.in("query_start_loc");
  a.seq_lens = call.in("seq_lens");
  a.block_table = call.in("block_table");
  a.params = read_attention_params(call);
  return a;
}

PagedAttentionInt8Args read_paged(Arguments& call) {
  PagedAttentionInt8Args a;
  a.q = call.in("q");
  a.q_scale = call.in("q_scale");
  a.key_cache = call.out("key_cache");
  a.key_scale_cache = call.out("key_scale_cache");
  a.value_cache = call.out("value_cache");
  a.v_scale = call.in("v_scale");
  a.k_mean = call.in("k_mean");
  a.out = call.out("out");
  a.lse = call.out("lse");
  a.query_start_loc = call.in("query_start_loc");
  a.seq_lens = call.in("seq_lens");
  a.block_table = call.in("block_table");
  a.params = read_attention_params(call);
  a.save_key = call.in("save_key");
  a.save_value = call.in("save_value");
  a.save_key_scale = call.in("save_key_scale");
  return a;
}

void bind_caches(nb::module_& m) {
  m.def("reshape_and_cache_flash_int8", [](const nb::kwargs& values) {
    Arguments call("reshape_and_cache_flash_int8", values);
    const ReshapeAndCacheInt8Args a = read_rows(call);
    call.run([&](Executor& e) { reshape_and_cache_flash_int8(a, &e); });
  });
  m.def("reshape_and_cache_flash_mix", [](const nb::kwargs& values) {
    Arguments call("reshape_and_cache_flash_mix", values);
    const ReshapeAndCacheInt8Args a = read_rows(call);
    call.run([&](Executor& e) { reshape_and_cache_flash_mix(a, &e); });
  });
  m.def("reshape_and_cache_int8_per_token_head", [](const nb::kwargs& values) {
    Arguments call("reshape_and_cache_int8_per_token_head", values);
    ReshapeAndCachePerTokenHeadArgs a;
    a.key = call.in("key");
    a.value = call.in("value");
    a.key_cache = call.out("key_cache");
    a.value_cache = call.out("value_cache");
    a.key_scale_cache = call.out("key_scale_cache");
    a.value_scale_cache = call.out("value_scale_cache");
    a.slot_mapping = call.in("slot_mapping");
    call.run([&](Executor& e) { reshape_and_cache_int8_per_token_head(a, &e); });
  });
}

}  // namespace

void bind_int8(nb::module_& m) {
  bind_caches(m);
  m.def("int8_mixed_cache_shape", [](const nb::kwargs& values) {
    Arguments call("int8_mixed_cache_shape", values);
    KvCacheSpec spec;
    spec.num_blocks = call.integer("num_blocks", 0);
    spec.num_kv_heads = call.small_integer("num_kv_heads", 0);
    spec.block_size = call.small_integer("block_size", 0);
    spec.head_size = call.small_integer("head_size", 0);
    spec.dtype = DType::i8;
    spec.format = KvFormat::int8_level2;
    call.done();
    nb::list shape;
    for (const std::int64_t n : int8_mixed_cache_shape(spec)) shape.append(n);
    return nb::tuple(shape);
  });
  m.def("flash_attn_varlen_int8", [](const nb::kwargs& values) {
    Arguments call("flash_attn_varlen_int8", values);
    const FlashAttnVarlenInt8Args a = read_varlen(call);
    const std::optional<IsaLevel> isa = call.isa();
    call.run([&](Executor& e) { flash_attn_varlen_int8(a, &e, isa); });
  });
  m.def("paged_attention_int8", [](const nb::kwargs& values) {
    Arguments call("paged_attention_int8", values);
    const PagedAttentionInt8Args a = read_paged(call);
    const std::optional<IsaLevel> isa = call.isa();
    call.run([&](Executor& e) { paged_attention_int8(a, &e, isa); });
  });
  m.def("paged_attention_mix", [](const nb::kwargs& values) {
    Arguments call("paged_attention_mix", values);
    const PagedAttentionInt8Args a = read_paged(call);
    const std::optional<IsaLevel> isa = call.isa();
    call.run([&](Executor& e) { paged_attention_mix(a, &e, isa); });
  });
  m.def("oracle_flash_attn_varlen_int8", [](const nb::kwargs& values) {
    Arguments call("oracle.flash_attn_varlen_int8", values);
    const FlashAttnVarlenInt8Args a = read_varlen(call);
    return oracle_result(call.run_here([&] { return oracle::flash_attn_varlen_int8(a); }));
  });
}

}  // namespace attend::python
