// SPDX-License-Identifier: Apache-2.0
#include "ops/indexer_schedule.h"

#include <algorithm>

#include "attend/ops/indexer_logits.h"
#include "core/check.h"

namespace attend {
namespace ops {

ContextLens checked_context_lens(std::string_view op, const ConstTensorView& context_lens) {
  const check::Where where{op, "context_lens"};
  ContextLens lens;
  lens.of_each_token = context_lens.rank == 2;
  check::tensor(where, context_lens, lens.of_each_token ? 2 : 1, {DType::i32});
  check::contiguous(where, context_lens);
  lens.requests = context_lens.shape[0];
  if (lens.of_each_token) lens.columns = context_lens.shape[1];
  check::require(lens.columns >= 1, where, "at least one length a request",
                 [&] { return describe(context_lens); });
  lens.values = {context_lens.as<std::int32_t>(), static_cast<std::size_t>(context_lens.numel())};
  for (std::size_t i = 0; i < lens.values.size(); ++i) {
    check::require(lens.values[i] >= 0, where, "lengths of at least 0",
                   [&] { return fmt::format("{} at index {}", lens.values[i], i); });
  }
  return lens;
}

void paged_mqa_logits_schedule(const ContextLens& lens, std::int64_t block_size, std::int64_t parts,
                               std::int32_t* rows) {
  constexpr std::int64_t kSegmentBlocks = 4;
  const std::int64_t segment = kSegmentBlocks * block_size;
  const auto segments = [&](std::int64_t r) { return (lens.last(r) + segment - 1) / segment; };
  std::int64_t all = 0;
  for (std::int64_t r = 0; r < lens.requests; ++r) all += segments(r);
  std::int64_t request = 0, before = 0;  // segments of the requests before
  for (std::int64_t i = 0; i <= parts; ++i) {
    const std::int64_t begin = all / parts * i + std::min(i, all % parts);
    while (request < lens.requests && before + segments(request) <= begin)
      before += segments(request++);
    rows[2 * i] = static_cast<std::int32_t>(request);
    rows[2 * i + 1] = static_cast<std::int32_t>(begin - before);
  }
}

}  // namespace ops

void get_paged_mqa_logits_metadata(const PagedMqaLogitsMetadataArgs& a) {
  constexpr std::string_view kOp = "get_paged_mqa_logits_metadata";
  const check::Where where{kOp, "schedule_metadata"};
  const auto lens = ops::checked_context_lens(kOp, a.context_lens);
  check::require(a.block_size >= 1, {kOp, "block_size"}, ">= 1", a.block_size);
  check::tensor(where, a.schedule_metadata, 2, {DType::i32});
  check::shape(where, a.schedule_metadata, {-1, 2});
  check::contiguous(where, a.schedule_metadata);
  check::require(a.schedule_metadata.shape[0] >= 2, where, "at least 2 rows",
                 [&] { return describe(a.schedule_metadata); });
  check::no_overlap(where, a.schedule_metadata, "context_lens", a.context_lens);
  ops::paged_mqa_logits_schedule(lens, a.block_size, a.schedule_metadata.shape[0] - 1,
                                 a.schedule_metadata.as<std::int32_t>());
}

}  // namespace attend
