// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "attend/backend/differential.h"
#include "attend/backend/sparse.h"
#include "attend/batch/common_metadata.h"
#include "attend/cache/kv_cache_spec.h"
#include "attend/core/executor.h"
#include "attend/core/mla_dims.h"
#include "attend/core/tensor_view.h"
#include "attend/core/workspace.h"
#include "attend/plan/aot_plan.h"
#include "attend/plan/arithmetic.h"
#include "attend/plan/cascade.h"

/// The interface that every attention back end implements: capability (data), metadata builder
/// (once per batch), impl (once per layer).
namespace attend {

class Communicator;
class MlaWeights;

enum class AttentionType : std::uint8_t { decoder, encoder, encoder_only, encoder_decoder };
std::string_view to_string(AttentionType t) noexcept;
std::optional<AttentionType> parse_attention_type(std::string_view name) noexcept;

/// What a model and an engine ask of a back end. Text forms of kv_cache_dtype: "auto" (= dtype), a
/// dtype name, or the name of a KvFormat other than plain.
struct AttentionConfig {
  Platform platform;
  int head_size = 0;
  DType dtype = DType::bf16;
  std::string kv_cache_dtype = "auto";
  std::optional<int> block_size;  ///< only if the user fixed it
  AttentionType attn_type = AttentionType::decoder;
  bool use_mla = false;
  bool has_sink = false;
  bool use_sparse = false;
  bool use_differential = false;
  bool use_mm_prefix = false;
  bool use_per_head_quant_scales = false;
  bool use_non_causal = false;
  bool use_alibi_sqrt = false;
  bool batch_invariant = false;
  bool use_kv_connector = false;
  friend bool operator==(const AttentionConfig&, const AttentionConfig&) = default;
};
std::string describe(const AttentionConfig& config);

/// What a back end can do, as data: the CLI prints it, validate_configuration reads it.
struct Capability {
  std::vector<DType> dtypes;                 ///< query/key/value types; empty = any
  std::vector<DType> cpu_only_dtypes;        ///< those of `dtypes` that only the CPU serves
  std::vector<std::string> kv_cache_dtypes;  ///< empty = any
  int head_size_multiple = 1;                ///< head sizes must be a multiple of this
  int max_head_size = 0;                     ///< 0 = no limit
  std::vector<int> head_sizes;               ///< empty = any that fits the two rules above
  std::vector<int> block_sizes;  ///< block size must be a multiple of one of these; empty = any
  std::vector<AttentionType> attn_types = {AttentionType::decoder};
  /// Where it can be chosen automatically; empty = any. Elsewhere only when asked for by name.
  std::vector<DeviceType> devices;
  int min_cuda_capability = 0;  ///< 10 * major + minor, e.g. 80
  bool is_mla = false;
  bool is_sparse = false;
  bool is_differential = false;
  bool supports_sink = false;
  bool supports_mm_prefix = false;
  bool supports_per_head_quant_scales = false;
  bool supports_non_causal = false;
  bool supports_alibi_sqrt = false;
  bool supports_batch_invariance = false;
  bool supports_kv_connector = true;
};

/// Which batches a captured graph may replay.
enum class GraphSupport : std::uint8_t {
  never,
  uniform_single_token_decode,
  uniform_batch,
  always
};

/// What an MLA back end's builder needs besides the cache.
struct MlaBuilderConfig {
  MlaDims dims;
  DType dtype = DType::bf16;  ///< of the layers
  /// Prefill back end by name, or "auto": select_mla_prefill() on `platform`. The layers' impls
  /// must be made with the same one.
  std::string prefill_backend = "auto";
  Platform platform;
  // Keys and values of a context are made of so many tokens at a time: mla_workspace_tokens().
  std::int64_t max_model_len = 0;  ///< tokens of the longest request, >= 1
  int max_num_seqs = 0;            ///< requests of the largest batch, >= 1
  /// In the place of that number; a piece of kPieceSize keys and a block at least. 0 = off.
  std::int64_t workspace_tokens = 0;
  /// Longest query (inclusive) that takes the decode path, if its request has computed tokens and
  /// stands before all that take the other; 0 = kMlaDecodeThreshold, or one token and the
  /// speculative ones if that is more.
  int decode_threshold = 0;
  /// false: tokens of a prompt (CommonMetadata::is_prefilling, then required) take the prefill path
  /// however few there are in a step. A prompt's rows have the same bits then however it is cut.
  bool short_extends_decode = true;
  bool quant_output = false;  ///< layers may be called with outputs in fp8_e4m3
};

/// What a builder is made for: one group of layers with the same cache.
struct BuilderConfig {
  int num_q_heads = 0;
  KvCacheSpec cache;     ///< num_blocks may be 0 for encoders: they have no cache
  int window_left = -1;  ///< as in AttentionParams; encoder_decoder: both -1
  int window_right = -1;
  int num_speculative_tokens = 0;
  int num_workers = 1;  ///< workers of the executor that will run the plans
  AttentionType attn_type = AttentionType::decoder;
  /// Whether requests that share a prefix attend to it once; a back end may do without.
  CascadeMode cascade = CascadeMode::automatic;
  bool use_alibi = false;  ///< the layers have ALiBi slopes; only CascadeMode::vllm asks
  AotLimits capture;       ///< room of what build_for_capture() makes; zeros = it is not called
  int max_num_splits = 0;  ///< most parts along keys of a unit of work, 0 = as many as help
  /// What multiplies, in all layers of the group. A builder refuses what the cache's type does not
  /// have at the level in use: Unsupported.
  Arithmetic arithmetic = Arithmetic::automatic;
  /// MLA back ends only, and needed there. cache.num_kv_heads is then 1, cache.head_size the
  /// cache_dim() of `dims`.
  std::optional<MlaBuilderConfig> mla;
  std::optional<SparseBuilderConfig> sparse;  ///< sparse back ends only, and needed there
  /// Differential back ends only, and needed there.
  std::optional<DifferentialBuilderConfig> differential;
};

/// Result of a builder; each back end derives its own. Immutable once built, shared by all layers.
class Metadata {
 public:
  virtual ~Metadata() = default;
  /// Scratch that Impl::forward() needs with this metadata, in bytes.
  virtual std::size_t workspace_bytes() const noexcept = 0;
  /// What requests of the batch attend to once for all of them, and why; null = the back end does
  /// not look for it.
  virtual const CascadeDecision* cascade_decision() const noexcept { return nullptr; }
  /// Sparse back ends only; null = another one.
  virtual const SparseBatch* sparse_batch() const noexcept { return nullptr; }
};

/// Turns a batch into a back end's metadata, once per batch, on the host.
class MetadataBuilder {
 public:
  virtual ~MetadataBuilder() = default;
  /// `common_prefix_len`: tokens that all requests share at the start, whole blocks and no more
  /// than the computed tokens of any request; 0 = none or not known.
  /// `fast_build`: prefer a quick plan over a balanced one.
  /// @throws InvalidArgument if the batch breaks an invariant.
  virtual std::unique_ptr<Metadata> build(int common_prefix_len, const CommonMetadata& batch,
                                          bool fast_build = false) = 0;
  /// Copy of `m` for another cache group that differs only in these two. For encoder_decoder
  /// metadata `slot_mapping` takes the place of encoder_slot_mapping.
  virtual std::unique_ptr<Metadata> update_block_table(
      const Metadata& m, const ConstTensorView& block_table,
      std::span<const std::int64_t> slot_mapping) const = 0;
  /// Metadata with buffers of fixed sizes and addresses, for a call of Impl::forward() that is
  /// captured and run again with other batches. `batch` is the first one.
  /// @throws InvalidArgument; Unsupported unless graph_support() says that there is such a thing.
  virtual std::unique_ptr<Metadata> build_for_capture(const CommonMetadata& batch);
  /// Puts another batch, within BuilderConfig::capture, into metadata of build_for_capture(), or
  /// into a copy that update_block_table() made of it, together with the batch's block table and
  /// slots. workspace_bytes() stays. Allocates nothing. Copies share one plan: a batch is in all of
  /// them or in none when they are used. Layers must not be running.
  /// @throws as build_for_capture(), and leaves `m` as it was.
  virtual void refresh(Metadata& m, const CommonMetadata& batch) const;
  /// Longest query (inclusive) that the back end treats as decode; nullopt = batch order is free.
  virtual std::optional<int> reorder_batch_threshold() const noexcept { return std::nullopt; }
  virtual GraphSupport graph_support() const noexcept { return GraphSupport::never; }
};

/// What an MLA layer has besides.
struct MlaLayerConfig {
  std::shared_ptr<const MlaWeights> weights;  ///< not null; of the layer's dtype
  std::string prefill_backend = "auto";       ///< as the builder's
  Platform platform;                          ///< as the builder's
};

/// Constants of one layer.
struct ImplConfig {
  int num_q_heads = 0;
  int num_kv_heads = 0;
  int head_size = 0;
  std::optional<float> scale;  ///< unset = 1 / sqrt(head_size)
  float softcap = 0.0F;        ///< 0 = off
  /// Keys visible including the own one, >= 1; unset = all. encoder_decoder: unset.
  std::optional<int> sliding_window;
  std::vector<float> alibi_slopes;  ///< [num_q_heads] or empty; encoder_decoder: empty
  bool use_alibi_sqrt = false;      ///< as AttentionParams::alibi_sqrt
  std::vector<float> sinks;         ///< [num_q_heads], as AttentionParams::sinks, or empty
  bool lse_includes_sink = false;   ///< as in AttentionParams
  AttentionType attn_type = AttentionType::decoder;
  DType dtype = DType::bf16;
  std::string kv_cache_dtype = "auto";
  /// The layer owns no cache: it is given the one that an earlier layer has written in this step,
  /// writes nothing and ignores key and value. Not for encoders, which have no cache to share.
  bool shares_kv_cache = false;
  /// fp8 caches: a stored code stands for code * scale. 1 value or one a kv head, finite and > 0;
  /// empty = 1. Both of the same size; empty for other caches.
  std::vector<float> k_scale, v_scale;
  /// int8_level1 only, and needed there: scales of the values, [num_kv_heads, head_size], each
  /// finite and > 0, as ValueScales has them for the layer. Empty for other caches.
  std::vector<float> value_scales;
  /// MLA back ends only, and needed there. num_kv_heads is then 1, head_size the cache_dim() of its
  /// weights, k_scale the scale of an fp8 cache, and the default of `scale` 1 / sqrt(qk_head_dim).
  std::optional<MlaLayerConfig> mla;
  /// Differential back ends only, and needed there.
  std::optional<DifferentialLayerConfig> differential;
};

/// Tensors of one layer's call. T may exceed the batch's num_tokens (padding): rows beyond it are
/// neither read nor written.
struct ForwardArgs {
  ConstTensorView query;  ///< [T, Hq, D]
  /// [T, Hkv, D]; undefined = keys are already in the cache. encoder_decoder: [E, Hkv, D] or
  /// longer, the encoder's rows that CommonMetadata::encoder_slot_mapping gives slots to.
  ConstTensorView key;
  ConstTensorView value;  ///< like key; given iff key is
  /// MLA instead of key and value: [T, L] normed latents of the new tokens; undefined = they are
  /// already in the cache. query is then [T, Hq, P + R], rotated, output [T, Hq, V].
  ConstTensorView kv_c;
  ConstTensorView k_pe;  ///< [T, R], rotated; given iff kv_c is
  /// Sparse MLA only, and needed there: i32 [T, topk], last dimension stride 1: positions of the
  /// tokens of its request that a token attends to, in any order; one named twice counts twice.
  /// What is negative or behind the token names nothing.
  ConstTensorView topk_indices;
  /// Differential attention of variant v2 only, and needed there:
  /// DifferentialCombine::token_lambda, [T, Hq / 2]. output is then [T, Hq / 2, D].
  ConstTensorView token_lambda;
  /// Logical shape of Backend::kv_cache_shape(); undefined for encoders without cache.
  TensorView kv_cache;
  /// Shape of Backend::kv_scale_shape(), f32, any strides; undefined if that is empty.
  TensorView kv_scale_cache;
  TensorView output;  ///< [T, Hq, D]
  /// MLA with an fp8_e4m3 output: an output code stands for code * output_scale, finite and > 0.
  std::optional<float> output_scale;
  TensorView lse;  ///< f32 [T, Hq], natural log; undefined = not wanted
  Workspace workspace;
  Executor* executor = nullptr;  ///< null = default_executor()
  /// Back ends under decode context parallelism only, and needed there: this rank's end of the
  /// group. forward() is then a collective call, for this rank's heads.
  Communicator* communicator = nullptr;
};

/// Runs one layer.
class Impl {
 public:
  virtual ~Impl() = default;
  /// Writes key/value into the cache (if given and if the metadata has slots), then attends.
  /// `metadata` null = profiling run: output is filled with zeros.
  /// @throws InvalidArgument, before anything is written.
  virtual void forward(const ForwardArgs& args, const Metadata* metadata) const = 0;
};

/// One attention back end. Stateless; lives for the whole process.
class Backend {
 public:
  virtual ~Backend() = default;
  /// Fixed name in capitals, e.g. "FLASH_ATTN".
  virtual std::string_view name() const noexcept = 0;
  virtual const Capability& capability() const noexcept = 0;
  /// Every reason why this back end cannot serve `config`, in the fixed order of the list in
  /// docs/selection.md; empty = it can. Never stops at the first.
  std::vector<std::string> validate_configuration(const AttentionConfig& config) const;

