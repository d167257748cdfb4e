// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/dist/decode_context_parallel.h"

namespace attend::dcp {

/// Combines partial results, each rank keeping its heads, by one way or the other.
inline void combine_parts(const DcpCombineArgs& args, DcpCombine way, Communicator& comm) {
  if (way == DcpCombine::all_to_all) {
    dcp_a2a_lse_reduce(args, comm);
  } else {
    cp_lse_ag_out_rs(args, comm);
  }
}

}  // namespace attend::dcp
