"""Our Fréchet distance beside those of torch-fidelity, torchmetrics, pytorch-fid and clean-fid, on the same images.

    pip install --no-deps --target other-tools pytorch-fid==0.3.0 clean-fid==0.1.35
    PYTHONPATH=.:other-tools python tools/compare_fid.py

All of them get the same two folders of PNG files and the same Inception network, whose weights are random and drawn
from a seed: what the tools do to an image, and how they compute, does not depend on what the weights have learned.
No download. Every tool runs its own code from the files to the number. Beside it stands what our code finds on
the other tool's resize and scaling; if these two agree, they are all the difference between the tools.

Fewer images than features leave covariances without full rank, as any quick comparison does; the tools then differ
in how they take the root of a singular matrix, too. `--layer 192` with 256 images has full rank.
"""

import json
import tempfile
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from onelora_diffusion.data import load_dataset
from onelora_diffusion.evaluation.formulas import frechet_distance
from onelora_diffusion.evaluation.images import open_images
from onelora_diffusion.evaluation.statistics import FeatureStatistics, RunningStatistics
from onelora_diffusion.sampling import as_uint8
from tools.random_inception import inception_random

try:
    import cleanfid.fid
    import cleanfid.inception_pytorch
    import pytorch_fid.fid_score
    import pytorch_fid.inception
except ImportError as error:
    command = "pip install --no-deps --target other-tools pytorch-fid==0.3.0 clean-fid==0.1.35"
    raise SystemExit(f"compare_fid.py: {error}; {command}, and put other-tools on PYTHONPATH") from error
import torch_fidelity
from torchmetrics.image.fid import FrechetInceptionDistance

SIDE = 299  # of Inception's input
BATCH_SIZE = 16


@dataclass
class Settings:
    """Compare our Fréchet distance with other tools' own, on random Inception weights."""

    resolution: int = 256
    """Of the images: below 299 the tools enlarge them, above they shrink them."""
    num_images: int = 64
    """In each of the two sets."""
    layer: Literal["64", "192", "768", "2048"] = "2048"
    """Of Inception; FID has the last."""
    seed: int = 0
    """Of the weights and of the grain of the images."""
    output: Path | None = None
    """JSON file. None: the table only."""


def main(settings: Settings) -> None:
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / name for name in ("first", "second")]
        for folder, digits in zip(folders, ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9)), strict=True):
            write_images(folder, digits, settings)
        features = inception_random(settings.seed, settings.layer)
        weights = Path(scratch) / "weights.pth"
        torch.save(features.network.state_dict(), weights)
        for module in (pytorch_fid.inception, cleanfid.inception_pytorch):
            module.load_state_dict_from_url = lambda *_, **__: torch.load(weights, weights_only=True)
        block = pytorch_fid.inception.InceptionV3.BLOCK_INDEX_BY_DIM[int(settings.layer)]

        ours = frechet_distance(*(measure(folder, features) for folder in folders))
        print(f"ours: {ours:.6g} ({time.monotonic() - start:.0f} s)", flush=True)

        tools = {
            "torch-fidelity": ("TF1 bilinear", "(x - 128)/128", by_torch_fidelity),
            "torchmetrics, antialias=True": ("torch bilinear, antialias", "(x - 128)/128", by_torchmetrics),
            "pytorch-fid": ("torch bilinear", "x/127.5 - 1", by_pytorch_fid),
            "clean-fid, legacy_pytorch": ("torch bilinear", "x/127.5 - 1", by_clean_fid_legacy),
            "clean-fid, clean": ("PIL bicubic", "(x - 128)/128", by_clean_fid),
        }
        ours_on = {("TF1 bilinear", "(x - 128)/128"): ours}
        rows = []
        for name, (resize, scaling, tool) in tools.items():
            if (resize, scaling) not in ours_on:
                resized = [resized_features(folder, resize, scaling, block) for folder in folders]
                ours_on[resize, scaling] = frechet_distance(*map(statistics_of, resized))
            theirs, same = own_number(tool, folders, weights, settings.layer, block), ours_on[resize, scaling]
            rows.append({"tool": name, "resize": resize, "scaling": scaling, "theirs": theirs, "ours_on_it": same})
            print(f"{name}: {theirs}, ours on its resize {same:.6g} ({time.monotonic() - start:.0f} s)", flush=True)

    print(f"\n{settings.num_images} + {settings.num_images} images of {settings.resolution} px, ", end="")
    print(f"{settings.layer} features; ours: {ours:.6g} (TF1 bilinear, (x - 128)/128)\n")
    print("| tool | resize to 299 | scaling | its number | beside ours | ours on its resize | they differ by |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        same, theirs = row["ours_on_it"], row["theirs"]
        if isinstance(theirs, str):
            cells = theirs, "", f"{same:.6g}", ""
        else:
            cells = f"{theirs:.6g}", f"{theirs / ours - 1:+.2%}", f"{same:.6g}", f"{theirs / same - 1:+.1e}"
        print("| " + " | ".join([row["tool"], row["resize"], row["scaling"], *cells]) + " |")
    if settings.output:
        report = {**vars(settings), "output": None, "ours": ours, "tools": rows, "seconds": time.monotonic() - start}
        settings.output.write_text(json.dumps(report, indent=2) + "\n")


def write_images(folder: Path, digits: tuple[int, ...], settings: Settings) -> None:
    """Handwritten digits of 8 by 8 pixels, enlarged to squares with hard edges, tinted and grained."""
    folder.mkdir()
    dataset = load_dataset("digits", split="train", resolution=8, classes=digits)
    generator = torch.Generator().manual_seed(settings.seed)
    for index in range(settings.num_images):
        image = interpolate(dataset[index % len(dataset)][0][None], size=(settings.resolution,) * 2)
        tint = torch.rand(1, 3, 1, 1, generator=generator)
        grain = 0.2 * torch.randn(image.shape, generator=generator)
        pixels = as_uint8((image + 1) * tint - 1 + grain)[0].permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / f"{index:04d}.png")


