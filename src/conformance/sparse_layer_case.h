// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <memory>

#include "conformance/check.h"

namespace attend::conformance {

/// A layer of sparse MLA as an engine drives it, in two steps: contexts, then what is compared.
/// `with_indexer`: an indexer chooses the tokens, and what it chose is checked first; else the
/// chosen tokens are random ones.
std::unique_ptr<Case> make_sparse_layer_case(Rng& rng, bool with_indexer);

}  // namespace attend::conformance
