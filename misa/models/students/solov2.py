"""SOLOv2 as a box-supervised student (Eq. 2): mmdet's head, with `Positives` in place of mask targets.

Every box is trained on, as with mmdet's masks; the published code of APro and BoxLevelSet leaves out boxes that cover
fewer than 10 pixels of the input. A cell that several objects share has the class of the last and a mask to learn for
each of them, as in mmdet and in DiscoBox's code; APro's and BoxLevelSet's keep the mask of the last only.
"""

from typing import Any, ClassVar, NamedTuple

import torch
from mmdet.models.dense_heads import SOLOV2Head
from mmdet.models.detectors import SOLOv2
from mmengine.config import ConfigDict
from mmengine.dist import get_world_size
from mmengine.structures import InstanceData
from torch import Tensor

from misa.errors import UserError
from misa.experiment import Experiment, Inference, Network
from misa.losses.inputs import Positives
from misa.models.students.base import BoxMasks, BoxSupervised, StudentOutput
from misa.models.students.batch_means import share
from misa.models.students.common import mmdet_model, objectives
from misa.models.students.solov2_decode import Dense, decode, dense_outputs, each_image
from misa.models.students.solov2_inference import DensePart, find_boxes_by_cells, find_by_cells
from misa.models.students.table import Implementation
from misa.objectives.base import Detected, PerBox
from misa.ops.boxes import box_masks, centre_cells, extents, positive_cells
from misa.ops.transfer import on_host, to_device


class Cells(NamedTuple):
    """The positive grid cells of a batch, ordered by image, on the host.

    position: a cell's index into the concatenated levels of its image. instance: its box, within the image. counts:
    positive cells per image. targets (b cells): the class of every cell; the number of classes is the background.
    centres: the index of the cell at each box's center (`centre_cells`), positive or not.
    """

    position: Tensor
    instance: Tensor
    labels: Tensor
    image: Tensor
    counts: list[int]
    targets: Tensor
    centres: Tensor


