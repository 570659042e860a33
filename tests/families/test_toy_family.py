"""A new family is a class and a row of the table; here its prompts are of unequal length in one batch."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from serving.servers import draw
from torch import nn

from onelora_diffusion import families
from onelora_diffusion.families import Family
from onelora_diffusion.sampling import SamplerSettings, generate_images
from onelora_diffusion.serving.drawing import Drawing, picture_of
from onelora_diffusion.serving.request import Request

COLOURS = {"red": (0.5, -0.5, -1.0), "green": (-1.0, 0.5, 0.0), "dim": (-0.25, -0.25, -0.25)}


class ToyTransformer(nn.Module):
    """Predicts the flow towards one colour for each image: the sum of its words' colours."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(in_channels=3, out_channels=3, sample_size=4, patch_size=1)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x, sigmas, words):
        colours = torch.stack([colours.sum(0) for colours in words]).view(-1, 3, 1, 1)
        return self.weight * (x - colours) / sigmas.view(-1, 1, 1, 1)


class Toy(Family):
    name, transformer_class, targets = "toy", "ToyTransformer", None

    def encode_conditions(self, pipeline, conditions, max_sequence_length=None):
        words = [[COLOURS[word] for word in (condition or "").split()] for condition in conditions]
        return {"words": [torch.tensor(colours).view(-1, 3) for colours in words]}

    def predict(self, denoiser, latents, times, conditions):
        return denoiser(latents, times / 1000, conditions["words"])


class ToyVAE(nn.Module):
    config, dtype = SimpleNamespace(scaling_factor=1.0), torch.float32

    def encode(self, images):
        return SimpleNamespace(latents=images)

    def decode(self, latents):
        return SimpleNamespace(sample=latents)


class ToyPipeline:
    vae_scale_factor = 1

    def __init__(self):
        self.transformer, self.vae, self.scheduler = ToyTransformer(), ToyVAE(), FlowMatchEulerDiscreteScheduler()
        self.components = {"vae": self.vae}

    def __call__(self, prompt, guidance_scale=1.0):
        pass


@pytest.fixture
def pipeline(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, Toy()))
    return ToyPipeline()


def grey(colour):
    return ((torch.tensor(colour) + 1) * 127.5).round()


def test_images_are_drawn_of_prompts_of_unequal_length(pipeline):
    prompts = ["red", "green dim", "dim dim"]
    settings = SamplerSettings(num_inference_steps=3, guidance_scale=1.0)
    [(_, images)] = generate_images(pipeline, prompts, 0, range(3), settings, images_at_once=3)
    expected = torch.stack([grey((0.5, -0.5, -1.0)), grey((-1.25, 0.25, -0.25)).clamp(0), grey((-0.5,) * 3)])
    assert (images - expected.view(3, 3, 1, 1)).abs().max() <= 1


def test_requests_are_drawn_together_each_with_its_own_guidance(pipeline):
    drawing = Drawing(pipeline, 50)
    asked = [Request(subject="dim", guidance_scale=scale, num_inference_steps=3) for scale in (1.0, 2.0, 3.0)]
    asked = [drawing.completed(request, []) for request in asked]
    assert len({drawing.batch_key(request) for request in asked}) == 1
    images = draw(drawing, asked, [{}] * 3)
    for image, colour in zip(images, (-0.25, -0.5, -0.75), strict=True):  # no prompt is black's middle, 0
        assert (picture_of(image) - grey(colour)).abs().max() <= 1
