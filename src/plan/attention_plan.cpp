// SPDX-License-Identifier: Apache-2.0
#include "attend/plan/attention_plan.h"

#include <algorithm>
#include <limits>
#include <string>
#include <tuple>

#include "attend/core/error.h"
#include "plan/unit_layout.h"

namespace attend {
namespace {

/// Most rows of a prefill unit: large enough that packing K and V is cheap beside using them, small
/// enough that a unit's state stays in L2. Fewer where the workers would not all get their units.
constexpr int kMaxUnitRows = 1024;
constexpr int kMinUnitRows = 192;
/// Units that each worker should get at least, so that the dynamic order can balance them.
constexpr int kUnitsPerWorker = 4;

void require(const AttentionPlanInput& in, bool ok, const char* argument,
             const std::string& expected, const std::string& got) {
  if (!ok) throw InvalidArgument(in.op, argument, expected, got);
}

void check_lengths(const AttentionPlanInput& in) {
  const auto& starts = in.query_start_loc;
  require(in, !starts.empty(), "query_start_loc", "at least 1 entry", "0 entries");
  require(in, in.seq_lens.size() + 1 == starts.size(), "seq_lens",
          std::to_string(starts.size() - 1) + " entries (query_start_loc has one more)",
          std::to_string(in.seq_lens.size()) + " entries");
  require(in, starts[0] == 0, "query_start_loc", "0 at index 0", std::to_string(starts[0]));
  std::int64_t total_keys = 0;
  for (std::size_t r = 0; r < in.seq_lens.size(); ++r) {
    if (starts[r + 1] < starts[r])
      throw InvalidArgument(
          in.op, "query_start_loc",
          ">= " + std::to_string(starts[r]) + " at index " + std::to_string(r + 1),
          std::to_string(starts[r + 1]));
    if (in.seq_lens[r] < 0)
      throw InvalidArgument(in.op, "seq_lens", ">= 0 at index " + std::to_string(r),
                            std::to_string(in.seq_lens[r]));
    total_keys += in.seq_lens[r];
  }
  require(in, total_keys <= std::numeric_limits<std::int32_t>::max(), "seq_lens",
          "a sum that fits 32 bits", std::to_string(total_keys));
  require(in, in.request_causal.empty() || in.request_causal.size() == in.seq_lens.size(),
          "request_causal", std::to_string(in.seq_lens.size()) + " entries or none",
          std::to_string(in.request_causal.size()) + " entries");
}

void check_head_dim(const AttentionPlanInput& in, const char* name, int d) {
  require(in, d > 0 && d % 8 == 0 && d <= 256, name, "a multiple of 8 in [8, 256]",
          std::to_string(d));
}

void check_shape(const AttentionPlanInput& in) {
  require(in, in.num_kv_heads > 0, "num_kv_heads", ">= 1", std::to_string(in.num_kv_heads));
  require(in, in.num_q_heads > 0 && in.num_q_heads % in.num_kv_heads == 0, "num_q_heads",
          "a positive multiple of num_kv_heads = " + std::to_string(in.num_kv_heads),
          std::to_string(in.num_q_heads));
  check_head_dim(in, "head_dim_qk", in.head_dim_qk);
  check_head_dim(in, "head_dim_v", in.head_dim_v);
  require(in, in.window_left >= -1, "window_left", ">= -1", std::to_string(in.window_left));
  require(in, in.window_right >= -1, "window_right", ">= -1", std::to_string(in.window_right));
  require(in, in.num_workers >= 1, "num_workers", ">= 1", std::to_string(in.num_workers));
}

IsaLevel checked_isa(std::optional<IsaLevel> wanted) {
  if (!wanted) return active_isa();
  const auto levels = available_isa_levels();
  if (std::find(levels.begin(), levels.end(), *wanted) == levels.end())
    throw Unsupported("[plan_attention] ISA level " + std::string(to_string(*wanted)),
                      {"this machine does not have it"});
  return *wanted;
}

/// Pieces that queries [begin, end) of a request can see, as [first, last).
struct PieceRange {
  std::int32_t first, last;
};

PieceRange visible_pieces(const AttentionPlan& p, int r, int begin, int end) {
  const auto i = static_cast<std::size_t>(r);
  const std::int64_t keys = p.seq_lens[i];
  const std::int64_t shift = keys - (p.query_start_loc[i + 1] - p.query_start_loc[i]);
  std::int64_t lo = 0, hi = keys;
  if (p.window_left >= 0) lo = std::max<std::int64_t>(0, begin + shift - p.window_left);
  const std::int64_t right = p.request_causal[i] != 0 ? 0 : p.window_right;
  if (right >= 0) hi = std::clamp<std::int64_t>(end - 1 + shift + right + 1, 0, keys);
  if (lo >= hi) return {0, 0};
  return {static_cast<std::int32_t>(lo / kPieceSize),
          static_cast<std::int32_t>((hi + kPieceSize - 1) / kPieceSize)};
}

class Planner {
 public:
  explicit Planner(AttentionPlan& plan) : p_(plan), group_(plan.num_q_heads / plan.num_kv_heads) {
    const std::int64_t rows = std::int64_t{plan.num_tokens()} * plan.num_q_heads;
    const std::int64_t units = std::int64_t{kUnitsPerWorker} * plan.num_workers;
    unit_rows_ =
        static_cast<int>(std::clamp<std::int64_t>(rows / units, kMinUnitRows, kMaxUnitRows));
  }

