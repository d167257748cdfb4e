// SPDX-License-Identifier: Apache-2.0
#include "backends/mla/prefill_steps.h"

#include <algorithm>

namespace attend::mla {
namespace {

class Cutter {
 public:
  Cutter(const PrefillRequests& requests, std::int64_t max_keys)
      : requests_(requests), max_keys_(max_keys) {}

  std::vector<PrefillStep> cut() {
    for (int r = requests_.begin; r < requests_.end; ++r) {
      const std::int32_t end = whole_pieces(r);
      // A chunk has no request without keys in it: it would only carry that one's state around.
      if (end == 0) close();
      for (std::int32_t at = 0; at < end;) {
        if (room() < kPieceSize) close();
        const auto take = static_cast<std::int32_t>(
            std::min<std::int64_t>(end - at, room() / kPieceSize * kPieceSize));
        add(r, at, take, false);
        at += take;
        if (at < end) close();
      }
    }
    close();
    for (int r = requests_.begin; r < requests_.end; ++r) {
      const std::int32_t begin = whole_pieces(r);
      const std::int32_t keys =
          query_len(r) == 0 ? 0 : requests_.seq_lens[static_cast<std::size_t>(r)] - begin;
      if (room() < keys) close();
      add(r, begin, keys, true);
    }
    close();
    return std::move(steps_);
  }

 private:
  std::int32_t query_len(int r) const {
    const auto i = static_cast<std::size_t>(r);
    return requests_.query_start_loc[i + 1] - requests_.query_start_loc[i];
  }
  /// Keys of the context of a request that lie in whole pieces; none if nothing asks for them.
  std::int32_t whole_pieces(int r) const {
    if (query_len(r) == 0) return 0;
    const std::int32_t seq_len = requests_.seq_lens[static_cast<std::size_t>(r)];
    return (seq_len - query_len(r)) / kPieceSize * kPieceSize;
  }
  std::int64_t room() const { return open_ ? max_keys_ - steps_.back().num_keys() : max_keys_; }
  void close() { open_ = false; }
  void add(int r, std::int32_t start, std::int32_t count, bool last) {
    if (!open_) {
      PrefillStep step;
      step.request_begin = step.request_end = r;
      step.token_begin = requests_.query_start_loc[static_cast<std::size_t>(r)];
      step.last = last;
      step.cu_seq_lens.push_back(0);
      steps_.push_back(std::move(step));
      open_ = true;
    }
    PrefillStep& step = steps_.back();
    ++step.request_end;
    step.starts.push_back(start);
    step.resumes.push_back(start > 0 ? 1 : 0);
    step.cu_seq_lens.push_back(step.cu_seq_lens.back() + count);
  }

  const PrefillRequests& requests_;
  std::int64_t max_keys_;
  std::vector<PrefillStep> steps_;
  bool open_ = false;  ///< whether the last step takes more
};

}  // namespace

std::vector<PrefillStep> cut_prefill(const PrefillRequests& requests, std::int64_t max_keys) {
  return Cutter(requests, max_keys).cut();
}

}  // namespace attend::mla
