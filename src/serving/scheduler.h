// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "serving/block_pool.h"
#include "serving/request.h"

namespace attend::serving {

struct SchedulerConfig {
  int max_num_batched_tokens = 2048;  ///< query tokens per step, >= 1
  int max_num_seqs = 256;             ///< requests running at the same time, >= 1
  int block_size = 16;                ///< tokens per block; of no use without a pool
  int decode_threshold = 1;           ///< longest query that the back end treats as decode
  int num_speculative_tokens = 0;     ///< drafts that a decode verifies in one step, >= 0
  double acceptance = 0.0;  ///< chance, 0 .. 1, that a draft is right if those before it are
  std::uint64_t seed = 0;   ///< of what is accepted: depends on request and position only
  int encoder_tokens = 0;   ///< of every request, >= 1 with an encoder pool; else of no use
};

/// One request's share of a step.
struct ScheduledRequest {
  const Request* request = nullptr;
  std::int64_t num_computed_tokens = 0;  ///< tokens already in the cache
  int num_scheduled_tokens = 0;          ///< query tokens of this step, drafts included, >= 1
  /// Blocks of all tokens up to and including this step's; empty without a pool. Valid until
  /// complete_step().
  std::span<const std::int32_t> blocks = {};
  int num_draft_tokens = 0;     ///< the last so many of the scheduled tokens are drafts
  int num_accepted_tokens = 0;  ///< drafts that turn out right; those behind are rejected
  /// Blocks of the encoder tokens; empty without an encoder pool. Valid like `blocks`.
  std::span<const std::int32_t> encoder_blocks = {};
  bool new_encoder = false;  ///< the encoder runs in this step and fills encoder_blocks

  /// One token after a finished prompt, and drafts behind it: what the report counts as decode.
  bool is_decode() const noexcept {
    return num_scheduled_tokens == 1 + num_draft_tokens &&
           num_computed_tokens >= request->prompt_tokens;
  }
  /// Position of the first rejected draft; behind the last token if there is none.
  std::int64_t first_rejected() const noexcept {
    return num_computed_tokens + num_scheduled_tokens - num_draft_tokens + num_accepted_tokens;
  }
};

/// What runs in one step: decodes first, then extends, then prefills.
struct RequestBatch {
  std::vector<ScheduledRequest> requests;
  int num_tokens = 0;
};

struct SchedulerCounters {
  std::int64_t preemptions = 0;
  /// Prompt tokens that a request found in the cache when it was first admitted. What a preempted
  /// request finds again of its own does not count.
  std::int64_t prefix_hit_tokens = 0;
  /// Query tokens of all steps, recomputed ones included, rejected drafts not.
  std::int64_t computed_tokens = 0;
  std::int64_t generated_tokens = 0;
  std::int64_t draft_tokens = 0;
  std::int64_t accepted_tokens = 0;  ///< of the drafts
  std::int64_t encoder_tokens = 0;   ///< of all steps, recomputed ones included
  std::int64_t finished_requests = 0;
};

/// Continuous batching under a token budget. Every step first continues the running requests
/// (decodes, then the one prompt that may be under way), then admits waiting ones in the order in
/// which they were added. Prompts are cut to the budget (chunked prefill). When blocks run out, the
/// latest-admitted request loses its blocks, returns to the front of the queue and computes its
/// tokens again later.
///
/// With speculative tokens a decode computes its last known token and drafts of the next ones,
/// never more than it still has to generate. Of these it keeps those before the first wrong one;
/// the slots of the rejected ones are written again by the tokens that really come there.
///
/// With an encoder pool every request also holds the blocks of its encoder tokens, from admission
/// until it ends or is preempted; the encoder runs in the step of the admission. Its tokens count
/// against the budget, but a step may always take one encoder. Prefixes are not reused: equal
/// tokens of a decoder do not have equal keys if the encoders saw different inputs.
///
/// Without a pool (encoders) a request is its prompt, computed in one step; one that is longer than
/// the budget runs alone.
class Scheduler {
 public:
  /// `pool` may be null (encoders); so may `encoder_pool` (no cross attention), which needs a
  /// `pool`. Both must outlive the scheduler.
  /// @throws InvalidArgument for a config field out of range.
  Scheduler(const SchedulerConfig& config, BlockPool* pool, BlockPool* encoder_pool = nullptr);
  ~Scheduler();

  /// @throws OutOfBlocks if the request could not run even with the whole cache for itself.
  void require_fits(const Request& request) const;
  /// Queues a request, which must outlive the scheduler. @throws OutOfBlocks as above.
  void add(const Request& request);
  bool has_work() const noexcept { return !waiting_.empty() || !running_.empty(); }
  /// Chooses the next step; never empty if has_work(). @pre the last step is complete.
  const RequestBatch& schedule();
  /// The step has been computed: publishes full blocks, generates tokens, retires requests.
  void complete_step();

  const SchedulerCounters& counters() const noexcept { return counters_; }
  std::size_t num_waiting() const noexcept { return waiting_.size(); }
  std::size_t num_running() const noexcept { return running_.size(); }

 private:
  struct Sequence;
  void continue_running(bool decodes);
  void admit_waiting();
  bool admit(Sequence& seq);
  std::optional<std::int64_t> budget_after_encoder() const;
  bool make_room(Sequence& seq, std::int64_t tokens);
  void extend_blocks(Sequence& seq, std::int64_t tokens);
  void preempt_latest();
  std::int64_t drafts_for(const Sequence& seq) const noexcept;
  int accepted_of(const Sequence& seq, int drafts) const noexcept;
  void schedule_tokens(Sequence& seq, std::int64_t tokens);
  void order_decodes_first();
  void publish_full_blocks(Sequence& seq, std::int64_t first_new_token);
  void release_blocks(Sequence& seq);
  void retire(Sequence& seq);
  std::int64_t blocks_for(std::int64_t tokens) const noexcept;

  SchedulerConfig config_;
  BlockPool* pool_;
  BlockPool* encoder_pool_;
  std::deque<std::unique_ptr<Sequence>> waiting_;
  std::vector<std::unique_ptr<Sequence>> running_;  // in order of admission
  std::vector<Sequence*> scheduled_;                // same order as batch_.requests
  RequestBatch batch_;
  std::int64_t budget_ = 0;
  bool preempted_ = false;          // in this step
  bool encoder_scheduled_ = false;  // in this step
  SchedulerCounters counters_;
};

}  // namespace attend::serving
