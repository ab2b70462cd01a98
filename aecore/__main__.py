"""The `aecore` command."""

import os
import sys


def main() -> None:
    """Runs the command. Ctrl-C prints one line instead of a traceback, during imports too."""
    try:
        from aecore import cli

        cli.run()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _end_at_once(130)
    except SystemExit as ended:
        if ended.code == 130:
            _end_at_once(130)
        raise


def _end_at_once(status: int) -> None:
    """Ends the process without Python's cleanup, which may crash while a device computes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
