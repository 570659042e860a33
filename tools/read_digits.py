"""How many of the digits that the text-to-image miniature draws are those asked for: the base beside an adapter.

    python train_text_to_image.py && python -m tools.read_digits
    python -m tools.read_digits runs/digit-words 50    # an adapter, and pictures of each word

Every picture is what `sample.py` draws of its caption: picture i of its own noise, with and without the adapter. A
classifier of real handwritten digits reads them.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from onelora_diffusion import count_trainable, disable_adapter, load_adapter
from onelora_diffusion.data.captions import DIGITS
from onelora_diffusion.data.digits import CAPTIONS
from onelora_diffusion.data.table import defaults_of
from onelora_diffusion.evaluation.recognition import DigitClassifier
from onelora_diffusion.evaluation.report import format_table
from onelora_diffusion.pipelines.base import eval_mode, load_base
from onelora_diffusion.sampling import image_generators

STEPS = 20  # of the pipeline's own sampler


def main(adapter: Path, num_each: int) -> None:
    pipeline = load_base(condition=str)
    pipeline.set_progress_bar_config(disable=True)
    load_adapter(pipeline.transformer, adapter)
    with disable_adapter(pipeline.transformer):
        by_base = draw(pipeline, CAPTIONS, num_each)
    classifier = DigitClassifier(by_base.shape[-1])
    digits = torch.arange(len(CAPTIONS)).repeat(num_each)
    found = [classifier.predict(images) == digits for images in (by_base, draw(pipeline, CAPTIONS, num_each))]

    def share(right: Tensor) -> str:
        return f"{right.float().mean():.1%}"

    rows = {
        caption: [share(right[digit :: len(CAPTIONS)]) for right in found] for digit, caption in enumerate(CAPTIONS)
    }
    rows["all ten"] = [share(right) for right in found]
    rows |= validation_loss(adapter)
    rows["trained parameters"] = ["", f"{count_trainable(pipeline.transformer):,}"]
    title = (
        f"Digits read as those asked for: {num_each} pictures of each caption, {STEPS} steps, guidance "
        f"{defaults_of(DIGITS).guidance_scale:g}, read by a {classifier.describe()}"
    )
    print(format_table(title, ["base", "adapted"], rows))


def validation_loss(run: Path) -> dict[str, list[str]]:
    """The row of the last validation in a run's folder, if there was one."""
    metrics = run / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    losses = [line for line in lines if "validation_loss" in line]
    names = ("base_validation_loss", "validation_loss")
    return {"validation loss": [f"{losses[-1][name]:.4f}" for name in names]} if losses else {}


@torch.no_grad()
def draw(pipeline, captions: Sequence[str], num_each: int) -> Tensor:
    """Pictures of the captions in turns, (captions · num_each, 3, R, R) in uint8."""
    parts = []
    with eval_mode(pipeline.transformer):
        for first in range(0, len(captions) * num_each, len(captions)):
            images = pipeline(
                list(captions),
                guidance_scale=defaults_of(DIGITS).guidance_scale,
                num_inference_steps=STEPS,
                generator=image_generators(0, range(first, first + len(captions))),
                max_sequence_length=pipeline.tokenizer.model_max_length,
                clean_caption=False,
                output_type="pt",
                use_resolution_binning=False,
            ).images
            parts.append((images * 255).round().to(torch.uint8))
    return torch.cat(parts)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(Path(arguments[0] if arguments else "runs/digit-words"), int(arguments[1]) if arguments[1:] else 20)
