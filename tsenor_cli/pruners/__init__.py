"""One file per pruning method. Their names are in specs.py: the command line must not load torch."""
