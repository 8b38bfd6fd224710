"""Load checkpoints exactly, also those of slimmable networks."""
