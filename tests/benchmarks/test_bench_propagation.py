import pytest
import torch
from torch.testing import assert_close

from benchmarks import plain_propagation as plain
from benchmarks import propagation
from benchmarks.propagation import exponent, fired, load, main
from misa.engine.reports.profile import peak_memory
from misa.ops.propagation import propagate_global, propagate_local
from misa.ops.tree import minimum_spanning_tree


def test_the_plain_form_is_the_same_function(rng):
    masks, image = torch.rand(3, 12, 14, generator=rng), torch.rand(3, 12, 14, generator=rng)
    boxes = torch.zeros(3, 12, 14)
    boxes[:, 2:9, 3:11] = 1
    trees = plain.tree_per_mask(image, 3)
    first = plain.pass_per_mask(masks, [image] * 3, trees, 0.2)
    assert_close(first, propagate_global(masks, image, bandwidth=0.2), atol=1e-6, rtol=0)
    second = plain.pass_per_mask(first, list(first[:, None]), trees, 0.07)
    tree = minimum_spanning_tree(image)
    assert_close(second, propagate_global(first, first[:, None], bandwidth=0.07, tree=tree), atol=1e-6, rtol=0)
    local = plain.local_per_mask(masks, image, boxes, 0.15, 5, 4)
    assert_close(local, propagate_local(masks, image, box_masks=boxes, steps=4), atol=1e-5, rtol=0)


def test_exponent():
    assert exponent([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]) == pytest.approx(2.0)


@pytest.mark.shared
def test_masks_of_the_cells_that_fire(shared):
    root = shared / "data" / "coco_mini"
    cells = fired(root, 86, 800)
    assert set(cells) == {0, 1, 2}
    assert len(cells) > 9  # an object is assigned to several cells
    work, alone = load(root, 86, cells, short=128), load(root, 86, None, short=128)
    assert_close(work.boxes, alone.boxes[cells])
    assert work.labels == [alone.labels[i] for i in cells]
    assert not torch.equal(work.masks[0], work.masks[1])  # each cell predicts on its own


def test_memory_that_was_used_before_counts_again():
    kept = []

    def task():
        blocks = []
        for _ in range(1000):
            blocks.append(torch.ones(25_000))  # 0.1 MB
            kept.append(bytearray(700))  # between the blocks, so that freed memory is not returned to the system

    assert [peak_memory(task) for _ in range(3)] == pytest.approx([100] * 3, rel=0.2)


@pytest.mark.shared
@pytest.mark.parametrize(
    "measured", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["no memory", "memory of four processes"]
)
def test_quick_run_prints_its_tables(shared, capsys, monkeypatch, measured):
    if not measured:
        monkeypatch.setattr(propagation, "growth", lambda *_: 7.0)
    threads = torch.get_num_threads()
    try:
        assert main(["--quick", "--threads", "1", "--data", str(shared / "data" / "coco_mini")]) == 0
    finally:
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    for word in ("tree+global", "SOLOv2", "SEPA", "start-up", "1 threads", "with numba"):
        assert word in out


def test_missing_data_is_said(tmp_path, capsys):
    """Also a folder of other images."""
    for folder in (tmp_path / "nowhere", tmp_path):
        assert main(["--data", str(folder)]) == 2
        assert f"no image 000000000308.jpg in {folder}/train2017 or val2017" in capsys.readouterr().err
