"""Mask solvers side by side: problems → contenders → measurements → table, JSON, picture."""

# Names only: the command line must not load torch.
OURS = ("exact", "entropic")
BASELINES = ("flow", "highs", "pdlp", "exhaustive", "plain-torch", "two-approximation", "bi-nm", "max1000")
YARDSTICKS = ("topk",)
CONTENDERS = OURS + BASELINES + YARDSTICKS
SCORES = ("normal", "cubed", "uniform")
