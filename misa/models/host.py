"""Asynchronous transfer of a batch to the device; boxes and labels are also kept on the host."""

from typing import Any

from mmdet.models.data_preprocessors import DetDataPreprocessor

from misa.ops.transfer import with_host_copy


class Preprocessor(DetDataPreprocessor):
    """mmdet's preprocessor with non-blocking copies, which need a batch in pinned memory.

    `misa.ops.transfer.on_host` returns the host's boxes and labels: positives are assigned on the host.
    """

    def __init__(self, *args: Any, bgr_to_rgb: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, non_blocking=True, **kwargs)
        self.swapped = bgr_to_rgb

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Return inputs (b 3 h w) and samples on the device, as mmdet does."""
        before = data.get("data_samples") or []
        if self.swapped:  # mmdet indexes by a list, whose transfer to the device would block
            data = {**data, "inputs": [self.cast_data(image).flip(0) for image in data["inputs"]]}
        prepared: dict[str, Any] = super().forward(data, training)
        if training and self.device.type != "cpu":
            for old, new in zip(before, prepared["data_samples"], strict=True):
                for name in ("bboxes", "labels"):
                    kept, moved = old.gt_instances[name], new.gt_instances[name]
                    with_host_copy(moved, getattr(kept, "tensor", kept))
        return prepared
