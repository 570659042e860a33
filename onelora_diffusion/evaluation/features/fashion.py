"""Features for Fashion-MNIST: those of a small classifier of its ten classes, trained by the recipe below."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from tqdm import tqdm

from onelora_diffusion.data.fashion import FashionMNIST
from onelora_diffusion.evaluation.features.base import Features
from onelora_diffusion.evaluation.images import to_uint8
from onelora_diffusion.files import first_line, write_bytes

SIDE = 32


class FashionNetwork(nn.Module):
    """Three strided convolutions and two linear layers; 64 features between the last two."""

    num_features = 64

    def __init__(self):
        super().__init__()
        widths = (1, 16, 32, 64)
        layers = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (SIDE // 8) ** 2, self.num_features))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(self.num_features, 10))

    def forward(self, grey: Tensor) -> Tensor:
        return self.head(self.trunk(grey))


class FashionFeatures(Features):
    """The classifier's 64 features: uint8 (batch, 3, R, R) -> float64 (batch, 64); `predict` gives the class.

    Args:
        weights: the file that `train_fashion_classifier` wrote.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is not of this classifier.
    """

    name = "fashion-mnist"
    num_features = FashionNetwork.num_features
    resize = f"mean of the channels, bilinear to {SIDE}x{SIDE}"

    def __init__(self, weights: str | Path | None):
        super().__init__()
        if weights is None or not Path(weights).is_file():
            raise FileNotFoundError(f"no weights of the Fashion-MNIST classifier at '{weights}'")
        content = Path(weights).read_bytes()
        self.network = FashionNetwork()
        try:
            self.network.load_state_dict(load(content))
            with safe_open(weights, framework="pt") as file:
                self.accuracy = json.loads(file.metadata()["classifier"])["accuracy"]
        except (SafetensorError, RuntimeError, TypeError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(f"'{weights}' is no Fashion-MNIST classifier: {first_line(error)}") from error
        self.network.requires_grad_(False).eval()
        self.extractor = hashlib.sha256(content).hexdigest()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.network.trunk(grey_images(images)).double()

    @torch.no_grad()
    def predict(self, images: Tensor) -> Tensor:
        """The class (0..9) of each uint8 image (batch, 3, R, R): (batch,) int64."""
        return self.network(grey_images(images.to(self.network.head[1].weight.device))).argmax(1)

    def describe(self) -> str:
        return f"convolutional classifier of the ten classes, {self.accuracy:.1%} right on the test split"


def load_fashion(resolution: int, weights: str | Path | None = None) -> FashionFeatures:
    return FashionFeatures(weights)


def train_fashion_classifier(
    path: Path, root: str | Path | None = None, epochs: int = 4, batch_size: int = 128, lr: float = 2e-3, seed: int = 0
) -> None:
    """Train the classifier on all ten classes of the train split, and write it as one .safetensors.

    AdamW, the learning rate falling to 0 along a line, half of the images mirrored; all drawn from `seed`. The
    last digits depend on the machine, so that the file's hash, not the recipe, says which features a number is of.
    """
    parts = []
    for split in ("train", "test"):
        dataset = FashionMNIST(root, split, SIDE, classes=tuple(range(10)))
        parts += [dataset.images, torch.tensor(dataset.labels)]
    images, labels, held_out, held_out_labels = parts

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = FashionNetwork()
        optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=1e-2)
        steps = epochs * (len(images) // batch_size)
        progress = tqdm(range(steps), desc="classifier", unit="step")
        for step in progress:
            if step % (len(images) // batch_size) == 0:
                batches = torch.randperm(len(images)).split(batch_size)
            chosen = batches[step % (len(images) // batch_size)]
            batch = grey_images(to_uint8(images[chosen]))
            batch = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, batch.flip(-1), batch)
            loss = cross_entropy(network(batch), labels[chosen])
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 50 == 0:
                progress.set_postfix(loss=f"{loss.item():.3f}")

    network.eval()
    with torch.no_grad():
        predicted = torch.cat([network(grey_images(to_uint8(batch))).argmax(1) for batch in held_out.split(1000)])
    facts = {
        "accuracy": (predicted == held_out_labels).double().mean().item(),
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(network.state_dict(), metadata={"classifier": json.dumps(facts)}))


def grey_images(images: Tensor) -> Tensor:
    """uint8 (batch, 3, R, R) -> float32 (batch, 1, 32, 32) in [0, 1]."""
    grey = images.float().mean(1, keepdim=True) / 255
    if grey.shape[-1] == SIDE:
        return grey
    return interpolate(grey, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
