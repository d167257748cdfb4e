// SPDX-License-Identifier: Apache-2.0
#include "attend/core/numa.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <optional>
#include <string_view>
#include <system_error>
#include <utility>

#include "core/small_file.h"

namespace attend {
namespace {

namespace fs = std::filesystem;

// More than Linux can be built for.
constexpr int kMaxCpus = 1 << 16;
constexpr int kMaxNodes = 1 << 12;
constexpr std::size_t kMaxFileBytes = 1 << 20;

// A whole text of decimal digits as a number below `end`.
std::optional<std::int64_t> number_below(std::string_view text, std::int64_t end) noexcept {
  std::int64_t value = 0;
  const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || stop != text.data() + text.size()) return std::nullopt;
  if (value < 0 || value >= end) return std::nullopt;
  return value;
}

std::string_view trimmed(std::string_view text) noexcept {
  constexpr std::string_view kSpace = " \t\n";
  const auto begin = text.find_first_not_of(kSpace);
  if (begin == std::string_view::npos) return {};
  return text.substr(begin, text.find_last_not_of(kSpace) - begin + 1);
}

// "0-3,8,10-11": ranges that ascend and do not touch twice. nullopt for anything else.
std::optional<std::vector<int>> parse_cpu_list(std::string_view text) {
  std::vector<int> cpus;
  text = trimmed(text);
  while (!text.empty()) {
    const auto comma = std::min(text.find(','), text.size());
    const std::string_view range = text.substr(0, comma);
    const auto dash = range.find('-');
    const auto first = number_below(range.substr(0, dash), kMaxCpus);
    const auto last =
        dash == std::string_view::npos ? first : number_below(range.substr(dash + 1), kMaxCpus);
    if (!first || !last || *last < *first) return std::nullopt;
    if (!cpus.empty() && *first <= cpus.back()) return std::nullopt;
    for (auto cpu = *first; cpu <= *last; ++cpu) cpus.push_back(static_cast<int>(cpu));
    if (comma + 1 == text.size()) return std::nullopt;  // ends with a comma
    text.remove_prefix(std::min(comma + 1, text.size()));
  }
  return cpus;
}

// "Node 0 MemTotal:  1234 kB", one line of many.
std::optional<std::int64_t> parse_memory(std::string_view text) {
  constexpr std::string_view kKey = " MemTotal:";
  const auto key = text.find(kKey);
  if (key == std::string_view::npos) return std::nullopt;
  text.remove_prefix(key + kKey.size());
  std::string_view line = trimmed(text.substr(0, text.find('\n')));
  constexpr std::string_view kUnit = " kB";
  if (!line.ends_with(kUnit)) return std::nullopt;
  line.remove_suffix(kUnit.size());
  const auto kib = number_below(trimmed(line), std::int64_t{1} << 50);
  return kib ? std::optional(*kib * 1024) : std::nullopt;
}

// The number in the name of a node's folder; other names are none.
std::optional<int> node_number(std::string_view name) noexcept {
  constexpr std::string_view kPrefix = "node";
  if (!name.starts_with(kPrefix)) return std::nullopt;
  const auto id = number_below(name.substr(kPrefix.size()), kMaxNodes);
  return id ? std::optional(static_cast<int>(*id)) : std::nullopt;
}

NumaTopology unknown(std::string problem) { return {{}, std::move(problem)}; }

// Reads one node. Returns what is wrong with it; empty if nothing is.
std::string read_node(const fs::path& folder, NumaNode& node) {
  const SmallFile list = read_small_file(folder / "cpulist", kMaxFileBytes);
  if (!list.problem.empty()) return fmt::format("node{}/cpulist: {}", node.id, list.problem);
  auto cpus = parse_cpu_list(list.text);
  if (!cpus) return fmt::format("node{}/cpulist is not a list of CPUs", node.id);
  node.cpus = std::move(*cpus);
  const SmallFile info = read_small_file(folder / "meminfo", kMaxFileBytes);
  if (!info.problem.empty()) return fmt::format("node{}/meminfo: {}", node.id, info.problem);
  const auto memory = parse_memory(info.text);
  if (!memory) return fmt::format("node{}/meminfo has no MemTotal", node.id);
  node.memory_bytes = *memory;
  return {};
}

// First CPU that two nodes claim.
std::optional<int> shared_cpu(const std::vector<NumaNode>& nodes) {
  std::vector<int> all;
  for (const NumaNode& n : nodes) all.insert(all.end(), n.cpus.begin(), n.cpus.end());
  std::sort(all.begin(), all.end());
  const auto twice = std::adjacent_find(all.begin(), all.end());
  return twice == all.end() ? std::nullopt : std::optional(*twice);
}

}  // namespace

NumaTopology read_numa_topology(const fs::path& root) {
  std::error_code error;
  NumaTopology topology;
  for (fs::directory_iterator it(root, error), end; !error && it != end; it.increment(error)) {
    const auto id = node_number(it->path().filename().native());
    if (!id) continue;
    NumaNode node;
    node.id = *id;
    if (std::string problem = read_node(it->path(), node); !problem.empty())
      return unknown(std::move(problem));
    topology.nodes.push_back(std::move(node));
  }
  if (error) return unknown(error.message());
  std::ranges::sort(topology.nodes, {}, &NumaNode::id);
  const auto equal = std::ranges::adjacent_find(topology.nodes, {}, &NumaNode::id);
  if (equal != topology.nodes.end()) return unknown(fmt::format("two nodes {}", equal->id));
  if (const auto cpu = shared_cpu(topology.nodes))
    return unknown(fmt::format("CPU {} is in two nodes", *cpu));
  if (topology.nodes.empty()) return unknown("no nodes");
  return topology;
}

const NumaTopology& numa_topology() {
  static const NumaTopology topology = read_numa_topology("/sys/devices/system/node");
  return topology;
}

}  // namespace attend
