"""Features of networks that `transformers` has: weights from the hub, which are pinned, or from a folder."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.transforms.v2.functional import InterpolationMode, normalize, resize

from onelora_diffusion.command_line import check_installed
from onelora_diffusion.evaluation.features.base import Features
from onelora_diffusion.remote import is_in_reach

IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class Published:
    """The published weights of a network: a commit of a repository on the hub, and the flag that takes a copy."""

    hub_id: str
    revision: str
    flag: str
    is_safetensors: bool = False  # else they are a `pytorch_model.bin`, which is read weights-only

    @property
    def extractor(self) -> str:
        return f"{self.hub_id}@{self.revision}"

    def load(self, class_name: str, folder: str | Path | None, **options):
        """(an object of this class of transformers, what identifies its weights).

        `folder` has config.json and model.safetensors; None takes the published weights, from the hub's cache or the
        hub. ValueError if `transformers` is not installed, FileNotFoundError if there are no such weights.
        """
        check_installed(self.hub_id, "transformers")
        import transformers

        of_class = getattr(transformers, class_name)
        if folder is not None:
            weights = Path(folder) / "model.safetensors"
            if not weights.is_file():
                raise FileNotFoundError(
                    f"no weights at '{folder}': {self.flag} takes a folder of config.json and model.safetensors"
                )
            loaded = of_class.from_pretrained(folder, use_safetensors=True, local_files_only=True, **options)
            return loaded, hashlib.sha256(weights.read_bytes()).hexdigest()
        pinned = {"revision": self.revision, "use_safetensors": self.is_safetensors, **options}
        try:
            return of_class.from_pretrained(self.hub_id, local_files_only=True, **pinned), self.extractor
        except OSError as error:  # not in the cache
            if not is_in_reach(self.hub_id):
                name = "model.safetensors" if self.is_safetensors else "pytorch_model.bin"
                raise FileNotFoundError(
                    f"no weights of {self.hub_id}: {name} is not in the hub's cache and cannot be fetched from "
                    f"https://huggingface.co/{self.hub_id}; give a copy by {self.flag}, or choose other --features "
                    "and --metrics"
                ) from error
        return of_class.from_pretrained(self.hub_id, **pinned), self.extractor


class NetworkFeatures(Features):
    """A network's features of images that are resized as PIL does it: uint8 (batch, 3, R, R) -> float64 (batch, d).

    The bicubic filter is antialiased and works in bytes, like PIL's, from which it differs by a grey level at most.
    The network gets `side` by `side` pixels, normalised by (mean, deviation) of the three channels in [0, 1].
    """

    def __init__(self, network: nn.Module, name: str, extractor: str, num_features: int, side: int, colours=IMAGENET):
        super().__init__()
        self.network = network.requires_grad_(False).eval()
        self.name, self.extractor, self.num_features = name, extractor, num_features
        self.side, self.colours = side, colours
        self.resize = f"bicubic to {side}x{side}, antialias=True, in bytes"

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        images = resize(images, [self.side, self.side], InterpolationMode.BICUBIC, antialias=True)
        return self.embed(normalize(images.float() / 255, *self.colours)).double()

    def embed(self, images: Tensor) -> Tensor:
        """The class token of normalised images (batch, 3, side, side)."""
        return self.network(images).last_hidden_state[:, 0]
