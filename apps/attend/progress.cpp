// SPDX-License-Identifier: Apache-2.0
#include "progress.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace attend::cli {
namespace {

constexpr auto kRedraw = std::chrono::milliseconds(100);
constexpr auto kPlainLine = std::chrono::seconds(5);
constexpr int kBarWidth = 30;

}  // namespace

Progress::Progress() : terminal_(isatty(STDERR_FILENO) != 0), last_(Clock::now()) {}

Progress::~Progress() { clear(); }

bool Progress::due() const {
  return Clock::now() - last_ >=
         (terminal_ ? Clock::duration(kRedraw) : Clock::duration(kPlainLine));
}

void Progress::update(double fraction, std::string_view text) {
  if (!due()) return;
  last_ = Clock::now();
  fraction = std::clamp(fraction, 0.0, 1.0);
  if (!terminal_) {
    fmt::print(stderr, "{:3.0f} % {}\n", std::floor(100 * fraction), text);
    return;
  }
  const int filled = static_cast<int>(fraction * kBarWidth);
  // "\033[K" erases what a longer line before left behind.
  fmt::print(stderr, "\r[{:#<{}}{:.<{}}] {:3.0f} % {}\033[K", "", filled, "", kBarWidth - filled,
             std::floor(100 * fraction), text);
  std::fflush(stderr);
  drawn_ = true;
}

void Progress::clear() {
  if (!drawn_) return;
  std::fputs("\r\033[K", stderr);
  std::fflush(stderr);
  drawn_ = false;
}

}  // namespace attend::cli
