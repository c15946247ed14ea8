"""The environment of processes that tests start."""

import os
import re


def environment(devices: int = 1) -> dict[str, str]:
    """This process's, with a number of simulated devices: what compiles fast here does so there."""
    flags = re.sub(r"(device_count=)\d+", rf"\g<1>{devices}", os.environ.get("XLA_FLAGS", ""))
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
