"""A small base model from nothing: a KL autoencoder, then a latent DiT with learned variance, in stock classes."""

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor, nn
from torchvision.utils import save_image
from tqdm import tqdm

from benchmarks.folders import folder_written_beside
from onelora_diffusion.data.latents import sample_moments
from onelora_diffusion.diffusion import add_noise, training_losses
from onelora_diffusion.families.autoencoder import encode_moments
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.sampling import SamplerSettings, generate_images
from onelora_diffusion.training.ema import ExponentialMovingAverage
from onelora_diffusion.training.weighting import loss_weights, weighted_loss

LATENT_SHAPE = (4, 8, 8)


@dataclass
class BaseRecipe:
    """How a small base model is trained; everything is drawn from one seed."""

    seed: int = 0
    num_layers: int = 4
    vae_steps: int = 800
    vae_batch_size: int = 64
    vae_lr: float = 2e-3
    kl_weight: float = 1e-3
    """Weight of the KL term, per latent number, against the squared error per pixel."""
    steps: int = 10_000
    batch_size: int = 64
    lr: float = 1e-3
    snr_gamma: float | None = None
    """Weighs the squared error by min(SNR, γ) / SNR (Hang et al. 2023); None: by 1."""
    class_std: float = 0.02
    """Standard deviation that class embeddings begin with. DiT's 0.02 hardly parts them in a run of minutes."""
    label_drop: float = 0.1
    ema_decay: float = 0.999


def train_base(images: Tensor, labels: Tensor, vae_channels: tuple[int, ...], recipe: BaseRecipe) -> DiTPipeline:
    """A pipeline that draws images like these.

    Args:
        images: (N, 3, R, R) in [-1, 1], R = 8 · 2^(len(vae_channels) - 1), since latents are 8 by 8.
        labels: (N,) int64, every class from 0 up.
        vae_channels: channels of the autoencoder's levels; each but the last halves the image.
    """
    torch.manual_seed(recipe.seed)
    vae = train_vae(images, vae_channels, recipe)
    parts = [encode_moments(vae, batch) for batch in images.split(1000)]
    scale = 1 / torch.cat([sample_moments(part, torch.randn_like(part[:, 0])) for part in parts]).std()
    vae.register_to_config(scaling_factor=float(scale))  # latents of unit variance, as in Stable Diffusion

    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    moments = parts[0] if len(parts) == 1 else torch.cat(parts)  # a copy has another layout, and draws other noise
    transformer = train_transformer(moments * scale, labels, scheduler, recipe)
    return DiTPipeline(transformer, vae, scheduler)


def train_vae(images: Tensor, channels: tuple[int, ...], recipe: BaseRecipe) -> AutoencoderKL:
    """Images (N, 3, R, R) -> an autoencoder with latents (4, 8, 8)."""
    vae = AutoencoderKL(
        sample_size=images.shape[-1],
        latent_channels=LATENT_SHAPE[0],
        scaling_factor=1.0,  # until it is known, below
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        norm_num_groups=8,
        force_upcast=False,
    )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe.vae_lr, weight_decay=0.0)
    progress = tqdm(range(recipe.vae_steps), desc="autoencoder", unit="step")
    for step in progress:
        set_lr(optimizer, recipe.vae_lr, step, recipe.vae_steps)
        batch = images[torch.randint(len(images), (recipe.vae_batch_size,))]
        posterior = vae.encode(batch).latent_dist
        error = (vae.decode(posterior.sample()).sample - batch).square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        (error + recipe.kl_weight * kl).backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            progress.set_postfix(mse=f"{error.item():.5f}", kl=f"{kl.item():.3f}")
    return vae.eval().requires_grad_(False)


def train_transformer(moments: Tensor, labels: Tensor, scheduler, recipe: BaseRecipe) -> DiTTransformer2DModel:
    """Scaled latent moments (N, 2, 4, 8, 8) and labels (N,) -> a DiT with the EMA's weights."""
    num_classes = int(labels.max()) + 1
    transformer = DiTTransformer2DModel(
        sample_size=LATENT_SHAPE[-1],
        patch_size=2,
        in_channels=LATENT_SHAPE[0],
        out_channels=2 * LATENT_SHAPE[0],  # the noise, and the learned variance
        num_layers=recipe.num_layers,
        num_attention_heads=4,
        attention_head_dim=24,
        num_embeds_ada_norm=num_classes,  # the null row comes on top
    )
    embedder = transformer.transformer_blocks[0].norm1.emb
    for block in transformer.transformer_blocks:
        block.norm1.emb = embedder  # one conditioning for all blocks, as in the original code
    embedder.class_embedder.dropout_prob = 0.0  # labels are dropped below, once per sample
    initialize_weights(transformer, recipe.class_std)

    optimizer = torch.optim.AdamW(transformer.parameters(), lr=recipe.lr, weight_decay=0.0)
    ema = ExponentialMovingAverage(dict(transformer.named_parameters()), recipe.ema_decay)

    def predict(noisy: Tensor, timesteps: Tensor, chosen: Tensor, dropped: Tensor) -> Tensor:
        class_labels = torch.where(dropped, num_classes, labels[chosen])
        return transformer(noisy, timestep=timesteps, class_labels=class_labels).sample

    train_denoiser(predict, optimizer, ema, moments, scheduler, recipe, recipe.steps)

    # A stock model in the stock layout: every block owns a copy of the embedder, and its own label dropout.
    averaged = {name: ema.values.get(name, tensor) for name, tensor in transformer.state_dict().items()}
    shared = "transformer_blocks.0.norm1.emb."
    for name in list(averaged):
        if ".norm1.emb." in name:
            averaged[name] = averaged[shared + name.split(".norm1.emb.")[1]]
    stock = DiTTransformer2DModel.from_config(transformer.config)
    stock.load_state_dict(averaged)
    return stock.eval().requires_grad_(False)


