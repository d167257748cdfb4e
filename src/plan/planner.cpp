// SPDX-License-Identifier: Apache-2.0
#include "plan/planner.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "plan/plan_checks.h"
#include "plan/unit_layout.h"
#include "plan/unit_size.h"

namespace attend::plan {
namespace {

PieceRange visible_pieces(const AttentionPlan& p, int r, int begin, int end) {
  const auto i = static_cast<std::size_t>(r);
  return plan::visible_pieces({p.seq_lens[i], p.query_start_loc[i + 1] - p.query_start_loc[i],
                               p.window_left, p.request_causal[i] != 0 ? 0 : p.window_right},
                              begin, end);
}

class Planner {
 public:
  Planner(AttentionPlan& to, PlannerScratch& scratch)
      : p_(to),
        group_(to.num_q_heads / to.num_kv_heads),
        whole_(scratch.whole),
        shared_(scratch.shared),
        innermost_(scratch.innermost) {
    const int rows = max_unit_rows(p_.num_tokens(), p_.num_q_heads, p_.head_dim_qk + p_.head_dim_v,
                                   p_.num_workers);
    step_ = std::max(1, rows / group_);
    whole_.clear();
    shared_.clear();
    innermost_.assign(p_.seq_lens.size(), -1);
    p_.units.clear();
    p_.reductions.clear();
    p_.partial_runs.clear();
    p_.max_unit_rows = 0;
    p_.num_partial_rows = 0;
  }

  void make_units() {
    std::int64_t total = 0;
    for (const SharedPrefix& shared : p_.shared_prefixes) total += share(shared);
    for (int r = 0; r < p_.num_reqs(); ++r) total += cut_request(r);
    const std::int64_t target =
        std::max<std::int64_t>(1, total / (std::int64_t{kUnitsPerWorker} * p_.num_workers));
    for (SharedPieces& shared : shared_) emit(shared, target);
    for (const WorkUnit& u : whole_) emit(u, target);
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

  /// Notes the pieces of a shared prefix that are in no prefix before it; returns their cost.
  std::int64_t share(const SharedPrefix& prefix) {
    const auto begin = static_cast<std::size_t>(prefix.request_begin);
    const int outer = innermost_[begin];
    SharedPieces s{prefix.request_begin, prefix.request_end, outer, {0, 0}, 0};
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
        whole_.push_back({r, h, begin, end, pieces.first, pieces.last, -1, 0});
        sum += cost(whole_.back());
      }
    }
    return sum;
  }

  /// Into how many parts along keys `u` is cut, so that it alone does not hold up other workers.
  int num_parts(const WorkUnit& u, std::int64_t target) const {
    const int pieces = u.piece_end - u.piece_begin;
    if (p_.num_workers == 1 || pieces < 2 || cost(u) <= 2 * target || rows(u) > kBlockRows)
      return 1;
    const int most = p_.max_num_splits > 0 ? std::min(pieces, p_.max_num_splits) : pieces;
    return static_cast<int>(std::min<std::int64_t>(most, cost(u) / target));
  }

  /// Adds the units of shared pieces. The first part of an outermost prefix merges its pieces, as
  /// nothing comes before them; pieces of the other parts are stored one by one.
  void emit(SharedPieces& s, std::int64_t target) {
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
          const auto cut = [&](int at) {
            return static_cast<int>(std::int64_t{pieces} * at / parts);
          };
          const int first = cut(part);
          const bool merges = part == 0 && s.merged > 0;
          u.piece_begin = s.pieces.first + first;
          u.piece_end = s.pieces.first + cut(part + 1);
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
    const SharedPieces& s = shared_[static_cast<std::size_t>(shared)];
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
  int step_;                      ///< query tokens of a unit
  std::vector<WorkUnit>& whole_;  ///< a request's units before they are split
  std::vector<SharedPieces>& shared_;
  std::vector<int>& innermost_;  ///< [B] index of the longest shared pieces, or -1
};

}  // namespace

void set_lengths(AttentionPlan& p, const AttentionPlanInput& in) {
  p.query_start_loc.assign(in.query_start_loc.begin(), in.query_start_loc.end());
  p.seq_lens.assign(in.seq_lens.begin(), in.seq_lens.end());
  p.key_start_loc.assign(1, 0);
  for (const std::int32_t n : p.seq_lens) p.key_start_loc.push_back(p.key_start_loc.back() + n);
  p.request_causal.assign(in.request_causal.begin(), in.request_causal.end());
  if (p.request_causal.empty())
    p.request_causal.assign(p.seq_lens.size(), in.causal ? std::uint8_t{1} : std::uint8_t{0});
}

void set_shape(AttentionPlan& p, const AttentionPlanInput& in) {
  p.isa = checked_isa(in.isa);
  p.isa_given = in.isa.has_value();
  p.arithmetic = in.arithmetic;
  p.num_q_heads = in.num_q_heads;
  p.num_kv_heads = in.num_kv_heads;
  p.head_dim_qk = in.head_dim_qk;
  p.head_dim_v = in.head_dim_v;
  p.branches = in.branches;
  p.window_left = in.window_left;
  p.window_right = in.window_right;
  p.num_workers = in.num_workers;
  p.max_num_splits = in.max_num_splits;
}

void make_units(AttentionPlan& p, PlannerScratch& scratch) { Planner(p, scratch).make_units(); }

}  // namespace attend::plan
