"""Configuration of one training run, that is, one row of a results table (§4.3, Tables 1-5).

An `Experiment` holds everything that decides a result and nothing about the machine: device, folders and the number of
workers are arguments of the run. Only the standard library is imported, so that a table of rows loads fast.
"""

import dataclasses
import difflib
import functools
import hashlib
import importlib
import json
import math
import pkgutil
import re
import typing
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, NamedTuple, Self

_OBJECTIVES = "misa.objectives"
TORCHVISION = "torchvision:"
SEED = "{seed}"
"""In `Experiment.start`: replaced by the run's seed."""
_LABELS = Literal["objectives", "grabcut", "student", "rectangles"]
# The backbone that a smoke run builds in place of a large one.
_SMALLEST = {
    "resnet50": "resnet18",
    "resnet101": "resnet18",
    "swin_s": "swin_t",
    "swin_b": "swin_t",
    "swin_l": "swin_t",
    "efficientnet_lite1": "efficientnet_lite0",
    "efficientnet_lite2": "efficientnet_lite0",
}


def _later(default: Any) -> Any:
    """Declare a field added after the first release; `values` omits it at its default, which keeps old hashes valid."""
    return field(default=default, metadata={"later": True})


def _require_range(values: Any, names: tuple[str, ...], low: float = 0, high: float = math.inf) -> None:
    """Raise ValueError if one of these fields is not a finite number of that range, ends included."""
    for name in names:
        number = getattr(values, name)
        if not (low <= number <= high and number < math.inf):
            wanted = f"from {low} to {high}" if high < math.inf else f"a number of {low} or more"
            raise ValueError(f"{type(values).__name__}.{name} is {number}; it must be {wanted}.")


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _check_fields(value: Any) -> None:
    """Raise ValueError if a field of a dataclass, also of a nested one, does not have its declared type or choice."""
    kind: Any = type(value)
    for name, hint in _hints(kind).items():
        held = getattr(value, name)
        if typing.get_origin(hint) is Literal and held not in typing.get_args(hint):
            choices = ", ".join(map(str, typing.get_args(hint)))
            raise ValueError(f"{type(value).__name__}.{name} is {held!r}; choose one of {choices}.")
    try:
        require_types(value, type(value).__name__)
    except TypeError as error:
        raise ValueError(f"{error}.") from None


def require_types(values: Any, name: str) -> None:
    """Raise TypeError if a field of a dataclass, also of a nested one, does not have its declared type.

    An integer is a float, too, and a list a tuple.
    """
    kind: Any = type(values)
    hints = _hints(kind)
    for one in fields(values):
        value, hint = getattr(values, one.name), hints[one.name]
        if is_dataclass(value) and isinstance(value, tuple(filter(is_dataclass, (hint, *typing.get_args(hint))))):
            require_types(value, f"{name}.{one.name}")
        elif not _fits(value, hint):
            if isinstance(value, float) and not math.isfinite(value):
                raise TypeError(f"{name}.{one.name} is {value}, not a finite number")
            wanted = hint.__name__ if isinstance(hint, type) else re.sub(r"misa\.experiment\.|typing\.", "", str(hint))
            raise TypeError(f"{name}.{one.name} is {value!r}, not of type {wanted}")


def _fits(value: Any, hint: Any) -> bool:
    inner, args = typing.get_origin(hint), typing.get_args(hint)
    if inner is Literal:
        return value in args
    if inner is tuple:
        kinds = args[:1] * len(value) if isinstance(value, tuple | list) and args[-1] is Ellipsis else args
        return isinstance(value, tuple | list) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if args:  # a union
        return any(_fits(value, kind) for kind in args)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return hint is Any or type(value) is hint


_LARGEST_GRID = 1024  # cells on a side, pixels of a stride


