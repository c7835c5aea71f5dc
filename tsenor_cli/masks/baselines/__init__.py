"""What the exact solver is measured and judged against. Used by the tests and the benchmark only, one file per method.

Every file has `solve(blocks, n) -> mask`: CPU tensors, scores [B, M, M] of any float type, finite and ≥ 0, and bool
[B, M, M]. Its docstring says whether a mask holds exactly n per row and column or at most n.
"""
