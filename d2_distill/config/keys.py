"""Every configuration key that d2_distill adds to Detectron2's."""

from __future__ import annotations

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg


def get_distill_cfg() -> CN:
    """Detectron2's default config with the keys of :func:`add_distill_config`."""
    cfg = get_cfg()
    add_distill_config(cfg)
    return cfg


def add_distill_config(cfg: CN) -> None:
    """Add d2_distill's keys, with their defaults, to a Detectron2 config."""
    # Python files of your own, relative to the working directory, that are imported before the config is read: what
    # they register can be named in it. A function add_config(cfg) in them adds their keys; see docs/own_method.md.
    cfg.IMPORTS = ()

    # User data sets, registered before anything is built; relative paths are below $DETECTRON2_DATASETS
    # (default: "datasets").
    # COCO format: rows of (name, json_file, image_root).
    cfg.DATASETS.COCO = ()
    # Pascal VOC folders: rows of (name, dirname, split, class_names, year); class_names () takes CLASSES below or, where
    # these are empty too, all names in the folder's Annotations, sorted.
    cfg.DATASETS.VOC = ()
    # Names of the detector's classes in the order of its outputs, by which its head's NUM_CLASSES is set. () takes those
    # of the first data set of TRAIN, else of TEST, whose class list is known; data sets of another list are refused. The
    # config.yaml of a run holds them.
    cfg.DATASETS.CLASSES = ()

    # "SGD" (Detectron2's) or "AdamW"; both take BASE_LR, WEIGHT_DECAY* and BIAS_LR_FACTOR.
    cfg.SOLVER.OPTIMIZER = "SGD"
    # CLIP_GRADIENTS.CLIP_TYPE may also be "full_model": the norm of all gradients together, not of each parameter's.

    # "nms" (the detector's own) or, with one-stage detectors, "cluster_nms" or "cluster_diou_nms", with
    # "voting_" or "weighted_" in front for boxes that are voted on; see postprocess/cluster_nms.py.
    cfg.TEST.NMS = "nms"
    # Rules of Pascal VOC data sets: "devkit" (Detectron2's) or "openmmlab"; see evaluation/voc.py.
    cfg.TEST.VOC_CONVENTION = "devkit"

    _add_backbone_config(cfg)
    _add_detector_configs(cfg)
    _add_distiller_config(cfg)


def _add_backbone_config(cfg: CN) -> None:
    # Batch norms of the backbone use their running statistics and do not update them, while weight and bias are
    # trained (OpenMMLab's norm_eval). For RESNETS.NORM "BN"; stages below FREEZE_AT are frozen altogether.
    cfg.MODEL.BACKBONE.FIXED_BN_STATISTICS = False
    # Of the FPN builders below and build_p3p7_resnet_fpn_backbone: what stands above P5: "P6P7" (convolutions, for
    # one-stage detectors), "P6" (the first of them, for low-resolution ones), "MaxPool" (P6 for two-stage ones) or "".
    cfg.MODEL.FPN.TOP_BLOCK = "P6P7"
    # What P6 is convolved from, "p5" or "res5", and whether there is a ReLU between P6 and P7. RetinaNet: "res5" and
    # True (as in Detectron2) or False (OpenMMLab); FCOS: "p5", True.
    cfg.MODEL.FPN.TOP_BLOCK_IN_FEATURE = "p5"
    cfg.MODEL.FPN.TOP_BLOCK_RELU = False

    # build_mobilenet_v2_fpn_backbone.
    mobilenet_v2 = cfg.MODEL.MOBILENETV2 = CN()
    # Factor on the channels.
    mobilenet_v2.WIDTH_MULT = 1.0
    # "BN", "SyncBN" or "FrozenBN".
    mobilenet_v2.NORM = "BN"
    # "ReLU6", with which torchvision's weights were trained, or "LeakyReLU" of slope 0.1 (HEAD).
    mobilenet_v2.ACTIVATION = "ReLU6"
    # The stages, 0 to 7, whose outputs are res2, res3, res4 and res5; 7 is the 1x1 convolution to 1280 channels
    # behind stage 6, which has 320.
    mobilenet_v2.OUT_STAGES = (1, 2, 4, 7)
    # Pad convolutions of stride 2 at the bottom and the right only, for weights that were trained with TensorFlow.
    mobilenet_v2.SAME_PADDING = False

    # build_slimmable_resnet_fpn_backbone and build_slimmable_mobilenet_v2_fpn_backbone (MSAD): networks whose weights
    # hold several widths, of which one is built.
    slimmable = cfg.MODEL.SLIMMABLE = CN()
    # "BN", "SyncBN" or "FrozenBN".
    slimmable.NORM = "BN"
    # Of the ResNet: 50, 101 or 152.
    slimmable.DEPTH = 50
    # One of WIDTH_MULT_LIST, the widths in the order in which public weights were trained; MobileNetV2's are 0.35, 0.5,
    # 0.75, 1.0.
    slimmable.WIDTH_MULT = 1.0
    slimmable.WIDTH_MULT_LIST = [0.25, 0.5, 0.75, 1.0]

    # build_low_resolution_backbone: a detector that sees every FACTOR-th row and column of its images, while boxes stay
    # in pixels of the whole ones.
    low_resolution = cfg.MODEL.LOW_RESOLUTION = CN()
    # Builder of the pyramid that reads the small images.
    low_resolution.BACKBONE = "build_p3p7_resnet_fpn_backbone"
    # 2 or 4.
    low_resolution.FACTOR = 2
    # Pad images to detect as for training (800x1333 to 1024x1536), as published. False pads less, which is faster, but
    # group norms see other statistics then; measure what it costs.
    low_resolution.ALIGN_TEST = True

    # build_swin_fpn_backbone; the defaults are Swin-T. S: DEPTHS [2, 2, 18, 2]; B: also EMBED_DIM 128 and NUM_HEADS
    # [4, 8, 16, 32].
    swin = cfg.MODEL.SWIN = CN()
    # Whose modules: "torchvision" or, with its own names and freezing, "detectron2" (not the embedded one).
    swin.IMPLEMENTATION = "torchvision"
    swin.EMBED_DIM = 96
    swin.DEPTHS = [2, 2, 6, 2]
    swin.NUM_HEADS = [3, 6, 12, 24]
    swin.WINDOW_SIZE = 7
    # Stochastic depth of the last block; it rises linearly from 0.
    swin.DROP_PATH_RATE = 0.2


