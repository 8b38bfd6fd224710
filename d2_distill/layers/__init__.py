"""Layers that several detectors, backbones or methods use."""
