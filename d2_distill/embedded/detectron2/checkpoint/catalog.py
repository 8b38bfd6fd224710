"""The path prefix ``catalog://`` of the ImageNet backbones that Detectron published."""

from __future__ import annotations

from detectron2.utils.file_io import PathManager, PublishedFileHandler


class ModelCatalog:
    """Addresses of published backbones by their catalogue names."""

    @staticmethod
    def get(name: str) -> str:
        """Address of e.g. ``ImageNetPretrained/MSRA/R-50``; KeyError for other than MSRA's backbones."""
        if not name.startswith("ImageNetPretrained/MSRA/"):
            raise KeyError(f"catalog://{name} is unknown; use catalog://ImageNetPretrained/MSRA/<backbone>.")
        return f"https://dl.fbaipublicfiles.com/detectron/{name}.pkl"


PathManager.register_handler(PublishedFileHandler("catalog://", ModelCatalog.get))
