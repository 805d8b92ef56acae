# SPDX-License-Identifier: Apache-2.0
"""Where users are: one module a framework, each importing that framework, and nothing here importing them."""