@dataclass(frozen=True)
class Network:
    """Architecture of the student. Defaults: SOLOv2 and Mask2Former as in mmdet.

    `scale_ranges` are ranges of sqrt(box area) in pixels of the network input; they overlap, so that an object may be
    assigned to two levels. Neck, head and grid fields are SOLOv2's; Mask2Former is `feature_channels` wide throughout
    and uses `queries`, `encoder_layers`, `decoder_layers` and `points`.
    """

    backbone: str = "resnet50"  # a row of `misa.models.backbones.BACKBONES`, or "timm:<model>"
    base_channels: int = 64  # of a ResNet
    pretrained: bool = True  # ImageNet weights; off: from scratch
    frozen_stages: int = 1  # the stem and as many stages of the backbone are not trained; -1: all are
    norm_eval: bool = True  # keep the backbone's BatchNorm statistics fixed
    drop_path: float = _later(0.3)  # stochastic depth of a Swin; default: SeMask's and APro's
    neck_channels: int = 256
    head_channels: int = 512
    mask_channels: int = 128
    feature_channels: int = 256  # D' of Eq. 2
    stacked_convs: int = 4  # of the head's towers
    strides: tuple[int, ...] = (8, 8, 16, 32, 32)  # of the head's levels
    grids: tuple[int, ...] = (40, 36, 24, 16, 12)  # cells on a side of each level
    scale_ranges: tuple[tuple[int, int], ...] = ((1, 96), (48, 192), (96, 384), (192, 768), (384, 2048))
    queries: int = _later(100)
    encoder_layers: int = _later(6)
    decoder_layers: int = _later(9)
    weights: str = _later("")  # file or name of pretrained weights that replace the usual ones
    points: int = _later(12544)  # sampled per mask loss with supervision="mask"; box losses use every pixel
    rays: Literal["official", "cast"] = _later("official")  # PolarMask's targets, see `misa.ops.rays.ray_lengths`

    def __post_init__(self) -> None:
        _check_fields(self)
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"Network.drop_path is {self.drop_path}; it must be at least 0 and below 1.")
        widths = ("base_channels", "neck_channels", "head_channels", "mask_channels", "feature_channels")
        _require_range(self, (*widths, "stacked_convs", "queries", "encoder_layers", "decoder_layers", "points"), 1)
        for name in ("strides", "grids"):
            if any(not 1 <= number <= _LARGEST_GRID for number in getattr(self, name)):
                given = ", ".join(map(str, getattr(self, name)))
                raise ValueError(f"Network.{name} is ({given}); each must be from 1 to {_LARGEST_GRID}.")


TINY = Network(
    backbone="resnet18",
    base_channels=32,
    pretrained=False,
    frozen_stages=-1,
    norm_eval=False,
    neck_channels=64,
    head_channels=64,
    mask_channels=64,
    feature_channels=64,
    stacked_convs=2,
    strides=(8, 8, 16, 16),
    grids=(16, 12, 8, 6),
    scale_ranges=((1, 28), (20, 48), (40, 80), (64, 4096)),
)
"""A SOLOv2 small enough to train on the embedded data in minutes on one CPU core."""

TINY_MASK2FORMER = dataclasses.replace(TINY, queries=20, encoder_layers=1, decoder_layers=3, points=512)
"""A Mask2Former of that size."""


class Framework(NamedTuple):
    """An entry of `FRAMEWORKS`: facts about a student architecture that are needed without importing it.

    module: file in misa/models/students/ that holds its `Implementation`; "": the file named as the framework.
    smoke: network of its smoke runs.
    supervision: labels that it can be trained on.
    objectives: whether box objectives and a teacher can supervise it; otherwise it has its own losses.
    branches: whether some of its parameters get no gradient in a batch without objects for them.
    """

    module: str = ""
    smoke: Network = TINY
    supervision: tuple[str, ...] = ("box", "mask")
    objectives: bool = True
    branches: bool = False


