"""Boxes as text and as pixels."""

import numpy as np
import pytest

from pe_jax.data import regions


def test_a_box_is_written_as_corners_in_thousandths_cut_off():
    assert regions.write((64, 48, 128, 96), 640, 480) == "[100,100,300,300]"
    assert regions.write((1, 1, 1, 1), 3, 3) == "[333,333,666,666]"  # not rounded
    assert regions.write((-5, 0, 700, 480), 640, 480) == "[000,000,999,999]"


def test_an_answers_boxes_are_read_back():
    box = (64, 48, 128, 96)
    text = f"The dog is at {regions.write(box, 640, 480)}, the cat at [ 1, 20,300 ,999]."
    assert regions.parse(text) == [(0.1, 0.1, 0.3, 0.3), (0.001, 0.02, 0.3, 0.999)]
    assert regions.parse("none [1,2,3] [1000,1,1,1] [a,b,c,d]") == []


def test_marks_are_replaced_by_their_boxes_each_time():
    boxes = [(0, 0, 10, 10), (50, 20, 25, 30)]
    assert (
        regions.fill("<|bbox1|><|bbox0|> <|bbox1|>", boxes, 100, 100)
        == "[500,200,750,500][000,000,100,100] [500,200,750,500]"
    )
    with pytest.raises(ValueError, match=r"names <\|bbox2\|> and there are 2 boxes"):
        regions.fill("<|bbox2|>", boxes, 100, 100)


def test_a_drawn_box_is_red_four_pixels_wide_and_changes_nothing_else():
    frame = np.full((40, 50, 3), 90, np.uint8)
    got = regions.draw(frame, (10.9, 12.2, 30.5, 33.7))
    assert (frame == 90).all()
    want = np.zeros((40, 50), bool)
    want[12:34, 10:31] = True
    want[16:30, 14:27] = False
    np.testing.assert_array_equal((got == regions.RED).all(-1), want)
    assert (got[~want] == 90).all()
