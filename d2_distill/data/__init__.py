"""Data sets, checks and loaders: what Detectron2 does not already do."""
