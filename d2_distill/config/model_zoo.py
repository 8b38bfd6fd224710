"""Config files by path, or by their names in Detectron2's model zoo, where that is installed."""

from __future__ import annotations

from detectron2.utils.file_io import PathManager

from ..errors import UserError

try:  # The zoo is optional: the embedded subset has none, and the real one may not import.
    from detectron2 import model_zoo
except ImportError:
    model_zoo = None


def find_config(name: str, *, key: str) -> str:
    """The path of a config file; of a file that is not there, the path of the model zoo's config of this name.

    Args:
        key: what the error message calls the name.

    Raises:
        UserError: there is neither.
    """
    if PathManager.isfile(name):
        return name
    if model_zoo is None:
        raise UserError(
            f"{key}: there is no file {name}; give a path from the working directory; names of Detectron2's model zoo "
            "need the real Detectron2, and this is the embedded one (docs/embedded_detectron2.md)."
        )
    try:
        return model_zoo.get_config_file(name)
    except (RuntimeError, ValueError):  # the latter of newer setuptools, for an absolute path
        raise UserError(
            f"{key}: there is no file {name}, nor has the model zoo this config; give a path from the working "
            "directory, or a name such as COCO-Detection/retinanet_R_50_FPN_3x.yaml."
        ) from None


def checkpoint_url(name: str, *, key: str) -> str:
    """The address of the zoo's trained checkpoint of one of its configs.

    Args:
        key: of the weights that are not given.

    Raises:
        UserError: the zoo has none.
    """
    try:
        return model_zoo.get_checkpoint_url(name)
    except RuntimeError:
        raise UserError(
            f"{key} is empty, and Detectron2's model zoo has no trained checkpoint of {name}; name one."
        ) from None
