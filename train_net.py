#!/usr/bin/env python3
"""Train, distil or evaluate a detector.

    python train_net.py --config-file configs/quickstart/distilled.yaml --num-gpus 8
    python train_net.py --config-file configs/quickstart/student.yaml --eval-only MODEL.WEIGHTS student.pth
    python train_net.py --config-file configs/Base-RetinaNet.yaml --train-data train.json images --test-data val.json images
    python train_net.py --list

``torchrun train_net.py --config-file ...`` works too. Without a GPU, ``--num-gpus`` counts CPU processes.
"""

from __future__ import annotations

from typing import Any

from d2_distill.engine import Trainer, evaluate, list_choices, parse_arguments, setup, start


def main(args: Any) -> Any:
    cfg, model = setup(args)
    if args.eval_only:
        return evaluate(cfg, model)
    trainer = Trainer(cfg, model)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = parse_arguments(epilog=__doc__)
    start(list_choices if args.list else main, args)
