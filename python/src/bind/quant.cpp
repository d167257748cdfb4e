// SPDX-License-Identifier: Apache-2.0
#include "attend/ops/quant.h"

#include <nanobind/stl/string.h>

#include <algorithm>
#include <span>

#include "arguments.h"
#include "attend/cache/fp8_ds_mla.h"
#include "attend/ops/int8_cache.h"
#include "attend/oracle/quantize.h"

namespace attend::python {
namespace {

/// Arrays as the Python side of the oracle makes them: numpy, contiguous, of one dimension.
template <typename T>
using Numbers = nb::ndarray<const T, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
std::span<const T> span_of(const Numbers<T>& array) {
  return {array.data(), array.size()};
}

/// A numpy array of one dimension that owns the elements.
template <typename T>
nb::object new_array(std::vector<T> values) {
  auto* owned = new std::vector<T>(std::move(values));
  const nb::capsule owner(owned, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nb::cast(nb::ndarray<nb::numpy, T, nb::ndim<1>>(owned->data(), {owned->size()}, owner));
}

Int8QuantMode read_mode(Arguments& call) {
  const std::string mode = call.text("mode").value_or("per_token_head");
  if (mode == "per_token_head") return Int8QuantMode::per_token_head;
  if (mode == "per_channel") return Int8QuantMode::per_channel;
  call.refuse("mode", "per_token_head or per_channel", mode);
}

DType fp8_format(const std::string& name) {
  const std::optional<DType> format = parse_dtype(name);
  if (!format || !is_fp8(*format))
    throw InvalidArgument("oracle.fp8", "dtype", "fp8_e4m3 or fp8_e5m2", name);
  return *format;
}

void bind_oracle_codes(nb::module_& m) {
  m.def("oracle_fp8_value", [](const std::string& format, const Numbers<std::uint8_t>& codes) {
    const DType dtype = fp8_format(format);
    std::vector<double> values;
    for (const std::uint8_t code : span_of(codes)) values.push_back(oracle::fp8_value(dtype, code));
    return new_array(std::move(values));
  });
  m.def("oracle_fp8_code",
        [](const std::string& format, const Numbers<double>& x, const Numbers<float>& scale) {
          const DType dtype = fp8_format(format);
          std::vector<std::uint8_t> codes(x.size());
          for (std::size_t i = 0; i < std::min(x.size(), scale.size()); ++i)
            codes[i] = oracle::fp8_code(dtype, x.data()[i], scale.data()[i]);
          return new_array(std::move(codes));
        });
  m.def("oracle_int8_scale", [](const Numbers<double>& rows, std::size_t width) {
    std::vector<float> scales;
    for (std::size_t i = 0; width > 0 && i + width <= rows.size(); i += width)
      scales.push_back(oracle::int8_scale(span_of(rows).subspan(i, width)));
    return new_array(std::move(scales));
  });
  m.def("oracle_int8_code", [](const Numbers<double>& x, const Numbers<float>& scale) {
    std::vector<std::int8_t> codes(x.size());
    for (std::size_t i = 0; i < std::min(x.size(), scale.size()); ++i)
      codes[i] = oracle::int8_code(x.data()[i], scale.data()[i]);
    return new_array(std::move(codes));
  });
}

void bind_oracle_rows(nb::module_& m) {
  // [n, 512] and [n, 64] to [n, 656] and back.
  m.def("oracle_fp8_ds_mla_encode",
        [](const Numbers<double>& latent, const Numbers<std::uint16_t>& rope) {
          using namespace fp8_ds_mla;
          const std::size_t n = std::min(latent.size() / kLatent, rope.size() / kRope);
          std::vector<std::uint8_t> rows(n * kRowBytes);
          for (std::size_t i = 0; i < n; ++i)
            oracle::fp8_ds_mla_encode(span_of(latent).subspan(i * kLatent, kLatent),
                                      span_of(rope).subspan(i * kRope, kRope),
                                      std::span(rows).subspan(i * kRowBytes, kRowBytes));
          return new_array(std::move(rows));
        });
  m.def("oracle_fp8_ds_mla_decode", [](const Numbers<std::uint8_t>& rows) {
    using namespace fp8_ds_mla;
    const std::size_t n = rows.size() / kRowBytes;
    std::vector<double> elements(n * kDim);
    for (std::size_t i = 0; i < n; ++i)
      oracle::fp8_ds_mla_decode(span_of(rows).subspan(i * kRowBytes, kRowBytes),
                                std::span(elements).subspan(i * kDim, kDim));
    return new_array(std::move(elements));
  });
}

}  // namespace

void bind_quant(nb::module_& m) {
  m.def("scaled_int8_quant_for_attn", [](const nb::kwargs& values) {
    Arguments call("scaled_int8_quant_for_attn", values);
    ScaledInt8QuantArgs a;
    a.input = call.in("input");
    a.output = call.out("output");
    a.mode = read_mode(call);
    a.scale = call.out("scale");
    a.transpose_scale = call.boolean("transpose_scale", false);
    a.static_scale = call.in("static_scale");
    a.mean = call.in("mean");
    call.run([&](Executor& e) { scaled_int8_quant_for_attn(a, &e); });
  });
  m.def("channel_mean", [](const nb::kwargs& values) {
    Arguments call("channel_mean", values);
    ChannelMeanArgs a;
    a.input = call.in("input");
    a.start_loc = call.in("start_loc");
    a.mean = call.out("mean");
    call.run([&](Executor& e) { channel_mean(a, &e); });
  });
  bind_oracle_codes(m);
  bind_oracle_rows(m);
}

}  // namespace attend::python