FRAMEWORKS = {
    "solov2": Framework(),
    "mask2former": Framework(smoke=TINY_MASK2FORMER),
    "boxinst": Framework("baselines", supervision=("box",), objectives=False, branches=True),
    "condinst": Framework(branches=True),
    "solo": Framework("baselines", supervision=("mask",), objectives=False, branches=True),
    "mask_rcnn": Framework("baselines", supervision=("mask",), objectives=False, branches=True),
    "polarmask": Framework(supervision=("mask",), objectives=False, branches=True),
}
"""Student architectures by name, each implemented in a file of misa/models/students/."""


@dataclass(frozen=True)
class Affinity:
    """The pairwise term (§3.3): which affinities are combined (Table 5) and how masks are propagated along them.

    Bandwidths are APro's zetas for SOLOv2 (0.01 and 0.07 on the tree, 0.15 in the window). `global_size` is the side of
    the square to which the tree's image is resized, 96 in APro's Mask2Former; None keeps the masks' size.
    """

    mode: Literal["apro", "pamr"] = "apro"  # a global and a local term, or PAMR's single one (Table 5)
    feature: bool = False  # A^f, Eq. 10
    saliency: bool = False  # A^c, Eq. 12
    balance: float = 0.7  # weight of A^f or A^c against the color affinity A
    tree_bandwidth: float = 0.01
    refine_bandwidth: float | None = 0.07  # of the second pass, guided by the first one's result; None: a single pass
    window: int = 5  # side of the local term's window, odd
    local_bandwidth: float = 0.15
    local_steps: int = 20  # iterations in the window
    global_weight: float = 2.0
    local_weight: float = 1.0
    global_size: int | None = _later(None)
    # Of |M̂ − M| (Eq. 15): the mean of each box, then over the instances; or the mean over the pixels of all boxes.
    reduction: Literal["box_mean", "box_ratio"] = _later("box_mean")
    # How A^f or A^c is combined with A: "sum" is Eq. 13, "product" is low where either is. PAMR uses the local form.
    global_form: Literal["sum", "embedding", "product"] = _later("sum")
    local_form: Literal["sum", "product"] = _later("sum")
    semantic_scale: float = _later(1.0)  # factor on σ of A^f and A^c
    # Interpretations of Eq. 11 (see `misa.ops.readings`): what S^c is, how S is normalized, how K weights channels.
    semantic_values: Literal["channels", "class", "probability"] = _later("channels")
    semantic_norm: Literal["none", "channel", "pixel"] = _later("none")
    semantic_factors: Literal["signed", "absolute", "positive", "contrast"] = _later("signed")
    # Half the window's side as a fraction of the map's shorter side; replaces `window`: APro's 5 x 5 is 0.01 of 200.
    window_share: float | None = _later(None)
    # For mode="pamr": dilations of the 3x3 neighborhood in mask pixels, and the number of iterations.
    pamr_dilations: tuple[int, ...] = _later((1, 2, 4, 8, 12, 24))
    pamr_steps: int = _later(10)
    # One or two names of `misa.ops.affinity.KERNELS` that replace A and the semantic affinity, a semantic one second;
    # `feature` and `saliency` then only say whether a teacher is used.
    kernels: tuple[str, ...] | None = _later(None)
    # The share of a pseudo mask's range in its box that is stretched to one half, its range to [0, 1]; 0: as averaged.
    stretch: float = _later(0.0)

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.feature and self.saliency:
            raise ValueError("Affinity has feature and saliency; A^c stands in for A^f, choose one of them.")
        if self.feature and self.semantic_values != "channels":
            raise ValueError("Affinity.semantic_values is of saliency; A^f compares the channels of S themselves.")
        if self.semantic_values == "probability" and (self.semantic_norm, self.semantic_factors) != ("none", "signed"):
            raise ValueError(
                "Affinity: probabilities are of S and K as they are; with semantic_values probability leave "
                "semantic_norm and semantic_factors out."
            )
        if self.kernels is not None and not 1 <= len(self.kernels) <= 2:
            raise ValueError(f"Affinity.kernels is {self.kernels}; give one or two names, or None.")
        if self.kernels and self.kernels[0] in ("feature", "saliency"):
            raise ValueError(f"Affinity.kernels begins with {self.kernels[0]}, which can only be the second.")
        if not 0 <= self.stretch < 1:
            raise ValueError(f"Affinity.stretch is {self.stretch}; it must be a share below 1, or 0 for none.")
        if self.window < 1 or self.window % 2 == 0:
            raise ValueError(f"Affinity.window is {self.window}; it must be odd.")
        if not self.pamr_dilations or min((self.pamr_steps, *self.pamr_dilations)) < 1:
            raise ValueError("Affinity: pamr_dilations (one or more) and pamr_steps must be at least 1.")
        if self.local_steps < 1:
            raise ValueError(f"Affinity.local_steps is {self.local_steps}; it must be at least 1.")
        positive = ("tree_bandwidth", "refine_bandwidth", "local_bandwidth", "semantic_scale", "window_share")
        for name in positive:
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"Affinity.{name} is {value}; it must be a positive number.")
        _require_range(self, ("balance", "global_weight", "local_weight"))


