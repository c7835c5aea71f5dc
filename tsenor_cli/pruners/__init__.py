"""One file per pruning method."""

METHODS = ("magnitude",)  # names only: the command line must not load torch
