// SPDX-License-Identifier: Apache-2.0
#include "attend/plan/attention_plan.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <string>
#include <tuple>
#include <utility>

#include "attend/core/error.h"
#include "plan/unit_layout.h"
#include "plan/unit_size.h"
#include "plan/visible_pieces.h"

namespace attend {
namespace {

using plan::PieceRange;

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

void check_shared_prefixes(const AttentionPlanInput& in) {
  const std::size_t num_reqs = in.seq_lens.size();
  std::vector<std::int32_t> shared(num_reqs, 0);  // keys of the prefixes so far
  for (std::size_t i = 0; i < in.shared_prefixes.size(); ++i) {
    const SharedPrefix& s = in.shared_prefixes[i];
    const std::string range =
        fmt::format("[{}, {}) at index {}", s.request_begin, s.request_end, i);
    require(in,
            s.request_begin >= 0 && s.request_begin < s.request_end &&
                std::cmp_less_equal(s.request_end, num_reqs),
            "shared_prefixes", fmt::format("requests of [0, {})", num_reqs), range);
    const auto begin = static_cast<std::size_t>(s.request_begin);
    for (std::size_t r = begin; std::cmp_less(r, s.request_end); ++r) {
      require(in, shared[r] == shared[begin], "shared_prefixes",
              "requests that lie beside or inside of each range before", range);
      const std::string got = fmt::format("{} keys at index {}", s.num_keys, i);
      require(in, s.num_keys <= in.seq_lens[r], "shared_prefixes",
              fmt::format("at most the {} keys of request {}", in.seq_lens[r], r), got);
      require(in, s.num_keys > shared[r], "shared_prefixes",
              fmt::format("more than the {} keys that are shared already", shared[r]), got);
    }
    std::fill(shared.begin() + s.request_begin, shared.begin() + s.request_end, s.num_keys);
  }
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

PieceRange visible_pieces(const AttentionPlan& p, int r, int begin, int end) {
  const auto i = static_cast<std::size_t>(r);
  return plan::visible_pieces({p.seq_lens[i], p.query_start_loc[i + 1] - p.query_start_loc[i],
                               p.window_left, p.request_causal[i] != 0 ? 0 : p.window_right},
                              begin, end);
}

class Planner {
 public:
  explicit Planner(AttentionPlan& to) : p_(to), group_(to.num_q_heads / to.num_kv_heads) {
    const int rows = plan::max_unit_rows(p_.num_tokens(), p_.num_q_heads, p_.num_workers);
    step_ = std::max(1, rows / group_);
    innermost_.assign(p_.seq_lens.size(), -1);
  }

  void make_units() {
    std::int64_t total = 0;
    for (const SharedPrefix& shared : p_.shared_prefixes) total += share(shared);
    for (int r = 0; r < p_.num_reqs(); ++r) total += cut_request(r);
    const std::int64_t target =
        std::max<std::int64_t>(1, total / (std::int64_t{plan::kUnitsPerWorker} * p_.num_workers));
    std::vector<WorkUnit> whole;
    whole.swap(p_.units);
    for (Shared& shared : shared_) emit(shared, target);
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
  /// Requests that attend to some pieces together. Partials lie piece by piece; all rows of a kv
  /// head in a piece are consecutive, so that those of a request are found however rows are cut.
  struct Shared {
    std::int32_t request_begin, request_end;
    int outer;                ///< index of the shared pieces before these, or -1
    PieceRange pieces;        ///< [0, 0) if no row sees any
    std::int32_t end;         ///< piece at which the requests part
    std::int32_t merged = 0;  ///< leading pieces whose partials are stored as one
    std::int64_t slot = 0;    ///< of the first row
    std::int64_t rows = 0;    ///< of a kv head in a piece

    int partials() const { return (merged > 0 ? 1 : 0) + pieces.last - pieces.first - merged; }
  };

  int rows(const WorkUnit& u) const { return (u.q_end - u.q_begin) * group_; }

  /// Work of a unit in units of one row over one piece; packing a piece costs about 16 rows.
  std::int64_t cost(const WorkUnit& u) const {
    return std::int64_t{rows(u) + 16} * (u.piece_end - u.piece_begin) + 1;
  }

  /// Notes the pieces of a shared prefix that are in no prefix before it; returns their cost.
  std::int64_t share(const SharedPrefix& prefix) {
    const auto begin = static_cast<std::size_t>(prefix.request_begin);
    const int outer = innermost_[begin];
    Shared s{prefix.request_begin, prefix.request_end, outer, {0, 0}, 0};
    s.end = prefix.num_keys / kPieceSize;
    const std::int32_t from = outer < 0 ? 0 : shared_[static_cast<std::size_t>(outer)].end;
    if (from == s.end) return 0;
    s.pieces = {s.end, 0};
    for (std::int32_t r = s.request_begin; r < s.request_end; ++r) {
      const auto i = static_cast<std::size_t>(r);
      innermost_[i] = static_cast<int>(shared_.size());
      const int query_len = p_.query_start_loc[i + 1] - p_.query_start_loc[i];
      const PieceRange seen = visible_pieces(p_, r, 0, query_len);
      if (query_len == 0 || seen.first == seen.last) continue;
      s.pieces.first = std::min(s.pieces.first, std::max(from, seen.first));
      s.pieces.last = std::max(s.pieces.last, std::min(s.end, seen.last));
    }
    const auto end = static_cast<std::size_t>(prefix.request_end);
    const int tokens = p_.query_start_loc[end] - p_.query_start_loc[begin];
    if (s.pieces.first >= s.pieces.last) s.pieces = {0, 0};
    s.rows = std::int64_t{tokens} * group_;
    shared_.push_back(s);
    const std::int64_t units = std::int64_t{(tokens + step_ - 1) / step_} * p_.num_kv_heads;
    return (s.rows * p_.num_kv_heads + 16 * units) * (s.pieces.last - s.pieces.first);
  }

  /// Cuts a request into one unit per kv head and group of query tokens; returns their cost.
  std::int64_t cut_request(int r) {
    const auto i = static_cast<std::size_t>(r);
    const int query_len = p_.query_start_loc[i + 1] - p_.query_start_loc[i];
    const int shared = innermost_[i];
    const std::int32_t own = shared < 0 ? 0 : shared_[static_cast<std::size_t>(shared)].end;
    std::int64_t sum = 0;
    for (int begin = 0; begin < query_len; begin += step_) {
      const int end = std::min(begin + step_, query_len);
      PieceRange pieces = visible_pieces(p_, r, begin, end);
      pieces = {std::max(pieces.first, own), std::max(pieces.last, own)};
      for (int h = 0; h < p_.num_kv_heads; ++h) {
        p_.units.push_back({r, h, begin, end, pieces.first, pieces.last, -1, 0});
        sum += cost(p_.units.back());
      }
    }
    return sum;
  }

  /// Into how many parts along keys `u` is cut, so that it alone does not hold up other workers.
  int num_parts(const WorkUnit& u, std::int64_t target) const {
    const int pieces = u.piece_end - u.piece_begin;
    if (p_.num_workers == 1 || pieces < 2 || cost(u) <= 2 * target || rows(u) > plan::kBlockRows)
      return 1;
    return static_cast<int>(std::min<std::int64_t>(pieces, cost(u) / target));
  }

  /// Adds the units of shared pieces. The first part of an outermost prefix merges its pieces, as
  /// nothing comes before them; pieces of the other parts are stored one by one.
  void emit(Shared& s, std::int64_t target) {
    const int pieces = s.pieces.last - s.pieces.first;
    if (pieces == 0) return;
    const int tokens = static_cast<int>(s.rows / group_);
    WorkUnit u{s.request_begin, 0,  0, std::min(step_, tokens), s.pieces.first,
               s.pieces.last,   -1, 0};
    const int parts = num_parts(u, target);
    if (s.outer < 0) s.merged = pieces / parts;
    s.slot = p_.num_partial_rows;
    p_.num_partial_rows += s.rows * s.partials() * p_.num_kv_heads;
    for (; u.kv_head < p_.num_kv_heads; ++u.kv_head) {
      const std::int64_t head = s.slot + s.rows * s.partials() * u.kv_head;
      for (u.q_begin = 0; u.q_begin < tokens; u.q_begin = u.q_end) {
        u.q_end = std::min(u.q_begin + step_, tokens);
        p_.max_unit_rows = std::max(p_.max_unit_rows, rows(u));
        for (int part = 0; part < parts; ++part) {
          const int first = pieces * part / parts;
          const bool merges = part == 0 && s.merged > 0;
          u.piece_begin = s.pieces.first + first;
          u.piece_end = s.pieces.first + pieces * (part + 1) / parts;
          u.partial_slot = head + std::int64_t{u.q_begin} * group_ +
                           s.rows * (s.merged > 0 && part > 0 ? 1 + first - s.merged : first);
          u.partial_stride = merges ? 0 : s.rows;
          p_.units.push_back(u);
        }
      }
    }
  }

  /// Adds runs for the rows of `u` over the pieces that its request shares, outermost first.
  void add_shared_runs(const WorkUnit& u, int shared) {
    if (shared < 0) return;
    const Shared& s = shared_[static_cast<std::size_t>(shared)];
    add_shared_runs(u, s.outer);
    const int first = p_.query_start_loc[static_cast<std::size_t>(u.request)] -
                      p_.query_start_loc[static_cast<std::size_t>(s.request_begin)];
    if (s.partials() == 0) return;
    const std::int64_t slot =
        s.slot + s.rows * s.partials() * u.kv_head + std::int64_t{first + u.q_begin} * group_;
    p_.partial_runs.push_back({slot, s.rows, s.partials()});
  }

  /// Adds `u`, split along keys if it alone would hold up the other workers.
  void emit(const WorkUnit& u, std::int64_t target) {
    const int pieces = u.piece_end - u.piece_begin;
    p_.max_unit_rows = std::max(p_.max_unit_rows, rows(u));
    const auto run_begin = static_cast<std::int32_t>(p_.partial_runs.size());
    add_shared_runs(u, innermost_[static_cast<std::size_t>(u.request)]);
    const int parts = num_parts(u, target);
    if (parts == 1 && std::cmp_equal(run_begin, p_.partial_runs.size())) {
      p_.units.push_back(u);
      return;
    }
    for (int part = 0; part < parts && pieces > 0; ++part) {
      WorkUnit piece = u;
      piece.piece_begin = u.piece_begin + static_cast<int>(std::int64_t{pieces} * part / parts);
      piece.piece_end = u.piece_begin + static_cast<int>(std::int64_t{pieces} * (part + 1) / parts);
      piece.partial_slot =
          p_.num_partial_rows + std::int64_t{piece.piece_begin - u.piece_begin} * rows(u);
      piece.partial_stride = rows(u);
      p_.units.push_back(piece);
    }
    if (pieces > 0) p_.partial_runs.push_back({p_.num_partial_rows, rows(u), pieces});
    p_.num_partial_rows += std::int64_t{pieces} * rows(u);
    const auto run_end = static_cast<std::int32_t>(p_.partial_runs.size());
    p_.reductions.push_back({u.request, u.kv_head, u.q_begin, u.q_end, run_begin, run_end});
  }

  AttentionPlan& p_;
  int group_;
  int step_;  ///< query tokens of a unit
  std::vector<Shared> shared_;
  std::vector<int> innermost_;  ///< [B] index of the longest shared pieces, or -1
};

}  // namespace

AttentionPlan plan_attention(const AttentionPlanInput& in) {
  check_lengths(in);
  check_shape(in);
  check_shared_prefixes(in);
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
  p.shared_prefixes.assign(in.shared_prefixes.begin(), in.shared_prefixes.end());
  Planner(p).make_units();
  p.workspace_bytes = plan::workspace_bytes(p);
  return p;
}

}  // namespace attend