@dataclass(frozen=True)
class Distillation:
    """FSD (§3.2): its two parts (Table 4), the Fourier mask of Eq. 4 and the weights of Eq. 6 (§4.3).

    `unit` "raw" uses S unscaled and sums over its channels, as Eq. 6 is printed: the loss then grows with the scale and
    the number of channels of S, which are arbitrary. "spread" divides S by its standard deviation and averages.

    `radius` must be scaled with the map: the paper's 10 is a twentieth of the height of a map of 200 x 336. On a much
    smaller one 10 bins are nearly the whole spectrum, and almost nothing is left to distill inside the boxes.
    """

    frequency: bool = True  # the low band and the high one are compared apart
    space: bool = True  # background and boxes are compared apart; with both, each region has one band (Eq. 6)
    radius: float = 10.0  # t, in frequency bins of the feature map
    scale: float = 0.2  # theta
    bg_weight: float = 6.0
    fg_weight: float = 10.0
    weight: float = 1.0  # of L_trans in the total loss; the paper gives none
    unit: Literal["raw", "spread"] = _later("raw")

    def __post_init__(self) -> None:
        _check_fields(self)
        if not 0 <= self.radius < math.inf:
            raise ValueError(f"Distillation.radius is {self.radius}; it must be a number of bins of 0 or more.")
        if not 0 <= self.scale <= 1:
            raise ValueError(f"Distillation.scale is {self.scale}; it must be from 0 to 1, as Eq. 4's α.")
        _require_range(self, ("bg_weight", "fg_weight", "weight"))


@dataclass(frozen=True)
class Schedule:
    """Optimizer, batch and length of the training. Defaults: §4.3 for AdamW and batch, APro's schedule otherwise."""

    epochs: int = 36
    batch: int = 16  # images per step, over all devices
    lr: float = 1.2e-4
    weight_decay: float = 0.05
    decay: Literal["step", "cosine"] = "step"
    milestones: tuple[int, ...] = (27, 33)  # epochs, for decay="step"
    warmup: int = 2000  # iterations
    clip: float = 1.0  # maximum gradient norm
    optimizer: Literal["adamw", "sgd"] = _later("adamw")  # sgd: with momentum 0.9
    backbone_lr: float = _later(1.0)  # as a multiple of lr
    norm_decay: bool = _later(False)  # weight decay of normalization layers, too
    precision: Literal["float32", "bfloat16", "float16"] = _later("float32")  # autocast of the networks, not the losses

    def __post_init__(self) -> None:
        _check_fields(self)
        low = {"epochs": self.epochs, "batch": self.batch, "warmup": self.warmup + 1}
        for name, number in low.items():
            if number < 1:
                raise ValueError(f"Schedule.{name} is {getattr(self, name)}; it is too small.")
        if not (0 < self.lr < math.inf and self.weight_decay >= 0 and self.clip > 0):
            raise ValueError("Schedule: lr and clip must be positive, weight_decay at least 0.")
        _require_range(self, ("weight_decay", "backbone_lr"))


