// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "arguments.h"
#include "attend/backend/backend.h"
#include "attend/backend/mla_prefill.h"

/// The library's structs of settings from arguments that are dicts of their fields. Fields have the
/// names of C++; missing ones have its defaults.
namespace attend::python {

/// Reads a required dict: read(Arguments&) takes its fields. Errors name the function of `call`.
template <typename Read>
auto read_fields(Arguments& call, const char* name, Read&& read) {
  const nb::handle value = call.object(name);
  if (!value.is_valid() || !PyDict_Check(value.ptr()))
    call.refuse_type(name, "the dataclass of its settings, or a dict of their fields",
                     value.is_valid() ? value : nb::handle(nb::none()));
  const auto fields = nb::borrow<nb::kwargs>(value);
  Arguments nested(call.function(), fields);
  auto result = read(nested);
  nested.done();
  return result;
}

KvLayout read_layout(Arguments& call, const char* name);
KvFormat read_format(Arguments& call, const char* name);
KvCacheSpec read_cache_spec(Arguments& call);
AttentionConfig read_attention_config(Arguments& call);
MlaPrefillConfig read_mla_prefill_config(Arguments& call);
BuilderConfig read_builder_config(Arguments& call);
ImplConfig read_impl_config(Arguments& call);

}  // namespace attend::python
