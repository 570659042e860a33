"""Serve many adapters of one base by a page and an API; requests are drawn together in batches.

    onelora serve                                              # the miniature, and the adapters under runs/
    onelora serve --base facebook/DiT-XL-2-256 --adapters runs --adapter-memory 2000
    onelora serve --host 0.0.0.0 --allow-host draw.example.org --token-file tokens.txt

The page is at http://127.0.0.1:7860, the API below /v1 and described by /openapi.json (docs/serving.md). Ctrl-C or
SIGTERM ends it, once what waits is drawn.
"""

import logging
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
from onelora_diffusion.pipelines.base import class_names, load_base, model_index
from onelora_diffusion.serving.settings import AccessSettings, BatchSettings, PortSettings

GONE = "ONELORA_SERVE_AUTH"  # of versions whose page asked for a user and a password


@dataclass(frozen=True, kw_only=True)
class Settings(PortSettings, AccessSettings, BatchSettings, ComputeSettings):
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
        for part in (PortSettings, AccessSettings, BatchSettings):
            part.check(self)
        if self.adapter_memory <= 0 or self.max_steps < 1:
            raise ValueError(f"--adapter-memory {self.adapter_memory:g} and --max-steps {self.max_steps}: give more")
        if not self.adapters.is_dir() and self.adapters != Settings.adapters:
            raise FileNotFoundError(f"--adapters '{self.adapters}': no such folder")
        if GONE in os.environ:
            raise ValueError(f"{GONE} is no longer read: give tokens by --token-file, and unset it")


@one_line_errors("serve.py")
def main(settings: Settings) -> None:
    settings.check()
    try:
        from onelora_diffusion.serving.api import create_app
        from onelora_diffusion.serving.launching import listening
        from onelora_diffusion.serving.service import Service
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{error}: pip install 'onelora-diffusion[serve]', or make serve") from error
    logging.basicConfig(format="%(message)s")
    logging.getLogger("onelora_diffusion.access").setLevel(logging.INFO)
    name = "miniature" if settings.base is None else settings.base
    scale = defaults_of(EMBEDDED if settings.base is None else None).guidance_scale
    # Clients learn the name of a folder, and not where it is on this machine.
    name = Path(name).resolve().name if Path(name).is_dir() else name
    service, tokens = Service(name, settings.adapters, scale, settings.request_timeout), settings.tokens()
    with listening(create_app(service, settings, settings.host), settings, settings.receive_timeout) as address:
        batcher, summary = load(settings)
        service.start(batcher)
        print(summary)
        for entry in batcher.library.entries():
            if entry.problem:
                print(f"left out: {entry.name}: {entry.problem}")
        if not tokens and (settings.allow_host or settings.host not in ("127.0.0.1", "localhost", "::1")):
            print("all who reach this server may draw: --token-file asks them for a token")
        print(f"serving at {address} (Ctrl-C ends it)", flush=True)
        try:
            threading.Event().wait()
        finally:
            service.drain(settings.drain_timeout)


def load(settings: Settings):
    """(the batcher of the base and its adapters, what it serves in one line)."""
    from onelora_diffusion.serving.adapter_cache import AdapterCache
    from onelora_diffusion.serving.batching import Batcher
    from onelora_diffusion.serving.library import AdapterLibrary, shipped_adapters

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    drawing = load_drawing(settings, device)
    transformer = drawing.transformer.requires_grad_(False)
    folders = [settings.adapters, *([shipped_adapters()] if settings.base is None else [])]
    library = AdapterLibrary(folders, fingerprint(transformer))
    batcher = Batcher(drawing, library, AdapterCache(transformer, int(settings.adapter_memory * 1e6)), settings)
    fitting = sum(not entry.problem for entry in library.entries())
    return batcher, f"{settings.base or 'the miniature'}, {fitting} adapters, {in_words(settings.report(device))}"


def load_drawing(settings: Settings, device: torch.device):
    """Load the base to its device, for drawing."""
    from onelora_diffusion.serving.drawing import Drawing

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
