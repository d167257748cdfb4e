// SPDX-License-Identifier: Apache-2.0
#include "serving/scheduler.h"

#include <fmt/format.h>

#include <algorithm>
#include <cassert>
#include <utility>

#include "attend/batch/split.h"
#include "attend/core/error.h"
#include "serving/content.h"

namespace attend::serving {

struct Scheduler::Sequence {
  const Request* request = nullptr;
  std::int64_t num_computed = 0;   // tokens in the cache; admission sets it
  std::int64_t num_generated = 0;  // survives preemption: those tokens are known
  int num_scheduled = 0;           // in the current step
  int num_drafts = 0, num_accepted = 0;
  bool admitted_before = false;
  bool encoder_done = false;  // the encoder's keys are in the cache
  std::vector<std::int32_t> blocks, encoder_blocks;
  std::vector<std::uint64_t> hashes;  // of full blocks, as far as they were needed

  std::int64_t num_known() const { return request->prompt_tokens + num_generated; }
  std::int64_t num_remaining() const { return num_known() - num_computed; }
  bool is_decode() const { return num_computed > 0 && num_remaining() == 1; }

  std::span<const std::uint64_t> hashes_of(std::int64_t count, int block_size) {
    while (static_cast<std::int64_t>(hashes.size()) < count) {
      const std::int64_t begin = static_cast<std::int64_t>(hashes.size()) * block_size;
      const std::uint64_t parent = hashes.empty() ? 0 : hashes.back();
      hashes.push_back(block_hash(parent, *request, begin, begin + block_size));
    }
    return std::span(hashes).first(static_cast<std::size_t>(count));
  }
};

Scheduler::Scheduler(const SchedulerConfig& config, BlockPool* pool, BlockPool* encoder_pool)
    : config_(config), pool_(pool), encoder_pool_(encoder_pool) {
  const auto require_positive = [](std::string_view name, int value) {
    if (value < 1) throw InvalidArgument("scheduler", name, ">= 1", std::to_string(value));
  };
  require_positive("max_num_batched_tokens", config.max_num_batched_tokens);
  require_positive("max_num_seqs", config.max_num_seqs);
  require_positive("block_size", config.block_size);
  require_positive("decode_threshold", config.decode_threshold);
  if (encoder_pool != nullptr) require_positive("encoder_tokens", config.encoder_tokens);
  if (config.num_speculative_tokens < 0) {
    throw InvalidArgument("scheduler", "num_speculative_tokens", ">= 0",
                          std::to_string(config.num_speculative_tokens));
  }
  if (!(config.acceptance >= 0.0 && config.acceptance <= 1.0)) {
    throw InvalidArgument("scheduler", "acceptance", "from 0 to 1",
                          std::to_string(config.acceptance));
  }
}

Scheduler::~Scheduler() = default;

std::int64_t Scheduler::blocks_for(std::int64_t tokens) const noexcept {
  return ceil_div(tokens, config_.block_size);
}

void Scheduler::require_fits(const Request& request) const {
  if (pool_ != nullptr && blocks_for(request.kv_tokens()) > pool_->num_blocks()) {
    throw OutOfBlocks(blocks_for(request.kv_tokens()), pool_->num_blocks(),
                      fmt::format("request {} ({} tokens, the whole cache holds {})", request.id,
                                  request.kv_tokens(), pool_->num_blocks() * config_.block_size));
  }
  if (encoder_pool_ != nullptr &&
      blocks_for(config_.encoder_tokens) > encoder_pool_->num_blocks()) {
    throw OutOfBlocks(
        blocks_for(config_.encoder_tokens), encoder_pool_->num_blocks(),
        fmt::format("the encoder of request {} ({} tokens, the whole cache holds {})", request.id,
                    config_.encoder_tokens, encoder_pool_->num_blocks() * config_.block_size));
  }
}

void Scheduler::add(const Request& request) {
  require_fits(request);
  auto seq = std::make_unique<Sequence>();
  seq->request = &request;
  waiting_.push_back(std::move(seq));
}

const RequestBatch& Scheduler::schedule() {
  assert(scheduled_.empty());
  batch_ = {};
  budget_ = config_.max_num_batched_tokens;
  preempted_ = encoder_scheduled_ = false;
  continue_running(/*decodes=*/true);
  continue_running(/*decodes=*/false);
  // Admitting right after a preemption would only take the blocks that were just freed.
  if (!preempted_) admit_waiting();
  order_decodes_first();
  return batch_;
}

void Scheduler::continue_running(bool decodes) {
  for (std::size_t i = 0; i < running_.size() && budget_ > 0; ++i) {
    Sequence& seq = *running_[i];
    if (seq.num_scheduled > 0 || seq.is_decode() != decodes) continue;
    const std::int64_t tokens = std::min(seq.num_remaining() + drafts_for(seq), budget_);
    if (!make_room(seq, tokens)) return;
    schedule_tokens(seq, tokens);
  }
}

bool Scheduler::make_room(Sequence& seq, std::int64_t tokens) {
  const auto missing = [&] {
    return blocks_for(seq.num_computed + tokens) - static_cast<std::int64_t>(seq.blocks.size());
  };
  while (missing() > pool_->num_free()) {
    // A prompt is only left unfinished when the budget is used up, so it is always the one admitted
    // last: the victim has no tokens in this step yet.
    assert(running_.back()->num_scheduled == 0);
    const bool self = running_.back().get() == &seq;
    preempt_latest();
    if (self) return false;
  }
  extend_blocks(seq, tokens);
  return true;
}

void Scheduler::extend_blocks(Sequence& seq, std::int64_t tokens) {
  const auto wanted = static_cast<std::size_t>(blocks_for(seq.num_computed + tokens));
  while (seq.blocks.size() < wanted) seq.blocks.push_back(pool_->allocate().value());
}

void Scheduler::preempt_latest() {
  auto victim = std::move(running_.back());
  running_.pop_back();
  release_blocks(*victim);
  waiting_.push_front(std::move(victim));
  ++counters_.preemptions;
  preempted_ = true;
}

void Scheduler::admit_waiting() {
  while (!waiting_.empty() && budget_ > 0 &&
         static_cast<int>(running_.size()) < config_.max_num_seqs) {
    if (!admit(*waiting_.front())) return;
    running_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
}

bool Scheduler::admit(Sequence& seq) {
  if (pool_ == nullptr) {
    const std::int64_t tokens = seq.num_remaining();
    if (tokens > budget_ && batch_.num_tokens > 0) return false;
    schedule_tokens(seq, tokens);
    return true;
  }
  const auto budget = budget_after_encoder();
  if (!budget) return false;
  // The last known token is always computed: the next one is generated from its output.
  const std::int64_t cacheable = (seq.num_known() - 1) / config_.block_size;
  const auto hits = pool_->find_prefix(seq.hashes_of(cacheable, config_.block_size));
  const auto num_hits = static_cast<std::int64_t>(hits.size());
  const std::int64_t hit_tokens = num_hits * config_.block_size;
  const std::int64_t tokens = std::min(seq.num_known() - hit_tokens, *budget);
  const auto revived = std::count_if(hits.begin(), hits.end(),
                                     [&](std::int32_t b) { return pool_->references(b) == 0; });
  if (blocks_for(hit_tokens + tokens) - num_hits > pool_->num_free() - revived) return false;

  for (const std::int32_t b : hits) pool_->share(b);
  seq.blocks = hits;
  seq.num_computed = hit_tokens;
  if (!std::exchange(seq.admitted_before, true)) counters_.prefix_hit_tokens += hit_tokens;
  extend_blocks(seq, tokens);
  budget_ = *budget;
  if (encoder_pool_ != nullptr) {
    for (std::int64_t b = blocks_for(config_.encoder_tokens); b > 0; --b) {
      seq.encoder_blocks.push_back(encoder_pool_->allocate().value());
    }
    encoder_scheduled_ = true;
  }
  schedule_tokens(seq, tokens);
  return true;
}

/// What an admission leaves of the budget for the decoder's tokens, at least one; nullopt if the
/// step has no room for another encoder.
std::optional<std::int64_t> Scheduler::budget_after_encoder() const {
  if (encoder_pool_ == nullptr) return budget_;
  if (blocks_for(config_.encoder_tokens) > encoder_pool_->num_free()) return std::nullopt;
  if (encoder_scheduled_ && budget_ <= config_.encoder_tokens) return std::nullopt;
  return std::max<std::int64_t>(1, budget_ - config_.encoder_tokens);
}

std::int64_t Scheduler::drafts_for(const Sequence& seq) const noexcept {
  if (!seq.is_decode() || seq.num_computed < seq.request->prompt_tokens) return 0;
  // The step generates a token of its own: no draft is of use beyond the last one but that.
  return std::min<std::int64_t>(config_.num_speculative_tokens,
                                seq.request->output_tokens - seq.num_generated - 1);
}

int Scheduler::accepted_of(const Sequence& seq, int drafts) const noexcept {
  for (int i = 0; i < drafts; ++i) {
    const auto position = static_cast<std::uint64_t>(seq.num_known() + i);
    const std::uint64_t bits = mix64(mix64(config_.seed ^ own_content_id(*seq.request)) + position);
    if (static_cast<double>(bits >> 11) * 0x1p-53 >= config_.acceptance) return i;
  }
  return drafts;
}

void Scheduler::schedule_tokens(Sequence& seq, std::int64_t tokens) {
  seq.num_scheduled = static_cast<int>(tokens);
  seq.num_drafts = static_cast<int>(std::max<std::int64_t>(0, tokens - seq.num_remaining()));
  seq.num_accepted = accepted_of(seq, seq.num_drafts);
  budget_ -= tokens;
  batch_.num_tokens += seq.num_scheduled;
  batch_.requests.push_back({.request = seq.request,
                             .num_computed_tokens = seq.num_computed,
                             .num_scheduled_tokens = seq.num_scheduled,
                             .blocks = seq.blocks,
                             .num_draft_tokens = seq.num_drafts,
                             .num_accepted_tokens = seq.num_accepted,
                             .encoder_blocks = seq.encoder_blocks,
                             .new_encoder = encoder_pool_ != nullptr && !seq.encoder_done});
  scheduled_.push_back(&seq);
}

void Scheduler::order_decodes_first() {
  std::vector<ReorderRequest> rows;
  rows.reserve(scheduled_.size());
  for (const Sequence* seq : scheduled_) {
    rows.push_back({seq->num_scheduled, static_cast<int>(seq->num_computed),
                    static_cast<int>(seq->request->prompt_tokens)});
  }
  for (const auto& [a, b] : reorder_swaps(rows, config_.decode_threshold)) {
    std::swap(scheduled_[static_cast<std::size_t>(a)], scheduled_[static_cast<std::size_t>(b)]);
    std::swap(batch_.requests[static_cast<std::size_t>(a)],
              batch_.requests[static_cast<std::size_t>(b)]);
  }
}

void Scheduler::complete_step() {
  for (Sequence* seq : std::exchange(scheduled_, {})) {
    const std::int64_t before = seq->num_computed;
    const int drafts = std::exchange(seq->num_drafts, 0);
    const int accepted = std::exchange(seq->num_accepted, 0);
    seq->num_computed += std::exchange(seq->num_scheduled, 0) - (drafts - accepted);
    counters_.draft_tokens += drafts;
    counters_.accepted_tokens += accepted;
    counters_.computed_tokens += seq->num_computed - before;
    if (pool_ != nullptr) publish_full_blocks(*seq, before);
    if (encoder_pool_ != nullptr && !std::exchange(seq->encoder_done, true)) {
      counters_.encoder_tokens += config_.encoder_tokens;
    }
    if (seq->num_remaining() > 0) continue;
    const std::int64_t wanted = pool_ == nullptr ? 0 : seq->request->output_tokens;
    if (wanted > 0) {
      seq->num_generated += 1 + accepted;
      counters_.generated_tokens += 1 + accepted;
    }
    if (seq->num_generated >= wanted) retire(*seq);
  }
}

void Scheduler::publish_full_blocks(Sequence& seq, std::int64_t first_new_token) {
  if (encoder_pool_ != nullptr) return;  // equal tokens do not mean equal keys
  const std::int64_t full = seq.num_computed / config_.block_size;
  const auto hashes = seq.hashes_of(full, config_.block_size);
  for (std::int64_t b = first_new_token / config_.block_size; b < full; ++b) {
    const auto i = static_cast<std::size_t>(b);
    pool_->publish(seq.blocks[i], hashes[i]);
  }
}

void Scheduler::release_blocks(Sequence& seq) {
  if (pool_ != nullptr) pool_->release(seq.blocks);
  if (encoder_pool_ != nullptr) encoder_pool_->release(seq.encoder_blocks);
  seq.blocks.clear();
  seq.encoder_blocks.clear();
  seq.encoder_done = false;
}

void Scheduler::retire(Sequence& seq) {
  release_blocks(seq);
  ++counters_.finished_requests;
  std::erase_if(running_, [&](const auto& s) { return s.get() == &seq; });
}

}  // namespace attend::serving
