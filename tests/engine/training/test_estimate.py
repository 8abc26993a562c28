"""Cost estimates of a row: operation counts against another library, the formula against numbers by hand."""

import pytest
import torch
from mmengine.logging import MMLogger

from misa.cli import main
from misa.engine.training.estimate import GPUS, Step, Work, estimate, input_pixels, measure
from misa.errors import UserError
from misa.rows import find_row

MISA = find_row("table1_coco:misa_r50")


def work(device="cpu", seconds=1.0):
    small = Step(
        flops=2e11, kept=1e8, parameters=40_000_000, frozen=10_000_000, pixels=10_000, seconds=seconds, device=device
    )
    return Work(small, Step(**{**small.__dict__, "flops": 3e11, "kept": 3e8, "pixels": 20_000}))


def test_the_formula():
    """1024 x 1024 pixels, to which 1000 are padded, are n = 103.9 differences beyond the small image.

    F = 2e11 + n 1e11, A = 1e8 + n 2e8.
    """
    beyond = (1024**2 - 10_000) / 10_000
    row = MISA.but(augmentation={"jitter": (0.1, 2.0), "crop": 1000})
    found = estimate(row, work(), gpus=4, gpu="A100", per_gpu=2, utilization=0.5)
    assert str(found.split) == "batch 16 = 4 processes x 2 images x 2 accumulated"
    seconds = 2 * 2 * (2e11 + beyond * 1e11) / (19.5e12 * 0.5)
    assert found.step_seconds == pytest.approx(seconds)
    assert found.memory == pytest.approx((40e6 * 16 + 10e6 * 4 + 2 * (1e8 + beyond * 2e8)) / 1e9)
    assert found.days == pytest.approx(36 * (118_287 // 16) * seconds / 86400)
    assert str(found).endswith(" days with 118287 training images")
    half = estimate(row.but(schedule={"precision": "bfloat16"}), work(), gpus=4, gpu="A100", utilization=0.5)
    assert half.step_seconds == pytest.approx(seconds * 19.5 / 312)  # four images at once take as long as two twice


def test_a_semantic_teacher_is_refused_before_anything_is_measured(capsys):
    row = find_row("teacher:demo")
    for ask in (lambda: measure(row), lambda: estimate(row, work(), gpus=1, gpu="A100", images=500)):
        with pytest.raises(UserError, match="of a semantic teacher, misa profile measures a step"):
            ask()
    assert main(["estimate", "teacher:demo", "--images", "500"]) == 2
    assert main(["estimate", "demo:misa"]) == 2
    assert "how many training images demo has is not known; give --images" in capsys.readouterr().err
    assert main(["estimate", "demo:misa", "--images", "500", "--gpus", "3"]) == 2
    printed = capsys.readouterr()
    assert "measuring" not in printed.out


def test_what_is_assumed_and_what_does_not_fit_is_said():
    text = str(estimate(MISA, work(), gpus=1, gpu="T4"))
    assert "u = 0.30, assumed" in text
    assert "more than a T4 has: lower per_gpu" in text
    measured = estimate(MISA, work("NVIDIA A100-SXM4-80GB", seconds=0.05), gpus=8, gpu="A100")
    assert measured.utilization == pytest.approx(3e11 / (0.05 * 19.5e12))
    assert "measured here" in str(measured)


@pytest.mark.parametrize(
    ("device", "known"),
    [
        ("NVIDIA A100-SXM4-40GB", True),
        ("NVIDIA GeForce RTX 4090", True),
        ("Tesla V100-SXM2-16GB", True),
        ("NVIDIA RTX A1000", False),
        ("NVIDIA T400 4GB", False),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", False),
        ("NVIDIA GeForce RTX 3090 Ti", False),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", False),
        ("cpu", False),
    ],
)
def test_a_card_of_a_similar_name_is_not_that_of_the_table(device, known):
    assert estimate(MISA, work(device), gpus=1, gpu="A100").measured == known


def test_fewer_images_than_a_batch_are_refused():
    with pytest.raises(UserError, match="3 training images cannot fill a batch of 4"):
        estimate(find_row("photos:box"), work(), gpus=1, gpu="A100", images=3)
    assert estimate(find_row("photos:box"), work(), gpus=1, gpu="A100", images=4).days > 0


def test_sizes_are_those_of_the_recipe():
    assert input_pixels(MISA) == 736 * 960  # the mean short side is 720
    assert input_pixels(find_row("table1_coco:misa_m2f_swin_b")) == 1024**2


def test_wrong_input_is_told():
    with pytest.raises(UserError, match="did you mean 'H100'"):
        estimate(MISA, work(), gpus=8, gpu="H10")
    with pytest.raises(UserError, match="cannot be shared evenly by 3"):
        estimate(MISA, work(), gpus=3, gpu="H100")
    with pytest.raises(UserError, match="give images"):
        estimate(find_row("demo:box"), work(), gpus=1, gpu="H100")
    with pytest.raises(UserError, match="two multiples of 32"):
        measure(MISA, sides=(100, 200))
    assert all(sheet.half > sheet.float32 for sheet in GPUS.values())


def test_a_convolution_counts_as_written_out():
    """torch's counter on one layer: two operations per product, and twice as many again for the two gradients."""
    layer = torch.nn.Conv2d(3, 5, 3, padding=1)
    images = torch.randn(1, 3, 16, 20, requires_grad=True)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        layer(images).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (16 * 20) * 5 * 3 * 9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo:box", "demo:misa", "demo:mask2former_misa", "demo:mask"])
def test_two_small_images_tell_of_a_larger_one(name):
    """Linear extrapolation from 96 and 160 pixels is within five percent of the count at 256."""
    row = find_row(name)
    line, larger = measure(row, sides=(96, 160)), measure(row, sides=(160, 256)).large
    assert line.flops(larger.pixels) == pytest.approx(larger.flops, rel=0.05)
    assert line.kept(larger.pixels) == pytest.approx(larger.kept, rel=0.05)


def test_the_closed_log_file_of_an_earlier_run_is_not_written_to(tmp_path):
    """Whoever configures logging in a process, as submitit does, closes the files of all loggers."""
    logger = MMLogger.get_instance("an earlier run", log_file=str(tmp_path / "log.txt"))
    for handler in logger.handlers:
        handler.close()
    try:
        assert measure(find_row("demo:box"), sides=(64, 96)).flops(96 * 96) > 0
    finally:
        MMLogger._instance_dict.pop("an earlier run")


@pytest.mark.slow
def test_the_command(capsys):
    assert main(["estimate", "demo:box", "--gpus", "2", "--gpu", "A100", "--images", "500"]) == 0
    text = capsys.readouterr().out
    assert "batch 8 = 2 processes x 4 images on 2 x A100 (u = 0.30, assumed)" in text
    assert "days" in text
