"""How many of the letters that the text-to-image miniature draws are those asked for: "a large Q" and the other 25.

    python -m tools.read_letters           # 4 pictures of each
    python -m tools.read_letters 10 FOLDER # more, of a miniature somewhere else

A classifier of printed letters, in as many sizes, weights and places as the miniature has seen, reads them.
"""

import string
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from onelora_diffusion.pipelines.base import load_base
from tools.glyphs import Glyphs, draw, glyph_list
from tools.read_digits import draw as draw_captions

PICTURES = 150  # of each letter, to learn from; and a fifth of it to try the classifier on


def main(num_each: int, folder: Path | None) -> None:
    pipeline = load_base(folder, condition=str)
    pipeline.set_progress_bar_config(disable=True)
    classifier = LetterClassifier()
    right = letters_right(pipeline, classifier, num_each)
    print(f"{right.mean():.1%} of {len(right)} pictures are read as the letter asked for")
    print(f"{classifier.accuracy:.1%} of printed ones are, which the classifier has not seen")


def letters_right(pipeline, classifier: "LetterClassifier", num_each: int) -> np.ndarray:
    """Which pictures are read as the letter asked for, (26 · num_each,)."""
    images = draw_captions(pipeline, [f"a large {letter}" for letter in string.ascii_uppercase], num_each)
    return classifier.read(images / 255) == np.array([*string.ascii_uppercase * num_each])


class LetterClassifier:
    """Reads large capitals, upright, of any font."""

    def __init__(self):
        from sklearn.svm import SVC

        images, labels = printed(PICTURES, seed=0)
        self.classifier = SVC(C=10).fit(images.flatten(1).numpy(), labels)
        images, labels = printed(PICTURES // 5, seed=1)
        self.accuracy = float((self.read(images[:, None]) == labels).mean())

    def read(self, images: Tensor) -> np.ndarray:
        """Pictures (N, C, 16, 16) in [0, 1] -> letters (N,)."""
        return self.classifier.predict(images.mean(1).flatten(1).numpy())


def printed(num_each: int, seed: int) -> tuple[Tensor, np.ndarray]:
    """Pictures (26 · num_each, 16, 16) in [0, 1] and their letters."""
    generator = np.random.default_rng(seed)
    of_letter = {
        letter: [index for index, glyph in enumerate(glyph_list()) if glyph.character == letter]
        for letter in string.ascii_uppercase
    }
    letters = np.repeat([*of_letter], num_each)
    count = len(letters)

    def normal(scale: float, *shape: int) -> Tensor:
        return torch.from_numpy(scale * generator.standard_normal((count, *shape))).float()

    glyphs = torch.tensor([generator.choice(of_letter[letter]) for letter in letters])
    weight = torch.from_numpy(generator.choice([0.025, 0.1, -0.005], count)).float()
    spread = Glyphs(
        glyphs, weight + normal(0.006), normal(0.08), normal(0.1), normal(0.05, 2), 1.3 + normal(0.05), normal(0.05, 2)
    )
    return draw(spread, 16)[:, 0].float() / 255, letters


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(int(arguments[0]) if arguments else 4, Path(arguments[1]) if arguments[1:] else None)
