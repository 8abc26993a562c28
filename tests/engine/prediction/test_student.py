import pytest
import torch
from mmengine.registry import MODELS

from misa.engine.prediction.student import build_student, for_inference
from misa.models.students.table import model_config
from tests.helpers import tiny_experiment


@pytest.mark.parametrize("backbone", ["resnet18", "swin_t", "efficientnet_lite0", "timm:convnext_atto"])
def test_a_student_of_every_kind_of_backbone_is_opened(tmp_path, backbone):
    """It is built on the meta device first, but mmdet's Swin reads values during construction."""
    row = tiny_experiment(network={"backbone": backbone})
    torch.manual_seed(0)
    weights = MODELS.build(model_config(for_inference(row), ("a", "b"))).state_dict()
    opened = build_student(row, ("a", "b"), path=tmp_path, weights=weights)
    assert not opened.training
    assert all(torch.equal(value, weights[name]) for name, value in opened.state_dict().items())


def test_an_exported_row_names_no_start_of_the_training():
    """It is a path of another machine, and the weights are in the file."""
    row = tiny_experiment()
    assert for_inference(row.but(start="runs/other")).values() == for_inference(row).values()
