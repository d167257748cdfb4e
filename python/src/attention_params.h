// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "arguments.h"
#include "attend/ops/attention.h"

namespace attend::python {

/// Takes the arguments that say how logits become probabilities.
inline AttentionParams read_attention_params(Arguments& call) {
  AttentionParams p;
  p.scale = call.optional_number("scale");
  p.causal = call.boolean("causal", false);
  p.window_left = call.small_integer("window_left", -1);
  p.window_right = call.small_integer("window_right", -1);
  p.softcap = static_cast<float>(call.number("softcap", 0.0));
  p.alibi_slopes = call.in("alibi_slopes");
  p.alibi_sqrt = call.boolean("alibi_sqrt", false);
  p.sinks = call.in("sinks");
  p.lse_includes_sink = call.boolean("lse_includes_sink", false);
  return p;
}

}  // namespace attend::python
