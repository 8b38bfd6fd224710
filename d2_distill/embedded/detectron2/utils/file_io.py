"""``PathManager``: opens local files, web addresses and names of published files, with a download cache."""

from __future__ import annotations

from typing import Callable

from iopath.common.file_io import HTTPURLHandler, PathHandler
from iopath.common.file_io import PathManager as PathManagerBase

PathManager = PathManagerBase()


class PublishedFileHandler(PathHandler):
    """Downloads what a name below a prefix stands for.

    Args:
        prefix: e.g. ``detectron2://``.
        address_of: from the name behind the prefix to the address.
    """

    def __init__(self, prefix: str, address_of: Callable[[str], str]):
        super().__init__()
        self._prefix, self._address_of = prefix, address_of

    def _get_supported_prefixes(self):
        return [self._prefix]

    def _get_local_path(self, path, **kwargs):
        return PathManager.get_local_path(self._address_of(path[len(self._prefix):]), **kwargs)

    def _open(self, path, mode="r", **kwargs):
        return open(self._get_local_path(path), mode, **kwargs)


PathManager.register_handler(HTTPURLHandler())
PathManager.register_handler(
    PublishedFileHandler("detectron2://", "https://dl.fbaipublicfiles.com/detectron2/{}".format))
