// SPDX-License-Identifier: Apache-2.0
#include "plan/kernel_choice_file.h"

#include <fmt/format.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <string_view>
#include <system_error>

#include "attend/core/error.h"
#include "core/cpu_detect.h"
#include "core/small_file.h"

namespace attend::plan {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int kFormat = 1;
constexpr std::size_t kMaxBytes = 1 << 16;
constexpr int kMaxDepth = 3;

// Everything deeper than what a choice has is dropped while it is read.
json parse(const std::string& text) {
  const auto shallow = [](int depth, json::parse_event_t, const json&) {
    return depth <= kMaxDepth;
  };
  return json::parse(text, shallow, /*allow_exceptions=*/false);
}

bool says(const json& object, const char* name, std::string_view text) {
  const auto it = object.find(name);
  return it != object.end() && it->is_string() && it->get_ref<const std::string&>() == text;
}

// The available level that a value names.
std::optional<IsaLevel> level_of(const json& levels, KernelKind kind,
                                 const std::vector<IsaLevel>& available) {
  const auto it = levels.find(to_string(kind));
  if (it == levels.end() || !it->is_string()) return std::nullopt;
  const auto level = parse_isa(it->get_ref<const std::string&>());
  if (!level || std::ranges::find(available, *level) == available.end()) return std::nullopt;
  return level;
}

StoredChoice unusable(std::string problem) { return {std::nullopt, std::move(problem)}; }

[[noreturn]] void fail(const fs::path& path, int error) {
  throw Error(fmt::format("cannot write the choice of kernels to '{}': {}", path.string(),
                          std::generic_category().message(error)));
}

void write_all(int fd, std::string_view text, const fs::path& path) {
  while (!text.empty()) {
    const ssize_t written = write(fd, text.data(), text.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail(path, errno);
    text.remove_prefix(static_cast<std::size_t>(written));
  }
}

// A file beside another that goes, with what it holds, unless it takes that one's place.
class TempFile {
 public:
  explicit TempFile(const fs::path& beside) : target_(beside), name_(beside.string() + ".XXXXXX") {
    fd_ = mkstemp(name_.data());
    if (fd_ < 0) fail(target_, errno);
  }
  TempFile(const TempFile&) = delete;
  TempFile& operator=(const TempFile&) = delete;
  ~TempFile() {
    close(fd_);
    if (!kept_) unlink(name_.c_str());
  }
  int fd() const { return fd_; }
  void keep() {
    if (rename(name_.c_str(), target_.c_str()) != 0) fail(target_, errno);
    kept_ = true;
  }

 private:
  fs::path target_;
  std::string name_;
  int fd_ = -1;
  bool kept_ = false;
};

}  // namespace

ChoiceMachine this_machine() { return {ATTEND_VERSION, cpu_identity(), available_isa_levels()}; }

fs::path choice_path(const char* xdg_cache_home, const char* home) {
  const auto is_absolute = [](const char* text) { return text != nullptr && text[0] == '/'; };
  fs::path folder;
  if (is_absolute(xdg_cache_home)) {
    folder = xdg_cache_home;
  } else if (is_absolute(home)) {
    folder = fs::path(home) / ".cache";
  } else {
    return {};
  }
  return folder / "attend" / "kernels.json";
}

fs::path choice_path() { return choice_path(std::getenv("XDG_CACHE_HOME"), std::getenv("HOME")); }

StoredChoice read_choice(const fs::path& path, const ChoiceMachine& machine) {
  const SmallFile file = read_small_file(path, kMaxBytes);
  if (file.missing) return {};
  if (!file.problem.empty()) return unusable(file.problem);
  const json stored = parse(file.text);
  const auto format = stored.is_object() ? stored.find("format") : stored.end();
  if (!stored.is_object() || format == stored.end() || *format != kFormat)
    return unusable("not a choice of kernels");
  if (!says(stored, "version", machine.version)) return unusable("of another version of attend");
  if (!says(stored, "cpu", machine.cpu)) return unusable("of another CPU");
  const auto levels = stored.find("levels");
  if (levels == stored.end() || !levels->is_object()) return unusable("no levels");
  KernelLevels result{};
  for (const KernelKind kind : kKernelKinds) {
    const auto level = level_of(*levels, kind, machine.levels);
    if (!level)
      return unusable(fmt::format("no level that this process has for {}", to_string(kind)));
    result[static_cast<std::size_t>(kind)] = *level;
  }
  return {result, {}};
}

void require_writable(const fs::path& path) {
  std::error_code error;
  fs::create_directories(path.parent_path(), error);
  if (error) fail(path, error.value());
  const TempFile file(path);
}

void write_choice(const fs::path& path, const ChoiceMachine& machine, const KernelLevels& levels) {
  nlohmann::ordered_json stored = {
      {"format", kFormat}, {"version", machine.version}, {"cpu", machine.cpu}};
  for (const KernelKind kind : kKernelKinds)
    stored["levels"][to_string(kind)] = to_string(levels[static_cast<std::size_t>(kind)]);
  require_writable(path);
  TempFile file(path);
  write_all(file.fd(), stored.dump(2) + "\n", path);
  file.keep();
}

}  // namespace attend::plan
