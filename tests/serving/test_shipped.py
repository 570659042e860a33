"""The adapter that ships fits the miniature, as it is now, and draws what it says."""

import pytest
import torch

from onelora_diffusion.evaluation.recognition import DigitClassifier
from onelora_diffusion.injection.book import fingerprint
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.serving.adapter_cache import AdapterCache
from onelora_diffusion.serving.batching import Batcher, BatchSettings
from onelora_diffusion.serving.drawing import Drawing
from onelora_diffusion.serving.library import AdapterLibrary, shipped_adapters
from onelora_diffusion.serving.request import Request

REMEDY = "the miniature was made anew: run `make adapter`"


@pytest.fixture(scope="module")
def batcher():
    pipeline = load_base()
    transformer = pipeline.transformer.requires_grad_(False)
    library = AdapterLibrary([shipped_adapters()], fingerprint(transformer))
    batcher = Batcher(
        Drawing(pipeline, 50),
        library,
        AdapterCache(transformer, 10**9),
        BatchSettings(max_batch=40, max_queue_per_client=80),
    )
    yield batcher
    batcher.close()


def test_it_fits_the_miniature(batcher):
    (entry,) = batcher.library.entries()
    assert entry.problem is None, REMEDY
    assert entry.name == "handwritten-digits" and entry.path.stat().st_size < 100_000
    assert entry.classes == {digit: str(digit) for digit in range(10)}


def test_it_draws_its_digits_and_the_base_none(batcher):
    digits = [str(index % 10) for index in range(40)]
    settings = dict(num_inference_steps=15, guidance_scale=2.0)
    shipped = (("handwritten-digits", 1.0),)
    adapted = [Request(subject=digit, adapters=shipped, seed=seed, **settings) for seed, digit in enumerate(digits)]
    base = [Request(subject=index % 10, seed=index, **settings) for index in range(40)]
    tickets = batcher.submit_all([*adapted, *base])
    images = torch.stack([ticket.picture.result(120) for ticket in tickets]).permute(0, 3, 1, 2)
    read = DigitClassifier(16).predict(images)
    right = (read == torch.arange(80) % 10).float()
    assert right[:40].mean() >= 0.7, REMEDY  # far below what it was trained to, and far above chance
    assert right[40:].mean() < 0.4  # A to K, which are letters
