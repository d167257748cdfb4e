// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace attend::cpu {

/// 2^f = Horner(kExp2Poly) for f in [-0.5, 0.5], highest power first: minimax with the constant
/// term held at 1, so that exp2(0) is exactly 1. Largest relative error in float32: 1.7e-7.
inline constexpr int kExp2Terms = 6;
inline constexpr float kExp2Poly[kExp2Terms] = {1.326472731307149e-3F, 9.671512991189957e-3F,
                                                5.550733581185341e-2F, 0.24022242426872253F,
                                                0.6931470036506653F,   1.0F};

}  // namespace attend::cpu
