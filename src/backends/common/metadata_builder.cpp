// SPDX-License-Identifier: Apache-2.0
// What builders answer that have nothing to capture.
#include "attend/backend/backend.h"
#include "attend/core/error.h"

namespace attend {
namespace {

[[noreturn]] void refuse(const char* function) {
  throw Unsupported(function, {"the back end makes no metadata for captured graphs"});
}

}  // namespace

std::unique_ptr<Metadata> MetadataBuilder::build_for_capture(const CommonMetadata&) {
  refuse("build_for_capture");
}

void MetadataBuilder::refresh(Metadata&, const CommonMetadata&) const { refuse("refresh"); }

}  // namespace attend
