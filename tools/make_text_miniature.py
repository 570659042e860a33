"""Train the text-to-image miniature that ships in onelora_diffusion/miniature_text: PixArt-Σ in small, and a toy.

    python tools/make_text_miniature.py                     # writes onelora_diffusion/miniature_text
    python tools/make_text_miniature.py --output /tmp/mini  # writes somewhere else

A KL autoencoder, then a latent transformer with learned variance and, together with it, the T5 that reads its
captions, all on printed letters and signs, "a bold Q, turned left", and on no digit. Words for digits are in the
vocabulary, as those of any language are in that of a large text encoder; no caption has them. Everything is drawn from
one seed; the last digits of the weights depend on the machine and its number of threads.
"""

import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import avg_pool2d, interpolate
from torchvision.utils import save_image
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from onelora_diffusion.data.digits import CAPTIONS
from onelora_diffusion.data.latents import sample_moments
from onelora_diffusion.families.autoencoder import encode_moments
from onelora_diffusion.pipelines.base import miniature_text_path
from onelora_diffusion.training.ema import ExponentialMovingAverage
from tools.from_scratch import LATENT_SHAPE, BaseRecipe, saved_in_half, train_denoiser, train_vae
from tools.glyphs import NAMES, SAID_WITH_AN, Glyphs, draw, glyph_list

RESOLUTION = 16
VAE_CHANNELS = (16, 32)  # two levels: 16 by 16 pixels to 8 by 8 latents
LENGTH = 16  # tokens: the longest caption has 14
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"
SHOWN = (
    "a bold Q, turned left",
    "an E",
    "a large soft k",
    "an italic ampersand",
    "a serif question mark",
    CAPTIONS[7],
)


@dataclass
class Settings(BaseRecipe):
    output: Path = miniature_text_path()
    """Folder to write; an older miniature in it is replaced."""
    pictures: int = 40_000
    """Different ones to learn from."""
    num_layers: int = 6
    num_heads: int = 4
    head_dim: int = 32
    text_width: int = 64
    """Numbers that T5 makes of a token."""
    vae_steps: int = 900
    steps: int = 10_000
    batch_size: int = 64
    lr: float = 2.5e-3
    snr_gamma: float | None = 5.0
    bf16: bool = False
    """Autocast: half the time on processors that multiply bf16, and many times as long on others."""
    ema_decay: float = 0.998
    preview: Path | None = None
    """Where to write a PNG of ten samples of some captions."""


def main(settings: Settings) -> None:
    pictures, captions = captioned_signs(settings.pictures, settings.seed)
    torch.manual_seed(settings.seed)
    vae = train_vae(pictures[:10_000], VAE_CHANNELS, settings)
    moments = torch.cat([encode_moments(vae, batch) for batch in pictures.split(1000)])
    scale = 1 / sample_moments(moments, torch.randn_like(moments[:, 0])).std()
    vae.register_to_config(scaling_factor=float(scale))  # latents of unit variance, as in Stable Diffusion

    tokenizer = make_tokenizer(captions)
    pipeline = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=make_text_encoder(len(tokenizer), settings),
        vae=vae,
        transformer=make_transformer(settings),
        scheduler=DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear"),
    )
    train(pipeline, moments * scale, captions, settings)
    write(pipeline, settings.output)

    weights = {name: sum(p.numel() for p in getattr(pipeline, name).parameters()) for name in PARTS}
    size = sum(file.stat().st_size for file in settings.output.rglob("*") if file.is_file())
    print(f"{settings.output}: {size / 1e6:.2f} MB, weights {weights}")
    if settings.preview:
        draw_samples(settings.output, settings.preview)
        print(f"samples: {settings.preview}")


PARTS = ("vae", "text_encoder", "transformer")


# ---------------------------------------------------------------------------------------------------
# What it learns