  /// Logical cache shape. @throws InvalidArgument for a block size that it does not support.
  virtual std::vector<std::int64_t> kv_cache_shape(const KvCacheSpec& spec) const = 0;
  /// Physical order of the logical dimensions (layers in front if asked for).
  virtual std::vector<int> kv_cache_stride_order(KvLayout layout, bool include_layers,
                                                 KvFormat format) const = 0;
  /// Shape of the f32 cache of scales beside the cache, contiguous; empty = there is none.
  virtual std::vector<std::int64_t> kv_scale_shape(const KvCacheSpec&) const { return {}; }
  /// Index of the dimension that counts blocks in kv_cache_shape() without layers.
  virtual int kv_cache_block_dim() const noexcept = 0;
  /// Layout that the back end insists on; nullopt = both work.
  virtual std::optional<KvLayout> required_kv_cache_layout() const noexcept { return std::nullopt; }
  /// `preferred` if it is supported, else the smallest supported block size.
  int preferred_block_size(int preferred) const noexcept;

  /// @throws InvalidArgument; Unsupported for BuilderConfig::arithmetic.
  virtual std::unique_ptr<MetadataBuilder> make_builder(const BuilderConfig& config) const = 0;
  virtual std::unique_ptr<Impl> make_impl(const ImplConfig& config) const = 0;

 protected:
  /// A reason that depends on several fields at once; nullopt = none.
  virtual std::optional<std::string> supports_combination(const AttentionConfig&) const {
    return std::nullopt;
  }
};

}  // namespace attend
