from __future__ import annotations

import numpy as np

from onestill.pixels import to_images, to_pictures


def test_pictures_and_images_round_trip() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    images = to_images(pictures)
    assert (images.shape, images.min() >= -1, images.max() <= 1) == ((2, 3, 5, 7), True, True)
    np.testing.assert_array_equal(to_pictures(images), pictures)
    beyond = np.array([-5, 5], np.float32).reshape(1, 1, 2, 1).repeat(3, axis=1)
    assert to_pictures(beyond).ravel().tolist() == [0, 0, 0, 255, 255, 255]
