// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

namespace attend::serving {

/// Owner of a fixed number of KV-cache blocks: counts references, finds blocks again by the hash of
/// their content and evicts the least recently used ones.
///
/// A block is in one of three states: used (references > 0), cached (no reference, but published
/// under a hash and therefore reusable) or empty. Ids are 0 .. num_blocks - 1, block 0 is ordinary.
class BlockPool {
 public:
  /// @throws InvalidArgument unless num_blocks is in 1 .. 2^31 - 1.
  explicit BlockPool(std::int64_t num_blocks);

  std::int64_t num_blocks() const noexcept { return static_cast<std::int64_t>(blocks_.size()); }
  /// Blocks that allocate() can still hand out: empty ones and cached ones.
  std::int64_t num_free() const noexcept { return num_blocks() - num_used_; }
  std::int64_t num_used() const noexcept { return num_used_; }
  std::int64_t peak_used() const noexcept { return peak_used_; }

  /// A block with one reference: an empty one, else the least recently used cached one, whose
  /// content is forgotten. nullopt if all are used.
  std::optional<std::int32_t> allocate();
  /// Blocks that hold the longest known prefix of `hashes`. Changes nothing.
  std::vector<std::int32_t> find_prefix(std::span<const std::uint64_t> hashes) const;
  /// Adds a reference to a used or cached block.
  void share(std::int32_t block);
  /// Makes a used block findable under `hash`. If another block already is, that one stays.
  void publish(std::int32_t block, std::uint64_t hash);
  /// Drops one reference of each of a request's blocks, given in the order of its tokens. Of those
  /// that become free the deepest counts as least recently used, so that prefixes live longest.
  void release(std::span<const std::int32_t> blocks);

  int references(std::int32_t block) const;
  bool is_cached(std::int32_t block) const;
  /// First broken invariant in words; empty if all hold. Walks everything: for tests.
  std::string violation() const;

 private:
  static constexpr std::int32_t kNone = -1;
  struct Block {
    int references = 0;
    std::optional<std::uint64_t> hash;
    std::int32_t older = kNone, newer = kNone;  // neighbours in the list of cached blocks
  };
  Block& at(std::int32_t block);
  const Block& at(std::int32_t block) const;
  void acquire(std::int32_t block);
  void append_newest(std::int32_t block);
  void unlink(std::int32_t block);

  std::vector<Block> blocks_;
  std::vector<std::int32_t> empty_;  // a stack
  std::int32_t oldest_ = kNone, newest_ = kNone;
  std::unordered_map<std::uint64_t, std::int32_t> by_hash_;
  std::int64_t num_used_ = 0, peak_used_ = 0;
};

}  // namespace attend::serving
