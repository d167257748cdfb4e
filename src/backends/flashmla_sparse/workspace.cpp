// SPDX-License-Identifier: Apache-2.0
#include "backends/flashmla_sparse/workspace.h"

#include <algorithm>

#include "backends/common/layout_cursor.h"

namespace attend::flashmla_sparse {

WorkspaceLayout lay_out(const SparseMlaMetadata& m) {
  const auto heads = static_cast<std::size_t>(m.num_heads);
  const auto bytes = [](std::int64_t rows, std::size_t elements) {
    return static_cast<std::size_t>(rows) * elements * size_of(DType::bf16);
  };
  const auto dim = [](int d) { return static_cast<std::size_t>(d); };
  const MlaDims& d = m.dims;
  std::size_t largest = 0;
  for (const auto& [tokens, plan] : m.plans) largest = std::max(largest, plan.workspace_bytes);

  WorkspaceLayout l;
  LayoutCursor cursor(0);
  if (m.quant_output) l.output = cursor.take(bytes(m.num_tokens, heads * dim(d.v_head_dim)));
  l.queries = cursor.take(bytes(m.tokens_at_once, heads * dim(d.cache_dim())));
  l.latents = cursor.take(bytes(m.tokens_at_once, heads * dim(d.kv_lora_rank)));
  const auto tokens = static_cast<std::size_t>(m.tokens_at_once);
  l.slots = cursor.take(tokens * static_cast<std::size_t>(m.topk) * sizeof(std::int32_t));
  l.counts = cursor.take(tokens * sizeof(std::int32_t));
  l.rows = cursor.take(bytes(m.most_rows, dim(d.cache_dim())));
  l.plan = cursor.take(largest);
  l.total = cursor.at() + LayoutCursor::kAlignment;
  return l;
}

}  // namespace attend::flashmla_sparse
