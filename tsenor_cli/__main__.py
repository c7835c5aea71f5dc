"""`python -m tsenor_cli`, and the `tsenor` command."""

from __future__ import annotations

import gc
import os
import sys

from tsenor_cli.cli import run


def main() -> None:
    """Run the command line and exit with its documented code."""
    # Threads of torch that wait spinning take the cores that others, or they themselves, need (docs/measured.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    gc.set_threshold(100_000)  # loading torch and transformers makes a million objects that stay: a tenth of the start
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
