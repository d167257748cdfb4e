// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/cache.h"

#include "arguments.h"

namespace attend::python {
namespace {

constexpr const char* kMoves = "int64 [n, 2] or a list of pairs";

std::vector<BlockMove> moves_of_tensor(const Arguments& call, const ConstTensorView& t) {
  if (t.dtype != DType::i64 || t.rank != 2 || t.shape[1] != 2)
    call.refuse("moves", kMoves, describe(t));
  std::vector<BlockMove> moves;
  const auto* numbers = t.as<std::int64_t>();
  for (std::int64_t i = 0; i < t.shape[0]; ++i) {
    const std::int64_t* pair = numbers + i * t.strides[0];
    moves.push_back({pair[0], pair[t.strides[1]]});
  }
  return moves;
}

/// An int, or what acts as one (numpy's integers).
std::int64_t block_index(const Arguments& call, nb::handle value) {
  if (PyBool_Check(value.ptr()) || !PyIndex_Check(value.ptr()))
    call.refuse_type("moves", kMoves, value);
  const auto number = nb::steal(PyNumber_Index(value.ptr()));
  std::int64_t index = 0;
  if (!number.is_valid() || !nb::try_cast(number, index)) {
    PyErr_Clear();
    call.refuse_type("moves", kMoves, value);
  }
  return index;
}

std::vector<BlockMove> read_moves(Arguments& call) {
  const nb::handle value = call.object("moves");
  if (!value.is_valid()) call.refuse("moves", kMoves, "None");
  if (framework_of(value) != Framework::none) return moves_of_tensor(call, call.in("moves"));
  if (!PyList_Check(value.ptr()) && !PyTuple_Check(value.ptr()))
    call.refuse_type("moves", kMoves, value);
  std::vector<BlockMove> moves;
  for (const nb::handle pair : value) {
    if ((!PyList_Check(pair.ptr()) && !PyTuple_Check(pair.ptr())) || nb::len(pair) != 2)
      call.refuse_type("moves", kMoves, pair);
    moves.push_back({block_index(call, pair[0]), block_index(call, pair[1])});
  }
  return moves;
}

}  // namespace

void bind_cache(nb::module_& m) {
  m.def("reshape_and_cache_flash", [](const nb::kwargs& values) {
    Arguments call("reshape_and_cache_flash", values);
    ReshapeAndCacheFlashArgs a;
    a.key = call.in("key");
    a.value = call.in("value");
    a.key_cache = call.out("key_cache");
    a.value_cache = call.out("value_cache");
    a.slot_mapping = call.in("slot_mapping");
    a.k_scale = call.in("k_scale");
    a.v_scale = call.in("v_scale");
    call.run([&](Executor& e) { reshape_and_cache_flash(a, &e); });
  });
  m.def("swap_blocks", [](const nb::kwargs& values) {
    Arguments call("swap_blocks", values);
    const ConstTensorView src = call.in("src");
    const TensorView dst = call.out("dst");
    const int block_dim = call.small_integer("block_dim", 0);
    const std::vector<BlockMove> moves = read_moves(call);
    call.run_here([&] { swap_blocks(src, dst, block_dim, moves); });
  });
  m.def("copy_blocks", [](const nb::kwargs& values) {
    Arguments call("copy_blocks", values);
    const std::vector<TensorView> caches = call.out_list("caches");
    const int block_dim = call.small_integer("block_dim", 0);
    const std::vector<BlockMove> moves = read_moves(call);
    call.run_here([&] { copy_blocks(caches, block_dim, moves); });
  });
}

}  // namespace attend::python
