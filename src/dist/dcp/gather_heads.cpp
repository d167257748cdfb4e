// SPDX-License-Identifier: Apache-2.0
#include "dist/dcp/gather_heads.h"

#include <cstddef>
#include <cstring>

#include "dist/dcp/reserve.h"

namespace attend {

void dcp::copy_heads(const TensorView& to, const ConstTensorView& from) {
  const std::size_t bytes = static_cast<std::size_t>(from.shape[2]) * size_of(from.dtype);
  for (std::int64_t t = 0; t < from.shape[0]; ++t) {
    for (std::int64_t h = 0; h < from.shape[1]; ++h) {
      std::memcpy(to.select(0, t).select(0, h).data, from.select(0, t).select(0, h).data, bytes);
    }
  }
}

TensorView dcp::gather_heads(const ConstTensorView& q, Communicator& comm, HeadBuffers& buffers) {
  const std::int64_t tokens = q.shape[0], heads = q.shape[1], dim = q.shape[2];
  const TensorView own = reserve(buffers.own, q.dtype, {tokens, heads, dim});
  const TensorView gathered = reserve(buffers.gathered, q.dtype, {comm.size(), tokens, heads, dim});
  const TensorView all = reserve(buffers.all, q.dtype, {tokens, comm.size() * heads, dim});
  copy_heads(own, q);
  comm.all_gather(own, gathered);
  for (int r = 0; r < comm.size(); ++r) {
    copy_heads(all.slice(1, r * heads, heads), gathered.select(0, r));
  }
  return all;
}

}  // namespace attend