@dataclass(frozen=True)
class Augmentation:
    """Random flip and resizing: the short side is drawn from `short_sides`, the long one is capped (pixels).

    `jitter` switches to large-scale jittering (Ghiasi et al. 2021): the image is scaled to fit a square of `crop`
    pixels, times a factor drawn from the range `jitter`, then cropped or padded to the square.
    """

    short_sides: tuple[int, ...] = (640, 672, 704, 736, 768, 800)
    long_side: int = 1333
    test_short_side: int = 800
    flip: float = 0.5
    jitter: tuple[float, float] | None = _later(None)
    crop: int = _later(1024)

    def __post_init__(self) -> None:
        _check_fields(self)
        _require_range(self, ("flip",), 0, 1)
        _require_range(self, ("long_side", "test_short_side", "crop"), 1)
        if not self.short_sides or min(self.short_sides) < 1:
            raise ValueError(f"Augmentation.short_sides is {self.short_sides}; give one or more sizes in pixels.")
        if self.jitter is not None and not 0 < self.jitter[0] <= self.jitter[1] < math.inf:
            raise ValueError(f"Augmentation.jitter is {self.jitter}; give the smallest and the largest factor.")


@dataclass(frozen=True)
class Inference:
    """Thresholds at test time (APro's for VOC by default)."""

    score: float = 0.05  # before matrix NMS
    keep: float = 0.025  # score after it
    mask: float = 0.7  # foreground probability; Mask2Former has no such threshold: its masks are cut at 0.5
    candidates: int = 500
    per_image: int = 100
    from_shadow: bool = _later(False)  # predict with the EMA model instead of the student (BoxTeacher)
    rescore: bool = _later(False)  # CondInst: combine scores with the masks' confidence (BoxTeacher)

    def __post_init__(self) -> None:
        _check_fields(self)
        _require_range(self, ("score", "keep", "mask"), 0, 1)
        _require_range(self, ("candidates", "per_image"), 1)


@dataclass(frozen=True)
class Semantic:
    """Train SeMask, the semantic teacher (§3.1), instead of a student. The paper does not say what supervises it.

    `labels` "objectives" applies the student's box objectives per class, without label maps. The others are pseudo
    label maps made before training: by GrabCut in each box, by a trained box-supervised student, or by filling the
    boxes (the baseline). With supervision="mask" they come from the ground-truth masks (the upper bound).
    """

    labels: _LABELS = "objectives"
    student: str = ""  # for labels="student": a row, of which the run with the same seed is used, or a run folder
    stage_weight: float = 0.4  # of the auxiliary loss on the summed stage maps, as in SeMask
    # For labels="objectives": weights of the background outside all boxes, of the class inside them, and of
    # self-training on the network's own confident predictions inside them.
    outside_weight: float = 1.0
    class_weight: float = 1.0
    sure_weight: float = _later(0.0)
    loss_stride: int = 4  # input pixels per pixel of the objectives' masks
    residual: Literal["input", "norm"] = "input"  # what the attention is added to; "norm" as published for Swin
    network: str = _later("semask")  # a name in `misa.models.teacher.table.TEACHERS`

    def __post_init__(self) -> None:
        _check_fields(self)
        _require_range(self, ("stage_weight", "outside_weight", "class_weight", "sure_weight"))
        _require_range(self, ("loss_stride",), 1)