  void make_units() {
    std::int64_t total = 0;
    for (int r = 0; r < p_.num_reqs(); ++r) total += cut_request(r);
    const std::int64_t target =
        std::max<std::int64_t>(1, total / (std::int64_t{kUnitsPerWorker} * p_.num_workers));
    std::vector<WorkUnit> whole;
    whole.swap(p_.units);
    for (const WorkUnit& u : whole) emit(u, target);
    const auto place = [](const WorkUnit& u) {
      return std::tuple(u.request, u.kv_head, u.q_begin, u.piece_begin);
    };
    std::sort(p_.units.begin(), p_.units.end(), [&](const WorkUnit& a, const WorkUnit& b) {
      const std::int64_t x = cost(a), y = cost(b);
      return x != y ? x > y : place(a) < place(b);
    });
  }

 private:
  int rows(const WorkUnit& u) const { return (u.q_end - u.q_begin) * group_; }

  /// Work of a unit in units of one row over one piece; packing a piece costs about 16 rows.
  std::int64_t cost(const WorkUnit& u) const {
    return std::int64_t{rows(u) + 16} * (u.piece_end - u.piece_begin) + 1;
  }

  /// Cuts a request into one unit per kv head and group of query tokens; returns their cost.
  std::int64_t cut_request(int r) {
    const auto i = static_cast<std::size_t>(r);
    const int query_len = p_.query_start_loc[i + 1] - p_.query_start_loc[i];
    const int step = std::max(1, unit_rows_ / group_);
    std::int64_t sum = 0;
    for (int begin = 0; begin < query_len; begin += step) {
      const int end = std::min(begin + step, query_len);
      const PieceRange pieces = visible_pieces(p_, r, begin, end);
      for (int h = 0; h < p_.num_kv_heads; ++h) {
        p_.units.push_back({r, h, begin, end, pieces.first, pieces.last, -1});
        sum += cost(p_.units.back());
      }
    }
    return sum;
  }

  /// Adds `u`, split along keys if it alone would hold up the other workers.
  void emit(const WorkUnit& u, std::int64_t target) {
    const int pieces = u.piece_end - u.piece_begin;
    p_.max_unit_rows = std::max(p_.max_unit_rows, rows(u));
    if (p_.num_workers == 1 || pieces < 2 || cost(u) <= 2 * target || rows(u) > plan::kBlockRows) {
      p_.units.push_back(u);
      return;
    }
    const auto parts = static_cast<int>(std::min<std::int64_t>(pieces, cost(u) / target));
    Reduction reduction{u.request, u.kv_head, u.q_begin, u.q_end, p_.num_partial_rows, pieces};
    for (int part = 0; part < parts; ++part) {
      WorkUnit piece = u;
      piece.piece_begin = u.piece_begin + static_cast<int>(std::int64_t{pieces} * part / parts);
      piece.piece_end = u.piece_begin + static_cast<int>(std::int64_t{pieces} * (part + 1) / parts);
      piece.partial_slot =
          p_.num_partial_rows + std::int64_t{piece.piece_begin - u.piece_begin} * rows(u);
      p_.units.push_back(piece);
    }
    p_.num_partial_rows += std::int64_t{pieces} * rows(u);
    p_.reductions.push_back(reduction);
  }

  AttentionPlan& p_;
  int group_;
  int unit_rows_;
};

}  // namespace

AttentionPlan plan_attention(const AttentionPlanInput& in) {
  check_lengths(in);
  check_shape(in);
  AttentionPlan p;
  p.isa = checked_isa(in.isa);
  p.query_start_loc.assign(in.query_start_loc.begin(), in.query_start_loc.end());
  p.seq_lens.assign(in.seq_lens.begin(), in.seq_lens.end());
  p.key_start_loc.assign(1, 0);
  for (const std::int32_t n : p.seq_lens) p.key_start_loc.push_back(p.key_start_loc.back() + n);
  p.request_causal.assign(in.request_causal.begin(), in.request_causal.end());
  if (p.request_causal.empty())
    p.request_causal.assign(p.seq_lens.size(), in.causal ? std::uint8_t{1} : std::uint8_t{0});
  p.num_q_heads = in.num_q_heads;
  p.num_kv_heads = in.num_kv_heads;
  p.head_dim_qk = in.head_dim_qk;
  p.head_dim_v = in.head_dim_v;
  p.window_left = in.window_left;
  p.window_right = in.window_right;
  p.num_workers = in.num_workers;
  Planner(p).make_units();
  p.workspace_bytes = plan::workspace_bytes(p);
  return p;
}

}  // namespace attend
