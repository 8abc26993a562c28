import pytest
import torch
from torch.nn.functional import unfold
from torch.testing import assert_close

from misa.ops.neighbors import inside, shift, window_offsets


@pytest.mark.parametrize(("window", "dilation"), [(3, 1), (3, 2), (5, 1), (5, 3)])
@pytest.mark.parametrize(("h", "w"), [(7, 9), (1, 5), (6, 1), (1, 1)])
def test_neighbors_are_those_of_unfold(rng, device, h, w, window, dilation):
    values = torch.rand(2, 3, h, w, generator=rng).to(device)
    offsets = window_offsets(window, dilation)
    reach = window // 2 * dilation
    expected = unfold(values, window, dilation=dilation, padding=reach).view(2, 3, window**2, h, w)
    centre = window**2 // 2
    expected = torch.cat([expected[:, :, :centre], expected[:, :, centre + 1 :]], dim=2)
    assert_close(torch.stack([shift(values, offset) for offset in offsets], dim=2), expected)
    present = unfold(torch.ones(1, 1, h, w), window, dilation=dilation, padding=reach).view(window**2, h, w) > 0
    present = torch.cat([present[:centre], present[centre + 1 :]])
    assert_close(inside(h, w, offsets, device=device).cpu(), present)


def test_several_dilations_follow_each_other():
    assert window_offsets(3, (1, 4)) == [*window_offsets(3, 1), *window_offsets(3, 4)]
    assert window_offsets(3, centre=True) == [(0, 0), *window_offsets(3)]
    assert window_offsets(1) == []
    assert inside(4, 5, []).shape == (0, 4, 5)


def test_shift_keeps_booleans():
    values = torch.tensor([[True, False], [True, True]])
    assert shift(values, (0, 1)).tolist() == [[False, False], [True, False]]
    assert shift(values, (-1, 0)).tolist() == [[False, False], [True, False]]


def test_wrong_windows_are_named():
    with pytest.raises(ValueError, match="odd window"):
        window_offsets(4)
    with pytest.raises(ValueError, match="dilations"):
        window_offsets(3, 0)
    with pytest.raises(ValueError, match="dilations"):
        window_offsets(3, ())
