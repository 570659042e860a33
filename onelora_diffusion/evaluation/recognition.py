"""Recognition: the share of generated images that a classifier trained on real ones assigns to their class."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from sklearn.svm import SVC
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.digits import CAPTIONED
from onelora_diffusion.data.table import classes_of
from onelora_diffusion.sampling import as_uint8


class DigitClassifier:
    """scikit-learn's support vector classifier (RBF kernel) of all ten handwritten digits, at 8 by 8 grey pixels.

    It is trained on the split `train`; `accuracy` is measured on the split `test`. Real images have the resolution and
    rounding of the generated ones.
    """

    def __init__(self, resolution: int):
        (images, labels), (held_out, held_out_labels) = (_digits(split, resolution) for split in ("train", "test"))
        self.model = SVC(gamma=0.05, C=10).fit(_grey_pixels(images), labels)
        self.accuracy = float((self.predict(held_out) == torch.tensor(held_out_labels)).float().mean())
        self.num_images, self.num_held_out = len(labels), len(held_out_labels)

    def predict(self, images: Tensor) -> Tensor:
        """The digit (0..9) in each uint8 image (batch, 3, R, R): (batch,) int64."""
        return torch.from_numpy(self.model.predict(_grey_pixels(images)))

    def describe(self) -> str:
        return (
            f"support vector classifier of the ten digits, trained on {self.num_images} real ones, "
            f"{self.accuracy:.1%} right on {self.num_held_out} others"
        )


# Data set -> function from a resolution to its classifier.
CLASSIFIERS = {"digits": DigitClassifier, CAPTIONED: DigitClassifier}


def class_numbers(dataset: str, names: Sequence[str]) -> tuple[int, ...] | None:
    """The class numbers of names in a data set; None if it lacks one of them, or its classes cannot be chosen."""
    classes = classes_of(dataset)
    return tuple(map(classes.index, names)) if set(names) <= set(classes) else None


@dataclass
class Recognition:
    """Counts the images that a classifier reads as asked."""

    classifier: object  # with `predict(images)`, `describe()` and `accuracy`
    numbers: Sequence[int]  # the classifier's class for each label

    def count(self, images: Tensor, labels: Sequence[int]) -> int:
        asked = torch.tensor([self.numbers[label] for label in labels])
        return int((self.classifier.predict(images).cpu() == asked).sum())


def recognition_of(dataset: str, names: Sequence[str], features, resolution: int) -> Recognition | None:
    """The recognition for labels with these names, by the data set's classifier or that of the features, if any."""
    numbers = class_numbers(dataset, names)
    if numbers and dataset in CLASSIFIERS:
        return Recognition(CLASSIFIERS[dataset](resolution), numbers)
    if numbers and dataset == features.name:
        return Recognition(features, numbers)
    return None


def _digits(split: str, resolution: int) -> tuple[Tensor, list[int]]:
    dataset = load_dataset("digits", split=split, resolution=resolution)
    images, labels = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    return as_uint8(torch.stack(images)), list(labels)


def _grey_pixels(images: Tensor):
    """Grey values (batch, 64) in [0, 1], averaged over channels and to scikit-learn's 8 by 8 pixels."""
    return adaptive_avg_pool2d(images.float().cpu().mean(1, keepdim=True), 8).flatten(1).numpy() / 255
