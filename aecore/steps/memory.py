"""How much memory there is, on the host and on devices, and how running out of it shows."""

import os
from typing import Any


def physical() -> int:
    """Bytes of the host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def limit(device: Any) -> int | None:
    """Bytes that JAX may use on a device; None where it doesn't say, as on CPUs."""
    return (device.memory_stats() or {}).get("bytes_limit")


def peak(device: Any) -> int | None:
    """The most bytes that were in use on a device so far; None where JAX doesn't count them."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def ran_out(error: Exception) -> bool:
    """Whether an error that XLA raised means that a device's memory did not suffice."""
    return "RESOURCE_EXHAUSTED" in str(error)
