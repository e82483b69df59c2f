# SPDX-License-Identifier: Apache-2.0
"""Every test sees eight CPU devices and strict dtype promotion; set before jax is imported.

Processes that tests start inherit the same environment.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