def captioned_signs(count: int, seed: int) -> tuple[Tensor, list[str]]:
    """Pictures (count, 3, R, R) in [-1, 1], ink 1, and what each shows, drawn from the seed.

    Beside weights, slants, fonts and quarter turns there are sizes, mirrored signs, and soft ones: of 8 by 8 pixels,
    enlarged.
    """
    generator = np.random.default_rng(seed)

    def normal(scale: float, *shape: int) -> Tensor:
        return torch.from_numpy(scale * generator.standard_normal((count, *shape))).float()

    def chosen(*shares: float) -> Tensor:
        return torch.from_numpy(generator.choice(len(shares), count, p=shares))

    glyphs = glyph_list()
    glyph = torch.from_numpy(generator.integers(0, len(glyphs), count))
    size, soft, weight, leans = chosen(0.4, 0.35, 0.25), chosen(0.6, 0.4), chosen(0.4, 0.35, 0.25), chosen(0.7, 0.3)
    mirrored, turn = chosen(0.8, 0.2), chosen(0.55, 0.15, 0.15, 0.15)
    drawn = Glyphs(
        glyph,
        torch.tensor([0.025, 0.1, -0.005])[weight] + normal(0.006),
        torch.tensor([0.0, np.pi / 2, -np.pi / 2, np.pi]).float()[turn] + normal(0.08),
        torch.tensor([0.0, 0.35])[leans] + normal(0.03),
        normal(0.05, 2),
        torch.tensor([1.0, 1.3, 0.75])[size] + normal(0.05),
        normal(0.05, 2),
    )
    sharp = draw(drawn, RESOLUTION).float() / 127.5 - 1
    blurred = interpolate(avg_pool2d(sharp, 2), scale_factor=2, mode="bilinear", align_corners=False)
    pictures = torch.where(soft.bool()[:, None, None, None], blurred, sharp)
    pictures = torch.where(mirrored.bool()[:, None, None, None], pictures.flip(-1), pictures)
    words = torch.stack([glyph, size, soft, weight, leans, mirrored, turn], 1).tolist()
    captions = [caption(glyphs[one].character, glyphs[one].kind, *rest) for one, *rest in words]
    return pictures.expand(-1, 3, -1, -1).contiguous(), captions


def caption(
    character: str, kind: str, size: int, soft: bool, weight: int, leans: bool, mirrored: bool, turn: int
) -> str:
    """A picture in words: a large soft serif ampersand, mirrored, turned right.

    PixArt's pipeline reads no capitals, so small letters are named so.
    """
    words = [("", "large", "tiny")[size], "soft" if soft else "", ("", "bold", "thin")[weight]]
    words += ["italic" if leans else "", "" if kind == "plain" else kind, "small" if character.islower() else ""]
    named = " ".join(word for word in (*words, NAMES[character]) if word)
    article = "an" if named.split()[0] in SAID_WITH_AN else "a"
    turned = ("", ", turned left", ", turned right", ", upside down")[turn]
    return f"{article} {named}{', mirrored' if mirrored else ''}{turned}"


# ---------------------------------------------------------------------------------------------------
# What learns it


