// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "attend/backend/backend.h"
#include "attend/cache/value_scales.h"
#include "attend/plan/kernel_choice.h"
#include "serving/kv_memory.h"
#include "serving/model_presets.h"
#include "serving/row_check.h"
#include "serving/scheduler.h"
#include "serving/speed.h"
#include "serving/trace.h"

namespace attend::serving {

/// How far a run is.
struct ReplayProgress {
  std::int64_t finished_requests = 0, requests = 0;
  double fraction = 0;  ///< share of the trace's tokens that is behind, 0 .. 1
  std::int64_t computed_tokens = 0;
  std::int64_t steps = 0;
  double seconds = 0;  ///< wall clock
};

struct ReplayConfig {
  const ModelPreset* model = nullptr;
  std::string backend = "auto";
  int num_layers = 1;
  std::optional<DType> dtype;  ///< unset = the model's
  std::string kv_cache_dtype = "auto";
  /// Scales of the values, as `attend calibrate` finds them: needed for kv_cache_dtype int8_level1,
  /// for all layers of the run and no others; null otherwise.
  const ValueScales* value_scales = nullptr;
  std::optional<KvLayout> kv_layout;       ///< unset = what the back end insists on, else HND
  std::optional<int> block_size;           ///< unset = 16, or what the back end supports
  std::optional<std::int64_t> num_blocks;  ///< unset = default_num_blocks()
  /// Blocks for keys of encoders, with cross attention only; unset = enough for all requests that
  /// run at the same time, or as many as fit a quarter of the available memory.
  std::optional<std::int64_t> num_encoder_blocks;
  int max_num_batched_tokens = 2048;
  int max_num_seqs = 256;
  /// Drafts that a decode verifies in one step, >= 0; encoders generate nothing and need 0.
  int num_speculative_tokens = 0;
  CascadeMode cascade = CascadeMode::automatic;
  Arithmetic arithmetic = Arithmetic::automatic;  ///< of all layers, an encoder's too
  double acceptance = 0.7;  ///< chance, 0 .. 1, that a draft is right if those before it are
  std::uint64_t seed = 0;
  std::int64_t check_rows = 0;   ///< rows to recompute in float64
  bool realtime = false;         ///< requests arrive when the trace says, by the wall clock
  Executor* executor = nullptr;  ///< null = default_executor()
  std::function<void(const ReplayProgress&)> on_progress;  ///< after every step
  /// Sees the values that a step brings to a layer with a cache (numbered as in LayerGroup), [rows,
  /// num_kv_heads, head_dim], before they are attended to: how static scales are calibrated.
  std::function<void(int layer, const ConstTensorView& value)> on_values;
  /// Sees each step's batch, and that of cross attention, before it is used and may spoil it: how
  /// tests show that a wrong slot or block is caught.
  std::function<void(CommonMetadata&)> fault_injection;
};

struct ReplayResult {
  std::string backend;
  DType dtype = DType::bf16;
  std::string kv_cache_dtype;  ///< name of the dtype or format that it holds; empty without one
  KvLayout kv_layout = KvLayout::hnd;
  /// Of the decoder's self attention, or of an encoder: which kernels, and of what level.
  KernelKind kernel_kind = KernelKind::bf16;
  IsaLevel isa = IsaLevel::scalar;
  std::int64_t num_blocks = 0;  ///< 0 without a cache
  int block_size = 0;
  std::int64_t peak_used_blocks = 0;
  std::int64_t num_encoder_blocks = 0;  ///< 0 without cross attention
  std::int64_t peak_used_encoder_blocks = 0;
  std::int64_t block_bytes = 0;  ///< of one block in one layer, its scales included
  MemoryUse memory;              ///< of all caches and scales, after the run
  std::int64_t requests = 0;
  std::int64_t prompt_tokens = 0;
  std::int64_t cascade_steps = 0;  ///< in which layers attended once to what requests share
  /// How often each reason decided, once a step and kind of layers.
  std::map<CascadeReason, std::int64_t> cascade_reasons;
  SchedulerCounters counters;
  std::vector<StepRecord> steps;
  CheckSummary check;

  /// Sum of the steps' times.
  double step_seconds() const noexcept;
  /// Prompt and generated tokens of the trace per second of step time; prompt tokens found in the
  /// cache count, recomputed ones do not count again.
  double tokens_per_second() const noexcept;
};

/// Blocks for a cache that holds the whole trace at once, or as many as fit a quarter of the
/// available memory.
std::int64_t default_num_blocks(const Trace& trace, int block_size, std::int64_t block_bytes,
                                int num_layers);

/// Serves a trace: scheduler, block pool, metadata builder and impl, with generated queries, keys
/// and values.
/// @throws InvalidArgument, Unsupported (no back end fits, or no kernel the arithmetic),
/// OutOfBlocks (a request larger than the cache; before the first step).
ReplayResult replay(const Trace& trace, const ReplayConfig& config);

}  // namespace attend::serving
