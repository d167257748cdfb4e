// SPDX-License-Identifier: Apache-2.0
// Addresses, visible ranges and the worker's scratch of one unit. Included inside an ISA namespace.

/// Time spent in a phase, until the end of a block; then the phase before goes on.
class InPhase {
 public:
  ATTEND_INLINE InPhase(PhaseClock* clock, Phase phase) noexcept : clock_(clock) {
    if (clock_ != nullptr) before_ = clock_->enter(phase);
  }
  ATTEND_INLINE ~InPhase() {
    if (clock_ != nullptr) clock_->enter(before_);
  }
  InPhase(const InPhase&) = delete;
  InPhase& operator=(const InPhase&) = delete;

 private:
  PhaseClock* clock_;
  Phase before_ = Phase::outside;
};

/// Keys [lo, hi) in absolute positions.
struct KeyRange {
  int lo, hi;
};

/// Keys that the query at `position` may see.
ATTEND_INLINE KeyRange visible_keys(const AttentionProblem& p, int r, int position) {
  const int num_keys = p.seq_lens[r];
  int hi = num_keys;
  if (p.causal[r]) {
    hi = position + 1 < hi ? position + 1 : hi;
  } else if (p.window_right >= 0 && position < hi - p.window_right) {
    hi = position + p.window_right + 1 < hi ? position + p.window_right + 1 : hi;
  }
  int lo = 0;
  if (p.window_left >= 0 && position > p.window_left) lo = position - p.window_left;
  if (hi < 0) hi = 0;
  return {lo < hi ? lo : hi, hi};
}

/// Keys or values of one request and kv head.
template <typename T>
struct HeadRows {
  const T* head;  // the kv head's first row
  KvStrides strides;
  int request;
};

/// Calls f(key, row) for keys [begin, end).
template <typename T, typename Fn>
ATTEND_INLINE void for_each_key(const AttentionProblem& p, const HeadRows<T>& from, int begin,
                                int end, const Fn& f) {
  const KvStrides& st = from.strides;
  const int r = from.request;
  if (p.block_table != nullptr) {
    const std::int32_t* table = p.block_table + r * p.block_table_stride;
    for (int j = begin; j < end;) {
      const int block = j / p.block_size;
      const int block_end = (block + 1) * p.block_size;
      const int stop = block_end < end ? block_end : end;
      const T* row = from.head + table[block] * st.block + (j - block * p.block_size) * st.token;
      for (; j < stop; ++j, row += st.token) f(j, row);
    }
    return;
  }
  const T* row = from.head + begin * st.token;
  if (p.kv_start != nullptr) {
    row += p.kv_start[r] * st.token;
  } else {
    row += (p.batch_idx != nullptr ? p.batch_idx[r] : r) * st.block;
    if (p.leftpad != nullptr) row += p.leftpad[r] * st.token;
  }
  for (int j = begin; j < end; ++j, row += st.token) f(j, row);
}

/// Row pointers of keys [begin, end); rows[i] is key begin + i.
template <typename T>
ATTEND_INLINE void fill_rows(const AttentionProblem& p, const HeadRows<T>& from, int begin, int end,
                             const T** rows) {
  for_each_key(p, from, begin, end,
               [&](int j, const T* row) ATTEND_LAMBDA { rows[j - begin] = row; });
}

/// A byte of a row that is told by its RowFormat.
struct CodedByte {
  std::uint8_t bits;
};

