// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "attend/ops/mla.h"
#include "attend/oracle/attention.h"

namespace attend::oracle {

/// Reference of mla_decode (arguments are only read); lse as [T, H].
Result mla_decode(const MlaDecodeArgs& args);

}  // namespace attend::oracle
