"""The `aecore` command."""

import sys


def main() -> None:
    """Runs the command; Ctrl-C while Python still imports it ends it in one line, too."""
    try:
        from aecore import cli
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    cli.run()


if __name__ == "__main__":
    main()
