"""Serve many adapters of one base by a page and an API; requests are drawn together in batches.

    onelora serve                                              # the miniature, and the adapters under runs/
    onelora serve --base facebook/DiT-XL-2-256 --adapters runs --adapter-memory 2000
    ONELORA_SERVE_AUTH=user:password onelora serve --host 0.0.0.0

The page is at http://127.0.0.1:7860, the calls of its API are under "API" there (docs/serving.md). Ctrl-C ends it.
"""

import os
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from onelora_diffusion.command_line import one_line_errors, quieten, typed_as
from onelora_diffusion.data.defaults import EMBEDDED, defaults_of
from onelora_diffusion.devices import ComputeSettings, in_words
from onelora_diffusion.families import family_of
from onelora_diffusion.injection.book import fingerprint
from onelora_diffusion.pipelines.base import (
    class_names,
    load_base,
    model_index,
)
from onelora_diffusion.serving.adapter_cache import AdapterCache
from onelora_diffusion.serving.batching import Batcher, BatchSettings
from onelora_diffusion.serving.drawing import Drawing
from onelora_diffusion.serving.launching import LOCAL, PortSettings, launch
from onelora_diffusion.serving.library import AdapterLibrary, shipped_adapters


@dataclass(frozen=True, kw_only=True)
class Settings(PortSettings, BatchSettings, ComputeSettings):
    """Serve many adapters of one base: a page, and an API."""

    base: str | None = None
    """Base model: a folder or a hub id. Default: the miniature inside the package."""
    adapters: Path = Path("runs")
    """Folder of adapters, or of training runs; new files are found while the server runs."""
    adapter_memory: float = 1000.0
    """Megabytes of memory for adapters; the least recently used ones are unloaded."""
    max_steps: int = 250
    """The most sampling steps that a request may ask for."""

    def check(self) -> None:
        PortSettings.check(self)
        BatchSettings.check(self)
        if self.adapter_memory <= 0 or self.max_steps < 1:
            raise ValueError(f"--adapter-memory {self.adapter_memory:g} and --max-steps {self.max_steps}: give more")
        if not self.adapters.is_dir() and self.adapters != Settings.adapters:
            raise FileNotFoundError(f"--adapters '{self.adapters}': no such folder")


@one_line_errors("serve.py")
def main(settings: Settings) -> None:
    settings.check()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported: nothing is sent anywhere
    try:
        from onelora_diffusion.serving.page import Page
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: pip install 'onelora-diffusion[serve]', or make serve") from error
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    drawing = load_drawing(settings, device)
    transformer = drawing.transformer.requires_grad_(False)

    folders = [settings.adapters, *([shipped_adapters()] if settings.base is None else [])]
    library = AdapterLibrary(folders, fingerprint(transformer))
    cache = AdapterCache(transformer, int(settings.adapter_memory * 1e6))
    batcher = Batcher(drawing, library, cache, settings)

    scale = defaults_of(EMBEDDED if settings.base is None else None).guidance_scale
    blocks, address = launch(Page(batcher, settings.base or "miniature", scale), settings)
    entries = library.entries()
    damaged = [entry for entry in entries if entry.problem]
    fitting, computing = len(entries) - len(damaged), in_words(settings.report(device))
    print(f"{settings.base or 'the miniature'}, {fitting} adapters, {computing}")
    for entry in damaged:
        print(f"left out: {entry.name}: {entry.problem}")
    if settings.host not in LOCAL and blocks.auth is None:
        print(f"all who reach {settings.host} may draw: set ONELORA_SERVE_AUTH=user:password to ask for a password")
    print(f"serving at {address} (Ctrl-C ends it)", flush=True)
    try:
        threading.Event().wait()
    finally:
        batcher.close()
        blocks.close(verbose=False)


def load_drawing(settings: Settings, device: torch.device) -> Drawing:
    """Load the base to its device, for drawing."""
    precision = "bf16" if settings.mixed_precision == "bf16" else "fp32"
    pipeline = load_base(settings.base, condition=object, precision=precision)
    if settings.mixed_precision == "fp16" and family_of(pipeline).condition is str:
        raise ValueError("--mixed-precision fp16 is for classes: choose bf16 or no")
    settings.place(pipeline.to(device), device)
    return Drawing(pipeline, settings.max_steps, class_names(model_index(settings.base)))


def run(arguments: list[str]) -> None:
    """What the command does, with the words that follow it."""
    quieten()
    main(tyro.cli(Settings, args=arguments, description=__doc__, prog=typed_as("serve.py")))


if __name__ == "__main__":
    run(sys.argv[1:])
