"""JAX's coordination service as a process of its own: `python -m` this, ADDRESS COUNT SECONDS.

Within the first process, it would die with it, and JAX then aborts the others at once with a page
of C++ traces, before they can say what happened. It ends when its standard input does: at once if
that said `leaving`, else after the others have had time to end.
"""

import sys
import time

from jax._src.lib import _jax  # pyright: ignore[reportPrivateImportUsage]

LINGERS = 30
"""Seconds."""


def main() -> None:
    address, count, seconds = sys.argv[1:]
    service = _jax.get_distributed_runtime_service(
        address, int(count), heartbeat_timeout=int(seconds), shutdown_timeout=int(seconds)
    )
    print("ready", flush=True)
    if sys.stdin.read().strip() != "leaving":
        time.sleep(LINGERS)
    service.shutdown()


if __name__ == "__main__":
    main()
