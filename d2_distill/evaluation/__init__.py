"""Measures of a model: Pascal VOC accuracy, size and cost."""
