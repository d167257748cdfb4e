// SPDX-License-Identifier: Apache-2.0
#include "conformance/attention_data.h"

#include <cmath>
#include <string>

#include "attend/core/error.h"
#include "attend/core/float_types.h"
#include "conformance/rng.h"

namespace attend::conformance {
namespace {

constexpr double kOutlierChance = 0.001;
constexpr double kOutlierDeviation = 10.0;
constexpr int kLargePairs = 4;  // of channels (c, c + head_size / 2), as RoPE pairs them
constexpr double kChannelMean = 12.0;
constexpr double kQueryDeviation = 1.5;
constexpr double kValueSpread = 0.4;  // of the logarithm of a token's size
constexpr double kRopeBase = 1e4;
constexpr double kSinkMass = 0.6;         // share of the softmax that the first key aims at
constexpr double kSinkAlignment = 0.5;    // product of a query with the sink's direction
constexpr double kSinkValueScale = 0.05;  // a sink's value is small

class Generator {
 public:
  Generator(const DataShape& shape, std::uint64_t seed) : shape_(shape), seed_(seed) {
    data_.shape = shape;
    data_.q = normal("q", shape.queries);
    data_.k = normal("k", shape.keys);
    data_.v = normal("v", shape.keys);
  }

  AttentionData make(DataKind kind) {
    switch (kind) {
      case DataKind::iid:
        break;
      case DataKind::outliers:
        add_outliers();
        break;
      case DataKind::channels:
        add_channels();
        break;
      case DataKind::rotated_channels:
        add_channels();
        rotate(data_.q, shape_.keys - shape_.queries);
        rotate(data_.k, 0);
        break;
      case DataKind::sink:
        add_sink();
        break;
    }
    for (auto* values : {&data_.q, &data_.k, &data_.v}) {
      for (double& x : *values) x = to_f32(to_bf16(static_cast<float>(x)));
    }
    return std::move(data_);
  }

 private:
  /// A stream of its own for each purpose: what one kind draws more moves nothing else.
  Rng stream(std::string_view name) const { return Rng(seed_, name, 0); }

  std::vector<double> normal(std::string_view name, int rows) const {
    Rng rng = stream(name);
    std::vector<double> values(static_cast<std::size_t>(rows) *
                               static_cast<std::size_t>(shape_.head_size));
    for (double& x : values) x = rng.normal();
    return values;
  }

  void add_outliers() {
    Rng rng = stream("outliers");
    for (auto* values : {&data_.q, &data_.k, &data_.v}) {
      for (double& x : *values) {
        if (rng.chance(kOutlierChance)) x += kOutlierDeviation * rng.normal();
      }
    }
  }

  void add_channels() {
    const auto size = static_cast<std::size_t>(shape_.head_size);
    std::vector<double> mean(size);
    Rng rng = stream("channels");
    for (int found = 0; found < kLargePairs;) {
      const auto c = static_cast<std::size_t>(rng.range(0, shape_.head_size / 2 - 1));
      if (mean[c] != 0.0) continue;
      for (const std::size_t channel : {c, c + size / 2}) {
        const double magnitude = kChannelMean * (0.7 + 0.6 * rng.uniform());
        mean[channel] = rng.chance(0.5) ? -magnitude : magnitude;
      }
      ++found;
    }
    for (std::size_t i = 0; i < data_.k.size(); ++i) data_.k[i] += mean[i % size];
    for (double& x : data_.q) x *= kQueryDeviation;
    Rng sizes = stream("token sizes");
    for (std::size_t t = 0; t < data_.v.size(); t += size) {
      const double token = std::exp(kValueSpread * sizes.normal());
      for (std::size_t d = 0; d < size; ++d) data_.v[t + d] *= token;
    }
  }

  /// Turns channel c and c + head_size / 2 of every row by position * base^(-2c / head_size).
  void rotate(std::vector<double>& rows, int first_position) const {
    const auto size = static_cast<std::size_t>(shape_.head_size);
    for (std::size_t row = 0; row < rows.size() / size; ++row) {
      const double position = first_position + static_cast<double>(row);
      for (std::size_t c = 0; c < size / 2; ++c) {
        const double exponent = -2.0 * static_cast<double>(c) / static_cast<double>(size);
        const double angle = position * std::pow(kRopeBase, exponent);
        double& a = rows[row * size + c];
        double& b = rows[row * size + size / 2 + c];
        const double turned = a * std::cos(angle) - b * std::sin(angle);
        b = a * std::sin(angle) + b * std::cos(angle);
        a = turned;
      }
    }
  }

  /// Gives the first key the logit L0 with which it takes kSinkMass of the softmax, if the other
  /// logits are N(0, 1): their weights sum to keys * e^(1 / 2) in the mean.
  void add_sink() {
    const auto size = static_cast<std::size_t>(shape_.head_size);
    const auto channel = static_cast<std::size_t>(stream("sink").range(0, shape_.head_size - 1));
    const double logit =
        0.5 + std::log(static_cast<double>(shape_.keys)) + std::log(kSinkMass / (1 - kSinkMass));
    data_.k[channel] += logit * std::sqrt(static_cast<double>(size)) / kSinkAlignment;
    for (std::size_t i = channel; i < data_.q.size(); i += size) data_.q[i] += kSinkAlignment;
    for (std::size_t d = 0; d < size; ++d) data_.v[d] *= kSinkValueScale;
  }

  DataShape shape_;
  std::uint64_t seed_;
  AttentionData data_;
};

}  // namespace

std::string_view to_string(DataKind kind) noexcept {
  switch (kind) {
    case DataKind::iid:
      return "G0 iid";
    case DataKind::outliers:
      return "G1 outliers";
    case DataKind::channels:
      return "G2 channels";
    case DataKind::rotated_channels:
      return "G3 rotated";
    case DataKind::sink:
      break;
  }
  return "G4 sink";
}

AttentionData make_attention_data(DataKind kind, const DataShape& shape, std::uint64_t seed) {
  const auto require = [](std::string_view name, bool valid, std::string_view expected, int got) {
    if (!valid) throw InvalidArgument("attention_data", name, expected, std::to_string(got));
  };
  require("queries", shape.queries >= 1, ">= 1", shape.queries);
  require("keys", shape.keys >= 2, ">= 2", shape.keys);
  require("head_size", shape.head_size >= 8 && shape.head_size <= 256 && shape.head_size % 8 == 0,
          "a multiple of 8 from 8 to 256", shape.head_size);
  return Generator(shape, seed).make(kind);
}

}  // namespace attend::conformance
