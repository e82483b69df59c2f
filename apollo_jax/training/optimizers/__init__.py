# SPDX-License-Identifier: Apache-2.0
"""Optimizers as transformations of flat dicts of arrays by name."""
