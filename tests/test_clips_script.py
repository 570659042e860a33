"""train_text_to_image.py and sample.py on clips, with a small pipeline of Wan."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageSequence
from rounding import rounding_of_images
from safetensors.torch import load_file
from tiny_models import make_pipeline

from onelora_diffusion import OneLoRALoaderMixin, read_adapter
from onelora_diffusion.cli import sample
from onelora_diffusion.cli.train_text_to_image import main
from onelora_diffusion.families import Recorded
from onelora_diffusion.training.prompt_settings import PromptSettings

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
FRAMES, SIDE, WIDTH = 5, 16, 32


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "wan"
    make_pipeline("wan").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def walks(tmp_path_factory):
    """Two clips of a bar that walks, as folders of frames, and a still picture."""
    folder = tmp_path_factory.mktemp("data") / "walks"
    for clip in ("left", "right"):
        (folder / clip).mkdir(parents=True)
        (folder / f"{clip}.txt").write_text(f"it walks {clip}")
        for number in range(7):
            pixels = np.zeros((20, 24, 3), np.uint8)
            pixels[:, 3 * (number if clip == "right" else 7 - number)] = 255
            Image.fromarray(pixels).save(folder / clip / f"{number}.png")
    Image.new("RGB", (20, 20), "green").save(folder / "green.png")
    (folder / "green.txt").write_text("green")
    return folder


def settings_of(base, walks, output, **changes):
    short = dict(base=str(base), base_precision="fp32", images=str(walks), output_dir=output, resolution=SIDE)
    short |= dict(max_steps=4, batch_size=2, log_every=1, sample_every=0, checkpoint_every=2, frames=FRAMES)
    return PromptSettings(**short | dict(max_sequence_length=24, learning_rate=0.05) | changes)


def losses_of(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_clips_are_learned_resumed_bit_for_bit_and_drawn_by_the_stock_pipeline(base, walks, tmp_path, monkeypatch):
    encoded, tried, encode = [], [], Recorded.encode_images
    monkeypatch.setattr(
        Recorded,
        "encode_images",
        lambda family, vae, images: (
            (encoded if images.shape[-1] == SIDE else tried).append(tuple(images.shape)) or encode(family, vae, images)
        ),
    )
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    shown = dict(
        validation_prompt=("it walks left",), sample_every=4, sample_steps=1, export_lora=(), sample_size=(SIDE, WIDTH)
    )
    assert main(settings_of(base, walks, whole, **shown)) == 0
    assert sorted(encoded) == [(1, 3, FRAMES, SIDE, SIDE)] * 2 + [(1, 3, SIDE, SIDE)]  # one after the other
    assert main(settings_of(base, walks, halves, max_steps=2)) == main(settings_of(base, walks, halves)) == 0
    assert losses_of(whole) == losses_of(halves) and len(encoded) == 3
    assert tried == [(1, 3, FRAMES, 64, 64)] * 3  # once a start, whether the models take so many
    for key, tensor in load_file(whole / "onelora_weights.safetensors").items():
        assert torch.equal(tensor, load_file(halves / "onelora_weights.safetensors")[key]), key
    training = read_adapter(whole).training
    assert (training["frames"], training["frame_rate"], training["dataset"]) == (FRAMES, None, "walks")
    with Image.open(whole / "samples/step-00000004.png") as grid:
        assert grid.n_frames == FRAMES and grid.size == (WIDTH + 4, 2 * SIDE + 6)

    sample.main(
        sample.Settings(
            adapter=whole,
            prompts=("it walks left",),
            height=SIDE,
            width=WIDTH,
            per_class=1,
            num_inference_steps=2,
            output=tmp_path / "clips",
        )
    )
    with Image.open(tmp_path / "clips/000000.png") as clip:
        frames = np.stack([np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(clip)])
        assert frames.shape == (FRAMES, SIDE, WIDTH, 3) and clip.info["duration"] == 62.5

    def drawn(pipeline):
        asked = dict(height=SIDE, width=WIDTH, num_frames=FRAMES, num_inference_steps=2, max_sequence_length=24)
        generator = sample_generator()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline("it walks left", generator=generator, output_type="pt", **asked).frames[0]

    def sample_generator():
        from onelora_diffusion.sampling import image_generators

        return image_generators(0, [0])[0]

    stock, ours = (DiffusionPipeline.from_pretrained(base) for _ in range(2))
    plain = drawn(stock)
    ours = OneLoRALoaderMixin.from_pipe(ours)
    ours.load_lora_weights(whole)
    stock.load_lora_weights(whole / "lora")
    adapted = drawn(ours)
    assert (adapted - plain).abs().mean() > 1e-3
    tolerance = rounding_of_images(stock, 2) * 10
    torch.testing.assert_close(drawn(stock), adapted, rtol=0, atol=tolerance)
    expected = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(adapted, expected, rtol=0, atol=tolerance + 0.5001 / 255)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(frames=6), "Wan draws clips of 4 k \\+ 1 frames, not of 6: give 5 or 9"),
        (dict(frames=9), "left has 7 frames, and 9 are asked for: take the clip out"),
        (dict(sample_size=(16, 20)), "a resolution of 20 is no multiple of 16, which the model needs: give 16 or 32"),
        (dict(frames=0), "--frames must be at least 1, not 0"),
        (dict(frames=1, frame_rate=8.0), "--frame-rate 8 needs --frames"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(base, walks, tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message) as caught:
        main(settings_of(base, walks, tmp_path / "run", **changes))
    assert "\n" not in caught.value.code and not (tmp_path / "run").exists()
