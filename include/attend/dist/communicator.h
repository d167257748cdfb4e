// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "attend/core/dtype.h"
#include "attend/core/error.h"
#include "attend/core/executor.h"
#include "attend/core/tensor_view.h"

/// Exchange of data between the ranks of a group.
namespace attend {

/// Thrown in the ranks that wait, or would wait, for a rank that has given up.
class CommunicatorAborted : public Error {
 public:
  using Error::Error;
};

enum class Collective : std::uint8_t {
  all_gather,
  all_to_all,
  reduce_scatter,
  all_reduce,
  broadcast
};
std::string_view to_string(Collective c) noexcept;

/// A checked call of a collective, as a Communicator's implementation receives it.
struct CollectiveCall {
  Collective kind = Collective::all_gather;
  DType dtype = DType::f32;  ///< f32 for the two reductions
  /// Elements of one block: what a rank gives (all_gather, all_reduce, broadcast), gives to one
  /// other (all_to_all) or gets (reduce_scatter).
  std::int64_t count = 0;
  int root = -1;               ///< broadcast: the rank that gives; -1 for the others
  const void* send = nullptr;  ///< may be null if count is 0
  void* recv = nullptr;        ///< broadcast: the same memory as send
};

/// One rank's end of a group of size() ranks.
///
/// Collectives: every rank of the group makes the same calls in the same order, with the same
/// dtype and sizes, and a call returns when this rank's result is there and its `send` may be
/// changed again. Views are contiguous, of any rank; only their number of elements counts. `recv`
/// must not overlap a `send` of any rank. Sums are float32 and start with rank 0's value, to which
/// the others are added in ascending order, so that the bits depend on the values only and are
/// those of a plain loop.
///
/// Every collective throws InvalidArgument, before anything is written, for views that are wrong
/// in themselves (this rank only: the others wait until somebody calls abort()), and
/// CommunicatorAborted after an abort. A communicator is used by one thread at a time.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int rank() const noexcept = 0;  ///< 0 .. size() - 1
  virtual int size() const noexcept = 0;  ///< >= 1

  /// recv = the sends of rank 0, 1, ... one after the other.
  /// send: any dtype, n elements; recv: same dtype, size() * n elements.
  void all_gather(const ConstTensorView& send, const TensorView& recv);
  /// Both hold size() blocks of equal length: block r of send goes to rank r, block r of recv came
  /// from rank r. Any dtype; a multiple of size() elements in each.
  void all_to_all(const ConstTensorView& send, const TensorView& recv);
  /// recv = block rank() of the sum of all sends. send: f32, size() * n elements; recv: f32, n.
  void reduce_scatter(const ConstTensorView& send, const TensorView& recv);
  /// recv = the sum of all sends. Both f32 with n elements.
  void all_reduce(const ConstTensorView& send, const TensorView& recv);
  /// buffer becomes that of rank `root`. Any dtype.
  void broadcast(const TensorView& buffer, int root);

  /// Gives up: ranks that wait for this one, and every later call in the group, throw
  /// CommunicatorAborted. What a rank must do if it fails between two collectives. Any thread may
  /// call it, more than once.
  virtual void abort() noexcept = 0;

 protected:
  /// Carries out a call whose own views are valid.
  virtual void run(const CollectiveCall& call) = 0;

 private:
  void check_and_run(Collective kind, const ConstTensorView& send, const TensorView& recv);
};

/// A group of `size` ranks inside this process, for one thread each; element r is rank r. A call
/// in which dtype, size or kind differ between the ranks throws InvalidArgument in all of them and
/// leaves the group usable. Destroying a communicator aborts the group, as far as it still waits.
/// @throws InvalidArgument unless size >= 1.
std::vector<std::unique_ptr<Communicator>> make_in_process_group(int size);

/// Runs `body` once for each rank of a new group, each on a thread of its own, and returns when all
/// are done. A rank that throws, or returns while others wait for it, aborts the group. What is
/// then thrown here is the exception of the lowest rank that failed by itself; if there is none,
/// CommunicatorAborted.
/// @throws InvalidArgument unless size >= 1; DeviceError if a thread cannot be started.
void run_in_process(int size, FunctionRef<void(Communicator&)> body);

}  // namespace attend
