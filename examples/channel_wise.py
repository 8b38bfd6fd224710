"""CWD, channel-wise distillation (Shu et al., ICCV 2021, arXiv 2011.13256): channels peak where the teacher's do."""

import torch
from detectron2.config import CfgNode

from d2_distill.losses import kd_kl_div_loss
from d2_distill.methods import DISTILL_METHOD_REGISTRY, DistillMethod
from d2_distill.methods.pairing import pair_features


def add_config(cfg):  # called before a config is read
    cfg.MODEL.DISTILL.CWD = CfgNode({"WEIGHT": 5.0, "TEMPERATURE": 1.0, "SCHEDULE": []})


@DISTILL_METHOD_REGISTRY.register()
class CWD(DistillMethod):  # its name in MODEL.DISTILL.METHODS
    KEY = "MODEL.DISTILL.CWD"
    WEIGHT_KEYS = {"loss_cwd": "WEIGHT"}  # term -> key of its weight, below KEY

    def __init__(self, *, pairs, temperature, **kwargs):
        super().__init__(**kwargs)
        self.pairs, self.temperature = pairs, temperature
        self.adapters = torch.nn.ModuleDict()
        for pair in pairs:
            if pair.student_channels != pair.teacher_channels:
                self.adapters[pair.student] = torch.nn.Conv2d(pair.student_channels, pair.teacher_channels, 1)

    @classmethod
    def from_config(cls, cfg, student, teacher):
        arguments = super().from_config(cfg, student, teacher)  # weights and schedule
        pairs = pair_features(student, teacher.staged, (), cls.KEY)
        return dict(arguments, pairs=pairs, temperature=cfg.MODEL.DISTILL.CWD.TEMPERATURE)

    def forward(self, student, teacher):
        losses = []
        for pair in self.pairs:
            ours, theirs = student.features[pair.student], teacher.features[pair.teacher]
            ours = self.adapters[pair.student](ours) if pair.student in self.adapters else ours
            losses.append(kd_kl_div_loss(ours.flatten(2), theirs.flatten(2), self.temperature).mean())
        return {"loss_cwd": torch.stack(losses).sum()}
