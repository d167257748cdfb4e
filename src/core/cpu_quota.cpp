// SPDX-License-Identifier: Apache-2.0
#include "core/cpu_quota.h"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>
#include <string_view>

#include "attend/core/executor.h"
#include "core/affinity.h"

namespace attend {
namespace {

namespace fs = std::filesystem;

void lower_to(std::optional<int>& limit, std::optional<int> other) noexcept {
  if (other) limit = limit ? std::min(*limit, *other) : *other;
}

// "max" and -1 mean no quota and give nullopt, like anything that is not a positive number.
std::optional<int> cpus_from(std::string_view quota_text, std::string_view period_text) noexcept {
  long long quota = 0;
  long long period = 0;
  const auto parse = [](std::string_view text, long long& value) {
    return std::from_chars(text.data(), text.data() + text.size(), value).ec == std::errc{};
  };
  if (!parse(quota_text, quota) || !parse(period_text, period)) return std::nullopt;
  if (quota <= 0 || period <= 0) return std::nullopt;
  const long long cpus = quota / period + (quota % period != 0 ? 1 : 0);
  return static_cast<int>(std::min<long long>(cpus, std::numeric_limits<int>::max()));
}

std::optional<int> limit_v2(const fs::path& folder) {
  std::ifstream file(folder / "cpu.max");
  std::string quota;
  std::string period;
  if (!(file >> quota >> period)) return std::nullopt;
  return cpus_from(quota, period);
}

std::optional<int> limit_v1(const fs::path& folder) {
  std::string quota;
  std::string period;
  if (!(std::ifstream(folder / "cpu.cfs_quota_us") >> quota)) return std::nullopt;
  if (!(std::ifstream(folder / "cpu.cfs_period_us") >> period)) return std::nullopt;
  return cpus_from(quota, period);
}

// Smallest limit of `group` and its ancestors up to the mount point. Inside a container the path
// may name folders of the host that are not mounted: those are skipped, the mount point counts.
template <typename Reader>
std::optional<int> smallest_limit(const fs::path& mount, std::string_view group, Reader read) {
  std::optional<int> limit = read(mount);
  fs::path folder = mount;
  for (const fs::path& part : fs::path(group).relative_path()) {
    folder /= part;
    lower_to(limit, read(folder));
  }
  return limit;
}

bool contains_controller(std::string_view controllers, std::string_view name) {
  std::istringstream list{std::string(controllers)};
  std::string item;
  while (std::getline(list, item, ',')) {
    if (item == name) return true;
  }
  return false;
}

}  // namespace

std::optional<int> cgroup_cpu_limit(const fs::path& root) {
  const fs::path mount = root / "sys/fs/cgroup";
  std::ifstream groups(root / "proc/self/cgroup");
  std::optional<int> limit;
  std::string line;  // "hierarchy:controllers:path"; version 2 has no controllers
  while (std::getline(groups, line)) {
    const auto first = line.find(':');
    const auto second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    if (controllers.empty()) {
      lower_to(limit, smallest_limit(mount, path, limit_v2));
    } else if (contains_controller(controllers, "cpu")) {
      lower_to(limit, smallest_limit(mount / controllers, path, limit_v1));
      lower_to(limit, smallest_limit(mount / "cpu", path, limit_v1));
    }
  }
  return limit;
}

int available_cpus() noexcept {
  int cpus = 1;
  try {
    cpus = std::max(1, static_cast<int>(thread_cpus().size()));
    return std::max(1, std::min(cpus, cgroup_cpu_limit("/").value_or(cpus)));
  } catch (const std::exception&) {
    return cpus;  // files that cannot be read set no limit
  }
}

}  // namespace attend
