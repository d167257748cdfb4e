// SPDX-License-Identifier: Apache-2.0
#include "batch.h"

#include <fmt/format.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>

#include "attend/batch/fast_prefill.h"
#include "attend/batch/local_attention.h"
#include "attend/batch/slot_mapping.h"
#include "attend/batch/split.h"

namespace attend::python {
namespace {

constexpr const char* kBatch = "an attend.batch.CommonMetadata";

/// A read-only numpy array over a vector that `owner` has.
template <typename T>
nb::object array_over(const std::vector<T>& values, nb::handle owner) {
  static constexpr T kNothing{};
  const T* data = values.empty() ? &kNothing : values.data();
  return nb::cast(nb::ndarray<nb::numpy, const T, nb::ndim<1>>(data, {values.size()}, owner));
}

/// An array that owns its numbers, of `shape` if there is one; writable.
template <typename T>
nb::object owned_array(std::vector<T> values, std::vector<std::size_t> shape = {}) {
  if (shape.empty()) shape = {values.size()};
  auto* owned = new std::vector<T>(std::move(values));
  owned->reserve(1);  // numpy wants an address
  const nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T>(owned->data(), shape.size(), shape.data(), owner));
}

/// numpy's array as a tensor of the framework of `like`, if that is torch.
nb::object as_framework_of(nb::handle like, nb::object array) {
  if (framework_of(like) != Framework::torch) return array;
  return nb::module_::import_("torch").attr("from_numpy")(array);
}

std::vector<std::uint8_t> read_flags(Arguments& call, const char* name) {
  const nb::handle value = call.object(name);
  std::vector<std::uint8_t> flags;
  if (value.is_valid() && (PyList_Check(value.ptr()) || PyTuple_Check(value.ptr()))) {
    for (const nb::handle item : value) {
      if (!PyBool_Check(item.ptr())) call.refuse_type(name, "True or False", item);
      flags.push_back(item.ptr() == Py_True ? 1 : 0);
    }
    return flags;
  }
  for (const std::int64_t x : read_i64(call, name)) flags.push_back(x != 0 ? 1 : 0);
  return flags;
}

/// Longest of the first `count` differences or values, for bounds that the caller left out.
int longest_query(const CommonMetadata& m) {
  const std::size_t count = std::min<std::size_t>(
      static_cast<std::size_t>(std::max(m.num_reqs, 0)) + 1, m.query_start_loc.size());
  std::int64_t most = 0;
  for (std::size_t r = 1; r < count; ++r)
    most = std::max(most, std::int64_t{m.query_start_loc[r]} - m.query_start_loc[r - 1]);
  return static_cast<int>(std::min<std::int64_t>(most, INT32_MAX));
}

int longest_request(const CommonMetadata& m) {
  const std::size_t count =
      std::min<std::size_t>(static_cast<std::size_t>(std::max(m.num_reqs, 0)), m.seq_lens.size());
  int most = 0;
  for (std::size_t r = 0; r < count; ++r) most = std::max(most, m.seq_lens[r]);
  return most;
}

/// Counts and bounds; those left out follow from the lengths.
void read_sizes(Arguments& call, CommonMetadata& m) {
  m.num_reqs = call.small_integer("num_reqs", static_cast<int>(m.seq_lens.size()));
  const auto reqs = static_cast<std::size_t>(std::max(m.num_reqs, 0));
  m.num_tokens = call.small_integer("num_tokens",
                                    reqs < m.query_start_loc.size() ? m.query_start_loc[reqs] : 0);
  m.max_query_len = call.small_integer("max_query_len", longest_query(m));
  m.max_seq_len = call.small_integer("max_seq_len", longest_request(m));
}

void construct(Batch* self, const nb::kwargs& values) {
  Arguments call("CommonMetadata", values);
  Batch b;
  CommonMetadata& m = b.common;
  m.query_start_loc = read_i32(call, "query_start_loc");
  m.seq_lens = read_i32(call, "seq_lens");
  read_sizes(call, m);
  const nb::handle table = call.object("block_table");
  b.block_table = table.is_valid() ? nb::borrow(table) : nb::none();
  if (table.is_valid())
    m.block_table =
        view_of(table, framework_of(table), {call.function(), "block_table"}, false, b.imports);
  m.slot_mapping = read_i64(call, "slot_mapping");
  m.causal = call.boolean("causal", true);
  m.request_causal = read_flags(call, "request_causal");
  m.is_prefilling = read_flags(call, "is_prefilling");
  m.positions = read_i64(call, "positions");
  m.encoder_seq_lens = read_i32(call, "encoder_seq_lens");
  m.encoder_slot_mapping = read_i64(call, "encoder_slot_mapping");
  m.dcp_local_seq_lens = read_i32(call, "dcp_local_seq_lens");
  m.logits_indices = read_i32(call, "logits_indices");
  call.done();
  m.validate();
  new (self) Batch(std::move(b));
}

/// A batch with the block table of another one, which it keeps alive.
Batch with_table_of(const Batch& other, CommonMetadata common) {
  Batch b;
  b.common = std::move(common);
  b.block_table = b.common.block_table.defined() ? nb::object(other.block_table) : nb::none();
  b.imports = other.imports;
  return b;
}

template <typename T>
void field(nb::class_<Batch>& type, const char* name, std::vector<T> CommonMetadata::* member) {
  type.def_prop_ro(name, [member](nb::handle self) {
    return array_over(nb::cast<const Batch&>(self).common.*member, self);
  });
}

void bind_fields(nb::class_<Batch>& type) {
  field(type, "query_start_loc", &CommonMetadata::query_start_loc);
  field(type, "seq_lens", &CommonMetadata::seq_lens);
  field(type, "slot_mapping", &CommonMetadata::slot_mapping);
  field(type, "request_causal", &CommonMetadata::request_causal);
  field(type, "is_prefilling", &CommonMetadata::is_prefilling);
  field(type, "positions", &CommonMetadata::positions);
  field(type, "encoder_seq_lens", &CommonMetadata::encoder_seq_lens);
  field(type, "encoder_slot_mapping", &CommonMetadata::encoder_slot_mapping);
  field(type, "dcp_local_seq_lens", &CommonMetadata::dcp_local_seq_lens);
  field(type, "logits_indices", &CommonMetadata::logits_indices);
  type.def_ro("block_table", &Batch::block_table);
  type.def_prop_ro("num_reqs", [](const Batch& b) { return b.common.num_reqs; });
  type.def_prop_ro("num_tokens", [](const Batch& b) { return b.common.num_tokens; });
  type.def_prop_ro("max_query_len", [](const Batch& b) { return b.common.max_query_len; });
  type.def_prop_ro("max_seq_len", [](const Batch& b) { return b.common.max_seq_len; });
  type.def_prop_ro("causal", [](const Batch& b) { return b.common.causal; });
}

void bind_methods(nb::class_<Batch>& type) {
  type.def("validate", [](const Batch& b, const nb::kwargs& values) {
    Arguments call("CommonMetadata.validate", values);
    const int block_size = call.small_integer("block_size", 0);
    call.done();
    b.common.validate(block_size);
  });
  type.def("key_start_loc", [](const Batch& b) { return owned_array(b.common.key_start_loc()); });
  type.def("unpadded", [](const Batch& b, const nb::kwargs& values) {
    Arguments call("CommonMetadata.unpadded", values);
    const int tokens = call.small_integer("tokens", b.common.num_tokens);
    const int reqs = call.small_integer("reqs", b.common.num_reqs);
    call.done();
    return with_table_of(b, b.common.unpadded(tokens, reqs));
  });
}

nb::object slot_mapping(const nb::kwargs& values) {
  Arguments call("make_slot_mapping", values);
  const auto& b = object_of<Batch>(call, "metadata", kBatch);
  const int block_size = call.small_integer("block_size", 0);
  SlotMappingOptions options;
  options.sliding_window = call.optional_integer("sliding_window");
  options.padded_tokens = call.small_integer("padded_tokens", 0);
  call.done();
  return as_framework_of(b.block_table,
                         owned_array(make_slot_mapping(b.common, block_size, options)));
}

nb::tuple split(const nb::kwargs& values) {
  Arguments call("split_decodes_and_prefills", values);
  const auto& b = object_of<Batch>(call, "metadata", kBatch);
  SplitOptions o;
  o.decode_threshold = call.small_integer("decode_threshold", o.decode_threshold);
  o.require_uniform = call.boolean("require_uniform", o.require_uniform);
  o.treat_short_extends_as_decodes =
      call.boolean("treat_short_extends_as_decodes", o.treat_short_extends_as_decodes);
  o.fresh_prompts_are_prefills =
      call.boolean("fresh_prompts_are_prefills", o.fresh_prompts_are_prefills);
  call.done();
  const DecodePrefillSplit s = split_decodes_and_prefills(b.common, o);
  return nb::make_tuple(s.num_decodes, s.num_prefills, s.num_decode_tokens, s.num_prefill_tokens);
}

std::vector<std::pair<int, int>> swaps(const nb::kwargs& values) {
  Arguments call("reorder_swaps", values);
  const std::vector<std::int32_t> scheduled = read_i32(call, "num_scheduled_tokens"),
                                  computed = read_i32(call, "num_computed_tokens"),
                                  prompt = read_i32(call, "num_prompt_tokens");
  const int threshold = call.small_integer("decode_threshold", 1);
  call.done();
  const std::size_t count = scheduled.size();
  const auto check = [&](const char* name, const std::vector<std::int32_t>& lengths) {
    if (lengths.size() != count)
      call.refuse(name, fmt::format("{} entries, as num_scheduled_tokens has", count),
                  fmt::format("{}", lengths.size()));
  };
  check("num_computed_tokens", computed);
  check("num_prompt_tokens", prompt);
  std::vector<ReorderRequest> requests(count);
  for (std::size_t r = 0; r < count; ++r) requests[r] = {scheduled[r], computed[r], prompt[r]};
  return reorder_swaps(requests, threshold);
}

Batch fast_prefill(const nb::kwargs& values) {
  Arguments call("make_kv_sharing_fast_prefill_metadata", values);
  const auto& b = object_of<Batch>(call, "metadata", kBatch);
  call.done();
  return with_table_of(b, make_kv_sharing_fast_prefill_metadata(b.common));
}

/// (batch, request of each virtual one)
nb::tuple local_attention(const nb::kwargs& values) {
  Arguments call("make_local_attention_virtual_batches", values);
  const auto& b = object_of<Batch>(call, "metadata", kBatch);
  const int chunk_size = call.small_integer("chunk_size", 0);
  const int block_size = call.small_integer("block_size", 0);
  call.done();
  LocalAttentionBatch local =
      make_local_attention_virtual_batches(chunk_size, block_size, b.common);
  Batch result;
  result.common = std::move(local.common);
  const ConstTensorView& table = result.common.block_table;
  const std::vector<std::size_t> shape = {static_cast<std::size_t>(table.shape[0]),
                                          static_cast<std::size_t>(table.shape[1])};
  // Moving the vector keeps its memory, so the view of the table stays right.
  result.block_table =
      as_framework_of(b.block_table, owned_array(std::move(local.block_table), shape));
  return nb::make_tuple(nb::cast(std::move(result)), owned_array(std::move(local.request_of)));
}

}  // namespace

void bind_batch(nb::module_& m) {
  nb::class_<Batch> type(m, "CommonMetadata");
  type.def("__init__", construct);
  bind_fields(type);
  bind_methods(type);
  m.def("make_slot_mapping", slot_mapping);
  m.def("split_decodes_and_prefills", split);
  m.def("reorder_swaps", swaps);
  m.def("make_kv_sharing_fast_prefill_metadata", fast_prefill);
  m.def("make_local_attention_virtual_batches", local_attention);
}

}  // namespace attend::python
