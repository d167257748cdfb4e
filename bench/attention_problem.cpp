// SPDX-License-Identifier: Apache-2.0
#include "bench/attention_problem.h"

#include <algorithm>
#include <utility>

#include "attend/oracle/attention.h"
#include "attend/plan/cascade.h"
#include "bench/random_fill.h"
#include "plan/unit_cost.h"

namespace attend::bench {

AttentionProblem::AttentionProblem(AttentionShape shape, Executor& executor)
    : s_(std::move(shape)),
      batch_(make_batch(s_.requests, s_.block_size, s_.shared_keys)),
      executor_(executor),
      q_count_(std::int64_t{batch_.query_start.back()} * s_.heads.query * s_.heads.dim),
      k_count_(batch_.num_rows * s_.heads.kv * s_.heads.dim),
      v_count_(batch_.num_rows * s_.heads.kv * s_.heads.value_dim()),
      q_(static_cast<std::size_t>(q_count_) * size_of(s_.dtype)),
      out_(q_.size() / static_cast<std::size_t>(s_.heads.dim) *
           static_cast<std::size_t>(s_.heads.value_dim())),
      k_(static_cast<std::size_t>(k_count_) * size_of(s_.kv_dtype), {.executor = &executor}),
      v_(static_cast<std::size_t>(v_count_) * size_of(s_.kv_dtype), {.executor = &executor}) {
  fill();
  if (s_.layout == Layout::nhd) {
    kvcache_ = kvcache_args();
  } else {
    whole_ = make_call(0, batch_.num_reqs());
  }
}

void AttentionProblem::fill() {
  const int workers = executor_.num_workers();
  executor_.run([&](int worker) {
    const auto fill_part = [&](const auto& b, DType dtype, std::int64_t count, unsigned seed) {
      fill_random(b.data(), dtype, {count * worker / workers, count * (worker + 1) / workers},
                  seed);
    };
    fill_part(q_, s_.dtype, q_count_, 1);
    fill_part(k_, s_.kv_dtype, k_count_, 2);
    fill_part(v_, s_.kv_dtype, v_count_, 3);
  });
}

/// The cache as [num_blocks, block_size, Hkv, dim].
TensorView AttentionProblem::blocks(const CacheMemory& cache, int dim) const {
  const std::int64_t count = batch_.num_rows / s_.block_size;
  if (s_.layout == Layout::nhd)
    return {cache.data(), s_.kv_dtype, {count, s_.block_size, s_.heads.kv, dim}};
  return TensorView{cache.data(), s_.kv_dtype, {count, s_.heads.kv, s_.block_size, dim}}.permute(
      {0, 2, 1, 3});
}

AttentionProblem::Call AttentionProblem::make_call(int begin, int end) const {
  Call call;
  FlashAttnVarlenArgs& args = call.args;
  const auto first = static_cast<std::size_t>(begin), last = static_cast<std::size_t>(end);
  const std::int64_t token = batch_.query_start[first];
  const std::int64_t tokens = batch_.query_start[last] - token;
  const auto rows = [&](const Buffer& b, int dim) {
    auto* data = static_cast<std::byte*>(b.data()) +
                 token * s_.heads.query * dim * static_cast<std::int64_t>(size_of(s_.dtype));
    return TensorView{data, s_.dtype, {tokens, s_.heads.query, dim}};
  };
  args.q = rows(q_, s_.heads.dim);
  args.out = rows(out_, s_.heads.value_dim());
  args.params.causal = true;
  args.params.window_left = s_.window_left;
  if (s_.layout == Layout::ragged) {
    args.k = {k_.data(), s_.kv_dtype, {batch_.num_rows, s_.heads.kv, s_.heads.dim}};
    args.v = {v_.data(), s_.kv_dtype, {batch_.num_rows, s_.heads.kv, s_.heads.value_dim()}};
  } else {
    args.k = blocks(k_, s_.heads.dim);
    args.v = blocks(v_, s_.heads.value_dim());
    args.block_table = batch_.table_view(begin, end);
  }

  const Batch part = make_batch(std::span(s_.requests).subspan(first, last - first), 0);
  AttentionPlanInput in = plan_input(part, s_.heads, executor_);
  in.window_left = s_.window_left;
  in.arithmetic = s_.arithmetic;
  CascadeInput cascade;
  cascade.mode = s_.flat ? CascadeMode::off : CascadeMode::automatic;
  cascade.batch = in;
  cascade.block_table = args.block_table;
  cascade.block_size = s_.block_size;
  cascade.kv_dtype = s_.kv_dtype;
  const CascadeDecision decision = decide_cascade(cascade);
  in.shared_prefixes = decision.prefixes;
  call.plan = plan_attention(in);
  call.workspace = Buffer(call.plan.workspace_bytes);
  return call;
}

FlashAttnWithKvCacheArgs AttentionProblem::kvcache_args() const {
  FlashAttnWithKvCacheArgs args;
  const int reqs = batch_.num_reqs();
  const auto rows = [&](const Buffer& b) {
    return TensorView{
        b.data(), s_.dtype, {reqs, batch_.query_len(0), s_.heads.query, s_.heads.dim}};
  };
  args.q = rows(q_);
  args.out = rows(out_);
  args.k_cache = blocks(k_, s_.heads.dim);
  args.v_cache = blocks(v_, s_.heads.value_dim());
  args.cache_seqlens = {batch_.seq_lens.data(), DType::i32, {reqs}};
  args.block_table = batch_.table_view(0, reqs);
  args.params.causal = true;
  args.params.window_left = s_.window_left;
  return args;
}

void AttentionProblem::run() {
  if (s_.layout == Layout::nhd) {
    flash_attn_with_kvcache(kvcache_, &executor_, s_.arithmetic);
  } else {
    whole_.run(executor_);
  }
}

double AttentionProblem::flops_of(int begin, int end) const {
  return 2.0 * batch_.pairs(s_.window_left, begin, end) * (s_.heads.dim + s_.heads.value_dim()) *
         s_.heads.query;
}

double AttentionProblem::bytes_of(int begin, int end) const {
  return static_cast<double>(batch_.visible_keys(s_.window_left, begin, end)) * s_.heads.kv *
         (s_.heads.dim + s_.heads.value_dim()) * static_cast<double>(size_of(s_.kv_dtype));
}

double AttentionProblem::bytes() const {
  const double all = bytes_of(0, batch_.num_reqs());
  if (s_.shared_keys == 0 || s_.flat) return all;
  const double once = static_cast<double>(batch_.num_rows) /
                      static_cast<double>(batch_.visible_keys(-1, 0, batch_.num_reqs()));
  return all * once;
}

std::optional<Estimate> AttentionProblem::estimate() const {
  if (s_.layout == Layout::nhd) return std::nullopt;
  const plan::PlanEstimate e = plan::estimate(whole_.plan, s_.kv_dtype);
  return Estimate{e.read_us, e.products_us, e.merge_us};
}

std::vector<Part> AttentionProblem::parts() {
  std::vector<Part> parts;
  if (s_.first_prefill == 0) return parts;
  const auto add = [&](std::string_view name, Bound bound, int begin, int end) {
    const auto call = std::make_shared<Call>(make_call(begin, end));
    parts.push_back({name, bound, flops_of(begin, end), bytes_of(begin, end),
                     [this, call] { call->run(executor_); }});
  };
  add("decodes", Bound::memory, 0, s_.first_prefill);
  add("prefills", Bound::compute, s_.first_prefill, batch_.num_reqs());
  return parts;
}

std::string AttentionProblem::verify() const {
  for (const Row& row : sample_rows(batch_, s_.heads.query)) {
    std::string wrong = verify_row(row);
    if (!wrong.empty()) return wrong;
  }
  return "";
}

std::int64_t AttentionProblem::kv_row(int kv_head, std::int64_t row, int dim) const {
  std::int64_t at = row * s_.heads.kv + kv_head;
  if (s_.layout == Layout::hnd)
    at = (row / s_.block_size * s_.heads.kv + kv_head) * s_.block_size + row % s_.block_size;
  return at * dim;
}

std::string AttentionProblem::verify_row(const Row& row) const {
  const std::int64_t token = batch_.query_start[static_cast<std::size_t>(row.request)] + row.token;
  const std::int64_t at_row = token * s_.heads.query + row.head;
  const int kv_head = row.head / s_.heads.group();
  oracle::RowProblem p = row_problem(batch_, s_.heads, row);
  p.window_left = s_.window_left;
  p.split_weights = s_.arithmetic != Arithmetic::exact && oracle::splits_weights(s_.kv_dtype);
  p.q = [&](int d) { return value_at(q_.data(), s_.dtype, at_row * s_.heads.dim + d); };
  const auto kv_value = [&](const CacheMemory& cache, std::int64_t j, int d, int dim) {
    return value_at(cache.data(), s_.kv_dtype,
                    kv_row(kv_head, batch_.row(row.request, j), dim) + d);
  };
  p.k = [&](std::int64_t j, int d) { return kv_value(k_, j, d, s_.heads.dim); };
  p.v = [&](std::int64_t j, int d) { return kv_value(v_, j, d, s_.heads.value_dim()); };
  const auto* out = static_cast<const std::byte*>(out_.data()) +
                    at_row * s_.heads.value_dim() * static_cast<std::int64_t>(size_of(s_.dtype));
  return compare_row(p, row, out, s_.dtype);
}

Case attention_case(std::string name, std::string description, Bound bound, AttentionShape shape) {
  return {std::move(name), std::move(description), bound,
          [shape = std::move(shape)](Executor& executor) {
            return std::make_unique<AttentionProblem>(shape, executor);
          }};
}

}  // namespace attend::bench
