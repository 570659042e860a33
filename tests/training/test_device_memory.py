"""What is in the device's memory, and when: only what the work at hand needs."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from onelora_diffusion.training import task

HOST, DEVICE = torch.device("cpu"), torch.device("cpu:0")  # one memory by two names


class Part(nn.Linear):
    """A component that keeps where it is."""

    device, dtype = HOST, torch.bfloat16

    def __init__(self):
        super().__init__(2, 2)

    def to(self, device, dtype=None):
        self.device = torch.device(device)
        return self


class Denoiser(Part):
    config = {}


class Autoencoder(Part):
    encode = decode = None


class Pipeline:
    """With a sound decoder, an image encoder, and two models like its denoiser, of which one only guides."""

    def __init__(self):
        kinds = {"text_encoder": Part, "image_encoder": Part, "vocoder": Part, "vae": Autoencoder}
        kinds |= dict.fromkeys(("transformer", "transformer_2", "unconditional"), Denoiser)
        self.components = {name: kind() for name, kind in kinds.items()}
        self.register_modules(**self.components)

    def register_modules(self, **parts):
        vars(self).update(parts)
        self.components.update(parts)

    def there(self):
        return {name for name, part in self.components.items() if part is not None and part.device != HOST}


@pytest.mark.parametrize("is_cached", [True, False])
def test_each_model_is_on_the_device_only_while_it_works(monkeypatch, is_cached):
    pipeline, seen = Pipeline(), {}
    conditioners = {n: p for n, p in pipeline.components.items() if n not in ("text_encoder", "vae", "transformer")}
    del conditioners["transformer_2"]
    family = SimpleNamespace(keep=lambda: None, conditioners=lambda pipeline: conditioners)
    family.encoders = lambda pipeline: {"text_encoder": pipeline.text_encoder}
    own = SimpleNamespace(pipeline=pipeline, family=family, accelerator=SimpleNamespace(device=DEVICE))
    own.encoded_data, encoder = ["photos"], weakref.ref(pipeline.text_encoder)

    def encode_images(*args):
        seen["images"], seen["encoder"] = pipeline.there(), encoder()
        return "latents" if is_cached else None

    monkeypatch.setattr(task, "identity_of", lambda parts: dict.fromkeys(parts, "..."))

    def encode_prompts(*args):
        seen["prompts"] = pipeline.there()
        return ["prompts"]

    monkeypatch.setattr(task, "_encode_prompts", encode_prompts)
    monkeypatch.setattr(task, "_encode_images", encode_images)
    task.encode([own], None)
    assert seen == {"prompts": {"text_encoder", "image_encoder", "vocoder"}, "images": {"vae"}, "encoder": None}
    assert own.folders == (["prompts"], ["latents" if is_cached else None])
    trains = {"transformer"} | (set() if is_cached else {"vae"})
    assert pipeline.there() == trains
    with task.Task.decoding(own):
        assert pipeline.there() == {"transformer", "transformer_2", "unconditional", "vae"}
    assert pipeline.there() == trains
