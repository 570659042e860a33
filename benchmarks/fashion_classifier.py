"""Train the classifier of Fashion-MNIST by whose features images are compared (evaluation/features/fashion.py)."""

import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from onelora_diffusion.data.fashion import FashionMNIST
from onelora_diffusion.evaluation.features.fashion import SIDE, FashionNetwork, grey_images
from onelora_diffusion.files import write_bytes
from onelora_diffusion.sampling import as_uint8


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
            batch = grey_images(as_uint8(images[chosen]))
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
        predicted = torch.cat([network(grey_images(as_uint8(batch))).argmax(1) for batch in held_out.split(1000)])
    facts = {
        "accuracy": (predicted == held_out_labels).double().mean().item(),
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save(network.state_dict(), metadata={"classifier": json.dumps(facts)}))