def _add_detector_configs(cfg: CN) -> None:
    # Keys that FCOS, ATSS, GFL and TOOD share.
    def dense_head() -> CN:
        node = CN()
        node.NUM_CLASSES = 80
        node.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
        node.NUM_CONVS = 4
        # Norm in the towers: "" or a name that detectron2.layers.get_norm knows.
        node.NORM = "GN"
        node.PRIOR_PROB = 0.01
        node.SCORE_THRESH_TEST = 0.05
        # Candidates of a level before the non-maximum suppression.
        node.TOPK_CANDIDATES_TEST = 1000
        node.NMS_THRESH_TEST = 0.6
        return node

    # Loss of boxes, BOX_LOSS below: "giou", "iou" (its logarithm), "linear_iou", "diou" or "ciou".
    # REG_MAX above 0 predicts each side of a box as a distribution over 0..REG_MAX strides.

    # Detectron2's FCOS ("FCOS"), for which it has no config, and OpenMMLabFCOS; of the keys below both read
    # CENTER_SAMPLING_RADIUS and the focal loss, the rest is OpenMMLabFCOS's. Its docstring tells which options make
    # which published form.
    fcos = cfg.MODEL.FCOS = dense_head()
    fcos.SCORE_THRESH_TEST = 0.2
    fcos.FOCAL_LOSS_ALPHA = 0.25
    fcos.FOCAL_LOSS_GAMMA = 2.0
    # A location is positive within this many strides of a box's centre; 0: in the whole box (OpenMMLabFCOS).
    fcos.CENTER_SAMPLING_RADIUS = 1.5
    # Between the levels: the largest distance to a side, in pixels, that the finer one regresses.
    fcos.SIZES_OF_INTEREST = [64, 128, 256, 512]
    # "exp": exponentials in pixels; "relu": clamped outputs in strides.
    fcos.DISTANCES = "relu"
    fcos.CENTERNESS_ON = "box"
    fcos.TOWER_BIAS = False
    fcos.REG_MAX = 0
    fcos.BOX_LOSS = "giou"
    fcos.BOX_LOSS_WEIGHT = 1.0
    # Added to intersection and union, in strides, by "giou", "iou" and "linear_iou".
    fcos.IOU_OFFSET = 0.0
    # Whether the layers that predict boxes and centerness have a bias; MSAD's have none.
    fcos.PREDICTOR_BIAS = True
    # "openmmlab": the best locations of a level with all their classes, and the score is class score times centerness;
    # "adelaidet": the best pairs of location and class, whose boxes are clipped only after the suppression (off if
    # NMS_THRESH_TEST <= 0), the score is the root of that product, and equals of the last detection stay.
    fcos.INFERENCE = "openmmlab"
    # "adelaidet": SCORE_THRESH_TEST is for class score times centerness, not for the class score alone.
    fcos.THRESH_WITH_CTR = False

    atss = cfg.MODEL.ATSS = dense_head()
    atss.FOCAL_LOSS_ALPHA = 0.25
    atss.FOCAL_LOSS_GAMMA = 2.0
    # Side of the anchor, in strides.
    atss.ANCHOR_SCALE = 8
    # Candidates of a box on each level.
    atss.ATSS_TOPK = 9
    atss.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    atss.REG_MAX = 0
    atss.BOX_LOSS = "giou"
    atss.BOX_LOSS_WEIGHT = 2.0
    # Lower bound of the sum of centerness targets that the box loss is divided by.
    atss.NORMALIZER_FLOOR = 1.0

    # GFL and GFLv2.
    gfl = cfg.MODEL.GFL = dense_head()
    gfl.ANCHOR_SCALE = 8
    gfl.ATSS_TOPK = 9
    gfl.REG_MAX = 16
    gfl.QUALITY_BETA = 2.0
    gfl.BOX_LOSS = "giou"
    gfl.BOX_LOSS_WEIGHT = 2.0
    gfl.DFL_WEIGHT = 0.25
    # Lower bound of the sum of scores that the box losses are divided by; CrossKD's code has 1.
    gfl.NORMALIZER_FLOOR = 1e-6
    # GFLv2: probabilities of each side that its quality sees, and its hidden channels.
    gfl.QUALITY_TOPK = 4
    gfl.QUALITY_CHANNELS = 64

    tood = cfg.MODEL.TOOD = dense_head()
    # Blocks of the one tower, all of which classes and boxes are predicted from.
    tood.NUM_CONVS = 6
    # Iterations in which targets and losses are those of ATSS; a third of the 1x schedule, as published.
    tood.INITIAL_ITERS = 30000
    tood.ANCHOR_SCALE = 8
    tood.ATSS_TOPK = 9
    tood.FOCAL_LOSS_ALPHA = 0.25
    tood.FOCAL_LOSS_GAMMA = 2.0
    # Afterwards the TOPK best aligned anchors of a box are its candidates: by score^ALIGNMENT_ALPHA * IoU^ALIGNMENT_BETA
    # of what they predict.
    tood.TOPK = 13
    tood.ALIGNMENT_ALPHA = 1.0
    tood.ALIGNMENT_BETA = 6.0
    tood.QUALITY_BETA = 2.0
    tood.BOX_LOSS = "giou"
    tood.BOX_LOSS_WEIGHT = 2.0

    # MultiScaleDetector, MSAD's teacher: one detector trained on high and low resolution and on the fusion of both.
    msad = cfg.MODEL.MSAD = CN()
    # Meta-architecture of the detector, whose backbone is a pyramid from P2 on.
    msad.DETECTOR = "OpenMMLabFCOS"
    msad.FACTOR = 2
    # Factor on the losses of the fused maps.
    msad.JOINT_WEIGHT = 0.4
    # "per_image" or, as in the first published code, the scores of the "first_image" for the whole batch.
    msad.FUSION_SCORE = "per_image"
    # Channels of the concatenated maps over hidden channels of the layer that scores them.
    msad.FUSION_REDUCTION = 16
    # What detects: "fused", "high" or "low" resolution.
    msad.TEST_BRANCH = "fused"

    # OpenMMLabRetinaNet reads MODEL.RETINANET and these.
    cfg.MODEL.RETINANET.REG_MAX = 0
    cfg.MODEL.RETINANET.BBOX_REG_LOSS_WEIGHT = 1.0