class Needs(NamedTuple):
    """Inputs that an objective requires from the model; only these are built and computed."""

    prior: bool = False  # S and K of the semantic teacher
    adapter: bool = False  # FSD's layers on top of the dense feature I
    colors: bool = False  # the images as RGB, 0..255
    shadow: bool = False  # an EMA model of the student, and its masks of the same objects
    detections: bool = False  # an EMA model of the student, and its detections in the images
    structure: int = 0  # channels of a map predicted from I
    per_box: bool = False  # one mask per box, and the finest map of the student's neck


@dataclass(frozen=True)
class Objective:
    """Loss of a student with its constants: a frozen dataclass in `misa/objectives/<kind>.py`.

    Derive subclasses from `misa.objectives.base.BoxObjective`, which defines the interface.
    """

    @property
    def needs(self) -> Needs:
        """The required inputs; none by default."""
        return Needs()

    @property
    def described(self) -> str:
        """What `misa rows` calls it: its name, and parts that it may have."""
        return type(self).__name__

    @property
    def kind(self) -> str:
        """Name of its file, from which a stored row loads it again."""
        package, _, kind = type(self).__module__.rpartition(".")
        if package != _OBJECTIVES:
            raise ValueError(
                f"{type(self).__name__} is of the module {type(self).__module__}; an objective belongs into a file of "
                f"{_OBJECTIVES}, by whose name a run finds it again."
            )
        if not _is_named_like(type(self).__name__, kind):
            raise ValueError(
                f"{type(self).__name__} is in {kind}.py of {_OBJECTIVES}, where a run does not find it again; name "
                "class and file alike, as FillShare and fill_share.py."
            )
        return kind


@dataclass(frozen=True)
class Expected:
    """The paper's results for a row, in percent."""

    ap: float
    ap50: float | None
    ap75: float | None
    ap_s: float | None = None
    ap_m: float | None = None
    ap_l: float | None = None


_OPTIONAL = {"affinity": Affinity, "distillation": Distillation, "semantic": Semantic}  # a row may lack them