def measure(folder: Path, features) -> FeatureStatistics:
    """As eval_fid.py does."""
    images, running = open_images(folder), RunningStatistics(features)
    for indices, pixels in images.batches(range(len(images)), BATCH_SIZE):
        running.update(indices, pixels)
    return running.reduce()


@torch.no_grad()
def resized_features(folder: Path, resize: str, scaling: str, block: int) -> Tensor:
    """Features of images that are resized and scaled here, (images, d)."""
    network = pytorch_fid.inception.InceptionV3([block], resize_input=False, normalize_input=False).eval()
    images, found = open_images(folder), []
    for _, pixels in images.batches(range(len(images)), BATCH_SIZE):
        x = RESIZES[resize](pixels)
        x = (x - 128) / 128 if scaling == "(x - 128)/128" else x / 127.5 - 1
        found.append(adaptive_avg_pool2d(network(x)[0], 1).flatten(1).double())
    return torch.cat(found)


def pil_bicubic(pixels: Tensor) -> Tensor:
    """Channel by channel in float, with the wider kernel that PIL takes to shrink, and clipped."""
    planes = [Image.fromarray(plane) for plane in pixels.flatten(0, 1).float().numpy()]
    planes = [np.asarray(plane.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for plane in planes]
    return torch.from_numpy(np.stack(planes)).clip(0, 255).view(-1, 3, SIDE, SIDE)


RESIZES = {
    "torch bilinear": lambda x: interpolate(x.float(), size=(SIDE, SIDE), mode="bilinear", align_corners=False),
    "torch bilinear, antialias": lambda x: interpolate(x.float(), size=(SIDE, SIDE), mode="bilinear", antialias=True),
    "PIL bicubic": pil_bicubic,
}


def statistics_of(features: Tensor) -> FeatureStatistics:
    return FeatureStatistics(features.mean(0), torch.cov(features.T), len(features))


def own_number(tool, folders: list[Path], weights: Path, layer: str, block: int) -> float | str:
    """The tool's own number, or the message with which it gives up."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        try:
            return float(tool(folders, weights, layer, block))
        except ValueError as error:  # the root of a singular matrix
            return f"fails: {error}"


def by_torch_fidelity(folders: list[Path], weights: Path, layer: str, block: int) -> float:
    found = torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        fid=True,
        feature_layer_fid=layer,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        batch_size=BATCH_SIZE,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    return found["frechet_inception_distance"]


def by_torchmetrics(folders: list[Path], weights: Path, layer: str, block: int) -> float:
    metric = FrechetInceptionDistance(int(layer), feature_extractor_weights_path=str(weights), antialias=True)
    for folder, is_real in zip(folders, (True, False), strict=True):
        images = open_images(folder)
        for _, pixels in images.batches(range(len(images)), BATCH_SIZE):
            metric.update(pixels, real=is_real)
    return metric.compute().item()


def by_pytorch_fid(folders: list[Path], weights: Path, layer: str, block: int) -> float:
    return pytorch_fid.fid_score.calculate_fid_given_paths(
        [str(folder) for folder in folders], BATCH_SIZE, "cpu", int(layer), num_workers=0
    )


def by_clean_fid_legacy(folders: list[Path], weights: Path, layer: str, block: int) -> float:
    network = cleanfid.inception_pytorch.InceptionV3([block], resize_input=False).eval()
    return clean_fid(folders, "legacy_pytorch", lambda x: adaptive_avg_pool2d(network(x / 255)[0], 1).flatten(1))


def by_clean_fid(folders: list[Path], weights: Path, layer: str, block: int) -> float:
    # Its network for this mode is a TorchScript file with weights inside; so its other one, with that one's scaling.
    network = cleanfid.inception_pytorch.InceptionV3([block], resize_input=False, normalize_input=False).eval()
    return clean_fid(folders, "clean", lambda x: adaptive_avg_pool2d(network((x - 128) / 128)[0], 1).flatten(1))


def clean_fid(folders: list[Path], mode: str, extractor) -> float:
    return cleanfid.fid.compute_fid(
        str(folders[0]),
        str(folders[1]),
        mode=mode,
        custom_feat_extractor=extractor,
        batch_size=BATCH_SIZE,
        num_workers=0,
        device=torch.device("cpu"),
        verbose=False,
    )


if __name__ == "__main__":
    main(tyro.cli(Settings))
