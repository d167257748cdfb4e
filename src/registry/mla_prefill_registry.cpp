// SPDX-License-Identifier: Apache-2.0
// The table of MLA prefill back ends: one generated line for each folder of
// src/backends/mla/prefill that registers itself.
#include <vector>

#include "attend/backend/mla_prefill.h"
#include "registry/named.h"

namespace attend {

#define ATTEND_MLA_PREFILL_BACKEND(name)       \
  namespace mla_prefill::name {                \
  const MlaPrefillBackend& backend() noexcept; \
  }
#include "mla_prefill_backends.inc"
#undef ATTEND_MLA_PREFILL_BACKEND

std::span<const MlaPrefillBackend* const> mla_prefill_backends() noexcept {
  static const std::vector<const MlaPrefillBackend*> all = sorted_by_name<MlaPrefillBackend>({
#define ATTEND_MLA_PREFILL_BACKEND(name) &mla_prefill::name::backend(),
#include "mla_prefill_backends.inc"
#undef ATTEND_MLA_PREFILL_BACKEND
  });
  return all;
}

const MlaPrefillBackend& find_mla_prefill_backend(std::string_view name) {
  return find_by_name("find_mla_prefill_backend", mla_prefill_backends(), name);
}

}  // namespace attend