def _add_distiller_config(cfg: CN) -> None:
    # MODEL.META_ARCHITECTURE: "Distiller" trains the detector that the usual keys describe, with a teacher.
    distill = cfg.MODEL.DISTILL = CN()
    # Meta-architecture of the student, e.g. "RetinaNet".
    distill.STUDENT = "RetinaNet"
    # Names from DISTILL_METHOD_REGISTRY; their loss terms add up.
    distill.METHODS = ()
    # Dotted module names copied from the teacher into the student before training (HEAD's "weight transfer"),
    # e.g. ("head",), or "student name=teacher name". Shapes must agree; the copies stay trainable.
    distill.INHERIT = ()
    # Iterations between two lines of the log that tell how hard each term pulls at the student's features, in parts of
    # its own losses; 0 for none. See docs/choosing.md.
    distill.GRADIENT_RATIO_PERIOD = 200

    distill.TEACHER = CN()
    # A config file of its own, as for any Detectron2 model, or a name of Detectron2's model zoo if installed.
    distill.TEACHER.CONFIG_FILE = ""
    # Checkpoint; "" takes MODEL.WEIGHTS of the teacher's config.
    distill.TEACHER.WEIGHTS = ""
    # Overrides of the teacher's config: a flat list of keys and values.
    distill.TEACHER.OPTS = []
    # The teacher's classes are matched with the student's by name, and others of its classes left out. Entries
    # "student name=teacher name" for what is the same under another name.
    distill.TEACHER.CLASS_ALIASES = ()
    # Batch norms of the teacher use, and update, the statistics of each batch: MSAD's published code only.
    distill.TEACHER.BATCH_STATISTICS = False

    # SCHEDULE of every method: factors on its weights by iteration, which are multiplied, e.g.
    # [["Warmup", 2000], ["EarlyStop", 58640]]; see schedules.py.

    # CrossKD (CVPR 2024): student tower features through the rest of the teacher's head. The weights that were
    # published for each detector are in docs/crosskd.md.
    crosskd = distill.CROSSKD = CN()
    # Number of student tower blocks in front of the tap, 0 (the FPN map) to the tower's length.
    crosskd.CLS_TAP = 3
    crosskd.BOX_TAP = 3
    # Whether the tap lies behind the last of these blocks' activation, "post" (as published), or in front, "pre".
    crosskd.TAP_ACTIVATION = "post"
    crosskd.CLS_WEIGHT = 1.0
    # Exponent of the quality focal modulation.
    crosskd.CLS_BETA = 1.0
    crosskd.BOX_WEIGHT = 1.0
    # "kl": divergence of the distributions that the teacher predicts; or a loss of decoded boxes, named as BOX_LOSS
    # of the detectors; "auto": "kl" if the teacher predicts distributions, else "giou".
    crosskd.BOX_LOSS = "auto"
    # Of "kl": softens both distributions.
    crosskd.BOX_TEMPERATURE = 1.0
    # Above 0 only where student and teacher predict centerness on the same anchors; published for ATSS: 1.
    crosskd.CENTERNESS_WEIGHT = 0.0
    # Lower bound of what the terms are divided by: it matters for FCOS students, whose sum of centerness targets
    # may be 0. The published code has 1e-6.
    crosskd.NORMALIZER_FLOOR = 1.0
    crosskd.SCHEDULE = []

    # CrossKD for two-stage detectors: the teacher's RoI head on the student's features of the student's proposals.
    crosskd_roi = distill.CROSSKD_ROI = CN()
    # Divergence between class distributions, both softened by the temperature.
    crosskd_roi.CLS_WEIGHT = 0.5
    crosskd_roi.TEMPERATURE = 3.0
    # L1 distance between box deltas.
    crosskd_roi.BOX_WEIGHT = 1.0
    crosskd_roi.SCHEDULE = []

    # PKD (NeurIPS 2022): Pearson correlation between FPN maps.
    pkd = distill.PKD = CN()
    pkd.WEIGHT = 2.0
    # Student features to imitate; () takes all whose stride the teacher has too.
    pkd.IN_FEATURES = ()
    pkd.SCHEDULE = []

    # Feature imitation on FPN maps.
    imitation = distill.IMITATION = CN()
    imitation.WEIGHT = 1.0
    imitation.IN_FEATURES = ()
    # Cells that are imitated: "whole" (FitNets), "inside_gt", "decouple" (DeFeat: inside_gt, and the rest with its own
    # weight), "finegrained", "gibox" (general instances) or "main" (positives); see regions/.
    imitation.REGION = "whole"
    # Factor on the cells outside of the boxes; "decouple" only.
    imitation.BACKGROUND_WEIGHT = 2.0
    # "gibox": 10 instances a level of each image; False: of the whole batch (the published code).
    imitation.GI_PER_IMAGE = True
    # A learned 1x1 convolution from the student's channels to the teacher's on each level.
    imitation.ADAPTER = True
    imitation.SCHEDULE = []

    # LD (CVPR 2022): localisation distillation for heads that predict distributions. Each term compares softened
    # distributions over a region: the boxes' (LD) or the classes' (KD), on the positives (MAIN) or on the valuable
    # localisation region around them (VLR).
    ld = distill.LD = CN()
    for name, weight, temperature in (
        ("MAIN_LD", 0.25, 10.0),
        ("VLR_LD", 0.0625, 10.0),
        ("MAIN_KD", 10.0, 2.0),
        ("VLR_KD", 0.0, 2.0),
    ):
        ld[name] = CN({"WEIGHT": weight, "TEMPERATURE": temperature})
    # LD terms are sums over the batch. The published weights belong to 3 images a GPU, so sums are scaled to this
    # many images, whatever the batch; 0: they are not (the published code, whose weights then depend on the batch).
    ld.REFERENCE_IMAGES = 3
    # Softmax over the bins of each "edge", or over all box outputs of an "anchor" (the published RetinaNet).
    ld.SOFTMAX = "edge"
    ld.VLR = CN()
    # "overlap": anchors whose overlap with a box is between GAMMA times its ATSS threshold and the threshold;
    # "inside_box": all anchors inside a box that are not positive; "auto": the latter for FCOS, else the former.
    ld.VLR.REGION = "auto"
    ld.VLR.GAMMA = 0.25
    # "iof": the published code's overlap, intersection over anchor; "union": the paper's DIoU.
    ld.VLR.OVERLAP = "iof"
    # Anchors count alike (the paper), not by their IoU ("overlap") or the student's score ("inside_box").
    ld.VLR.BINARY = False
    # Leave the positives out of the region (the published RetinaNet; always so for "inside_box").
    ld.VLR.EXCLUDE_POSITIVES = False
    ld.SCHEDULE = []

    # HEAD (ECCV 2022): a detection head of the teacher's kind, the assistant, is trained on the student's features and
    # imitates the teacher (AKD); the student imitates the teacher across kinds (CKD). Weights of 0 leave a part out;
    # with AKD and CKD at 0 ("assist only") no teacher is needed. A one-stage student proposes regions to an R-CNN
    # assistant as MODEL.RPN.PRE_NMS_TOPK_TRAIN, POST_NMS_TOPK_TRAIN, NMS_THRESH and MODEL.PROPOSAL_GENERATOR.MIN_SIZE
    # say. Without a teacher, MODEL.ROI_HEADS and MODEL.ROI_BOX_HEAD describe the assistant, else those of the teacher.
    head = distill.HEAD = CN()
    head.ASSIST_WEIGHT = 1.0
    head.AKD_WEIGHT = 2.0
    head.CKD_WEIGHT = 2.0
    # What the assistant starts from: "teacher", a copy of its head, or "fresh".
    head.ASSISTANT_INIT = "teacher"
    # Student features that an R-CNN assistant reads, fine to coarse. () takes the finest of a one-stage student, as many
    # as the teacher's head reads (four without a teacher), and those of the teacher's strides of a two-stage one.
    head.IN_FEATURES = ()
    # CKD, one-stage students: one linear layer for each anchor of a cell, not one for all.
    head.PER_ANCHOR = False
    # CKD, one-stage students: tower blocks in front of what imitates; -1: all of the tower.
    head.CKD_TAP = -1
    # Of the assistant's own losses, of AKD and of CKD.
    head.ASSIST_SCHEDULE = []
    head.AKD_SCHEDULE = [["Warmup", 2000]]
    head.CKD_SCHEDULE = [["Warmup", 2000]]

    # TF-HEAD, without a teacher: a one-stage student imitates assistants of other kinds that learn from the labels.
    tf_head = distill.TF_HEAD = CN()
    # Meta-architecture of the one-stage assistant, which reads its usual keys; "" for none.
    tf_head.DENSE_ASSISTANT = "OpenMMLabFCOS"
    # Factors on the assistants' own losses. RCNN_WEIGHT 0: no R-CNN assistant, see MODEL.DISTILL.HEAD for its keys.
    tf_head.DENSE_WEIGHT = 0.5
    tf_head.RCNN_WEIGHT = 1.0
    tf_head.CROSS_DENSE_WEIGHT = 1.0
    tf_head.CROSS_RCNN_WEIGHT = 1.3
    tf_head.IN_FEATURES = ()
    tf_head.PER_ANCHOR = True
    tf_head.ASSIST_SCHEDULE = [["Warmup", 2000]]
    # The mimicry stops at the first drop of the learning rate.
    tf_head.CROSS_SCHEDULE = [["Warmup", 2000], ["EarlyStop", 58640]]

    # MSAD (CVPR 2021): L1 distance of a low-resolution student's FPN maps to the fused maps of a MultiScaleDetector.
    msad = distill.MSAD = CN()
    # Published as KD_ALPHA 0.2 times KD_TEMPERATURE 3.
    msad.WEIGHT = 0.6
    msad.IN_FEATURES = ()
    msad.SCHEDULE = [["Warmup", 500]]
