// SPDX-License-Identifier: Apache-2.0
#include "attend/dist/communicator.h"

#include "core/check.h"

namespace attend {
namespace {

void check_view(check::Where where, const ConstTensorView& t) {
  check::require(
      t.rank >= 0 && t.rank <= kMaxRank, where,
      [] { return fmt::format("a rank from 0 to {}", kMaxRank); }, t.rank);
  check::tensor(where, t, t.rank, {});
  check::contiguous(where, t);
}

}  // namespace

std::string_view to_string(Collective c) noexcept {
  switch (c) {
    case Collective::all_gather:
      return "all_gather";
    case Collective::all_to_all:
      return "all_to_all";
    case Collective::reduce_scatter:
      return "reduce_scatter";
    case Collective::all_reduce:
      return "all_reduce";
    case Collective::broadcast:
      return "broadcast";
  }
  return "unknown";
}

void Communicator::check_and_run(Collective kind, const ConstTensorView& send,
                                 const TensorView& recv) {
  const std::string_view op = to_string(kind);
  check_view({op, "send"}, send);
  check_view({op, "recv"}, recv);
  if (kind == Collective::reduce_scatter || kind == Collective::all_reduce) {
    check::require(send.dtype == DType::f32, {op, "send"}, "dtype f32", to_string(send.dtype));
  }
  check::require(
      recv.dtype == send.dtype, {op, "recv"},
      [&] { return fmt::format("the dtype of send, {}", to_string(send.dtype)); },
      to_string(recv.dtype));
  const std::int64_t given = send.numel();
  const std::int64_t ranks = size();
  const bool blocks = kind == Collective::all_to_all || kind == Collective::reduce_scatter;
  check::require(
      !blocks || given % ranks == 0, {op, "send"},
      [&] { return fmt::format("a multiple of {} elements, one block a rank", ranks); }, given);
  const std::int64_t got = kind == Collective::all_gather       ? ranks * given
                           : kind == Collective::reduce_scatter ? given / ranks
                                                                : given;
  check::require(
      recv.numel() == got, {op, "recv"},
      [&] { return fmt::format("{} elements for {} in send and {} ranks", got, given, ranks); },
      recv.numel());
  check::no_overlap({op, "recv"}, recv, "send", send);
  run({kind, send.dtype, blocks ? given / ranks : given, -1, send.data, recv.data});
}

void Communicator::all_gather(const ConstTensorView& send, const TensorView& recv) {
  check_and_run(Collective::all_gather, send, recv);
}

void Communicator::all_to_all(const ConstTensorView& send, const TensorView& recv) {
  check_and_run(Collective::all_to_all, send, recv);
}

void Communicator::reduce_scatter(const ConstTensorView& send, const TensorView& recv) {
  check_and_run(Collective::reduce_scatter, send, recv);
}

void Communicator::all_reduce(const ConstTensorView& send, const TensorView& recv) {
  check_and_run(Collective::all_reduce, send, recv);
}

void Communicator::broadcast(const TensorView& buffer, int root) {
  constexpr std::string_view kOp = "broadcast";
  check_view({kOp, "buffer"}, buffer);
  check::require(
      root >= 0 && root < size(), {kOp, "root"},
      [&] { return fmt::format("a rank in [0, {})", size()); }, root);
  run({Collective::broadcast, buffer.dtype, buffer.numel(), root, buffer.data, buffer.data});
}

}  // namespace attend
