// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <chrono>
#include <string_view>

namespace attend::cli {

/// Progress of long work on standard error: a bar that redraws itself on a terminal, a plain line
/// every few seconds elsewhere.
class Progress {
 public:
  Progress();
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  /// True if an update now would be shown: lets callers skip composing the text.
  bool due() const;
  /// `fraction` 0 .. 1 of the work is done; `text` says more.
  void update(double fraction, std::string_view text);
  /// Removes the bar, so that other output starts on a clean line.
  void clear();

 private:
  using Clock = std::chrono::steady_clock;

  bool terminal_;
  bool drawn_ = false;
  Clock::time_point last_;
};

}  // namespace attend::cli
