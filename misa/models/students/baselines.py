"""mmengine configs of the published baselines of Tables 1 and 2 that mmdet implements.

SOLO and Mask R-CNN are trained from masks, BoxInst from boxes by its own losses. Each config is mmdet's file, in which
only the settings of the `Experiment` are replaced.
"""

from mmdet.models.data_preprocessors import BoxInstDataPreprocessor
from mmdet.models.detectors import SOLO, BoxInst, MaskRCNN
from mmengine.config import ConfigDict

from misa.experiment import Experiment
from misa.models.students.common import mmdet_file, mmdet_model
from misa.models.students.solov2 import grid_neck_and_head, matrix_nms
from misa.models.students.table import Implementation


def solo_config(experiment: Experiment, classes: tuple[str, ...]) -> ConfigDict:
    """SOLO (Wang et al. 2020a): seven convolutions per tower, one mask per grid cell."""
    model = mmdet_model("solo/solo_r50_fpn_1x_coco.py", SOLO, experiment)
    grid_neck_and_head(model, experiment.network, len(classes))
    model.test_cfg.update(matrix_nms(experiment.inference))
    return model


def boxinst_config(experiment: Experiment, classes: tuple[str, ...]) -> ConfigDict:
    """BoxInst (Tian et al. 2021): CondInst trained from boxes."""
    file = "boxinst/boxinst_r50_fpn_ms-90k_coco.py"
    model = mmdet_model(file, BoxInst, experiment)
    # Its preprocessor makes masks from the boxes.
    own = {name: value for name, value in model.data_preprocessor.items() if name != "pad_mask"}
    model.data_preprocessor = {
        **mmdet_file(file).data_preprocessor,
        **own,
        "type": BoxInstDataPreprocessor,
    }
    return dynamic_masks(model, experiment, len(classes))


def dynamic_masks(model: ConfigDict, experiment: Experiment, classes: int) -> ConfigDict:
    """Set the experiment's sizes in `model`; the widths of the dynamic layers remain mmdet's."""
    network, inference = experiment.network, experiment.inference
    model.bbox_head.update(
        num_classes=classes,
        in_channels=network.neck_channels,
        stacked_convs=network.stacked_convs,
        feat_channels=network.head_channels,
    )
    model.mask_head.mask_feature_head.update(in_channels=network.neck_channels, feat_channels=network.mask_channels)
    model.test_cfg.update(score_thr=inference.score, max_per_img=inference.per_image, mask_thr=inference.mask)
    return model


def mask_rcnn_config(experiment: Experiment, classes: tuple[str, ...]) -> ConfigDict:
    """Mask R-CNN (He et al. 2017)."""
    network, inference = experiment.network, experiment.inference
    channels = network.neck_channels
    model = mmdet_model("mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", MaskRCNN, experiment)
    model.rpn_head.update(in_channels=channels, feat_channels=channels)
    heads = model.roi_head
    heads.bbox_roi_extractor.out_channels = heads.mask_roi_extractor.out_channels = channels
    heads.bbox_head.update(num_classes=len(classes), in_channels=channels, fc_out_channels=4 * channels)
    heads.mask_head.update(num_classes=len(classes), in_channels=channels, conv_out_channels=channels)
    model.test_cfg.rcnn.update(
        score_thr=inference.score, max_per_img=inference.per_image, mask_thr_binary=inference.mask
    )
    return model


solo = Implementation(solo_config)
boxinst = Implementation(boxinst_config)
mask_rcnn = Implementation(mask_rcnn_config)