def train_denoiser(
    predict: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    ema: ExponentialMovingAverage,
    moments: Tensor,
    scheduler,
    recipe: BaseRecipe,
    steps: int,
    warmup_steps: int = 100,
) -> None:
    """Trains on scaled latent moments (N, 2, 4, 8, 8), at the rates, batch size and label drop of the recipe.

    Args:
        predict: (noisy latents, timesteps, the rows of `moments` that they come from, which of them lose their label)
            -> the model's output.
        optimizer: of one group.
    """
    progress = tqdm(range(steps), desc="transformer", unit="step")
    for step in progress:
        set_lr(optimizer, recipe.lr, step, steps, warmup_steps)
        chosen = torch.randint(len(moments), (recipe.batch_size,))
        latents = sample_moments(moments[chosen], torch.randn(recipe.batch_size, *LATENT_SHAPE))
        noise = torch.randn_like(latents)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (recipe.batch_size,))
        dropped = torch.rand(recipe.batch_size) < recipe.label_drop

        model_output = predict(add_noise(latents, noise, timesteps, scheduler), timesteps, chosen, dropped)
        losses = training_losses(model_output, latents, noise, timesteps, scheduler)
        weights = loss_weights(timesteps, scheduler, recipe.snr_gamma, "none")
        optimizer.zero_grad()
        weighted_loss(losses, weights).mean().backward()
        nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
        optimizer.step()
        ema.update(step + 1)
        if step % 50 == 0:
            progress.set_postfix({name: f"{loss.mean().item():.4f}" for name, loss in losses.items()})


def set_lr(optimizer, peak: float, step: int, steps: int, warmup_steps: int = 100) -> None:
    """Linear warm-up, then half a cosine down to nothing."""
    lr = peak * min(1.0, (step + 1) / warmup_steps) * (1 + math.cos(math.pi * step / steps)) / 2
    for group in optimizer.param_groups:
        group["lr"] = lr


def initialize_weights(transformer: DiTTransformer2DModel, class_std: float) -> None:
    """adaLN-Zero: every block begins as the identity, and the output as 0 (Peebles & Xie 2023, section 3.2)."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patch = transformer.pos_embed.proj
    nn.init.xavier_uniform_(patch.weight.flatten(1))  # a convolution used as a linear layer
    nn.init.zeros_(patch.bias)
    embedder = transformer.transformer_blocks[0].norm1.emb
    nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=class_std)
    nn.init.normal_(embedder.timestep_embedder.linear_1.weight, std=0.02)
    nn.init.normal_(embedder.timestep_embedder.linear_2.weight, std=0.02)
    outputs = [transformer.proj_out_1, transformer.proj_out_2]
    for linear in outputs + [block.norm1.linear for block in transformer.transformer_blocks]:
        nn.init.zeros_(linear.weight)


@contextlib.contextmanager
def saved_in_half(pipeline, output: Path) -> Iterator[Path]:
    """Context manager: the saved pipeline, in a folder that takes the place of `output` at the end.

    Transformer and VAE are stored, and left, in half precision.
    """
    pipeline.transformer.half()
    pipeline.vae.half()
    with folder_written_beside(output) as beside:
        pipeline.save_pretrained(beside)
        for weights in beside.rglob("*.safetensors"):
            weights.chmod(0o644)  # safetensors writes them for the owner alone
        yield beside


def write_base(pipeline: DiTPipeline, id2label: dict[int, str], output: Path) -> None:
    """Save as `saved_in_half`, with the class names that `save_pretrained` would leave out."""
    with saved_in_half(pipeline, output) as beside:
        index = json.loads((beside / "model_index.json").read_text())
        index["id2label"] = {str(label): name for label, name in id2label.items()}
        (beside / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def draw_samples(folder: Path, picture: Path, seed: int = 0) -> None:
    """Write a PNG of ten samples of each class of a pipeline folder, a class a row."""
    pipeline = load_base(folder)
    num_classes = pipeline.transformer.config.num_embeds_ada_norm
    labels = [label for label in range(num_classes) for _ in range(10)]
    batches = generate_images(pipeline, labels, seed, range(len(labels)), SamplerSettings(guidance_scale=1.5))
    save_image(torch.cat([batch for _, batch in batches]) / 255, picture, nrow=10)
