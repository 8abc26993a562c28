import numpy as np
import pytest
import torch
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS
from PIL import Image

from misa.data.pipeline import at_test_size, network_input
from misa.data.pipeline import test_pipeline as file_pipeline
from misa.errors import UserError
from misa.experiment import Augmentation, Experiment
from misa.models.students.common import preprocessor


@pytest.mark.parametrize("size", [(60, 100), (64, 96), (31, 240), (200, 3)])
@pytest.mark.parametrize("sizes", [(64, 96), (128, 192)])
def test_an_image_in_memory_is_what_the_test_gives_the_network(tmp_path, size, sizes):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    augmentation = Augmentation(test_short_side=sizes[0], long_side=sizes[1])
    loaded = Compose(file_pipeline(augmentation))({"img_path": str(tmp_path / "image.png"), "img_id": 0})
    preprocess = MODELS.build(preprocessor(Experiment(augmentation=augmentation)))
    expected = preprocess(pseudo_collate([loaded]), False)["inputs"]
    padded = network_input(image, augmentation, divisor=32)
    torch.testing.assert_close(padded, expected, rtol=0, atol=1e-6)
    h, w = loaded["inputs"].shape[-2:]
    assert torch.equal(network_input(image, augmentation), padded[..., :h, :w])


def test_an_image_is_never_thinner_than_a_pixel():
    assert at_test_size(np.zeros((4000, 1, 3), np.uint8), Augmentation(test_short_side=64, long_side=96)).shape[1] == 1


@pytest.mark.parametrize(
    "image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((0, 8, 3), np.uint8)]
)
def test_what_is_no_image_is_one_sentence(image):
    with pytest.raises(UserError, match=r"RGB \(h w 3\) of 8 bits"):
        network_input(image, Augmentation())
