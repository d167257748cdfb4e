// SPDX-License-Identifier: Apache-2.0
#include "ops/attention_problem.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <thread>
#include <vector>

#include "attend/plan/kernel_choice.h"
#include "core/check.h"
#include "plan/unit_layout.h"

namespace attend::ops {
namespace {

void check_head_size(check::Where where, const ConstTensorView& t, int largest) {
  const std::int64_t d = t.shape[t.rank - 1];
  check::require(
      d > 0 && d % 8 == 0 && d <= largest, where,
      [&] {
        return fmt::format("a head size (last dimension) that is a multiple of 8 in [8, {}]",
                           largest);
      },
      d);
}

void check_out_shape(std::string_view op, const ConstTensorView& q, const KvTensors& kv,
                     const ConstTensorView& out) {
  const check::Where where{op, "out"};
  const std::int64_t head_dim_v = kv.v.shape[kv.v.rank - 1];
  if (q.rank == 3) {
    check::shape(where, out, {q.shape[0], q.shape[1], head_dim_v});
  } else {
    check::shape(where, out, {q.shape[0], q.shape[1], q.shape[2], head_dim_v});
  }
  check::unit_last_stride(where, out);
  check::distinct_elements(where, out);
  check::no_overlap(where, out, "q", q);
  check::no_overlap(where, out, kv.k_name, kv.k);
  check::no_overlap(where, out, kv.v_name, kv.v);
}

void check_out_type(std::string_view op, const KvTensors& kv, const ConstTensorView& out,
                    int q_rank, std::initializer_list<DType> dtypes) {
  const check::Where where{op, "out"};
  if (kv.writes_out) {
    check::tensor(where, out, q_rank, dtypes);
  } else {
    check::require(!out.defined(), where, "undefined: the state is kept instead", "a tensor");
  }
}

void check_sinks(std::string_view op, const ConstTensorView& sinks, std::int64_t num_q_heads) {
  if (!sinks.defined()) return;
  const check::Where where{op, "sinks"};
  check::tensor(where, sinks, 1, {DType::f32});
  check::shape(where, sinks, {num_q_heads});
  for (std::int64_t h = 0; h < num_q_heads; ++h) {
    const float sink = sinks.as<float>()[h * sinks.strides[0]];
    check::require(sink < std::numeric_limits<float>::infinity(), where, "finite or -infinity",
                   [&] { return fmt::format("{} at index {}", sink, h); });
  }
}

}  // namespace

void check_qkv_shapes(std::string_view op, const ConstTensorView& q, const KvTensors& kv,
                      const ConstTensorView& out, int q_rank) {
  const int kv_rank = kv.four_dims ? 4 : 3;
  const bool int8 = q.dtype == DType::i8;
  check_head_size({op, "q"}, q, int8 ? kMaxInt8HeadDim : kMaxHeadDimQk);
  check_head_size({op, kv.v_name}, kv.v, int8 ? kMaxInt8HeadDim : kMaxHeadDimV);
  const std::int64_t heads = q.shape[q_rank - 2];
  const std::int64_t kv_heads = kv.k.shape[kv_rank - 2];
  check::require(kv_heads > 0, {op, kv.k_name}, "at least 1 head", [&] { return describe(kv.k); });
  check::require(
      heads > 0 && heads % kv_heads == 0, {op, "q"},
      [&] { return fmt::format("a number of heads that is a positive multiple of {}", kv_heads); },
      heads);
  check::require(
      kv.k.shape[kv_rank - 1] == q.shape[q_rank - 1], {op, kv.k_name},
      [&] { return fmt::format("the head size of q, {}", q.shape[q_rank - 1]); },
      [&] { return describe(kv.k); });
  if (kv.four_dims) {
    check::shape({op, kv.v_name}, kv.v, {kv.k.shape[0], kv.k.shape[1], kv_heads, -1});
  } else {
    check::shape({op, kv.v_name}, kv.v, {kv.k.shape[0], kv_heads, -1});
  }
  check::unit_last_stride({op, "q"}, q);
  check::unit_last_stride({op, kv.k_name}, kv.k);
  check::unit_last_stride({op, kv.v_name}, kv.v);
  if (kv.writes_out) check_out_shape(op, q, kv, out);
}

void check_qkv(std::string_view op, const ConstTensorView& q, const KvTensors& kv,
               const ConstTensorView& out, int q_rank) {
  const int kv_rank = kv.four_dims ? 4 : 3;
  check::tensor({op, "q"}, q, q_rank, {DType::f32, DType::f16, DType::bf16});
  check::tensor({op, kv.k_name}, kv.k, kv_rank, {q.dtype});
  check::tensor({op, kv.v_name}, kv.v, kv_rank, {q.dtype});
  check_out_type(op, kv, out, q_rank, {q.dtype});
  check_qkv_shapes(op, q, kv, out, q_rank);
}

void check_qkv_fp8(std::string_view op, const ConstTensorView& q, const KvTensors& kv,
                   const ConstTensorView& out, int q_rank) {
  const int kv_rank = kv.four_dims ? 4 : 3;
  check::tensor({op, "q"}, q, q_rank,
                {DType::f32, DType::f16, DType::bf16, DType::fp8_e4m3, DType::fp8_e5m2});
  check::tensor({op, kv.k_name}, kv.k, kv_rank, {DType::fp8_e4m3, DType::fp8_e5m2});
  check::tensor({op, kv.v_name}, kv.v, kv_rank, {kv.k.dtype});
  if (is_fp8(q.dtype)) {
    check_out_type(op, kv, out, q_rank, {DType::f32, DType::f16, DType::bf16});
  } else {
    check_out_type(op, kv, out, q_rank, {q.dtype});
  }
  check_qkv_shapes(op, q, kv, out, q_rank);
}

void check_qkv_int8(std::string_view op, const ConstTensorView& q, const KvTensors& kv,
                    const ConstTensorView& out, int q_rank) {
  const int kv_rank = kv.four_dims ? 4 : 3;
  check::tensor({op, "q"}, q, q_rank, {DType::f32, DType::f16, DType::bf16});
  check::tensor({op, kv.k_name}, kv.k, kv_rank, {DType::i8});
  check::tensor({op, kv.v_name}, kv.v, kv_rank, {DType::i8});
  check_out_type(op, kv, out, q_rank, {q.dtype});
  check_qkv_shapes(op, q, kv, out, q_rank);
}

void check_descale(std::string_view op, std::string_view argument, const ConstTensorView& descale,
                   bool allowed, std::int64_t num_reqs, std::int64_t num_kv_heads) {
  if (!descale.defined()) return;
  const check::Where where{op, argument};
  check::require(allowed, where, "undefined: the tensor that it scales is not fp8", "a tensor");
  check::tensor(where, descale, 2, {DType::f32});
  check::shape(where, descale, {num_reqs, num_kv_heads});
  for (std::int64_t r = 0; r < num_reqs; ++r) {
    for (std::int64_t h = 0; h < num_kv_heads; ++h) {
      const float x = descale.as<float>()[r * descale.strides[0] + h * descale.strides[1]];
      check::require(std::isfinite(x) && x > 0.0F, where, "finite values > 0",
                     [&] { return fmt::format("{} at [{}, {}]", x, r, h); });
    }
  }
}

cpu::Descale kernel_descale(const ConstTensorView& descale) {
  if (!descale.defined()) return {};
  return {descale.as<float>(), descale.strides[0], descale.strides[1]};
}

void check_params(std::string_view op, const AttentionParams& params, std::int64_t num_reqs,
                  std::int64_t num_q_heads) {
  if (params.scale)
    check::require(std::isfinite(*params.scale) && *params.scale > 0.0F, {op, "scale"},
                   "a finite value > 0", *params.scale);
  check::require(std::isfinite(params.softcap) && params.softcap >= 0.0F, {op, "softcap"},
                 "a finite value >= 0 (0 = off)", params.softcap);
  check::require(params.window_left >= -1, {op, "window_left"}, ">= -1", params.window_left);
  check::require(params.window_right >= -1, {op, "window_right"}, ">= -1", params.window_right);
  check_sinks(op, params.sinks, num_q_heads);
  const ConstTensorView& slopes = params.alibi_slopes;
  if (!slopes.defined()) return;
  const check::Where where{op, "alibi_slopes"};
  check::tensor(where, slopes, slopes.rank == 2 ? 2 : 1, {DType::f32});
  if (slopes.rank == 2) {
    check::shape(where, slopes, {num_reqs, num_q_heads});
  } else {
    check::shape(where, slopes, {num_q_heads});
  }
}

void check_block_size(std::string_view op, std::string_view argument,
                      const ConstTensorView& cache) {
  const std::int64_t size = cache.shape[1];
  check::require(size == 1 || size == 4 || size == 8 || (size > 0 && size % 16 == 0),
                 {op, argument}, "a block size of 1, 4, 8 or a multiple of 16", size);
  check::require(cache.shape[1] <= (1 << 30), {op, argument}, "a block size below 2^30", size);
}

namespace {

/// First block that a query of request r can see: those before it may be garbage.
std::int64_t first_visible_block(const AttentionPlan& plan, std::size_t r, int block_size) {
  if (plan.window_left < 0) return 0;
  const std::int64_t query_len = plan.query_start_loc[r + 1] - plan.query_start_loc[r];
  return std::max<std::int64_t>(0, plan.seq_lens[r] - query_len - plan.window_left) / block_size;
}

}  // namespace

void check_block_table(std::string_view op, const ConstTensorView& table, const AttentionPlan& plan,
                       int block_size, std::int64_t num_blocks) {
  const check::Where where{op, "block_table"};
  check::tensor(where, table, 2, {DType::i32});
  check::shape(where, table, {plan.num_reqs(), -1});
  check::unit_last_stride(where, table);
  for (int r = 0; r < plan.num_reqs(); ++r) {
    const auto i = static_cast<std::size_t>(r);
    const std::int64_t keys = plan.seq_lens[i];
    const std::int64_t used = (keys + block_size - 1) / block_size;
    check::require(
        used <= table.shape[1], {op, "seq_lens"},
        [&] {
          return fmt::format("at most {} at index {} ({} blocks of {} in the table's row)",
                             table.shape[1] * block_size, r, table.shape[1], block_size);
        },
        keys);
    if (plan.query_start_loc[i] == plan.query_start_loc[i + 1]) continue;
    const std::int32_t* row = table.as<std::int32_t>() + r * table.strides[0];
    for (std::int64_t b = first_visible_block(plan, i, block_size); b < used; ++b) {
      if (row[b] >= 0 && row[b] < num_blocks) continue;
      check::fail(
          where, [&] { return fmt::format("block ids in [0, {}) at [{}, {}]", num_blocks, r, b); },
          row[b]);
    }
  }
}

void check_shared_blocks(std::string_view op, const ConstTensorView& table,
                         const AttentionPlan& plan, int block_size) {
  const check::Where where{op, "block_table"};
  const auto row = [&](int r) { return table.as<std::int32_t>() + r * table.strides[0]; };
  for (const SharedPrefix& shared : plan.shared_prefixes) {
    check::require(
        shared.num_keys % block_size == 0, {op, "shared_prefixes"},
        [&] { return fmt::format("a multiple of the block size {}", block_size); },
        shared.num_keys);
    // Units read through the first request's table, so it must agree with each of the others
    // wherever that one is read. It may be garbage elsewhere.
    const std::int32_t* first_row = row(shared.request_begin);
    for (int r = shared.request_begin + 1; r < shared.request_end; ++r) {
      const auto i = static_cast<std::size_t>(r);
      if (plan.query_start_loc[i] == plan.query_start_loc[i + 1]) continue;
      std::int64_t b = first_visible_block(plan, i, block_size);
      for (; b < shared.num_keys / block_size; ++b) {
        if (row(r)[b] == first_row[b]) continue;
        check::fail(
            where,
            [&] {
              return fmt::format("{} at [{}, {}], the block of request {}, as planned",
                                 first_row[b], r, b, shared.request_begin);
            },
            row(r)[b]);
      }
    }
  }
}

void check_planned_shape(std::string_view op, const AttentionPlan& plan,
                         const PlannedShape& shape) {
  const auto same = [&](const char* argument, std::int64_t planned, std::int64_t got) {
    check::require(
        planned == got, {op, argument}, [&] { return fmt::format("{}, as planned", planned); },
        got);
  };
  same("q", plan.num_tokens(), shape.q.shape[0]);
  same("q", plan.num_q_heads, shape.q.shape[1]);
  same("q", plan.head_dim_qk, shape.q.shape[2]);
  same("k", plan.num_kv_heads, shape.num_kv_heads);
  same("v", plan.head_dim_v, shape.head_dim_v);
  same("branches", plan.branches, shape.branches);
  same("window_left", plan.window_left, shape.params.window_left);
  const bool all_causal = std::ranges::all_of(plan.request_causal, [](auto c) { return c != 0; });
  if (!all_causal) same("window_right", plan.window_right, shape.params.window_right);
}

void check_planned_lengths(std::string_view op, std::string_view argument,
                           const ConstTensorView& lengths,
                           const std::vector<std::int32_t>& planned) {
  if (!lengths.defined()) return;
  const check::Where where{op, argument};
  const auto got = check::i32_array(where, lengths, static_cast<std::int64_t>(planned.size()));
  const auto differ = std::ranges::mismatch(got, planned);
  if (differ.in1 == got.end()) return;
  check::fail(
      where,
      [&] {
        return fmt::format("{} at index {}, as planned", *differ.in2, differ.in1 - got.begin());
      },
      *differ.in1);
}

void check_arithmetic(std::string_view op, const AttentionPlan& plan, DType q, DType k, DType v) {
  kernel_level(plan, kernel_kind(q, k, v), op);
}

void check_resources(std::string_view op, const AttentionPlan& plan, Workspace workspace,
                     const Executor& executor) {
  check::require(
      executor.num_workers() == plan.num_workers, {op, "executor"},
      [&] { return fmt::format("{} workers, as the plan was made for", plan.num_workers); },
      executor.num_workers());
  check::require(
      workspace.size >= plan.workspace_bytes && workspace.data != nullptr, {op, "workspace"},
      [&] { return fmt::format("at least {} bytes", plan.workspace_bytes); },
      [&] {
        return fmt::format("{} bytes{}", workspace.size,
                           workspace.data == nullptr ? " at null" : "");
      });
}

cpu::AttentionProblem base_problem(const AttentionParams& params, const AttentionPlan& plan,
                                   DType dtype) {
  cpu::AttentionProblem p;
  p.q_dtype = p.k_dtype = p.v_dtype = p.out_dtype = dtype;
  p.query_start_loc = plan.query_start_loc.data();
  p.seq_lens = plan.seq_lens.data();
  p.causal = plan.request_causal.data();
  p.window_left = plan.window_left;
  p.window_right = plan.window_right;
  p.group_size = plan.num_q_heads / plan.num_kv_heads;
  p.head_dim_qk = plan.head_dim_qk;
  p.head_dim_v = plan.head_dim_v;
  p.scale = params.scale ? *params.scale : 1.0F / std::sqrt(static_cast<float>(plan.head_dim_qk));
  p.softcap = params.softcap;
  const ConstTensorView& slopes = params.alibi_slopes;
  if (slopes.defined()) {
    p.alibi_slopes = slopes.as<float>();
    p.alibi_stride_request = slopes.rank == 2 ? slopes.strides[0] : 0;
    p.alibi_stride_head = slopes.strides[slopes.rank - 1];
    p.alibi_sqrt = params.alibi_sqrt;
  }
  if (params.sinks.defined()) {
    p.sinks = params.sinks.as<float>();
    p.sink_stride = params.sinks.strides[0];
    p.lse_includes_sink = params.lse_includes_sink;
  }
  return p;
}

namespace {

/// Units or reductions in front of the zeros that a plan may end with.
template <typename T>
std::size_t num_work(const std::vector<T>& all) {
  const auto end =
      std::partition_point(all.begin(), all.end(), [](const T& t) { return is_work(t); });
  return static_cast<std::size_t>(end - all.begin());
}

}  // namespace

void place_rows(cpu::AttentionProblem& p, const ConstTensorView& q, const TensorView& out,
                const TensorView& lse) {
  p.q = q.data;
  p.q_layout = {true, 0, q.strides[0], q.strides[1]};
  if (!out.defined()) return;
  p.out = out.data;
  p.out_dtype = out.dtype;
  p.out_layout = {true, 0, out.strides[0], out.strides[1]};
  if (!lse.defined()) return;
  p.lse = lse.as<float>();
  p.lse_layout = {true, 0, lse.strides[0], lse.strides[1]};
}

void run_plan(const cpu::AttentionProblem& problem, const AttentionPlan& plan, Workspace workspace,
              Executor& executor) {
  const KernelKind kind = kernel_kind(problem.q_dtype, problem.k_dtype, problem.v_dtype);
  IsaLevel isa = kernel_level(plan, kind);
  // Fast kernels do not know of two maps.
  if (problem.maps == 2) isa = arithmetic_level(Arithmetic::exact, isa, kind, {});
  const cpu::RunUnitFn run_unit = cpu::run_unit_of(isa, problem);
  const auto address = (reinterpret_cast<std::uintptr_t>(workspace.data) + 63) / 64 * 64;
  float* base = reinterpret_cast<float*>(address);
  const auto layout =
      plan::scratch_layout(plan.max_unit_rows, plan.head_dim_qk, plan.head_dim_v, plan.branches);
  float* scratch = base + plan::partial_floats(plan);
  const auto worker_workspace = [&](int worker) {
    return cpu::KernelWorkspace{base, scratch + worker * layout.total, layout,
                                plan.partial_runs.data(), cpu::thread_phase_clock()};
  };
  const cpu::ReduceFn reduce = cpu::reduce_of(isa, problem.out_dtype);
  const std::size_t num_units = num_work(plan.units), num_reductions = num_work(plan.reductions);
  // Which worker takes which unit does not change any bit of the result, so they are taken as they
  // come, the largest first.
  std::atomic<std::size_t> next_unit{0}, units_done{0}, next_reduction{0};
  const std::size_t reserve = std::size_t{2} * static_cast<std::size_t>(plan.num_workers);
  const auto work = [&](int worker) {
    cpu::KernelWorkspace ws = worker_workspace(worker);
    const auto take = [&] { return next_unit.fetch_add(1, std::memory_order_relaxed); };
    for (std::size_t i = take(), after = 0; i < num_units; i = after) {
      // A worker that knows its next unit fetches the first keys of it. Towards the end none takes
      // what another one could begin with at once.
      const bool many = i + reserve < num_units;
      if (many) after = take();
      ws.following = many && after < num_units ? &plan.units[after] : nullptr;
      run_unit(problem, plan.units[i], ws);
      ws.fetched = ws.following != nullptr;
      units_done.fetch_add(1, std::memory_order_release);
      if (!many) after = take();
    }
    if (num_reductions == 0) return;
    // The last units are small: waiting for them takes less than starting the workers again.
    while (units_done.load(std::memory_order_acquire) < num_units) std::this_thread::yield();
    for (std::size_t i;
         (i = next_reduction.fetch_add(1, std::memory_order_relaxed)) < num_reductions;)
      reduce(problem, plan.reductions[i], ws);
  };
  if (num_units <= 1) {
    work(0);
  } else {
    executor.run(work);
  }
}

Workspace thread_workspace(std::size_t bytes) {
  thread_local Buffer buffer;
  buffer.reserve(bytes);
  return buffer.workspace();
}

}  // namespace attend::ops
