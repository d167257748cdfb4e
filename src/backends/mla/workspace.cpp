// SPDX-License-Identifier: Apache-2.0
#include "backends/mla/workspace.h"

#include <algorithm>

#include "attend/core/dtype.h"
#include "backends/common/layout_cursor.h"

namespace attend::mla {
WorkspaceLayout lay_out(const MlaMetadata& m, const MlaPrefill& prefill) {
  const auto heads = static_cast<std::size_t>(m.num_heads);
  const auto bytes = [&](std::int64_t rows, std::size_t elements) {
    return static_cast<std::size_t>(rows) * elements * size_of(m.dtype);
  };
  const auto dim = [](int d) { return static_cast<std::size_t>(d); };
  const MlaDims& d = m.dims;
  WorkspaceLayout l;
  LayoutCursor whole(0);
  if (m.quant_output) l.output = whole.take(bytes(m.num_tokens, heads * dim(d.v_head_dim)));
  l.parts = whole.at();

  LayoutCursor decode(l.parts);
  l.queries = decode.take(bytes(m.split.num_decode_tokens, heads * dim(d.cache_dim())));
  l.latents = decode.take(bytes(m.split.num_decode_tokens, heads * dim(d.kv_lora_rank)));
  l.decode = decode.take(m.decode.workspace_bytes);

  LayoutCursor steps(l.parts);
  l.rows = steps.take(bytes(m.max_keys, dim(d.cache_dim())));
  l.keys = steps.take(bytes(m.max_keys, heads * dim(d.qk_head_dim())));
  l.values = steps.take(bytes(m.max_keys, heads * dim(d.v_head_dim)));
  const std::size_t state_columns = heads * (dim(prefill.head_dim_v()) + 2);
  l.state = steps.take(static_cast<std::size_t>(m.carried_tokens) * state_columns * sizeof(float));
  std::size_t largest = 0;
  for (const PrefillStep& step : m.prefill_steps) {
    const std::int64_t tokens = step.last ? step.plan.num_tokens() : 0;
    largest = std::max(
        largest, step.plan.workspace_bytes +
                     prefill.workspace_bytes(tokens, step.num_keys(), step.last && m.quant_output));
  }
  l.prefill = steps.take(largest);
  l.total = std::max(decode.at(), steps.at()) + LayoutCursor::kAlignment;
  return l;
}

}  // namespace attend::mla