@dataclass(frozen=True)
class Experiment:
    """One training run: data, student, supervision, loss terms, schedule. Make variants with `but`."""

    data: Literal["demo", "coco", "voc"] = "voc"  # demo: synthetic scenes; else a folder in COCO layout
    student: str = "solov2"  # a name in `FRAMEWORKS`
    supervision: Literal["box", "mask"] = "box"
    network: Network = field(default_factory=Network)
    projection_weight: float = 3.0
    affinity: Affinity | None = field(default_factory=Affinity)
    schedule: Schedule = field(default_factory=Schedule)
    augmentation: Augmentation = field(default_factory=Augmentation)
    inference: Inference = field(default_factory=Inference)
    scenes: tuple[tuple[str, Any], ...] = ()  # parameters of misa.data.scenes.scenes.Scenes, for data="demo"
    limit: int | None = None  # a smoke run, of this many images; real ones take all of their data
    distillation: Distillation | None = None
    # Row of the teacher, which is trained first unless its run exists (Tables 3-5 and MISA itself); or a segmentation
    # network of torchvision with its weights or those of a file: "torchvision:<network>[:<file>]".
    teacher: str = ""
    semantic: Semantic | None = None  # train the semantic teacher instead of the student
    expected: Expected | None = None
    # Replaces projection_weight, affinity and distillation as the student's loss.
    objective: Objective | None = field(default=None, metadata={"later": True})
    # Run folder or checkpoint whose weights the network begins with; {seed} in it stands for the run's seed.
    start: str = _later("")

    def __post_init__(self) -> None:
        if isinstance(self.objective, Objective):
            _ = self.objective.kind  # raises for one that a run would not find again
        _check_fields(self)
        self._check_student()
        self._check_objective()
        _require_range(self, ("projection_weight",))
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"Experiment.limit is {self.limit}; it must be a number of images of 1 or more, or None.")
        if self.affinity is not None and self.affinity.window < 3:
            raise ValueError(f"Affinity.window is {self.affinity.window}; a row needs neighbors, 3 or more.")

    def _check_student(self) -> None:
        """Raise ValueError if the student does not support the row's supervision."""
        if self.student not in FRAMEWORKS:
            choices = ", ".join(FRAMEWORKS)
            raise ValueError(f"Experiment.student is {self.student!r}; choose one of {choices}.")
        framework = FRAMEWORKS[self.student]
        taught = self.teacher or self.semantic or self.objective
        if self.supervision not in framework.supervision or (taught and not framework.objectives):
            own = "a baseline with losses of its own" if not framework.objectives else "a student"
            raise ValueError(
                f"Experiment.student {self.student!r} is {own}: it takes supervision="
                f"{' or '.join(map(repr, framework.supervision))}, not {self.supervision!r}"
                f"{'' if framework.objectives else ', no objective and no teacher'}."
            )

    def _check_objective(self) -> None:
        """Raise ValueError if loss terms, objective and teacher are inconsistent."""
        wants = self.distillation is not None or (self.affinity and (self.affinity.feature or self.affinity.saliency))
        if self.objective is not None:
            terms = (self.projection_weight, self.affinity, self.distillation)
            if terms != (3.0, None, None) or self.supervision != "box" or self.semantic:
                raise ValueError(
                    f"Experiment.objective ({self.objective.kind}) supervises a student from boxes in place of "
                    "projection_weight, affinity and distillation; leave these at 3.0, None and None, supervision at "
                    "'box' and semantic at None."
                )
            wants = self.objective.needs.prior
        followed = self.objective is not None and (self.objective.needs.shadow or self.objective.needs.detections)
        if self.inference.from_shadow and not followed:
            raise ValueError(
                "Inference.from_shadow: nothing follows this row's student; name an objective with a shadow, such as "
                "BoxTeacher, or leave it False."
            )
        if self.inference.rescore and (self.student != "condinst" or self.supervision != "box"):
            raise ValueError("Inference.rescore is of condinst students that learn from boxes; leave it False.")
        if bool(wants) != bool(self.teacher) and self.semantic is None:
            raise ValueError(
                "Experiment.teacher and what learns from it belong together: distillation, feature or saliency in "
                f"affinity, or an objective that needs its prior. teacher is {self.teacher!r}; name a row such as "
                "'teacher:demo', or leave all out."
            )

    @property
    def trains_teacher(self) -> bool:
        """Whether its teacher is a row to be trained first; torchvision's networks are already trained."""
        return bool(self.teacher) and not self.teacher.startswith(TORCHVISION)

    def but(self, **changes: Any) -> Self:
        """Return a copy with some fields changed; a dict changes fields of a nested dataclass, or of its defaults.

        >>> Experiment().but(schedule={"epochs": 1}).schedule.epochs
        1
        """
        for name, value in changes.items():
            if not hasattr(self, name):
                names = ", ".join(f.name for f in dataclasses.fields(self))
                raise ValueError(f"Experiment has no field {name!r}; its fields are {names}.")
            current = getattr(self, name)
            if isinstance(value, dict) and current is None and name in _OPTIONAL:
                current = _OPTIONAL[name]()
            if isinstance(value, dict) and dataclasses.is_dataclass(current):
                known = [f.name for f in dataclasses.fields(current)]
                for key in sorted(value.keys() - set(known)):
                    near = difflib.get_close_matches(key, known, n=1)
                    hint = f"did you mean {near[0]!r}?" if near else f"its fields are {', '.join(known)}."
                    raise ValueError(f"{type(current).__name__} has no field {key!r}; {hint}")
                changes[name] = dataclasses.replace(current, **value)  # type: ignore[type-var]
        return dataclasses.replace(self, **changes)

    def expecting(self, ap: float, *others: float | None) -> Self:
        """Return a copy with the paper's results, given in the order of the fields of `Expected`."""
        return dataclasses.replace(self, expected=Expected(ap, *others))

    def smoke(self) -> Self:
        """Return a copy that runs the same code for two training steps, with small images and an untrained network."""
        tiny = FRAMEWORKS[self.student].smoke
        network = dataclasses.replace(tiny, backbone=_SMALLEST.get(self.network.backbone, self.network.backbone))
        return self.but(
            network=network,
            schedule={"epochs": 1, "batch": 2, "warmup": 1, "decay": "cosine"},
            augmentation={"short_sides": (128,), "long_side": 192, "test_short_side": 128}
            | ({"crop": 128} if self.augmentation.jitter else {}),
            inference={"candidates": 50, "per_image": 10},
            scenes=(("train", 8), ("val", 4)) if self.data == "demo" else (),
            limit=4,
            expected=None,
            start="",
        )

    def values(self) -> dict[str, Any]:
        """Return the fields as nested plain values; fields added later only if they differ from their default."""
        values: dict[str, Any] = plain(self)
        return values

    def digest(self) -> str:
        """Return a short hash of everything that decides the result, that is, of all fields but `expected`."""
        values = {name: value for name, value in self.values().items() if name != "expected"}
        for name in ("semantic", "distillation", "teacher"):
            if not values[name]:
                del values[name]  # as before the field existed, so that older runs keep their hash
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> Self:
        """Inverse of `values`; also accepts values read from JSON, with lists in place of tuples."""
        return _build(cls, values)


