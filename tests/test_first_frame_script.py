"""train_text_to_image.py and sample.py on bases that draw clips from their first frame."""

import first_frame_pipelines  # noqa: F401  which adds to those of tiny_models
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageSequence
from rounding import rounding_of_images
from tiny_models import make_pipeline

from onelora_diffusion import OneLoRALoaderMixin, read_adapter
from onelora_diffusion.cli import sample
from onelora_diffusion.cli.train_text_to_image import main
from onelora_diffusion.diffusion import training_losses
from onelora_diffusion.sampling import image_generators
from onelora_diffusion.training import task
from onelora_diffusion.training.prompt_settings import PromptSettings

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
FRAMES, SIDE = 5, 16


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """Two clips of a bar that walks over another colour, as folders of frames."""
    folder = tmp_path_factory.mktemp("data") / "walks"
    for clip, colour in (("left", (0, 90, 200)), ("right", (200, 90, 0))):
        (folder / clip).mkdir(parents=True)
        (folder / f"{clip}.txt").write_text(f"it walks {clip}")
        for number in range(6):
            pixels = np.full((20, 20, 3), colour, np.uint8)
            pixels[:, 3 * (number if clip == "right" else 6 - number)] = 255
            Image.fromarray(pixels).save(folder / clip / f"{number}.png")
    return folder


def settings_of(base, walks, output, **changes):
    short = dict(base=str(base), base_precision="fp32", images=str(walks), output_dir=output, resolution=SIDE)
    short |= dict(max_steps=4, batch_size=2, log_every=1, sample_every=0, checkpoint_every=2, frames=FRAMES)
    return PromptSettings(**short | dict(max_sequence_length=24, learning_rate=0.05) | changes)


def test_clips_are_learned_from_their_first_frames_and_drawn_as_the_stock_pipeline_does(
    walks, tmp_path, monkeypatch, capsys
):
    base, run = tmp_path / "wan", tmp_path / "run"
    make_pipeline("wan_ti2v_i2v").save_pretrained(base)
    picture = walks / "left" / "0.png"
    shown = dict(validation_prompt=("it walks left",), validation_reference=(picture,), sample_every=4, sample_steps=1)
    masks, own = [], training_losses
    monkeypatch.setattr(task, "training_losses", lambda *given: masks.append(given[5]) or own(*given))
    assert main(settings_of(base, walks, run, **shown, export_lora=())) == 0
    said = capsys.readouterr().out
    assert "each clip is learned from its own first frame" in said and "--reference IMAGE" in said
    assert len(masks) == 4 and all(mask.shape == (2, 1, 2, 4, 4) for mask in masks)
    assert not any(mask[:, :, 0].any() for mask in masks) and all(mask[:, :, 1:].all() for mask in masks)
    assert read_adapter(run).training["references"] == 1
    asked = dict(adapter=run, prompts=("it walks left",), resolution=SIDE, per_class=1, num_inference_steps=2)
    sample.main(sample.Settings(**asked, reference=(picture,), output=tmp_path / "clips"))
    with Image.open(tmp_path / "clips/000000.png") as clip:
        frames = np.stack([np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(clip)])
    stock = OneLoRALoaderMixin.from_pipe(DiffusionPipeline.from_pretrained(base))
    stock.set_progress_bar_config(disable=True)
    told = dict(height=SIDE, width=SIDE, num_frames=FRAMES, num_inference_steps=2, max_sequence_length=24)

    def drawn():
        generator = image_generators(0, [0])[0]
        with Image.open(picture) as image:
            return stock(image.convert("RGB"), "it walks left", generator=generator, output_type="pt", **told).frames[
                0
            ]

    plain = drawn()
    stock.load_lora_weights(run)
    adapted = drawn()
    assert (adapted - plain).abs().mean() > 1e-4
    expected = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
    tolerance = rounding_of_images(stock, 2) * 10
    torch.testing.assert_close(adapted, expected, rtol=0, atol=tolerance + 0.5001 / 255)
