"""Of two processes one reads the data sets; both get them, or both end with the same sentence."""

from __future__ import annotations

import json
import os

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from torch import distributed as dist
from torch import multiprocessing

from d2_distill.data.checks import check_datasets
from d2_distill.data.loaded import keep_only
from d2_distill.data.registration import register_datasets
from d2_distill.data.sharing import main_process_first
from d2_distill.errors import UserError

from .small_sets import small_cfg, write_coco, write_voc


def test_one_process_only_prepares():
    assert main_process_first(lambda: 5) == 5
    with pytest.raises(UserError, match="^a sentence$"):
        main_process_first(_refuse)


def _refuse():
    raise UserError("a sentence")


def _one_of_two(rank: int, folder: str, case: str, rows: tuple, backend: str, machines: int) -> None:
    """Write what this process has of the data, or its error, to ``<folder>/<rank>.json``."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    comm.create_local_process_group(2 // machines)
    dist.get_backend = lambda *group: backend
    coco, voc, unused = rows
    cfg = small_cfg(DATASETS__COCO=(coco, unused), DATASETS__VOC=(voc,), DATASETS__TRAIN=(coco[0],), DATASETS__TEST=(voc[0],))

    def prepare():
        if case == "lost" and rank == 1:
            os.rename(f"{coco[2]}/1.png", f"{coco[2]}/gone.png")  # as if this were a machine without it
        register_datasets(cfg)
        check_datasets(cfg)
        keep_only([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
        if rank == 0:
            for path in (coco[1], unused[1], f"{voc[1]}/Annotations/0.xml"):
                os.unlink(path)
        return rank

    try:
        result = main_process_first(prepare)
        names = (coco[0], voc[0])
        # As JSON has them, so that both can be compared.
        sets = [[DatasetCatalog.get(name), MetadataCatalog.get(name).thing_classes] for name in names]
        sets.append(MetadataCatalog.get(unused[0]).thing_classes)
    except UserError as error:
        result = sets = str(error)
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump([result, sets], file)
    comm.all_gather(None)  # none ends while the other still talks to it
    os._exit(0)  # torch 2.14 now and then aborts a process that ends right after its groups ("terminate called")


@pytest.fixture
def run(tmp_path):
    """Runs a case in two processes, and returns the result of each."""
    coco = write_coco(tmp_path / "coco")
    voc = (*write_voc(tmp_path / "voc")[:3], (), 2012)
    unused = write_coco(tmp_path / "unused", classes=("ant",))

    def run(case, *, backend="gloo", machines=1):
        arguments = (str(tmp_path), case, (coco, voc, unused), backend, machines)
        multiprocessing.spawn(_one_of_two, args=arguments, nprocs=2)
        return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]

    return run


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_both_have_what_one_has_read(run, backend):
    """On GPUs, too, where NCCL is for tensors there: only its name is asked for here."""
    (first, ours), (second, theirs) = run("good", backend=backend)
    assert (first, second) == (0, 1) and ours == theirs
    (coco, classes), (voc, voc_classes), unused = ours
    assert classes == voc_classes == ["cat", "dog"] and unused == ["ant"]
    assert [len(record["annotations"]) for record in coco] == [1, 1, 1] and len(voc) == 2


def test_error_of_the_main_process(run, tmp_path):
    (tmp_path / "coco" / "images" / "1.png").unlink()
    (error, _), (same, _) = run("bad")
    assert error == same and "images/1.png is missing" in error


def test_images_are_looked_for_on_each_machine(run):
    (error, _), (same, _) = run("lost", machines=2)
    assert error == same and "images/1.png is missing (1 of 3 are missing)" in error
