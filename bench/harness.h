// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "attend/core/executor.h"
#include "bench/ceilings.h"
#include "bench/noise.h"

/// Verify, then time: a case that fails its check is reported and not timed.
namespace attend::bench {

/// Which ceiling binds a case.
enum class Bound : std::uint8_t {
  compute,          ///< float32 multiply-adds, for 16-bit types too
  int8_compute,     ///< int8 dot products
  indexer_compute,  ///< products of the indexer's kernels, see measure_indexer_gflops()
  indexer,  ///< those or sequential reads, whichever takes longer as measured beside the case
  memory,   ///< sequential reads
  parts,    ///< what the case's parts take one after the other
};
std::string_view to_string(Bound bound) noexcept;

/// What the time of a part is compared with that of the whole for, under a name of its own.
struct Ratio {
  std::string_view name = {};  ///< in the JSON; "" = nothing
  bool of_whole = false;       ///< whole / part: how much longer it takes; else part / whole
};

/// Some of the work of a problem, or another way to do it, timed by itself.
struct Part {
  std::string_view name;
  Bound bound;
  double flops, bytes;  ///< as those of a problem
  std::function<void()> run;
  Ratio ratio = {};
};

/// Expected microseconds of all workers together.
struct Estimate {
  double read_us;      ///< reading and packing keys and values
  double products_us;  ///< QK, softmax and PV
  double merge_us;     ///< storing and merging partial results
};

/// A prepared case: data in memory, plan made.
class Problem {
 public:
  virtual ~Problem() = default;
  virtual void run() = 0;
  /// Compares the last run with the oracle on sampled rows; "" = right, else what is wrong.
  virtual std::string verify() const = 0;
  virtual double flops() const { return 0.0; }  ///< useful operations of one run
  virtual double bytes() const = 0;             ///< bytes that one run must at least move
  /// What the cost model of plans expects; unset = it knows nothing about this work.
  virtual std::optional<Estimate> estimate() const { return std::nullopt; }
  /// What the work consists of, for problems that parts bind; they stay valid as long as this.
  virtual std::vector<Part> parts() { return {}; }
};

struct Case {
  std::string name;
  std::string description;
  Bound bound;
  std::function<std::unique_ptr<Problem>(Executor&)> make;
  int threads = 0;  ///< workers that it is for; 0 = as many as there are
  /// The parts are another way to the same end: how many times as long they take is reported.
  bool against_parts = false;
};

/// A pool for a case that wants another number of workers than `shared` has, else null.
std::unique_ptr<Executor> own_pool(const Case& c, const Executor& shared);

/// All cases, in the order in which they are reported.
std::vector<Case> all_cases();
std::vector<Case> prefill_cases();
std::vector<Case> decode_cases();
std::vector<Case> differential_cases();
std::vector<Case> cascade_cases();
std::vector<Case> indexer_cases();
std::vector<Case> int8_cases();
std::vector<Case> cache_cases();
std::vector<Case> mla_cases();
std::vector<Case> mla_context_cases();
std::vector<Case> mla_projection_cases();
std::vector<Case> sparse_cases();
std::vector<Case> sparse_backend_cases();

/// How fast something is.
struct Speed {
  Bound bound = Bound::compute;
  double seconds = 0.0;  ///< median of one run
  double seconds_min = 0.0;
  double gflops = 0.0;  ///< 0 for cases without arithmetic
  double gbps = 0.0;    ///< bytes() a second, in 1e9
  /// GFLOP/s, int8 GOP/s or GB/s that binds, measured beside the case; GFLOP/s if parts bind.
  double ceiling = 0.0;
  double share = 0.0;  ///< of that ceiling
};

struct PartResult {
  std::string name;
  Speed speed;
  std::string ratio_name;  ///< "" = none
  double ratio = 0.0;
};

struct CaseResult {
  std::string name;
  bool verified = false;
  std::string failure;  ///< why it is not verified
  int threads = 0;      ///< workers that ran it
  Speed speed;
  int runs = 0;
  std::vector<PartResult> parts;  ///< timed between the runs of the whole
  double parts_over_whole = 0.0;  ///< times, for cases against their parts; 0 for others
  double lost_fraction = 0.0;     ///< time that other programs took before, between and after runs
  int attempts = 1;               ///< times that it was measured; this is the quietest

  bool noisy() const noexcept { return lost_fraction > kNoisyAbove; }
};

/// How to time a case.
struct Timing {
  double seconds = 0.5;  ///< to run the case for, at least
  int attempts = 3;      ///< to measure it until other programs leave it alone, at most
};

/// Prepares, verifies and times one case, on a pool of its own if it is for another number of
/// workers. Ceilings are measured before and after; the higher counts.
CaseResult run_case(const Case& c, Executor& executor, const Timing& timing);

}  // namespace attend::bench
