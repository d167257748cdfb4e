// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "attend/core/dtype.h"
#include "attend/core/tensor_view.h"
#include "attend/plan/attention_plan.h"

/// Cascade attention: whether requests whose cached keys begin alike attend to those once. It
/// changes no bit of a result, only how long it takes.
namespace attend {

enum class CascadeMode : std::uint8_t {
  automatic,  ///< where a model of bytes and operations expects a gain
  vllm,       ///< one prefix of all requests, by the rule of vLLM's flash_attn back end
  off,
  always,  ///< wherever two requests share a whole piece
};
std::string_view to_string(CascadeMode mode) noexcept;
std::optional<CascadeMode> parse_cascade_mode(std::string_view name) noexcept;

/// Why prefixes are shared, or why not.
enum class CascadeReason : std::uint8_t {
  off,
  no_block_table,
  encoder_keys,       ///< cross attention
  captured,           ///< a plan made ahead of time
  nothing_shared,     ///< no two requests with queries have the same blocks for a whole piece
  no_gain,            ///< automatic: flat attention is expected to be as fast
  gain,               ///< automatic: expected to be faster
  always,             ///< as asked for
  short_prefix,       ///< vllm: common prefix below 256 keys
  alibi,              ///< vllm: slopes
  window,             ///< vllm: a sliding window
  few_requests,       ///< vllm: below 8
  more_than_decodes,  ///< vllm: shared; not every request has one query, or heads are not grouped
  fewer_waves,        ///< vllm: shared; fewer waves of units than for flat decoding
  not_fewer_waves,    ///< vllm: as many waves of units as for flat decoding, or more
};
/// The reason in words.
std::string_view to_string(CascadeReason reason) noexcept;

/// What the decision is made from.
struct CascadeInput {
  CascadeMode mode = CascadeMode::automatic;
  AttentionPlanInput batch;     ///< valid; its shared_prefixes are ignored
  ConstTensorView block_table;  ///< i32 [B or more, max_blocks >= those of each request], last
                                ///< stride 1; undefined = nothing is shared. Any ids.
  int block_size = 0;           ///< > 0 with a block table
  DType kv_dtype = DType::bf16;
  /// vllm only: keys that all requests begin with, a multiple of block_size and no more than any
  /// request has. The other modes find it in the block table.
  int common_prefix_len = 0;
  bool use_alibi = false;  ///< vllm only
};

struct CascadeDecision {
  std::vector<SharedPrefix> prefixes;  ///< for AttentionPlanInput::shared_prefixes
  CascadeReason reason = CascadeReason::off;
  /// Estimates of the automatic mode for attending to all prefixes that were found, in
  /// microseconds a layer: by each request for itself, and as decided. 0 in other modes.
  double flat_us = 0.0, decided_us = 0.0;
};
/// The decision in one line.
std::string describe(const CascadeDecision& decision);

/// Decides. Sharing needs room for partial results in the workspace: those of every row of a
/// request that shares something, one for what is shared and one for each 256 keys of its own.
/// Automatic and always look for requests next to each other whose block tables begin alike, groups
/// inside of groups included. @throws Unsupported if the batch asks for an arithmetic that the
/// cache's type does not have (arithmetic_level()).
CascadeDecision decide_cascade(const CascadeInput& input);

}  // namespace attend
