# SPDX-License-Identifier: Apache-2.0
"""What plugs attend into other libraries: attend.integrations.transformers."""
