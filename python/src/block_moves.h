// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <vector>

#include "arguments.h"
#include "attend/ops/cache.h"

namespace attend::python {

/// Takes `moves`: int64 [n, 2] or a list of pairs.
inline std::vector<BlockMove> read_block_moves(Arguments& call) {
  constexpr const char* kName = "moves";
  constexpr const char* kExpected = "int64 [n, 2] or a list of pairs";
  const auto is_list = [](nb::handle h) { return PyList_Check(h.ptr()) || PyTuple_Check(h.ptr()); };
  const nb::handle value = call.object(kName);
  if (!value.is_valid()) call.refuse(kName, kExpected, "None");
  std::vector<BlockMove> moves;
  if (framework_of(value) != Framework::none) {
    const ConstTensorView t = call.in(kName);
    if (t.dtype != DType::i64 || t.rank != 2 || t.shape[1] != 2)
      call.refuse(kName, kExpected, describe(t));
    for (std::int64_t i = 0; i < t.shape[0]; ++i) {
      const std::int64_t* pair = t.as<std::int64_t>() + i * t.strides[0];
      moves.push_back({pair[0], pair[t.strides[1]]});
    }
    return moves;
  }
  if (!is_list(value)) call.refuse_type(kName, kExpected, value);
  for (const nb::handle pair : value) {
    BlockMove move;
    if (!is_list(pair) || nb::len(pair) != 2 || !nb::try_cast(pair[0], move.from) ||
        !nb::try_cast(pair[1], move.to))
      call.refuse_type(kName, kExpected, pair);
    moves.push_back(move);
  }
  return moves;
}

}  // namespace attend::python
