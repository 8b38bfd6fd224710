"""Box geometry and overlaps; functions of tensors only."""