def plain(value: Any) -> Any:
    """Return a dataclass as nested plain values: its fields by name, and the `kind` of an objective."""
    if not dataclasses.is_dataclass(value):
        return value
    kept = (
        f for f in dataclasses.fields(value) if not (f.metadata.get("later") and getattr(value, f.name) == f.default)
    )
    kind = {"kind": value.kind} if isinstance(value, Objective) else {}
    return kind | {f.name: plain(getattr(value, f.name)) for f in kept}


@dataclass(frozen=True)
class Comparison:
    """A table, of the paper or of one's own: rows of one module, compared with one of them seed by seed.

    rows: printed name of each row; in the module a row is called `<data>_<row>`.
    data: dataset of the paper's results among the rows; "" without a paper's.
    details: whether `misa.engine.reports.tables.Table.details` is printed below the table.
    """

    title: str
    rows: dict[str, str]
    baseline: str
    data: str = ""
    details: bool = False


def objective_from(values: dict[str, Any]) -> Objective:
    """Build an objective from its plain values and `kind`; ValueError if the kind is unknown or its class not found."""
    values = dict(values)
    kind, package = values.pop("kind", None), importlib.import_module(_OBJECTIVES)
    known = sorted({module.name for module in pkgutil.iter_modules(package.__path__)} - {"base"})
    if kind not in known:  # never import another module: the name may come from an untrusted file
        raise ValueError(f"there is no objective {kind!r}; the objectives are {', '.join(known)}.")
    module = importlib.import_module(f"{_OBJECTIVES}.{kind}")
    named = [value for name, value in vars(module).items() if isinstance(value, type) and _is_named_like(name, kind)]
    if len(named) != 1:
        raise ValueError(f"{kind}.py of {_OBJECTIVES} needs one class named like it, as FillShare in fill_share.py.")
    (own,) = named
    built: Objective = _build(own, values)
    return built


def _is_named_like(name: str, kind: str) -> bool:
    """Whether a class has the name of its objective's file, in CamelCase."""
    return name.lower() == kind.replace("_", "")


def _build(kind: Any, values: Any) -> Any:
    if kind is Objective:
        return objective_from(values)
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"{kind.__name__} has no field {unknown[0]!r}; its fields are {', '.join(sorted(known))}.")
    built = {}
    for name, value in values.items():
        nested = [t for t in (hints[name], *typing.get_args(hints[name])) if dataclasses.is_dataclass(t)]
        built[name] = _build(nested[0], value) if nested and isinstance(value, dict) else _frozen(value)
    return kind(**built)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
