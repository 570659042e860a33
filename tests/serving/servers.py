"""A server of a small DiT and some adapters, with or without a port."""

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tiny_models import make_dit, make_dit_pipeline, randomize

from onelora_diffusion import AdapterConfig, inject_adapter, save_adapter, unload_adapter
from onelora_diffusion.injection.book import fingerprint
from onelora_diffusion.serving.adapter_cache import AdapterCache
from onelora_diffusion.serving.batching import Batcher, BatchSettings
from onelora_diffusion.serving.drawing import Drawing
from onelora_diffusion.serving.library import AdapterLibrary
from onelora_diffusion.serving.request import Request
from onelora_diffusion.serving.settings import AccessSettings, PortSettings

ANY_PORT = PortSettings(port=0)
CONFIGS = {
    "plain": AdapterConfig(),
    "birds": AdapterConfig(num_classes=5, bias=True),
    "food": AdapterConfig(num_classes=3),
    "lora": AdapterConfig(method="lora", rank=2),
}
CLASSES = {"birds": ("robin", "wren", "owl", "crow", "gull"), "food": ("pizza", "sushi", "soup")}


def make_pipeline():
    """A random `DiTPipeline` of two blocks and ten classes, for images of 16 by 16."""
    pipeline = make_dit_pipeline(make_dit().requires_grad_(False))
    pipeline.vae.requires_grad_(False)
    return pipeline


def write_adapter(transformer, path, config: AdapterConfig, seed: int, classes: tuple[str, ...] = ()) -> None:
    inject_adapter(transformer, config)
    randomize(transformer, 0.3, seed)
    save_adapter(transformer, path, id2label=dict(enumerate(classes)) or None, training={"dataset": "toys"})
    unload_adapter(transformer).requires_grad_(False)


def write_adapters(folder: Path, transformer, names=tuple(CONFIGS), broken: bool = False) -> Path:
    """Adapters in files, and one that is damaged; their folder."""
    for seed, name in enumerate(names):
        write_adapter(transformer, folder / f"{name}.safetensors", CONFIGS[name], seed, CLASSES.get(name, ()))
    if broken:
        (folder / "broken.safetensors").write_bytes((folder / f"{names[0]}.safetensors").read_bytes()[:500])
    return folder


@contextlib.contextmanager
def serving(pipeline, folder, memory_bytes: int = 10**9, drawing=None, **settings):
    """A batcher of the adapters in a folder; closed at the end."""
    library = AdapterLibrary([folder], fingerprint(pipeline.transformer))
    cache = AdapterCache(pipeline.transformer, memory_bytes)
    batcher = Batcher(drawing or Drawing(pipeline, 50), library, cache, BatchSettings(**settings))
    try:
        yield batcher
    finally:
        batcher.close()
        if hasattr(pipeline.transformer, "_onelora"):
            unload_adapter(pipeline.transformer)


def draw(drawing: Drawing, requests: Sequence[Request], mixtures: Sequence[Mapping[str, float]]) -> torch.Tensor:
    """Completed requests that begin together, (batch, 3, size, size)."""
    images = [drawing.start(request, mixture) for request, mixture in zip(requests, mixtures, strict=True)]
    while running := [image for image in images if not image.is_done]:
        drawing.step(running)
    drawing.pause()
    return drawing.images(images)


@contextlib.contextmanager
def answering(batcher, folder, receive_timeout: float = 30.0, request_timeout: float = 60.0, port=ANY_PORT, **access):
    """(address, service) of a batcher behind a port."""
    from onelora_diffusion.serving.api import create_app
    from onelora_diffusion.serving.launching import listening
    from onelora_diffusion.serving.service import Service

    settings = AccessSettings(receive_timeout=receive_timeout, **access)
    service = Service("toy", folder, 2.0, request_timeout)
    service.start(batcher)
    with listening(create_app(service, settings), port, receive_timeout) as address:
        yield address, service


class Held(Drawing):
    """A drawing whose steps wait until they are let go; it notes the seeds of what is begun, and counts steps."""

    def __init__(self, pipeline):
        super().__init__(pipeline, 50)
        self.go, self.drawn, self.steps = threading.Event(), [], 0

    def start(self, request, mixture):
        self.drawn.append(request.seed)
        return super().start(request, mixture)

    def step(self, trajectories):
        assert self.go.wait(30)
        self.steps += 1
        super().step(trajectories)


def wait_until(holds, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)
