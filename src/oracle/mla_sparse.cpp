// SPDX-License-Identifier: Apache-2.0
#include <vector>

#include "attend/oracle/mla.h"

namespace attend::oracle {

MlaRowResult mla_sparse_row(const MlaRowProblem& p, std::span<const std::int32_t> chosen) {
  std::vector<std::int32_t> keys;
  for (const std::int32_t j : chosen)
    if (j >= 0 && j <= p.position && j < p.num_keys) keys.push_back(j);
  const auto key = [&](std::int64_t i) { return keys[static_cast<std::size_t>(i)]; };
  MlaRowProblem named = p;
  named.num_keys = static_cast<std::int64_t>(keys.size());
  named.position = named.num_keys - 1;
  named.latent = [&](std::int64_t i, int l) { return p.latent(key(i), l); };
  named.k_pe = [&](std::int64_t i, int d) { return p.k_pe(key(i), d); };
  return mla_decode_row(named);
}

}  // namespace attend::oracle