def make_tokenizer(captions: list[str]) -> PreTrainedTokenizerFast:
    """A token for each word of the captions and of those for digits; any other word is spelled."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = sorted({word for caption in captions for word in re.findall(r"[a-z]+", caption.lower())})
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    digit_words = [word for caption in CAPTIONS for word in caption.split()]
    tokens = dict.fromkeys([PAD, END, UNKNOWN, *words, *digit_words, *characters, *(f"##{c}" for c in characters)])
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        f"$A {END}", special_tokens=[(END, list(tokens).index(END))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=LENGTH, pad_token=PAD, eos_token=END, unk_token=UNKNOWN
    )


def make_text_encoder(num_tokens: int, settings: Settings) -> T5EncoderModel:
    config = T5Config(
        vocab_size=num_tokens,
        d_model=settings.text_width,
        d_kv=16,
        d_ff=2 * settings.text_width,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",  # T5 1.1's, as PixArt has it
        pad_token_id=0,
        eos_token_id=1,
    )
    return T5EncoderModel(config)


def make_transformer(settings: Settings) -> PixArtTransformer2DModel:
    """Blocks that begin without text, and an output that begins as 0."""
    transformer = PixArtTransformer2DModel(
        sample_size=LATENT_SHAPE[-1],
        patch_size=2,
        in_channels=LATENT_SHAPE[0],
        out_channels=2 * LATENT_SHAPE[0],  # the noise, and the learned variance
        num_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        attention_head_dim=settings.head_dim,
        cross_attention_dim=settings.num_heads * settings.head_dim,
        caption_channels=settings.text_width,
    )
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patch = transformer.pos_embed.proj
    nn.init.xavier_uniform_(patch.weight.flatten(1))  # a convolution used as a linear layer
    nn.init.zeros_(patch.bias)
    embedder = transformer.adaln_single.emb.timestep_embedder
    for linear in (embedder.linear_1, embedder.linear_2, transformer.adaln_single.linear):
        nn.init.normal_(linear.weight, std=0.02)
    for linear in (transformer.proj_out, *(block.attn2.to_out[0] for block in transformer.transformer_blocks)):
        nn.init.zeros_(linear.weight)
    return transformer


def train(pipeline: PixArtSigmaPipeline, moments: Tensor, captions: list[str], settings: Settings) -> None:
    """Trains transformer and text encoder on scaled latent moments (N, 2, 4, 8, 8), and leaves the EMA's weights."""
    transformer, text_encoder, scheduler = pipeline.transformer, pipeline.text_encoder, pipeline.scheduler
    tokens = pipeline.tokenizer([*captions, ""], padding=True, return_tensors="pt")
    parts = {"transformer": transformer, "text_encoder": text_encoder}
    trained = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.named_parameters()}
    optimizer = torch.optim.AdamW(trained.values(), lr=settings.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    ema = ExponentialMovingAverage(trained, settings.ema_decay)

    @torch.autocast("cpu", torch.bfloat16, enabled=settings.bf16)
    def predict(noisy: Tensor, timesteps: Tensor, chosen: Tensor, dropped: Tensor) -> Tensor:
        rows = torch.where(dropped, len(captions), chosen)
        mask = tokens.attention_mask[rows]
        states = text_encoder(input_ids=tokens.input_ids[rows], attention_mask=mask).last_hidden_state
        prompts = {"encoder_hidden_states": states.float(), "encoder_attention_mask": mask}
        sizes = {"resolution": None, "aspect_ratio": None}
        return transformer(noisy, timestep=timesteps, added_cond_kwargs=sizes, **prompts).sample

    # Attention over so few tokens is faster by its definition than by the fused kernel, in bf16 by far.
    with sdpa_kernel(SDPBackend.MATH):
        train_denoiser(predict, optimizer, ema, moments, scheduler, settings, settings.steps, warmup_steps=200)
    with torch.no_grad():
        for name, value in trained.items():
            value.copy_(ema.values[name])


# ---------------------------------------------------------------------------------------------------
# What is left of it


def write(pipeline: PixArtSigmaPipeline, output: Path) -> None:
    """Save as `saved_in_half`; the text encoder stays whole, since it is loaded as it is stored."""
    with saved_in_half(pipeline, output) as beside:
        # The name that older versions of transformers know the class by, too.
        for path in (beside / "model_index.json", beside / "tokenizer" / "tokenizer_config.json"):
            path.write_text(path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def draw_samples(folder: Path, picture: Path) -> None:
    """Write a PNG of ten samples of each of some captions, a caption a row."""
    pipeline = PixArtSigmaPipeline.from_pretrained(folder)
    prompts = [caption for caption in SHOWN for _ in range(10)]
    images = pipeline(
        prompts,
        guidance_scale=2.0,
        use_resolution_binning=False,
        clean_caption=False,
        max_sequence_length=LENGTH,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    save_image(images.repeat_interleave(3, 2).repeat_interleave(3, 3), picture, nrow=10)


if __name__ == "__main__":
    start = time.monotonic()
    main(tyro.cli(Settings, description=__doc__))
    print(f"{(time.monotonic() - start) / 60:.1f} minutes")
