// SPDX-License-Identifier: Apache-2.0
#include "conformance/flash_mla_problem.h"

#include <fmt/format.h>

#include <cmath>
#include <limits>

#include "attend/cache/fp8_ds_mla.h"
#include "attend/cache/fp8_ds_v4.h"

namespace attend::conformance {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

/// Keys as one token of sparse_mla_attention has them.
void point_to(SparseMlaArgs& a, const NamedKeys& keys, int req, int token) {
  a.kv_cache = keys.cache_view();
  a.indices = keys.indices.view().select(0, req).slice(0, token, 1);
  if (keys.lengths.view().defined()) a.topk_length = keys.lengths.view().slice(0, req, 1);
}

}  // namespace

NamedKeys::NamedKeys(Rng& rng, const RowFormat* format_of_rows, DType dtype, int elements,
                     int rows_of_block)
    : format(format_of_rows),
      dim(elements),
      block_size(rows_of_block),
      num_blocks(rng.range(1, 500 / rows_of_block + 1)) {
  Layout layout;
  layout.padded = rng.chance(0.4);
  cache = format != nullptr ? coded_storage(rng, *format, num_blocks, block_size, layout)
                            : Storage(rng, dtype, {num_blocks, block_size, dim}, layout);
  written_.assign(static_cast<std::size_t>(num_blocks) * static_cast<std::size_t>(block_size),
                  false);
}

TensorView NamedKeys::cache_view() const {
  return format != nullptr ? coded_view(cache, *format, block_size) : cache.view();
}

void NamedKeys::fill(Rng& rng, std::int64_t slot) {
  if (written_[static_cast<std::size_t>(slot)]) return;
  written_[static_cast<std::size_t>(slot)] = true;
  const std::int64_t block = slot / block_size, offset = slot % block_size;
  if (format != nullptr) {
    set_random_coded_row(rng, cache_view(), *format, block, offset);
  } else {
    cache.set_random(rng, cache.offset({block, offset, 0}), dim, 1.0);
  }
}

void NamedKeys::name(Rng& rng, int reqs, int tokens, int topk, bool with_lengths) {
  Layout layout;
  layout.padded = rng.chance(0.4);
  indices = Storage(rng, DType::i32, {reqs, tokens, topk}, layout);
  if (with_lengths) lengths = Storage(rng, DType::i32, {reqs}, layout);
  const double hole = rng.pick({0.0, 0.1, 0.9, 1.0});
  const auto capacity = static_cast<std::int32_t>(written_.size());
  constexpr std::int32_t kLowest = std::numeric_limits<std::int32_t>::min(),
                         kHighest = std::numeric_limits<std::int32_t>::max();
  for (int r = 0; r < reqs; ++r) {
    std::int32_t length = topk;
    if (with_lengths) {
      length = rng.pick({kLowest, -1, 0, topk / 2, topk - 1, topk, topk + 1, kHighest});
      lengths.view().as<std::int32_t>()[lengths.offset({r})] = length;
    }
    for (int t = 0; t < tokens; ++t) {
      for (int i = 0; i < topk; ++i) {
        auto slot = static_cast<std::int32_t>(rng.range(0, capacity - 1));
        if (rng.chance(hole)) slot = rng.pick({-1, -64, kLowest, kHighest, capacity});
        indices.view().as<std::int32_t>()[indices.offset({r, t, i})] = slot;
        if (i < length && slot >= 0 && slot < capacity) fill(rng, slot);
      }
    }
  }
}

