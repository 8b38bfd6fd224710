"""Helpers: registry, files, seeds, processes, logs, training scalars."""
