// SPDX-License-Identifier: Apache-2.0
// Addresses, visible ranges and the worker's scratch of one unit. Included inside an ISA namespace.

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

/// Row pointers of keys [begin, end); rows[i] is key begin + i.
template <typename T>
ATTEND_INLINE void fill_rows(const AttentionProblem& p, const HeadRows<T>& from, int begin, int end,
                             const T** rows) {
  const KvStrides& st = from.strides;
  const int r = from.request;
  if (p.block_table != nullptr) {
    const std::int32_t* table = p.block_table + r * p.block_table_stride;
    for (int j = begin; j < end;) {
      const int block = j / p.block_size;
      const int block_end = (block + 1) * p.block_size;
      const int stop = block_end < end ? block_end : end;
      const T* row = from.head + table[block] * st.block + (j - block * p.block_size) * st.token;
      for (; j < stop; ++j, row += st.token) rows[j - begin] = row;
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
  for (int j = begin; j < end; ++j, row += st.token) rows[j - begin] = row;
}

/// One worker's arrays, and the unit they hold. Keys and values lie in memory as `Stored` and are
/// multiplied as T: fp8 is decoded to bf16, which holds every fp8 value exactly, a piece at a time.
template <typename T, typename Stored>
struct UnitState {
  static constexpr bool kStaged = !std::is_same_v<T, Stored>;
  const AttentionProblem& p;
  const WorkUnit& u;
  int rows;  // query rows: token-major, then head of the group
  int dv_padded;
  float* q;         // [rows, D] scaled to log2 units
  float* s;         // [kBlockRows, kPieceSize] logits, then probabilities
  float* acc;       // [rows, dv_padded]
  float* k_panels;  // [kPanels][D][kPanelKeys]
  float* v_panels;  // [dv_padded / kPanelCols][kPieceSize][kPanelCols]
  float* m;         // [rows] running maximum, log2 units
  float* l;         // [rows] running sum
  float* piece_m;   // [rows] of the current piece
  float* piece_l;
  float* keep;  // [rows] factors of the merge: old state,
  float* take;  //        new piece
  int* lo;      // [rows] visible keys, absolute
  int* hi;
  int* request;      // [rows]
  const T** k_rows;  // [kPieceSize] current piece
  const T** v_rows;
  const Stored** stored_k_rows;  // the same as it lies in memory
  const Stored** stored_v_rows;
  const Stored** next_k_rows;  // next piece, for prefetch
  const Stored** next_v_rows;
  T* staged_k;  // [kPieceSize, D] decoded
  T* staged_v;  // [kPieceSize, Dv]

  UnitState(const AttentionProblem& problem, const WorkUnit& unit, const KernelWorkspace& ws)
      : p(problem),
        u(unit),
        rows((unit.q_end - unit.q_begin) * problem.group_size),
        dv_padded(ws.layout.padded_dv) {
    const plan::ScratchLayout& at = ws.layout;
    q = ws.scratch + at.q;
    s = ws.scratch + at.s;
    acc = ws.scratch + at.acc;
    k_panels = ws.scratch + at.k_panels;
    v_panels = ws.scratch + at.v_panels;
    float* row_array = ws.scratch + at.rows;
    const auto take_rows = [&] {
      float* here = row_array;
      row_array += at.padded_rows;
      return here;
    };
    m = take_rows();
    l = take_rows();
    piece_m = take_rows();
    piece_l = take_rows();
    keep = take_rows();
    take = take_rows();
    lo = reinterpret_cast<int*>(take_rows());
    hi = reinterpret_cast<int*>(take_rows());
    request = reinterpret_cast<int*>(take_rows());
    const Stored** stored = reinterpret_cast<const Stored**>(row_array);
    stored_k_rows = stored;
    stored_v_rows = stored + kPieceSize;
    next_k_rows = stored + 2 * kPieceSize;
    next_v_rows = stored + 3 * kPieceSize;
    k_rows = reinterpret_cast<const T**>(stored + 4 * kPieceSize);
    v_rows = k_rows + kPieceSize;
    staged_k = reinterpret_cast<T*>(ws.scratch + at.staged);
    staged_v = staged_k + std::int64_t{kPieceSize} * problem.head_dim_qk;
  }
  int head(int row) const { return u.kv_head * p.group_size + row % p.group_size; }
  /// Index of a row's query token among those of all requests.
  int token(int row) const { return p.query_start_loc[u.request] + u.q_begin + row / p.group_size; }
  /// Absolute position of query token `tok` of all among the keys of its request.
  int position(int of_request, int tok) const {
    return tok + p.seq_lens[of_request] - p.query_start_loc[of_request + 1];
  }
};
