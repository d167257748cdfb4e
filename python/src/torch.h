// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "border.h"

/// PyTorch as seen through the interpreter: nothing here links against it or imports it.
namespace attend::python {

/// An instance of torch.Tensor. False if the caller has not imported torch.
bool is_torch_tensor(nb::handle object);
/// @pre is_torch_tensor(object). @throws as view_of(); also for tensors that need gradients while
/// these are recorded.
TensorView torch_view(nb::handle object, const Place& place);
/// torch.get_num_threads(). @pre There has been a torch tensor.
int torch_num_threads();

}  // namespace attend::python
