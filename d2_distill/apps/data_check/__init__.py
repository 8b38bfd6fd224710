"""Inspect data sets and report statistics and every problem at once."""
