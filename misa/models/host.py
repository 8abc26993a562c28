"""A batch on its way to the device: nothing waits, and boxes and labels stay on the host as well."""

from typing import Any

from mmdet.models.data_preprocessors import DetDataPreprocessor

from misa.ops.sent import noted


class Preprocessor(DetDataPreprocessor):
    """mmdet's preprocessor with copies that do not wait where the loader has pinned its batch.

    `misa.ops.sent.on_host` gives the boxes and labels back: which cells or queries fire is decided on the host.
    """

    def __init__(self, *args: Any, bgr_to_rgb: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, non_blocking=True, **kwargs)
        self.swapped = bgr_to_rgb

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Inputs (b 3 h w) and samples on the device, as mmdet's."""
        before = data.get("data_samples") or []
        if self.swapped:  # mmdet indexes by a list, which is sent to the device each time, and that waits
            data = {**data, "inputs": [self.cast_data(image).flip(0) for image in data["inputs"]]}
        prepared: dict[str, Any] = super().forward(data, training)
        if training and self.device.type != "cpu":
            for old, new in zip(before, prepared["data_samples"], strict=True):
                for name in ("bboxes", "labels"):
                    kept, moved = old.gt_instances[name], new.gt_instances[name]
                    noted(moved, getattr(kept, "tensor", kept))
        return prepared
