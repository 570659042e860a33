"""The digit classifier on real digits it has not seen, and on images that are none."""

import pytest
import torch

from onelora_diffusion.data import load_dataset
from onelora_diffusion.evaluation.images import DatasetImages
from onelora_diffusion.evaluation.recognition import DigitClassifier, Recognition, class_numbers, recognition_of


@pytest.mark.parametrize("resolution", [8, 16])
def test_reads_held_out_digits(resolution):
    classifier = DigitClassifier(resolution)
    real = load_dataset("digits", split="test", resolution=resolution, classes=(5, 6, 7, 8, 9))
    (_, images), *_ = DatasetImages(real, resolution).batches(range(len(real)), len(real))
    right = (classifier.predict(images) == torch.tensor(real.labels) + 5).float().mean()
    assert right > 0.95 and classifier.accuracy > 0.97
    assert f"{classifier.accuracy:.1%} right on {classifier.num_held_out} others" in classifier.describe()


def test_does_not_read_noise_as_asked():
    noise = torch.randint(0, 256, (200, 3, 16, 16), dtype=torch.uint8)
    wanted = torch.arange(200) % 5 + 5
    assert (DigitClassifier(16).predict(noise) == wanted).float().mean() < 0.5


class FirstPixel:
    """Reads the class from the first value of an image."""

    name = "fashion-mnist"

    def predict(self, images):
        return images[:, 0, 0, 0].long()


def test_labels_are_counted_as_the_classes_that_their_names_are():
    assert class_numbers("fashion-mnist", ["sandal", "ankle boot"]) == (5, 9)
    assert class_numbers("digits", ["7", "0"]) == (7, 0)
    assert class_numbers("digits", ["7", "waffles"]) is None and class_numbers("food101", ["waffles"]) is None

    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([5, 9, 9, 1])
    found = recognition_of("fashion-mnist", ["sandal", "ankle boot"], FirstPixel(), 8)
    assert isinstance(found, Recognition) and found.count(images, [0, 1, 0, 1]) == 2
    assert recognition_of("fashion-mnist", ["sandal", "waffles"], FirstPixel(), 8) is None
    assert recognition_of("food101", ["waffles"], FirstPixel(), 8) is None
