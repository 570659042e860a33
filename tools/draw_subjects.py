"""Ten subjects, trained at once on the text-to-image miniature: a table, and a sheet of what each adapter draws.

    python -m tools.draw_subjects runs/ten-subjects

Each subject is a handwritten digit of 24 pictures, two of which are held out for validation. In a row of the sheet are
three of its pictures, three that the base draws of its caption, and, from the same noise, five of its adapter's. All
adapters draw in one batch.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from benchmarks.subjects import write_subjects
from onelora_diffusion import load_adapter, route_adapters
from onelora_diffusion.cli import train_text_to_image
from onelora_diffusion.data.digits import WORDS
from onelora_diffusion.evaluation.recognition import DigitClassifier
from onelora_diffusion.evaluation.report import format_table
from onelora_diffusion.pipelines.base import load_base, miniature_text_path
from onelora_diffusion.training.prompt_settings import PromptSettings
from tools.read_digits import draw

PICTURES, READ = 24, 20  # pictures of each subject; pictures that the classifier reads of each


def main(output: Path) -> None:
    write_subjects(output / "pictures", len(WORDS), PICTURES)
    code = train_text_to_image.main(settings_of(output))
    if code:
        raise SystemExit(code)
    captions = [f"a handwritten {word}" for word in WORDS]
    pipeline = load_base(condition=str)
    pipeline.set_progress_bar_config(disable=True)
    for word in WORDS:
        load_adapter(pipeline.transformer, output / "adapters" / word, word)
    found = {}
    for side, adapters in (("base", [None] * len(WORDS)), ("adapted", WORDS)):
        with route_adapters(pipeline.transformer, adapters):
            found[side] = draw(pipeline, captions, READ)
    classifier, digits = DigitClassifier(found["base"].shape[-1]), torch.arange(len(WORDS)).repeat(READ)
    right = {side: classifier.predict(images) == digits for side, images in found.items()}
    rows = {}
    for digit, word in enumerate(WORDS):
        losses = last_validation(output / "adapters" / word / "metrics.jsonl")
        read = [f"{right[side][digit :: len(WORDS)].float().mean():.0%}" for side in found]
        rows[word] = [f"{losses['base_validation_loss']:.4f}", f"{losses['validation_loss']:.4f}", *read]
    rows["all ten"] = ["", "", *(f"{right[side].float().mean():.1%}" for side in found)]
    print(format_table("Ten adapters from one run", ["base loss", "loss", "base read", "read"], rows))
    sheet = torch.cat([row_of(output, digit, found) for digit in range(len(WORDS))])
    grid = make_grid(sheet, nrow=11, padding=2, pad_value=128)
    image = Image.fromarray(grid.permute(1, 2, 0).numpy())
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(output / "subjects.png")


def settings_of(output: Path) -> PromptSettings:
    return PromptSettings(
        subjects=output / "pictures",
        output_dir=output / "adapters",
        base=str(miniature_text_path()),
        base_precision="fp32",
        prompt="a handwritten {subject}",
        max_sequence_length=16,
        max_steps=400,
        batch_size=8,
        learning_rate=1e-2,
        rates_by_sum=True,
        snr_gamma=5.0,
        lr_schedule="cosine",
        warmup_steps=50,
        max_grad_norm=1.0,
        ema_decay=(0.99,),
        validation_images=2,
        sample_every=0,
    )


def last_validation(metrics: Path) -> dict:
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line for line in lines if "validation_loss" in line][-1]


def row_of(output: Path, digit: int, found: dict[str, Tensor]) -> Tensor:
    """Eleven pictures (11, 3, R, R) in uint8: three of a subject, three by the base, five by its adapter."""
    size = found["base"].shape[-1]
    paths = sorted((output / "pictures" / WORDS[digit]).glob("*.png"))[:3]
    own = [np.array(Image.open(path).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)) for path in paths]
    drawn = [found[side][digit :: len(WORDS)][:number] for side, number in (("base", 3), ("adapted", 5))]
    return torch.cat([torch.from_numpy(np.stack(own)).permute(0, 3, 1, 2), *drawn])


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "runs/ten-subjects"))