FlashMlaProblem::FlashMlaProblem(Rng& rng, bool with_requests) : batched(with_requests) {
  dtype = rng.pick({DType::f32, DType::f16, DType::bf16});
  if (batched && rng.chance(0.6))
    format = rng.chance(0.5) ? &fp8_ds_mla::kFormat : &fp8_ds_v4::kFormat;
  if (format != nullptr) dtype = DType::bf16;
  dim = format != nullptr ? row_dim(*format) : rng.pick({576, 512, 72});
  latent = format != nullptr ? format->value_dim : rng.pick({64, dim == 72 ? 64 : 512});
  heads = rng.pick({1, 5, 16, 17, 64, 128});
  const int topk = rng.pick({1, 31, 256, 257, 600});
  const int most = std::max(1, 30'000 / (topk * heads));
  reqs = batched ? rng.range(1, 3) : rng.range(0, 4);
  tokens = batched ? rng.range(1, 3) : 1;
  while (reqs * tokens > most && reqs > 1) --reqs;
  while (reqs * tokens > most && tokens > 1) --tokens;
  while (topk * heads > 60'000) heads /= 2;
  scale = static_cast<float>(0.02 + 0.2 * rng.uniform());
  keys = NamedKeys(rng, format, dtype, dim, batched ? 64 : 1);
  keys.name(rng, reqs, tokens, topk, rng.chance(0.5));
  if (batched && rng.chance(0.6)) {
    extra.emplace(rng, format, dtype, dim, rng.pick({1, 16, 64}));
    extra->name(rng, reqs, tokens, rng.pick({1, 64, 300}), rng.chance(0.5));
  }
  Layout rows;
  rows.padded = rng.chance(0.4);
  q = Storage(rng, dtype, {reqs, tokens, heads, dim}, rows);
  q.set_random(rng, rng.pick({0.3, 1.0, 4.0}));
  if (rng.chance(0.5)) {
    sink = Storage(rng, DType::f32, {heads}, rows);
    sink.set_random(rng, 2.0);
    if (rng.chance(0.3)) sink.set(0, rng.pick({kInfinity, -kInfinity}));
  }
  out = Storage(rng, dtype, {reqs, tokens, heads, latent}, rows);
  lse = batched ? Storage(rng, DType::f32, {reqs, heads, tokens}, rows)
                : Storage(rng, DType::f32, {reqs, heads}, rows);
  max_logits = Storage(rng, DType::f32, {reqs, heads}, rows);
  for (Storage* s : {&out, &lse, &max_logits}) s->freeze();
  expect();
}

oracle::SparseMlaResult FlashMlaProblem::token(int req, int token) const {
  SparseMlaArgs a, more;
  a.q = q.view().select(0, req).slice(0, token, 1);
  a.out = out.view().select(0, req).slice(0, token, 1);
  a.scale = scale;
  a.sinks = sink.view();
  point_to(a, keys, req, token);
  if (extra) point_to(more, *extra, req, token);
  return oracle::sparse_mla_attention(a, extra ? &more : nullptr);
}

void FlashMlaProblem::expect() {
  oracle::SparseMlaResult& to = expected_;
  to.lse.resize(static_cast<std::size_t>(reqs * tokens * heads));
  to.lse_bound.resize(to.lse.size());
  const auto append = [](std::vector<double>& all, const std::vector<double>& some) {
    all.insert(all.end(), some.begin(), some.end());
  };
  for (int r = 0; r < reqs; ++r) {
    for (int t = 0; t < tokens; ++t) {
      oracle::SparseMlaResult x = token(r, t);
      for (int h = 0; h < heads; ++h) {
        // A sink of +infinity takes all.
        const bool sunk = sink.view().defined() && sink.get(sink.offset({h})) == kInfinity;
        for (int d = 0; sunk && d < latent; ++d) {
          const auto at = static_cast<std::size_t>(h * latent + d);
          x.out[at] = x.out_bound[at] = 0.0;
        }
        const auto at = static_cast<std::size_t>((r * heads + h) * tokens + t),
                   from = static_cast<std::size_t>(h);
        to.lse[at] = x.lse[from] == -kInfinity ? kInfinity : x.lse[from];
        to.lse_bound[at] = x.lse_bound[from];
      }
      append(to.out, x.out);
      append(to.out_bound, x.out_bound);
      append(to.max_logits, x.max_logits);
      append(to.max_logits_bound, x.max_logits_bound);
    }
  }
}

void FlashMlaProblem::compare(Outcome& outcome, bool with_max) {
  compare_written(outcome, "out", out, expected_.out, expected_.out_bound);
  compare_written(outcome, "lse", lse, expected_.lse, expected_.lse_bound);
  if (with_max)
    compare_written(outcome, "max_logits", max_logits, expected_.max_logits,
                    expected_.max_logits_bound);
}

std::string FlashMlaProblem::describe() const {
  return fmt::format("{} kv {} requests {} tokens {} heads {} dim {} latent {} topk {}{}{}",
                     to_string(dtype), format != nullptr ? format->name : to_string(dtype), reqs,
                     tokens, heads, dim, latent, keys.indices.view().shape[2],
                     extra ? fmt::format(" + {} of blocks of {}", extra->indices.view().shape[2],
                                         extra->block_size)
                           : "",
                     sink.view().defined() ? " sinks" : "");
}

}  // namespace attend::conformance