/// One worker's arrays, and the unit they hold. Keys and values lie in memory as `K` and `V` and
/// are multiplied as T, except that int8 keys of int8 queries are multiplied as they are. Codes are
/// staged: decoded to bf16, which holds each of them exactly, a piece at a time. So are rows of
/// bytes, whose numbers are bf16 by definition; their values, V = bf16, are the staged keys.
template <typename T, typename K, typename V>
struct UnitState {
  static constexpr bool kStagedKeys = !std::is_same_v<T, K>, kStagedValues = !std::is_same_v<T, V>,
                        kValuesAreKeys = std::is_same_v<K, CodedByte>;
  const AttentionProblem& p;
  const WorkUnit& u;
  const WorkUnit* following;
  bool fetched;
  PhaseClock* clock;
  int rows;  // query rows: token-major, then head of the group; all of map 1 before those of map 2
  int map_rows;  // rows from one map to the next: more than it has, where they fill whole tiles
  int members;   // of the group that are of one map
  int branch_columns;  // columns of accumulators from one branch to the next
  int dv_padded;       // of all branches
  float* q;            // [rows, D] scaled to log2 units; int8 queries: their codes
  float* s;            // [kBlockRows, kPieceSize] logits, then probabilities
  float* acc;          // [rows, dv_padded]
  float* k_panels;     // [branches * kPanels][D][kPanelKeys]
  float* v_panels;     // [dv_padded / kPanelCols][kPieceSize][kPanelCols]
  float* m;            // [rows] running maximum, log2 units
  float* l;            // [rows] running sum
  float* piece_m;      // [rows] of the current piece
  float* piece_l;
  float* keep;  // [rows] factors of the merge: old state,
  float* take;  //        new piece
  int* lo;      // [rows] visible keys, absolute
  int* hi;
  int* request;      // [rows]
  const T** k_rows;  // [branches, kPieceSize] current piece
  const T** v_rows;
  const K** stored_k_rows;  // the same as it lies in memory
  const V** stored_v_rows;
  const K** next_k_rows;  // next piece, for prefetch
  const V** next_v_rows;
  T* staged_k;          // [branches, kPieceSize, D] decoded
  T* staged_v;          // [branches, kPieceSize, Dv]
  float* key_scales;    // [kPieceSize] of the current piece, if keys have scales of their own
  float* value_scales;  // likewise
  // int8 queries only.
  std::int32_t* starts;   // [rows] minus what the bias of the keys adds to a product
  float* factors;         // [rows] of a product of codes
  float* offsets;         // [rows] of a logit
  float* full;            // [rows] running sum of the weights before rounding
  float* piece_full;      // [rows]
  std::uint8_t* weights;  // [kBlockRows, kPieceSize] rounded

  UnitState(const AttentionProblem& problem, const WorkUnit& unit, const KernelWorkspace& ws)
      : p(problem),
        u(unit),
        following(ws.following),
        fetched(ws.fetched),
        clock(ws.clock),
        rows((unit.q_end - unit.q_begin) * problem.group_size),
        map_rows(rows),
        members(problem.group_size / problem.maps),
        branch_columns(ws.layout.padded_dv / problem.branches),
        dv_padded(ws.layout.padded_dv) {
    if (problem.maps == 2) {
      map_rows = rows / 2;
      if (rows > Simd::kTileRows)
        map_rows = static_cast<int>(plan::round_up(map_rows, Simd::kTileRows));
      rows = map_rows + rows / 2;
    }
    const plan::ScratchLayout& at = ws.layout;
    q = ws.scratch + at.q;
    s = ws.scratch + at.s;
    acc = ws.scratch + at.acc;
    k_panels = ws.scratch + at.k_panels;
    v_panels = ws.scratch + at.v_panels;
    key_scales = ws.scratch + at.scales;
    value_scales = key_scales + kPieceSize;
    weights = reinterpret_cast<std::uint8_t*>(ws.scratch + at.weights);
    float* row_array = ws.scratch + at.rows;
    const auto take_rows = [&] {
      float* here = row_array;
      row_array += at.padded_rows;
      return here;
    };
    for (float** array :
         {&m, &l, &piece_m, &piece_l, &keep, &take, &factors, &offsets, &full, &piece_full})
      *array = take_rows();
    for (int** array : {&lo, &hi, &request, &starts}) *array = reinterpret_cast<int*>(take_rows());
    const int keys = problem.branches * kPieceSize;
    const K** key_rows = reinterpret_cast<const K**>(row_array);
    stored_k_rows = key_rows;
    next_k_rows = key_rows + keys;
    const V** value_rows = reinterpret_cast<const V**>(key_rows + std::int64_t{2} * keys);
    stored_v_rows = value_rows;
    next_v_rows = value_rows + keys;
    k_rows = reinterpret_cast<const T**>(value_rows + std::int64_t{2} * keys);
    v_rows = k_rows + keys;
    staged_k = reinterpret_cast<T*>(ws.scratch + at.staged);
    staged_v = staged_k + std::int64_t{keys} * problem.head_dim_qk;
  }
  /// What this worker does from now on.
  ATTEND_INLINE void enter(Phase phase) const {
    if (clock != nullptr) clock->enter(phase);
  }
  int map(int row) const { return row >= map_rows ? 1 : 0; }
  int in_map(int row) const { return row >= map_rows ? row - map_rows : row; }
  /// Query tokens from the unit's first one to that of a row.
  int step(int row) const { return in_map(row) / members; }
  int member(int row) const { return map(row) * members + in_map(row) % members; }
  int head(int row) const { return p.head(u.kv_head, member(row)); }
  /// Rows of one map; those behind them, up to the next map's, are nobody's.
  int own_rows() const { return (u.q_end - u.q_begin) * members; }
  /// Index of a row's query token among those of all requests.
  int token(int row) const { return p.query_start_loc[u.request] + u.q_begin + step(row); }
  /// Absolute position of query token `tok` of all among the keys of its request.
  int position(int of_request, int tok) const {
    return tok + p.seq_lens[of_request] - p.query_start_loc[of_request + 1];
  }
};
