"""Names of Detectron2's model zoo in the place of config files."""

from __future__ import annotations

import pytest

from d2_distill import provider
from d2_distill.engine.setup import load_config
from d2_distill.errors import UserError

NAME = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


@pytest.mark.skipif(provider.name() == "embedded", reason="the embedded Detectron2 has no model zoo")
def test_a_student_of_the_zoo(server, data, tmp_path):
    """Detectron2 copies the config file into the log, so it must be found there, too."""
    _, annotations, images = data["DATASETS"]["COCO"][0]
    opts = ["OUTPUT_DIR", tmp_path / "out", "MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", 0]
    opts += ["INPUT.MIN_SIZE_TRAIN", "(32,)", "MODEL.BACKBONE.FREEZE_AT", 0, "MODEL.RETINANET.NUM_CONVS", 1]
    opts += ["SOLVER.MAX_ITER", 1, "SOLVER.IMS_PER_BATCH", 2, "SOLVER.BASE_LR", 1e-6]
    server.run("--config-file", NAME, "--train-data", annotations, images, *opts).succeeded()
    cfg = load_config(str(tmp_path / "out" / "config.yaml"), [])
    assert cfg.MODEL.META_ARCHITECTURE == "RetinaNet" and cfg.MODEL.RESNETS.DEPTH == 50
    assert cfg.MODEL.RETINANET.NUM_CLASSES == 2


def test_what_is_no_file_nor_in_the_zoo():
    with pytest.raises(UserError, match=r"^The config: there is no file none\.yaml[,;] [^\n]*model zoo"):
        load_config("none.yaml", [])
