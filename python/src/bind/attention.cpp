// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/attention.h"

#include "arguments.h"
#include "attend/ops/merge.h"
#include "attend/oracle/attention.h"
#include "attention_params.h"
#include "oracle_result.h"

namespace attend::python {
namespace {

FlashAttnVarlenArgs read_varlen(Arguments& call) {
  FlashAttnVarlenArgs a;
  a.q = call.in("q");
  a.k = call.in("k");
  a.v = call.in("v");
  a.out = call.out("out");
  a.lse = call.out("lse");
  a.query_start_loc = call.in("query_start_loc");
  a.cu_seqlens_kv = call.in("cu_seqlens_kv");
  a.seq_lens = call.in("seq_lens");
  a.block_table = call.in("block_table");
  a.q_descale = call.in("q_descale");
  a.k_descale = call.in("k_descale");
  a.v_descale = call.in("v_descale");
  a.k_token_scale = call.in("k_token_scale");
  a.v_token_scale = call.in("v_token_scale");
  a.carry.state = call.out("carry_state");
  a.carry.resumes = call.in("carry_resumes");
  a.carry.last = call.boolean("carry_last", true);
  a.params = read_attention_params(call);
  return a;
}

FlashAttnWithKvCacheArgs read_kvcache(Arguments& call) {
  FlashAttnWithKvCacheArgs a;
  a.q = call.in("q");
  a.k_cache = call.out("k_cache");
  a.v_cache = call.out("v_cache");
  a.k_new = call.in("k_new");
  a.v_new = call.in("v_new");
  a.out = call.out("out");
  a.lse = call.out("lse");
  a.cache_seqlens = call.in("cache_seqlens");
  a.cache_batch_idx = call.in("cache_batch_idx");
  a.cache_leftpad = call.in("cache_leftpad");
  a.block_table = call.in("block_table");
  a.rotary_cos = call.in("rotary_cos");
  a.rotary_sin = call.in("rotary_sin");
  a.rotary_interleaved = call.boolean("rotary_interleaved", true);
  a.params = read_attention_params(call);
  return a;
}

MergeAttnStatesArgs read_merge(Arguments& call) {
  MergeAttnStatesArgs a;
  a.out = call.out("out");
  a.lse = call.out("lse");
  a.prefix_out = call.in("prefix_out");
  a.prefix_lse = call.in("prefix_lse");
  a.suffix_out = call.in("suffix_out");
  a.suffix_lse = call.in("suffix_lse");
  a.prefill_tokens_with_context = call.small_integer("prefill_tokens_with_context", -1);
  return a;
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("flash_attn_varlen", [](const nb::kwargs& values) {
    Arguments call("flash_attn_varlen", values);
    const FlashAttnVarlenArgs a = read_varlen(call);
    const KernelOptions kernels = call.kernels();
    call.run([&](Executor& e) { flash_attn_varlen(a, &e, kernels); });
  });
  m.def("flash_attn_with_kvcache", [](const nb::kwargs& values) {
    Arguments call("flash_attn_with_kvcache", values);
    const FlashAttnWithKvCacheArgs a = read_kvcache(call);
    const KernelOptions kernels = call.kernels();
    call.run([&](Executor& e) { flash_attn_with_kvcache(a, &e, kernels); });
  });
  m.def("merge_attn_states", [](const nb::kwargs& values) {
    Arguments call("merge_attn_states", values);
    const MergeAttnStatesArgs a = read_merge(call);
    call.run([&](Executor& e) { merge_attn_states(a, &e); });
  });
  m.def("oracle_flash_attn_varlen", [](const nb::kwargs& values) {
    Arguments call("oracle.flash_attn_varlen", values);
    const FlashAttnVarlenArgs a = read_varlen(call);
    return oracle_result(call.run_here([&] { return oracle::flash_attn_varlen(a); }));
  });
  m.def("oracle_flash_attn_with_kvcache", [](const nb::kwargs& values) {
    Arguments call("oracle.flash_attn_with_kvcache", values);
    const FlashAttnWithKvCacheArgs a = read_kvcache(call);
    return oracle_result(call.run_here([&] { return oracle::flash_attn_with_kvcache(a); }));
  });
  m.def("oracle_appended_keys", [](const nb::kwargs& values) {
    Arguments call("oracle.appended_keys", values);
    const FlashAttnWithKvCacheArgs a = read_kvcache(call);
    oracle::AppendedKeys keys = call.run_here([&] { return oracle::appended_keys(a); });
    return nb::make_tuple(numpy_array(std::move(keys.value)), numpy_array(std::move(keys.bound)));
  });
  m.def("oracle_merge_attn_states", [](const nb::kwargs& values) {
    Arguments call("oracle.merge_attn_states", values);
    const MergeAttnStatesArgs a = read_merge(call);
    return oracle_result(call.run_here([&] { return oracle::merge_attn_states(a); }));
  });
}

}  // namespace attend::python
