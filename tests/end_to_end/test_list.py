"""train_net.py --list tells of the pair of a config, a user's own method included, and leaves nothing behind."""

from __future__ import annotations

from .runs import ROOT, TINY, distiller, merged, write_config

IMPORTS = {"IMPORTS": [str(ROOT / "examples" / "channel_wise.py")]}


def test_the_pair_of_a_config(server, data, teacher, tmp_path):
    distilled = distiller(teacher.config, tmp_path / "none.pth", "PKD")
    config = merged(TINY, data, distilled, IMPORTS, {"OUTPUT_DIR": str(tmp_path / "out")})
    path = write_config(tmp_path / "config.yaml", config)
    outcome = server.run("--config-file", path, "--num-gpus", 2, "--list", "MODEL.DEVICE", "cuda").succeeded()
    serving, others = outcome.stdout.split("Methods that cannot serve it:")
    assert "  CWD " in serving and "  PKD " in serving and "  CrossKD " in serving
    assert "  LD " in others and "  CrossKDRoI " in others
    assert not (tmp_path / "out").exists() and not outcome.errors


def test_a_config_that_is_not_valid(server, tmp_path):
    outcome = server.run("--list", "--config-file", tmp_path / "none.yaml")
    assert outcome.code == 1 and len(outcome.errors) == 1 and "none.yaml" in outcome.errors[0]
    assert "Traceback" not in outcome.stderr
