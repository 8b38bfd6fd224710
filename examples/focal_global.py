"""FGD, focal and global distillation (Yang et al., CVPR 2022, arXiv 2111.11837) of feature pyramids."""

import torch.nn.functional as F
from detectron2.config import CfgNode
from torch import nn

from d2_distill.methods import DISTILL_METHOD_REGISTRY, DistillMethod
from d2_distill.methods.pairing import pair_features, require_same_channels
from d2_distill.regions import focal_masks, spatial_attention


def add_config(cfg):
    weights = {"FOREGROUND": 1e-3, "BACKGROUND": 5e-4, "ATTENTION": 1e-3, "GLOBAL": 5e-6}
    cfg.MODEL.DISTILL.FGD = CfgNode({**weights, "TEMPERATURE": 0.5, "SCHEDULE": []})


def channel_attention(x, temperature):  # (N, C, H, W) -> (N, C), whose mean over the channels is 1
    return (x.abs().mean(dim=(2, 3)) / temperature).softmax(dim=1) * x.shape[1]


class GlobalContext(nn.Module):  # the relation of all cells: pooled by attention, added to each cell (GcBlock)
    def __init__(self, channels):
        super().__init__()
        self.attend = nn.Conv2d(channels, 1, 1)
        half = channels // 2
        self.add = nn.Sequential(nn.Linear(channels, half), nn.LayerNorm(half), nn.ReLU(), nn.Linear(half, channels))

    def forward(self, x):
        weights = self.attend(x).flatten(start_dim=2).softmax(dim=2)
        return x + self.add((x.flatten(start_dim=2) * weights).sum(dim=2))[:, :, None, None]


@DISTILL_METHOD_REGISTRY.register()
class FGD(DistillMethod):
    KEY = "MODEL.DISTILL.FGD"
    WEIGHT_KEYS = {f"loss_fgd_{name}": name.upper() for name in ("foreground", "background", "attention", "global")}

    def __init__(self, *, pairs, channels, temperature, **kwargs):
        super().__init__(**kwargs)
        self.pairs, self.temperature = pairs, temperature
        self.ours, self.theirs = (nn.ModuleList(GlobalContext(channels) for _ in pairs) for _ in range(2))

    @classmethod
    def from_config(cls, cfg, student, teacher):
        arguments = super().from_config(cfg, student, teacher)  # weights and schedule
        pairs = pair_features(student, teacher.staged, (), cls.KEY)
        require_same_channels(pairs, "FGD")
        temperature = cfg.MODEL.DISTILL.FGD.TEMPERATURE
        return {**arguments, "pairs": pairs, "channels": pairs[0].student_channels, "temperature": temperature}

    def forward(self, student, teacher):
        terms = dict.fromkeys(self.WEIGHT_KEYS, 0.0)
        images, shapes, truth = len(student.images), student.staged.feature_shapes(), student.truth
        for pair, ours, theirs in zip(self.pairs, self.ours, self.theirs):
            x, y = student.features[pair.student], teacher.features[pair.teacher]
            x = F.interpolate(x, size=y.shape[2:], mode="bilinear", align_corners=False)
            spatial, channel = spatial_attention(y, self.temperature), channel_attention(y, self.temperature)
            errors = ((x - y).square() * channel[:, :, None, None]).sum(dim=1) * spatial
            masks = focal_masks(truth.boxes, truth.valid, tuple(y.shape[2:]), shapes[pair.student].stride)
            for name, mask in zip(("foreground", "background"), masks):
                terms[f"loss_fgd_{name}"] += (errors * mask).sum() / images
            distances = spatial_attention(x, self.temperature) - spatial, channel_attention(x, self.temperature) - channel
            terms["loss_fgd_attention"] += sum(distance.abs().sum() for distance in distances) / images
            terms["loss_fgd_global"] += (ours(x) - theirs(y)).square().sum() / images
        return {name: term for name, term in terms.items() if name in self.weights}
