// SPDX-License-Identifier: Apache-2.0
#include "conformance/paged_int8_case.h"

#include "attend/oracle/attention.h"
#include "conformance/int8_problem.h"

namespace attend::conformance {
namespace {

Int8Options decode_options(Rng& rng, bool mixed) {
  Int8Options o = random_int8_options(rng);
  o.values = mixed ? rng.pick({DType::f16, DType::bf16}) : DType::i8;
  return o;
}

/// Rows that the op saves are written into the problem's cache first, for the oracle; then they
/// move to the tensors that the op is given, and rubbish takes their place.
class PagedInt8Case final : public Case {
 public:
  PagedInt8Case(Rng& rng, bool mixed)
      : mixed_(mixed),
        problem_(rng, random_shape(rng, {.keys_cover_queries = true}), decode_options(rng, mixed)),
        saves_(rng.chance(0.7)),
        expected_(oracle::flash_attn_varlen_int8(problem_.args())) {
    if (saves_) move_new_rows(rng);
    for (Storage* s : caches()) s->freeze();
  }

  Outcome run(const KernelOptions& kernels, Executor& executor) override {
    problem_.reset();
    for (Storage* s : caches()) s->reset();
    if (mixed_) {
      paged_attention_mix(args(), &executor, kernels.isa);
    } else {
      paged_attention_int8(args(), &executor, kernels.isa);
    }
    Outcome outcome;
    compare_written(outcome, "out", problem_.out, expected_.out, expected_.out_bound);
    if (problem_.options.lse) {
      compare_written(outcome, "lse", problem_.lse, expected_.lse, expected_.lse_bound);
    }
    if (saves_) expect_saved();
    expect_undamaged(outcome, "key_cache", problem_.k);
    expect_undamaged(outcome, "value_cache", problem_.v);
    expect_undamaged(outcome, "key_scale_cache", problem_.k_scale);
    return outcome;
  }

  std::string describe() const override { return problem_.describe() + (saves_ ? " saves" : ""); }

 private:
  /// One new row, in the tensors that are saved and in the cache.
  struct NewRow {
    std::int64_t token;
    int head;
    std::int64_t block, offset;
  };

  template <typename F>
  void for_each_new_row(const F& f) const {
    const AttentionShape& s = problem_.shape;
    std::int64_t token = 0;
    for (int r = 0; r < s.num_reqs(); ++r) {
      const auto i = static_cast<std::size_t>(r);
      for (int n = 0; n < s.query_lens[i]; ++n, ++token) {
        const std::int64_t position = s.seq_lens[i] - s.query_lens[i] + n;
        for (int h = 0; h < s.kv_heads; ++h)
          f(NewRow{token, h, problem_.blocks.block(r, position),
                   position % problem_.options.block_size});
      }
    }
  }

  void move_new_rows(Rng& rng) {
    const AttentionShape& s = problem_.shape;
    const std::int64_t tokens = s.query_start_loc().back();
    Layout layout;
    layout.padded = problem_.options.padded;
    save_key_ = Storage(rng, DType::i8, {tokens, s.kv_heads, s.head_dim}, layout);
    save_value_ = Storage(rng, problem_.options.values, {tokens, s.kv_heads, s.head_dim_v}, layout);
    save_scale_ = Storage(rng, DType::f32, {tokens, s.kv_heads}, layout);
    const auto move = [&](Storage& from, std::int64_t at, Storage& to, std::int64_t to_at, int n) {
      for (int d = 0; d < n; ++d) {
        to.set(to_at + d, from.get(at + d));
        from.set(at + d, 111.0);
      }
    };
    for_each_new_row([&](const NewRow& row) {
      const auto [token, h, block, offset] = row;
      move(problem_.k, problem_.k.offset({block, h, offset, 0}), save_key_,
           save_key_.offset({token, h, 0}), s.head_dim);
      move(problem_.v, problem_.v.offset({block, h, offset, 0}), save_value_,
           save_value_.offset({token, h, 0}), s.head_dim_v);
      move(problem_.k_scale, problem_.k_scale.offset({block, h, offset}), save_scale_,
           save_scale_.offset({token, h}), 1);
    });
  }

  void expect_saved() {
    for_each_new_row([&](const NewRow& row) {
      const auto [token, h, block, offset] = row;
      for (int d = 0; d < problem_.shape.head_dim; ++d)
        problem_.k.expect_copy(problem_.k.offset({block, h, offset, d}), save_key_,
                               save_key_.offset({token, h, d}));
      for (int d = 0; d < problem_.shape.head_dim_v; ++d)
        problem_.v.expect_copy(problem_.v.offset({block, h, offset, d}), save_value_,
                               save_value_.offset({token, h, d}));
      problem_.k_scale.expect_copy(problem_.k_scale.offset({block, h, offset}), save_scale_,
                                   save_scale_.offset({token, h}));
    });
  }

  PagedAttentionInt8Args args() const {
    const FlashAttnVarlenInt8Args from = problem_.args();
    PagedAttentionInt8Args a;
    a.q = from.q;
    a.q_scale = from.q_scale.permute({1, 0});
    a.key_cache = problem_.k.view();
    a.key_scale_cache = problem_.k_scale.view();
    a.value_cache = problem_.v.view();
    a.v_scale = from.v_scale;
    a.k_mean = from.k_mean;
    a.out = from.out;
    a.lse = from.lse;
    a.query_start_loc = from.query_start_loc;
    a.seq_lens = from.seq_lens;
    a.block_table = from.block_table;
    a.params = from.params;
    if (saves_) {
      a.save_key = save_key_.view();
      a.save_value = save_value_.view();
      a.save_key_scale = save_scale_.view();
    }
    return a;
  }

  std::vector<Storage*> caches() { return {&problem_.k, &problem_.v, &problem_.k_scale}; }

  bool mixed_;
  Int8Problem problem_;
  bool saves_;
  oracle::Result expected_;
  Storage save_key_, save_value_, save_scale_;
};

}  // namespace

std::unique_ptr<Case> make_paged_int8_case(Rng& rng, bool mixed) {
  return std::make_unique<PagedInt8Case>(rng, mixed);
}

}  // namespace attend::conformance
