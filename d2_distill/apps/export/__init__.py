"""Detectors in forms that run without this project: checkpoints, TorchScript and ONNX files."""
