"""Installation of d2_distill; `pip install -e .[tools,export,timm,test]` for everything."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_namespace_packages, setup

TIMM = "timm>=1.0.7"
README = Path(__file__).with_name("README.md")

setup(
    name="d2_distill",
    version="0.1.0",
    description="Knowledge distillation of object detectors, a Detectron2 project",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9",
    # Detectron2 itself is not listed: the embedded subset stands in where it is not installed.
    install_requires=[
        "torch>=2.3",
        "torchvision>=0.18",
        "numpy",
        "pillow>=10.1",
        "pycocotools>=2.0.7",
        "fvcore>=0.1.5.post20221221",
        "iopath>=0.1.9",
        "pyyaml",
        "tabulate",
        "termcolor",
    ],
    extras_require={
        # quick-start data; pictures; curves; a faster COCO evaluation; videos and cameras
        "tools": ["scikit-learn", "matplotlib", "tensorboard", "faster-coco-eval", "opencv-python"],
        # ONNX files of tools/export.py: written, and run
        "export": ["onnx", "onnxruntime"],
        # backbones by name (build_timm_fpn_backbone) and their weights
        "timm": [TIMM],
        "test": ["pytest", "pytest-xdist", TIMM],
    },
    # The embedded Detectron2 lies in a plain folder that is put on sys.path, hence namespace packages.
    packages=find_namespace_packages(include=["d2_distill", "d2_distill.*"], exclude=["*.__pycache__"]),
    package_data={"": ["*.yaml"]},
)
