"""`python -m tsenor_cli`, and the `tsenor` command."""

from __future__ import annotations

import gc
import os
import sys

from tsenor_cli.cli import run


def main() -> None:
    """Run the command line and exit with its documented code."""
    _occupy_standard_streams()
    # Threads of torch that wait spinning take the cores that others, or they themselves, need (docs/measured.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    gc.set_threshold(100_000)  # loading torch and transformers makes a million objects that stay: a tenth of the start
    sys.exit(run(sys.argv[1:]))


def _occupy_standard_streams() -> None:
    """Or the next file that is opened would be the missing one, and what a library prints would go into it."""
    while (free := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(free)


if __name__ == "__main__":
    main()
