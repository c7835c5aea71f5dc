"""Text, and what flows through a model that reads it."""
