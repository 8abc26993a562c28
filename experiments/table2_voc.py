"""Table 2: PASCAL VOC 2012 val, trained on train_aug; 8 GPUs with 2 images each, as in §4.3.

misa data voc path/to/VOC2012 --sbd path/to/sbd --out path/to/voc      # once
misa train experiments/table2_voc.py:misa_r50 --data-root path/to/voc --gpus 8
misa train experiments/table2_voc.py:misa_m2f_r101 --data-root path/to/voc --gpus 8

"m2f" are the rows with a star: Mask2Former instead of SOLOv2. Sources: [P] the paper, §4.3; [A] APro's published
configurations; [M] mmdet's configurations; [S] BoxInstSeg's of BoxInst on VOC; [L] BoxLevelSet's published code and
configurations; [T] BoxTeacher's; [I] SIM's.
"""

from misa.experiment import (
    Affinity,
    Augmentation,
    Distillation,
    Experiment,
    Inference,
    Network,
    Schedule,
)
from misa.objectives.boxlevelset import BoxLevelSet
from misa.objectives.boxteacher import BoxTeacher
from misa.objectives.sim import SIM

# SOLOv2 --------------------------------------------------------------------------------------------------------------
# MISA's row is Table 3's `voc_literal`: Eq. 3-15 as printed. Sizes of heads [M], images 640-800 with flip
# [P: "default settings recommended in mmdet"; M, A].
MISA = Experiment(
    data="voc",
    projection_weight=3.0,  # [A]
    affinity=Affinity(
        tree_bandwidth=0.01,  # [A] zeta_gl
        refine_bandwidth=0.07,  # [A] zeta_gh
        local_bandwidth=0.15,  # [A] zeta_s
        window=5,  # [A] for VOC
        local_steps=20,  # [A]
        global_weight=2.0,  # [A] in the code of the head
        local_weight=1.0,
        saliency=True,
        balance=0.7,  # [P]
    ),
    distillation=Distillation(radius=10.0, scale=0.2, bg_weight=6.0, fg_weight=10.0),  # [P]
    teacher="teacher:voc_r50",  # [P] the student's backbone
    schedule=Schedule(
        epochs=36,  # [A]; the paper gives no length
        milestones=(27, 33),  # [A]
        batch=16,  # [P]
        lr=1.2e-4,  # [P]
        weight_decay=0.05,  # [P]
        warmup=2000,  # [A]
        clip=1.0,  # [A]
    ),
    inference=Inference(score=0.05, keep=0.025, mask=0.7),  # [A] for VOC
)
APRO = MISA.but(
    affinity={"saliency": False},
    distillation=None,
    teacher="",
    schedule={"batch": 8, "lr": 5e-5, "weight_decay": 0.1},  # [A] for VOC: 4 GPUs of 2
)
R101 = {"backbone": "resnet101"}

# Mask2Former ---------------------------------------------------------------------------------------------------------
MISA_M2F = MISA.but(
    student="mask2former",
    network=Network(frozen_stages=-1),  # [M, A] no frozen stages, fixed BatchNorm
    projection_weight=5.0,  # [A]
    affinity={
        "tree_bandwidth": 0.02,  # [A] for VOC R-50
        "refine_bandwidth": 0.03,  # [A]
        "global_weight": 1.0,  # [A]
        "global_size": 96,  # [A]
        "reduction": "box_ratio",  # [A]
    },
    schedule={
        "epochs": 50,  # [A] 33,065 steps of 16
        "milestones": (44, 48),  # [A] steps 29,390 and 31,840, that is epochs 44.4 and 48.1
        "backbone_lr": 0.1,  # [M, A]
        "warmup": 0,  # [M, A]
        "clip": 0.01,  # [M, A]
    },
    augmentation=Augmentation(jitter=(0.1, 2.0), crop=1024),  # [M, A]
    inference=Inference(per_image=100, mask=0.5),  # [A]; Mask2Former has no other threshold
)
APRO_M2F = MISA_M2F.but(
    affinity={"saliency": False},
    distillation=None,
    teacher="",
    schedule={"lr": 1e-4},  # [A]
)
TREE_R101 = {"tree_bandwidth": 0.03}  # [A] for VOC R-101

# BoxInst -------------------------------------------------------------------------------------------------------------
BOXINST = Experiment(
    data="voc",
    student="boxinst",
    affinity=None,  # it has its own pairwise term
    network=Network(head_channels=256),  # [M] boxinst_r50_fpn_ms-90k
    schedule=Schedule(
        optimizer="sgd",
        lr=0.005,
        weight_decay=1e-4,
        norm_decay=True,
        epochs=36,
        milestones=(27, 33),
        batch=8,  # 4 GPUs of 2
        warmup=500,
        clip=35.0,  # [S] and mmdet do not clip: a finite limit that is hardly ever reached
    ),  # [S]
    inference=Inference(score=0.05, mask=0.5),  # [M]
)

# BoxTeacher and SIM --------------------------------------------------------------------------------------------------
# Neither [T] nor [I] has a configuration of VOC: the schedule is BoxInst's, and not verified.
BOXTEACHER = BOXINST.but(
    student="condinst", objective=BoxTeacher(), inference={"from_shadow": True, "rescore": True}
)  # [T]
SIM_ROW = BOXINST.but(student="condinst", objective=SIM())  # [I] but for pasting
SIM_PASTE = SIM_ROW.but(objective=SIM(paste=50))  # [I]

# BoxLevelSet ---------------------------------------------------------------------------------------------------------
LEVELSET = APRO.but(affinity=None, objective=BoxLevelSet())  # [L] schedule and thresholds, which APro adopted

ROWS = {
    "boxinst_r50": BOXINST.expecting(34.3, 59.1, 34.2),
    "boxinst_r101": BOXINST.but(network=R101).expecting(36.5, 61.4, 37.0),
    "boxlevelset_r50": LEVELSET.expecting(36.3, 64.2, 35.9),
    "boxlevelset_r101": LEVELSET.but(network=R101).expecting(38.3, 66.3, 38.7),
    "sim_r50": SIM_ROW,
    "sim_r101": SIM_ROW.but(network=R101),
    "sim_paste_r50": SIM_PASTE.expecting(36.7, 65.5, 35.6),
    "sim_paste_r101": SIM_PASTE.but(network=R101).expecting(38.6, 67.1, 38.3),
    "boxteacher_r50": BOXTEACHER.expecting(38.6, 66.4, 38.7),
    "boxteacher_r101": BOXTEACHER.but(network=R101).expecting(40.2, 67.6, 40.8),
    "apro_r50": APRO.expecting(38.3, 65.1, 39.4),
    "apro_r101": APRO.but(network=R101).expecting(40.3, 67.2, 41.9),
    "apro_m2f_r50": APRO_M2F.expecting(42.3, 70.6, 44.5),
    "apro_m2f_r101": APRO_M2F.but(network=R101, affinity=TREE_R101).expecting(43.6, 72.0, 45.7),
    "misa_r50": MISA.expecting(39.9, 67.4, 40.6),
    "misa_r101": MISA.but(network=R101, teacher="teacher:voc_r101").expecting(41.5, 68.4, 42.2),
    "misa_m2f_r50": MISA_M2F.expecting(43.5, 71.8, 45.2),
    "misa_m2f_r101": MISA_M2F.but(network=R101, affinity=TREE_R101, teacher="teacher:voc_r101").expecting(
        44.7, 73.5, 46.1
    ),
}
