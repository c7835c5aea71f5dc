"""How the paper's iteration goes on, whatever it runs on: the stages of τ, and when a block is done."""

DEFAULT_ITERATIONS = 300
FIRST_TAU = 6.25  # times the largest score of a block: the first stage
LAST_TAU = 1600.0  # the last one, 2^8 times the first
PER_STAGE = 40  # iterations at one τ; at a last one that was asked for, as many as there may be
RESIDUAL_GOAL = 0.004  # of a marginal, relative to n: a stage ends early
GAP_GOAL = 0.003  # (bound - value of S) / bound: τ is large enough
LOG2_E = 1.4426950408889634
