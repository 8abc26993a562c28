"""The RLE of a crop equals that of the full mask."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as rle

from misa.data.rle import decode, decode_part, encode, encode_part

SHAPES = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_part_is_encoded_as_the_whole(data):
    pixels = data.draw(arrays.arrays(bool, data.draw(SHAPES)))
    top, left, below, right = (data.draw(st.integers(0, 5)) for _ in range(4))
    whole = np.pad(pixels, ((top, below), (left, right)))
    runs = encode_part(pixels, top, left, whole.shape)
    assert runs == encode(whole)
    assert np.array_equal(decode(runs), whole)
    assert rle.area(runs) == whole.sum()
    y, x, inner = decode_part(runs)
    again = np.zeros_like(whole)
    again[y : y + inner.shape[0], x : x + inner.shape[1]] = inner
    assert np.array_equal(again, whole)


def test_a_part_beyond_the_image_is_refused():
    with pytest.raises(ValueError, match=r"a part of \(2, 2\) at \(3, 0\) does not lie within"):
        encode_part(np.ones((2, 2), bool), 3, 0, (4, 4))


def test_an_empty_part_is_an_empty_mask():
    assert encode_part(np.zeros((0, 0), bool), 0, 0, (4, 5)) == encode(np.zeros((4, 5), bool))


@settings(max_examples=150, deadline=None)
@given(arrays.arrays(bool, st.tuples(st.integers(1, 300), st.integers(1, 12))))
def test_a_part_is_decoded_as_pycocotools_decodes_the_whole(mask):
    for runs in (encode(mask), rle.encode(np.asfortranarray(mask, dtype=np.uint8))):
        top, left, inner = decode_part(runs)
        again = np.zeros_like(mask)
        again[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
        assert np.array_equal(again, mask)


def test_runs_of_polygons_are_decoded():
    """They may contain empty runs."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        corners = rng.uniform(0, 90, (2, 8)).tolist()
        runs = rle.merge(rle.frPyObjects(corners, 100, 90))
        top, left, inner = decode_part(runs)
        assert np.array_equal(rle.decode(runs)[top : top + inner.shape[0], left : left + inner.shape[1]], inner)
        assert inner.sum() == rle.area(runs)


def test_a_part_does_not_hold_the_whole():
    whole = np.zeros((500, 700), bool)
    whole[20:30, 40:44] = True
    _, _, inner = decode_part(encode(whole))
    assert inner.base is None
    assert inner.shape == (10, 4)
