"""The `granulon` script, which is also `python -m granulon_hf`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C prints no traceback, not even while modules are still being imported."""
    try:
        from granulon_hf import cli

        cli.main()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
