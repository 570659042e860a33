"""Load what a server serves: a base, its adapters, and the queue that draws with them."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from onelora_diffusion.data.table import EMBEDDED, defaults_of
from onelora_diffusion.denoisers import BOTH, choose_denoiser, denoisers_in
from onelora_diffusion.devices import ComputeSettings, in_words
from onelora_diffusion.families import family_of
from onelora_diffusion.injection.book import fingerprint
from onelora_diffusion.pipelines.base import class_names, load_base, model_index
from onelora_diffusion.serving.settings import AccessSettings, BatchSettings, PortSettings

GONE = "ONELORA_SERVE_AUTH"  # of versions whose page asked for a user and a password


@dataclass(frozen=True, kw_only=True)
class ServeSettings(PortSettings, AccessSettings, BatchSettings, ComputeSettings):
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
        if not self.adapters.is_dir() and self.adapters != ServeSettings.adapters:
            raise FileNotFoundError(f"--adapters '{self.adapters}': no such folder")
        if GONE in os.environ:
            raise ValueError(f"{GONE} is no longer read: give tokens by --token-file, and unset it")


def make_service(settings: ServeSettings):
    """The `Service` of a base that is not loaded yet."""
    from onelora_diffusion.serving.service import Service

    # Clients learn the name of a folder, and not where it is on this machine.
    name = "miniature" if settings.base is None else settings.base
    name = Path(name).resolve().name if Path(name).is_dir() else name
    scale = defaults_of(EMBEDDED if settings.base is None else None).guidance_scale
    return Service(name, settings.adapters, scale, settings.request_timeout)


def load_batcher(settings: ServeSettings):
    """(the `Batcher` of the base and its adapters, what it serves in one line)."""
    from onelora_diffusion.serving.adapter_cache import AdapterCache
    from onelora_diffusion.serving.batching import Batcher
    from onelora_diffusion.serving.library import AdapterLibrary, shipped_adapters

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    drawing = _load_drawing(settings, device)
    transformer = drawing.transformer.requires_grad_(False)
    folders = [settings.adapters, *([shipped_adapters()] if settings.base is None else [])]
    library = AdapterLibrary(folders, fingerprint(transformer))
    batcher = Batcher(drawing, library, AdapterCache(transformer, int(settings.adapter_memory * 1e6)), settings)
    fitting = sum(not entry.problem for entry in library.entries())
    return batcher, f"{settings.base or 'the miniature'}, {fitting} adapters, {in_words(settings.report(device))}"


def _load_drawing(settings: ServeSettings, device: torch.device):
    from onelora_diffusion.serving.drawing import Drawing

    precision = "bf16" if settings.mixed_precision == "bf16" else "fp32"
    pipeline = load_base(settings.base, condition=object, precision=precision)
    if len(denoisers_in(pipeline)) > 1:  # adapters of one of them would fit the other as well, and are left out
        choose_denoiser(pipeline, BOTH)
    if settings.mixed_precision == "fp16" and family_of(pipeline).condition is str:
        raise ValueError("--mixed-precision fp16 is for classes: choose bf16 or no")
    settings.place(pipeline.to(device), device)
    return Drawing(pipeline, settings.max_steps, class_names(model_index(settings.base)))
