// SPDX-License-Identifier: Apache-2.0
#include "serving/block_pool.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "attend/core/error.h"

namespace attend::serving {
namespace {

constexpr std::string_view kOp = "block_pool";

}  // namespace

BlockPool::BlockPool(std::int64_t num_blocks) {
  if (num_blocks < 1 || num_blocks > std::numeric_limits<std::int32_t>::max()) {
    throw InvalidArgument(kOp, "num_blocks", "a number in 1 .. 2147483647",
                          std::to_string(num_blocks));
  }
  blocks_.resize(static_cast<std::size_t>(num_blocks));
  empty_.reserve(blocks_.size());
  for (auto b = static_cast<std::int32_t>(num_blocks - 1); b >= 0; --b) empty_.push_back(b);
}

BlockPool::Block& BlockPool::at(std::int32_t block) {
  return const_cast<Block&>(std::as_const(*this).at(block));
}

const BlockPool::Block& BlockPool::at(std::int32_t block) const {
  if (block < 0 || block >= num_blocks()) {
    throw InvalidArgument(kOp, "block", fmt::format("an id in 0 .. {}", num_blocks() - 1),
                          std::to_string(block));
  }
  return blocks_[static_cast<std::size_t>(block)];
}

int BlockPool::references(std::int32_t block) const { return at(block).references; }

bool BlockPool::is_cached(std::int32_t block) const { return at(block).hash.has_value(); }

void BlockPool::acquire(std::int32_t block) {
  if (blocks_[static_cast<std::size_t>(block)].references++ == 0) {
    ++num_used_;
    peak_used_ = std::max(peak_used_, num_used_);
  }
}

std::optional<std::int32_t> BlockPool::allocate() {
  std::int32_t block = kNone;
  if (!empty_.empty()) {
    block = empty_.back();
    empty_.pop_back();
  } else if (oldest_ != kNone) {
    block = oldest_;
    unlink(block);
    auto& hash = at(block).hash;
    by_hash_.erase(*hash);
    hash.reset();
  } else {
    return std::nullopt;
  }
  acquire(block);
  return block;
}

std::vector<std::int32_t> BlockPool::find_prefix(std::span<const std::uint64_t> hashes) const {
  std::vector<std::int32_t> found;
  for (const std::uint64_t hash : hashes) {
    const auto it = by_hash_.find(hash);
    if (it == by_hash_.end()) break;
    found.push_back(it->second);
  }
  return found;
}

void BlockPool::share(std::int32_t block) {
  const Block& b = at(block);
  if (b.references == 0) {
    if (!b.hash) throw InvalidArgument(kOp, "block", "a used or cached block", "an empty one");
    unlink(block);
  }
  acquire(block);
}

void BlockPool::publish(std::int32_t block, std::uint64_t hash) {
  Block& b = at(block);
  if (b.references == 0) throw InvalidArgument(kOp, "block", "a used block", "a free one");
  if (b.hash) return;
  if (by_hash_.emplace(hash, block).second) b.hash = hash;
}

void BlockPool::release(std::span<const std::int32_t> blocks) {
  for (const std::int32_t block : blocks) {
    if (at(block).references == 0)
      throw InvalidArgument(kOp, "block", "a used block", "a free one");
  }
  for (auto it = blocks.rbegin(); it != blocks.rend(); ++it) {
    Block& b = at(*it);
    if (--b.references > 0) continue;
    --num_used_;
    if (b.hash) {
      append_newest(*it);
    } else {
      empty_.push_back(*it);
    }
  }
}

void BlockPool::append_newest(std::int32_t block) {
  Block& b = at(block);
  b.older = newest_;
  b.newer = kNone;
  (newest_ == kNone ? oldest_ : at(newest_).newer) = block;
  newest_ = block;
}

void BlockPool::unlink(std::int32_t block) {
  Block& b = at(block);
  (b.older == kNone ? oldest_ : at(b.older).newer) = b.newer;
  (b.newer == kNone ? newest_ : at(b.newer).older) = b.older;
  b.older = b.newer = kNone;
}

std::string BlockPool::violation() const {
  std::vector<int> places(blocks_.size(), 0);
  for (const std::int32_t b : empty_) {
    ++places[static_cast<std::size_t>(b)];
    if (at(b).hash) return fmt::format("empty block {} is published", b);
  }
  std::int32_t before = kNone;
  for (std::int32_t b = oldest_; b != kNone; before = b, b = at(b).newer) {
    if (++places[static_cast<std::size_t>(b)] > 1) return fmt::format("block {} listed twice", b);
    if (!at(b).hash) return fmt::format("cached block {} has no hash", b);
    if (at(b).older != before) return fmt::format("list of cached blocks is broken at {}", b);
  }
  if (before != newest_) return "list of cached blocks does not end at the newest";
  std::int64_t used = 0;
  std::size_t published = 0;
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    const Block& b = blocks_[i];
    if (b.references < 0) return fmt::format("block {} has {} references", i, b.references);
    if (places[i] != (b.references == 0 ? 1 : 0)) {
      return fmt::format("block {} has {} references and is in {} free lists", i, b.references,
                         places[i]);
    }
    used += b.references > 0 ? 1 : 0;
    if (!b.hash) continue;
    ++published;
    const auto it = by_hash_.find(*b.hash);
    if (it == by_hash_.end() || it->second != static_cast<std::int32_t>(i)) {
      return fmt::format("block {} cannot be found under its hash", i);
    }
  }
  if (published != by_hash_.size()) return "hash table names blocks that do not carry the hash";
  if (used != num_used_) return fmt::format("{} blocks are used, counted {}", used, num_used_);
  return {};
}

}  // namespace attend::serving
