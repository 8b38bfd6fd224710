"""Gradient ratios of a run: scalars and a line of the log, and losses that stay the same; two processes."""

from __future__ import annotations

from .runs import QUIET, RECORDER, TINY, distiller, losses, merged, scalars, write_config


def test_two_processes(server, data, teacher, tmp_path):
    short = {"SOLVER": {"MAX_ITER": 4}}
    config = merged(TINY, data, QUIET, distiller(teacher.config, teacher.weights, "PKD", "CrossKD"), short)
    found, logs = [], []
    for period in (0, 2):
        folder = tmp_path / str(period)
        path = write_config(tmp_path / f"{period}.yaml", config, {"OUTPUT_DIR": str(folder)})
        opts = ("MODEL.DISTILL.GRADIENT_RATIO_PERIOD", period)
        server.run("--config-file", path, *opts, script=RECORDER, processes=2).succeeded()
        found.append(losses(folder))
        logs.append((folder / "log.txt").read_text())
    assert found[0] == found[1]
    assert "Gradients at the features" not in logs[0] and logs[1].count("Gradients at the features") == 2
    ratios = {name: value for name, value in scalars(folder).items() if name.startswith("grad_ratio/")}
    assert set(ratios) == {f"grad_ratio/{term}" for term in ("pkd", "crosskd_cls", "crosskd_box")}
    assert all(value > 0 for value in ratios.values())
