"""Training that keeps a checkpoint N:M sparse, and uses it."""
