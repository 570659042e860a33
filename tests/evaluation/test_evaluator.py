"""One pass over a set of images feeds every kind of features, the classifier and the metrics."""

import pytest
import torch

from onelora_diffusion.evaluation.evaluator import Evaluator, measure_images
from onelora_diffusion.evaluation.features.pixels import PixelFeatures
from onelora_diffusion.evaluation.images import Source
from onelora_diffusion.evaluation.metrics import MetricSettings
from onelora_diffusion.evaluation.recognition import Recognition


class FirstPixel:
    """Reads the class from the first value of an image."""

    def predict(self, images):
        return images[:, 0, 0, 0].long()


def batches(images, size=3):
    for indices in torch.arange(len(images)).split(size):
        yield indices.tolist(), images[indices]


def test_two_kinds_of_features_and_a_classifier_see_one_pass():
    real, made = torch.zeros(8, 3, 32, 32, dtype=torch.uint8), torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    real[::2] = 51  # 0.2 on half of the images: mean 0.1
    made[::2] = 153  # 0.6: mean 0.3
    features = [PixelFeatures(32), PixelFeatures(8)]
    source = Source("made", 32)
    references = measure_images(batches(real), source, features).measured
    asked = Recognition(FirstPixel(), [153, 0])  # the classes take turns: even images are of the first

    passes = []
    evaluator = Evaluator(features, references, recognition=asked)
    measured = evaluator.measure(
        (passes.append(indices) or (indices, images) for indices, images in batches(made)), source
    )
    assert sum(passes, []) == list(range(8))
    for each, found in zip(features, evaluator.compare(measured), strict=True):
        # All numbers of an image move as one. Half of 8 at v, half at 0: mean v/2, deviation v/2 (8/7)^½.
        expected = each.num_features * (0.2**2 + 0.2**2 * 8 / 7)
        assert found["distance"] == pytest.approx(expected, rel=1e-9)
        assert found["recognition"] == 1.0
    assert [each.origin.resize for each in measured.measured] == [each.resize for each in features]


def test_the_classifier_is_asked_for_the_labels_that_were_drawn():
    images = torch.zeros(6, 3, 4, 4, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([1, 1, 2, 2, 2, 1])
    asked = Recognition(FirstPixel(), [1, 2])
    for labels, expected in ((None, 2 / 6), ([0, 0, 1, 1, 1, 0], 1), ([0, 0, 0, 1, 1, 1], 4 / 6)):
        found = measure_images(
            batches(images), Source("made", 4), [PixelFeatures(4)], recognition=asked, labels=labels
        )
        assert found.recognition == expected


def test_features_are_kept_only_for_metrics_that_need_them():
    images = torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8)
    (without,) = measure_images(batches(images), Source("noise", 4), [PixelFeatures(4)]).measured
    (kept,) = measure_images(batches(images), Source("noise", 4), [PixelFeatures(4)], keep=True).measured
    assert without.kept is None and torch.equal(kept.kept, PixelFeatures(4)(images).float())
    with pytest.raises(ValueError, match="'noise' is given as statistics: --metrics kid needs the images"):
        Evaluator([PixelFeatures(4)], [without], MetricSettings(metrics=("kid",)))


def test_one_image_is_too_few():
    alone = measure_images(batches(torch.zeros(1, 3, 4, 4, dtype=torch.uint8)), Source("it", 4), [PixelFeatures(4)])
    with pytest.raises(ValueError, match="'it' is 1 image: a distance between sets needs two or more"):
        Evaluator([PixelFeatures(4)], alone.measured)
