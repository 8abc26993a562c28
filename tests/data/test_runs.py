"""Run lengths of a part are those of the whole mask."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from pycocotools import mask as rle

from misa.data.runs import decode, decode_part, encode, encode_part

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


def test_a_part_does_not_hold_the_whole():
    whole = np.zeros((500, 700), bool)
    whole[20:30, 40:44] = True
    _, _, inner = decode_part(encode(whole))
    assert inner.base is None
    assert inner.shape == (10, 4)
