// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/sparse_index.h"

#include <algorithm>
#include <limits>

#include "core/check.h"
#include "ops/mla_rows.h"

namespace attend {
namespace {

constexpr std::int64_t kMaxIndex = std::numeric_limits<std::int32_t>::max();

// What both ops read and write, after the checks.
struct Rows {
  std::string_view op;
  ConstTensorView tokens;
  TensorView out, counts;
  std::span<const std::int32_t> req_id = {};
};

// The pages of one request.
struct Pages {
  const std::int32_t* blocks = nullptr;
  std::int64_t table_width = 0;  // 0 = no such request
  std::int64_t block_size, stride, num_blocks;

  // -1 if there is no such row. @pre token >= 0.
  std::int32_t row_of(std::int64_t token) const noexcept {
    const std::int64_t entry = token / block_size;
    if (entry >= table_width) return -1;
    const std::int32_t block = blocks[entry];
    if (block < 0 || block >= num_blocks) return -1;
    return static_cast<std::int32_t>(block * stride + token % block_size);
  }
};

Pages pages_of(const SparseIndexPages& p, std::int32_t request) noexcept {
  Pages pages{.block_size = p.block_size,
              .stride = p.block_stride_rows == 0 ? p.block_size : p.block_stride_rows,
              .num_blocks = p.num_blocks};
  if (request < 0 || request >= p.block_table.shape[0]) return pages;
  pages.blocks = p.block_table.as<std::int32_t>() + request * p.block_table.strides[0];
  pages.table_width = p.block_table.shape[1];
  return pages;
}

void require_pages(std::string_view op, const SparseIndexPages& p) {
  const check::Where table{op, "block_table"};
  check::tensor(table, p.block_table, 2, {DType::i32});
  check::unit_last_stride(table, p.block_table);
  check::require(p.block_size >= 1, {op, "block_size"}, "at least 1", p.block_size);
  check::require(p.num_blocks >= 0, {op, "num_blocks"}, "at least 0", p.num_blocks);
  check::require(
      p.block_stride_rows == 0 || p.block_stride_rows >= p.block_size, {op, "block_stride_rows"},
      [&] { return fmt::format("0 or at least the {} rows of a block", p.block_size); },
      p.block_stride_rows);
  const std::int64_t stride = p.block_stride_rows == 0 ? p.block_size : p.block_stride_rows;
  // Divided, since the product may not fit.
  check::require(p.num_blocks == 0 || (kMaxIndex - (p.block_size - 1)) / stride >= p.num_blocks - 1,
                 {op, "num_blocks"}, "rows that fit i32",
                 [&] { return fmt::format("{} blocks, {} rows apart", p.num_blocks, stride); });
}

void require_apart(const Rows& r, std::string_view name, const ConstTensorView& input) {
  check::no_overlap({r.op, "out"}, r.out, name, input);
  if (r.counts.defined()) check::no_overlap({r.op, "valid_counts"}, r.counts, name, input);
}

void require_rows(Rows& r, const ConstTensorView& req_id, const SparseIndexPages& pages) {
  const check::Where tokens{r.op, "token_indices"}, out{r.op, "out"}, counts{r.op, "valid_counts"};
  check::tensor(tokens, r.tokens, 2, {DType::i32});
  check::unit_last_stride(tokens, r.tokens);
  check::require(r.tokens.shape[1] >= 1, tokens, "at least one index a token",
                 [&] { return describe(r.tokens); });
  r.req_id = check::i32_array({r.op, "req_id"}, req_id, r.tokens.shape[0]);
  require_pages(r.op, pages);
  check::tensor(out, r.out, 2, {DType::i32});
  check::shape(out, r.out, {r.tokens.shape[0], r.tokens.shape[1]});
  check::unit_last_stride(out, r.out);
  check::distinct_elements(out, r.out);
  if (r.counts.defined()) {
    check::i32_array(counts, r.counts, r.tokens.shape[0]);
    check::no_overlap(counts, r.counts, "out", r.out);
    check::no_overlap(counts, r.counts, "token_indices", r.tokens);
  }
  if (!check::same_view(r.out, r.tokens)) {
    check::no_overlap(out, r.out, "token_indices", r.tokens);
  }
  require_apart(r, "req_id", req_id);
  require_apart(r, "block_table", pages.block_table);
}

// Calls convert(token, tokens of the row, its results), which gives the count, for each query
// token.
template <typename Convert>
void for_each_row(const Rows& r, Executor* executor, Convert&& convert) {
  const std::int64_t num_rows = r.tokens.shape[0], topk = r.tokens.shape[1];
  mla_rows::run(num_rows * topk < mla_rows::kParallelElements, executor,
                [&](int worker, int workers) {
                  const std::int64_t end = num_rows * (worker + 1) / workers;
                  for (std::int64_t t = num_rows * worker / workers; t < end; ++t) {
                    const std::int32_t count =
                        convert(t, r.tokens.as<std::int32_t>() + t * r.tokens.strides[0],
                                r.out.as<std::int32_t>() + t * r.out.strides[0]);
                    if (r.counts.defined()) r.counts.as<std::int32_t>()[t] = count;
                  }
                });
}

// One row of indices; convert(token) is only asked for tokens >= 0.
template <typename Convert>
std::int32_t convert_row(const std::int32_t* tokens, std::int32_t* out, std::int64_t n,
                         Convert&& convert) {
  std::int32_t count = 0;
  for (std::int64_t j = 0; j < n; ++j) {
    const std::int32_t row = tokens[j] < 0 ? -1 : convert(tokens[j]);
    out[j] = row;
    count += row >= 0 ? 1 : 0;
  }
  return count;
}

void require_workspace(const Rows& r, const ConvertReqIndexToGlobalIndexArgs& a) {
  check::i32_array({r.op, "prefill_workspace_request_ids"}, a.prefill_workspace_request_ids,
                   r.tokens.shape[0]);
  check::i32_array({r.op, "prefill_workspace_starts"}, a.prefill_workspace_starts, -1);
  check::require(a.workspace_rows >= 0 && a.workspace_rows <= kMaxIndex, {r.op, "workspace_rows"},
                 "at least 0 and in the range of i32", a.workspace_rows);
  require_apart(r, "prefill_workspace_request_ids", a.prefill_workspace_request_ids);
  require_apart(r, "prefill_workspace_starts", a.prefill_workspace_starts);
}

void compact(std::int32_t* row, std::int64_t n) noexcept {
  std::fill(std::remove(row, row + n, -1), row + n, -1);
}

}  // namespace

void convert_req_index_to_global_index(const ConvertReqIndexToGlobalIndexArgs& a,
                                       Executor* executor) {
  Rows r{"convert_req_index_to_global_index", a.token_indices, a.out, a.valid_counts};
  require_rows(r, a.req_id, a.pages);
  const bool has_workspace = a.prefill_workspace_request_ids.defined();
  if (has_workspace) require_workspace(r, a);
  const auto* ids = a.prefill_workspace_request_ids.as<std::int32_t>();
  const std::int64_t topk = r.tokens.shape[1];
  for_each_row(r, executor, [&](std::int64_t t, const std::int32_t* tokens, std::int32_t* out) {
    if (!has_workspace || ids[t] < 0) {
      const Pages pages = pages_of(a.pages, r.req_id[static_cast<std::size_t>(t)]);
      return convert_row(tokens, out, topk,
                         [&](std::int64_t token) { return pages.row_of(token); });
    }
    const bool known = ids[t] < a.prefill_workspace_starts.shape[0];
    const std::int64_t start =
        known ? a.prefill_workspace_starts.as<std::int32_t>()[ids[t]] : a.workspace_rows;
    return convert_row(tokens, out, topk, [&](std::int64_t token) {
      const std::int64_t row = start + token;
      return row >= 0 && row < a.workspace_rows ? static_cast<std::int32_t>(row) : -1;
    });
  });
}

void filter_and_convert_dcp_index(const FilterAndConvertDcpIndexArgs& a, Executor* executor) {
  Rows r{"filter_and_convert_dcp_index", a.token_indices, a.out, a.valid_counts};
  require_rows(r, a.req_id, a.pages);
  check::require(a.world_size >= 1, {r.op, "world_size"}, "at least 1", a.world_size);
  check::require(a.interleave >= 1, {r.op, "interleave"}, "at least 1", a.interleave);
  check::require(
      a.rank >= 0 && a.rank < a.world_size, {r.op, "rank"},
      [&] { return fmt::format("in [0, {})", a.world_size); }, a.rank);
  const std::int64_t topk = r.tokens.shape[1];
  for_each_row(r, executor, [&](std::int64_t t, const std::int32_t* tokens, std::int32_t* out) {
    const Pages pages = pages_of(a.pages, r.req_id[static_cast<std::size_t>(t)]);
    const std::int32_t count = convert_row(tokens, out, topk, [&](std::int64_t token) {
      const std::int64_t run = token / a.interleave;
      if (run % a.world_size != a.rank) return -1;
      return pages.row_of(run / a.world_size * a.interleave + token % a.interleave);
    });
    if (a.compact_to_front) compact(out, topk);
    return count;
  });
}

}  // namespace attend
