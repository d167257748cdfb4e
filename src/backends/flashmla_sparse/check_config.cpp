// SPDX-License-Identifier: Apache-2.0
#include <fmt/format.h>

#include <limits>

#include "attend/cache/fp8_ds_mla.h"
#include "attend/plan/kernel_choice.h"
#include "backends/common/mla_checks.h"
#include "backends/flashmla_sparse/flashmla_sparse.h"
#include "core/check.h"

namespace attend::flashmla_sparse {
namespace {

constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();

class Checker {
 public:
  Checker(std::string_view op, const BuilderConfig& config) : op_(op), c_(config) {}

  void check() const {
    check::require(c_.mla.has_value(), at("mla"), "the sizes of the layers", "none");
    check::require(c_.sparse.has_value(), at("sparse"), "what sparse layers need", "none");
    const MlaBuilderConfig& m = *c_.mla;
    check::require(m.dtype == DType::bf16, at("mla.dtype"), "bf16", to_string(m.dtype));
    check_mla_dims(op_, m.dims, c_.num_q_heads, c_.cache.num_kv_heads, c_.cache.head_size);
    check_mla_format(op_, m.dims, KvFormat::fp8_ds_mla);  // rows of bf16 have the same parts
    check_cache();
    check_unused();
    in_range("num_speculative_tokens", c_.num_speculative_tokens, 0, kMost - 1);
    in_range("num_workers", c_.num_workers, 1, kMost);
    in_range("mla.max_model_len", m.max_model_len, 1, kMost);
    in_range("mla.max_num_seqs", m.max_num_seqs, 1, kMost);
    in_range("mla.decode_threshold", m.decode_threshold, 0, kMost);
    in_range("mla.workspace_tokens", m.workspace_tokens, 0, kMost);
    check_sparse();
    const KernelKind kind = kernel_kind(m.dtype, c_.cache.dtype, c_.cache.format);
    arithmetic_level(c_.arithmetic, kernel_choice().level(kind), kind, op_);
  }

 private:
  check::Where at(std::string_view argument) const { return {op_, argument}; }
  void in_range(std::string_view name, std::int64_t value, std::int64_t least,
                std::int64_t most) const {
    check::require(
        value >= least && value <= most, at(name),
        [&] { return fmt::format("a number from {} to {}", least, most); }, value);
  }

  void check_cache() const {
    const KvCacheSpec& cache = c_.cache;
    check::require(cache.format == KvFormat::plain || cache.format == KvFormat::fp8_ds_mla,
                   at("cache.format"), "plain or fp8_ds_mla", to_string(cache.format));
    check::require(cache.format != KvFormat::plain || cache.dtype == DType::bf16, at("cache.dtype"),
                   "bf16", to_string(cache.dtype));
    cache.validate();
    check_block_size(op_, cache.block_size);
  }

  void check_unused() const {
    check::require(c_.attn_type == AttentionType::decoder, at("attn_type"), "decoder",
                   to_string(c_.attn_type));
    check::require(c_.window_left == -1, at("window_left"), "-1", c_.window_left);
    check::require(c_.window_right <= 0, at("window_right"), "-1 or 0", c_.window_right);
    check::require(c_.max_num_splits == 0, at("max_num_splits"),
                   "0: the work is cut into tokens, not along keys", c_.max_num_splits);
    const std::string& prefill = c_.mla->prefill_backend;
    check::require(prefill == "auto", at("mla.prefill_backend"),
                   "auto: prefill attends to the same rows as decode", prefill);
  }

  void check_sparse() const {
    const SparseBuilderConfig& s = *c_.sparse;
    in_range("sparse.topk", s.topk, 1, 1 << 30);
    in_range("sparse.max_num_batched_tokens", s.max_num_batched_tokens, 1, kMost);
    in_range("sparse.num_processors", s.num_processors, 0, kMost);
    in_range("sparse.max_gathered_keys", s.max_gathered_keys, 0, kMost);
    // Logits of the longest row.
    in_range("sparse.max_logits_bytes", s.max_logits_bytes,
             c_.mla->max_model_len * static_cast<std::int64_t>(sizeof(float)),
             std::numeric_limits<std::int64_t>::max());
    in_range("sparse.dcp_world_size", s.dcp_world_size, 1, 1 << 16);
    in_range("sparse.dcp_rank", s.dcp_rank, 0, s.dcp_world_size - 1);
    in_range("sparse.dcp_interleave", s.dcp_interleave, 1, c_.cache.block_size);
    check::require(
        c_.cache.block_size % s.dcp_interleave == 0, at("sparse.dcp_interleave"),
        [&] { return fmt::format("a divisor of the block size {}", c_.cache.block_size); },
        s.dcp_interleave);
    check::require(
        s.dcp_world_size == 1 || s.strategy != SparseStrategy::separate, at("sparse.strategy"),
        "automatic or mixed: each rank reads its own keys where they lie", to_string(s.strategy));
  }

  std::string_view op_;
  const BuilderConfig& c_;
};

}  // namespace

void check_config(std::string_view op, const BuilderConfig& config) { Checker(op, config).check(); }

}  // namespace attend::flashmla_sparse
