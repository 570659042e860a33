"""The features that FID is defined on: Inception-v3 of 2015, as torch-fidelity converted it from TensorFlow."""

import hashlib
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from onelora_diffusion.evaluation.features.base import INCEPTION_SHA256, Features

NUM_SPATIAL = 7 * 17 * 17


class InceptionFeatures(Features):
    """Inception-v3's pooled activations: uint8 (batch, 3, R, R) -> float64 (batch, num_features).

    Images are brought to 299 by 299 as TensorFlow 1 did it, bilinearly and without antialiasing, as in ADM's
    evaluator and torch-fidelity. A distance is called FID only on the 2048 last features of the released weights.

    `layer` is `2048`, or an earlier one: `64`, `192`, `768`; weights have torch-fidelity's names, and `extractor`
    identifies them.
    """

    resize = "TF1 bilinear to 299x299, antialias=False"

    def __init__(self, state_dict: dict[str, Tensor], extractor: str, name: str = "inception", layer: str = "2048"):
        super().__init__()
        self.network = InceptionNetwork(layer)
        nn.Module.load_state_dict(self.network, state_dict)
        self.network.requires_grad_(False).eval()
        self.num_features = int(layer)
        self.name = name if layer == "2048" else f"{name}-{layer}"
        self.extractor = extractor if layer == "2048" else f"{extractor}-{layer}"
        self.num_spatial = NUM_SPATIAL if layer in ("768", "2048") else 0  # the earlier layers end before them

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[0].double()

    def with_spatial(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Also sFID's features (batch, 2023), channels last, as ADM's evaluator has them (Nash et al., ICML 2021)."""
        maps = []
        # mixed_6/conv of TensorFlow's graph is the first convolution, after the ReLU, of torchvision's Mixed_6d.
        layer = self.network.Mixed_6d.branch1x1
        hook = layer.register_forward_hook(lambda module, inputs, output: maps.append(output))
        try:
            features = self(images)
        finally:
            hook.remove()
        return features, maps[0][:, :7].permute(0, 2, 3, 1).flatten(1).double()

    def logits(self, features: Tensor) -> Tensor:
        """Class logits without their bias, (batch, 1008), of last features: what the Inception Score reads."""
        return features @ self.network.fc.weight.to(features).T


class InceptionNetwork(FeatureExtractorInceptionV3):
    """torch-fidelity's network without the weights that its constructor would download or unpickle."""

    def __init__(self, layer: str):
        nothing = BytesIO()
        torch.save({}, nothing)
        nothing.seek(0)
        super().__init__("inception-v3-compat", [layer], nothing)

    def load_state_dict(self, state_dict: dict) -> None:
        """Called by the constructor; the weights come later."""


def inception_2015(weights: str | Path | None = None) -> InceptionFeatures:
    """Inception-2015 with the weights of torch-fidelity's release: a file, else torch's cache, else the network.

    The file's hash is checked before it is read, and it is read weights-only. FileNotFoundError if there is no such
    file, or no cached one and no network; ValueError if it is not the released one.
    """
    path = Path(weights) if weights is not None else _released_weights()
    if not path.is_file():
        raise FileNotFoundError(f"no Inception weights at '{path}': they are at {URL_INCEPTION_V3}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != INCEPTION_SHA256:
        raise ValueError(
            f"'{path}' is not torch-fidelity's {Path(URL_INCEPTION_V3).name} (its SHA-256 starts with {digest[:8]}, "
            f"not {INCEPTION_SHA256[:8]}): get it from {URL_INCEPTION_V3}"
        )
    return InceptionFeatures(torch.load(path, map_location="cpu", weights_only=True), INCEPTION_SHA256)


def _released_weights() -> Path:
    """The released file in torch's cache, downloaded if it is not there."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256)
        except OSError as error:  # URLError, HTTPError, a time-out: all of them
            raise FileNotFoundError(
                f"no Inception weights in torch's cache, and no network ({error}): fetch {URL_INCEPTION_V3} "
                "elsewhere and give it by --inception-weights, or choose --features pixels"
            ) from error
    return path
