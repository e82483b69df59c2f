# SPDX-License-Identifier: Apache-2.0
"""What a recipe needs of a TPU, found out by compiling it on a machine that has none."""