class BoxSOLOv2Head(SOLOV2Head):
    """SOLOv2's head with cells assigned by boxes; it returns its masks as `Positives`."""

    def assign(self, instances: list[InstanceData], size: tuple[int, int]) -> Cells:
        """Assign cells to each image's `bboxes` (n, 4) and `labels` (n,); `size`: the padded input's (h, w)."""
        found = [self._assign_image(on_host(truth.bboxes), size) for truth in instances]
        labels = [on_host(truth.labels) for truth in instances]
        cells = sum(grid * grid for grid in self.num_grids)
        return Cells(
            position=torch.cat([position for position, _ in found]),
            instance=torch.cat([instance for _, instance in found]),
            labels=torch.cat([own[instance] for own, (_, instance) in zip(labels, found, strict=True)]),
            image=torch.cat([torch.full_like(instance, b) for b, (_, instance) in enumerate(found)]),
            counts=[len(position) for position, _ in found],
            targets=torch.stack(
                [
                    cell_labels(own, instance, position, cells, self.num_classes)
                    for own, (position, instance) in zip(labels, found, strict=True)
                ]
            ),
            centres=torch.cat(
                [centre_cells(on_host(own.bboxes), size, self.num_grids, self.scale_ranges) for own in instances]
            ),
        )

    def _assign_image(self, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        positions, instances, start = [], [], 0
        for grid, scale_range in zip(self.num_grids, self.scale_ranges, strict=True):
            instance, cell = positive_cells(boxes, size, grid, scale_range, shrink=self.pos_scale)
            positions.append(start + cell)
            instances.append(instance)
            start += grid * grid
        return torch.cat(positions), torch.cat(instances)

    def match(
        self, features: tuple[Tensor, ...], cells: Cells, instances: list[InstanceData], *, per_box: bool = False
    ) -> StudentOutput:
        """Return the positives, the dense feature I (b d h w) and the classification loss of a batch."""
        kernels, scores, mask_features = self(features)
        device = mask_features.device
        h, w = mask_features.shape[-2:]
        strung = torch.cat([level.flatten(2) for level in kernels], dim=2)
        every = [box_masks(truth.bboxes, h, w, stride=self.mask_stride) for truth in instances]
        boxes = [
            own[instance.to(device, non_blocking=True)]
            for own, instance in zip(every, cells.instance.split(cells.counts), strict=True)
        ]
        logits = torch.cat([level.flatten(2) for level in scores], dim=2).transpose(1, 2).flatten(0, 1)
        targets = to_device(cells.targets.flatten(), device)
        # One more than the positive cells, as in mmdet: a batch without any still trains the background. A cell that
        # several objects share counts once.
        count = int((cells.targets < self.num_classes).sum()) + 1 / get_world_size()
        loss = self.loss_cls(logits.float(), targets, avg_factor=count) * share(count, device)
        first = torch.tensor([0, *(len(truth.bboxes) for truth in instances)]).cumsum(0)[:-1]
        instance = first[cells.image] + cells.instance
        masks = _masks_at(cells.position, cells.image, strung, mask_features)
        positives = Positives(masks, torch.cat(boxes), cells.labels, cells.image, instance)
        found = StudentOutput(positives, mask_features, {"loss_cls": loss}, places=cells)
        if not per_box:
            return found
        image = torch.cat([torch.full((len(own),), b) for b, own in enumerate(every)])
        single = Positives(
            _masks_at(cells.centres, image, strung, mask_features),
            torch.cat(every),
            torch.cat([on_host(truth.labels) for truth in instances]),
            image,
            torch.arange(len(image)),
        )
        return found._replace(per_box=PerBox(single, features[0]))


def _masks_at(position: Tensor, image: Tensor, kernels: Tensor, dense: Tensor) -> Tensor:
    """Mask logits (n h w) of the cells at `position` (n, on the host, ordered by `image`), by kernels (b d cells)."""
    counts = torch.bincount(image, minlength=len(dense)).tolist()
    h, w = dense.shape[-2:]
    there = (each.to(dense.device, non_blocking=True) for each in (image, position))
    chosen = kernels.transpose(1, 2)[tuple(there)]
    with torch.autocast(dense.device.type, enabled=False):  # a sum over hundreds of channels may overflow float16
        masks = [
            (kernel @ own).view(-1, h, w)
            for kernel, own in zip(chosen.float().split(counts), dense.float().flatten(2), strict=True)
        ]
    return torch.cat(masks)


def cell_labels(labels: Tensor, instance: Tensor, cell: Tensor, cells: int, background: int) -> Tensor:
    """The class of every cell (cells,): `background` if it is not positive; the later instance wins a shared cell."""
    winner = labels.new_full((cells,), -1).scatter_reduce(0, cell, instance, "amax")
    return torch.cat([labels, labels.new_full((1,), background)])[winner]


def solov2_config(experiment: Experiment, classes: tuple[str, ...]) -> ConfigDict:
    """The detector's config."""
    network = experiment.network
    model = mmdet_model("solov2/solov2_r50_fpn_1x_coco.py", SOLOv2, experiment)
    grid_neck_and_head(model, network, len(classes))
    model.mask_head.mask_feature_head.update(feat_channels=network.mask_channels, out_channels=network.feature_channels)
    model.test_cfg.update(matrix_nms(experiment.inference))
    if experiment.supervision == "box":
        model.type, model.mask_head.type = MISA, BoxSOLOv2Head
        model.update(objectives(experiment, len(classes)))
    return model


def grid_neck_and_head(model: ConfigDict, network: Network, classes: int) -> None:
    """Set the grids of neck and head, one level per stride, in SOLO and SOLOv2; UserError for unequal lengths."""
    lengths = {name: len(getattr(network, name)) for name in ("strides", "grids", "scale_ranges")}
    if len(set(lengths.values())) > 1 or min(lengths.values()) < 4:
        given = ", ".join(f"{count} {name}" for name, count in lengths.items())
        raise UserError(f"the network has {given}; give as many of each, one a level, and at least four levels.")
    model.neck.num_outs = len(network.strides)
    model.mask_head.update(
        num_classes=classes,
        in_channels=network.neck_channels,
        feat_channels=network.head_channels,
        stacked_convs=network.stacked_convs,
        strides=list(network.strides),
        scale_ranges=network.scale_ranges,
        num_grids=list(network.grids),
    )


def matrix_nms(inference: Inference) -> dict[str, Any]:
    """Test-time thresholds of SOLO and SOLOv2."""
    return {
        "nms_pre": inference.candidates,
        "score_thr": inference.score,
        "mask_thr": inference.mask,
        "filter_thr": inference.keep,
        "max_per_img": inference.per_image,
    }


class MISA(BoxSupervised, SOLOv2):
    """SOLOv2 as the student."""

    mask_head: BoxSOLOv2Head
    neck: Any
    test_cfg: ConfigDict
    lacks: ClassVar[dict[str, str]] = {}

    def feature_channels(self) -> int:
        """D' of Eq. 2."""
        return int(self.mask_head.mask_feature_head.out_channels)

    def finest_channels(self) -> int:
        """Those of the FPN."""
        return int(self.neck.out_channels)

    def dense_feature(self, maps: tuple[Tensor, ...]) -> Tensor:
        """The mask features of Eq. 2."""
        return _dense_feature(self, maps)

    def training_output(self, images: Tensor, instances: list[InstanceData], places: Any = None) -> StudentOutput:
        """Positives are the assigned cells; places: `Cells`."""
        cells = places or self.mask_head.assign(instances, (images.shape[-2], images.shape[-1]))
        per_box = self.objective.needs.per_box
        return self.mask_head.match(self.extract_feat(images), cells, instances, per_box=per_box)

    def detect(self, images: Tensor, sizes: list[tuple[int, int]]) -> list[Detected]:
        """Detect by matrix NMS; boxes are the masks' extents."""
        head, limits, found = self.mask_head, self.test_cfg, []
        for dense in each_image(dense_outputs(head(self.extract_feat(images)))):
            scores, _, masks = decode(
                Dense(*(x.float() for x in dense)),
                grids=head.num_grids,
                strides=head.strides,
                score=limits.score_thr,
                keep=limits.filter_thr,
                mask=limits.mask_thr,
                candidates=limits.nms_pre,
                per_image=limits.max_per_img,
            )
            found.append(Detected(extents(masks) * head.mask_stride, scores, masks))
        return found

    def masks_of_boxes(self, images: Tensor, instances: list[InstanceData]) -> list[BoxMasks]:
        """The mean of the masks of the grid cells assigned to a box."""
        cells = self.mask_head.assign(instances, (images.shape[-2], images.shape[-1]))
        positives = self.mask_head.match(self.extract_feat(images), cells, instances).positives
        found = []
        for logits, owner, truth in zip(
            positives.mask_logits.split(cells.counts), cells.instance.split(cells.counts), instances, strict=True
        ):
            own = (torch.arange(len(truth.bboxes))[:, None] == owner).to(logits)  # (boxes, cells)
            count = own.sum(dim=1)
            total = torch.einsum("np,phw->nhw", own, logits.sigmoid())
            found.append(BoxMasks(total / count.clamp(min=1)[:, None, None], count > 0))
        return found


def _dense_feature(model: SOLOv2, maps: tuple[Tensor, ...]) -> Tensor:
    """`MISA.dense_feature`, also for mmdet's SOLOv2 trained from masks."""
    features: Tensor = model.mask_head.mask_feature_head(maps)
    return features


solov2 = Implementation(
    solov2_config,
    dense_feature=_dense_feature,
    find=find_by_cells,
    find_boxes=find_boxes_by_cells,
    mask_threshold="any",
    script=DensePart,
)
