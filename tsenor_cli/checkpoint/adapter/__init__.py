"""The one room that knows transformers: what a tensor is, how layers are loaded and run, how text becomes tokens."""
