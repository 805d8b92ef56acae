# SPDX-License-Identifier: Apache-2.0
"""One module per framework, which imports that framework, and ``importing``, which they all use. No other part of the
package imports them.
"""
