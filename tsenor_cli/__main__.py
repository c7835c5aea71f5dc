"""`python -m tsenor_cli`, and the `tsenor` command."""

from __future__ import annotations

import sys

from tsenor_cli.cli import run


def main() -> None:
    """Run the command line and exit with its documented code."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
