"""Text-to-image transformers at their full width: step time and memory of adapters, and what a whole one needs."""

import copy
import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from benchmarks.measure import interleave, ratio, resident_bytes, saved_bytes, table
from benchmarks.peers import twin
from onelora_diffusion.config import AdapterConfig
from onelora_diffusion.denoisers import DENOISERS, blocks_of
from onelora_diffusion.families import Family, family_of
from onelora_diffusion.injection.layers import target_layers
from onelora_diffusion.injection.verbs import inject_adapter
from onelora_diffusion.pipelines.base import model_index

TEXT_TOKENS = 128
PROMPT = "a photo of a dog in a bucket"
REFERENCE = "PEFT LoRA r=16"


class Base(NamedTuple):
    """A published transformer.

    Attributes:
        transformer_class: of diffusers.
        config: its settings, as far as they are not the defaults of its class.
        depths: settings of its numbers of blocks, and what a step is measured with.
        pixels: of the image, a side, that a latent stands for.
        channels: of latents.
        prompts: features of each of the prompt's arguments; those of one number have no tokens.
        targets: the layers that are adapted: of the blocks, of the modulation that all blocks share, of the output.
        called: what else than prompts it is called with for latents (batch, C, h, w) and times (batch,).
    """

    title: str
    transformer_class: str
    config: dict
    depths: dict[str, int]
    pixels: int
    channels: int
    prompts: dict[str, tuple[int, ...]]
    targets: tuple[str, ...]
    called: Callable[[Tensor, Tensor], dict]


class Published(Family):
    """A published transformer by its argument names: without a pipeline, of which nothing is read."""

    def __init__(self, base: Base):
        self.base, self.targets = base, base.targets

    def predict(self, denoiser: nn.Module, latents: Tensor, times: Tensor, conditions: dict) -> Tensor:
        dtype = conditions["encoder_hidden_states"].dtype
        output = denoiser(**self.base.called(latents.to(dtype), times), **conditions).sample
        return output if output.ndim == 4 else of_tokens(output, *latents.shape[2:])


def plainly(latents: Tensor, times: Tensor) -> dict:
    return {"hidden_states": latents, "timestep": times}


def flux_call(latents: Tensor, times: Tensor) -> dict:
    """What FLUX.1-dev is called with: tokens of 2 by 2 latents and their places, and a guidance of 3.5."""
    batch, _, height, width = latents.shape
    ids = torch.zeros(height // 2, width // 2, 3, device=latents.device)
    ids[..., 1] = torch.arange(height // 2, device=latents.device)[:, None]
    ids[..., 2] = torch.arange(width // 2, device=latents.device)
    return {
        "hidden_states": pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2),
        "timestep": times / 1000,
        "img_ids": ids.flatten(0, 1),
        "txt_ids": ids.new_zeros(TEXT_TOKENS, 3),
        "guidance": times.new_full((batch,), 3.5),
    }


def of_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """Tokens (batch, h/2 · w/2, 4C) -> latents (batch, C, h, w)."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2)), 2)


BASES = {
    "flux": Base(
        "FLUX.1-dev",
        "FluxTransformer2DModel",
        {"guidance_embeds": True, "num_layers": 19, "num_single_layers": 38},
        {"num_layers": 1, "num_single_layers": 2},
        8,
        16,
        {"encoder_hidden_states": (TEXT_TOKENS, 4096), "pooled_projections": (768,)},
        ("transformer_blocks.*", "single_transformer_blocks.*", "norm_out.linear", "proj_out"),
        flux_call,
    ),
    "sd3": Base(
        "SD3.5-Large",
        "SD3Transformer2DModel",
        {
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        {"num_layers": 2},
        8,
        16,
        {"encoder_hidden_states": (TEXT_TOKENS, 4096), "pooled_projections": (2048,)},
        ("transformer_blocks.*", "norm_out.linear", "proj_out"),
        plainly,
    ),
    "sana": Base(
        "SANA 1.6B",
        "SanaTransformer2DModel",
        {"num_layers": 20},
        {"num_layers": 3},
        32,
        32,
        {"encoder_hidden_states": (TEXT_TOKENS, 2304), "encoder_attention_mask": (TEXT_TOKENS,)},
        ("transformer_blocks.*", "time_embed.linear", "proj_out"),
        plainly,
    ),
    "pixart": Base(
        "PixArt-Σ",
        "PixArtTransformer2DModel",
        {"num_layers": 28, "caption_channels": 4096, "use_additional_conditions": False, "sample_size": 128},
        {"num_layers": 4},
        8,
        4,
        {"encoder_hidden_states": (TEXT_TOKENS, 4096), "encoder_attention_mask": (TEXT_TOKENS,)},
        ("transformer_blocks.*", "adaln_single.linear", "proj_out"),
        lambda latents, times: (
            plainly(latents, times) | {"added_cond_kwargs": dict.fromkeys(("resolution", "aspect_ratio"))}
        ),
    ),
}


def family_base(name: str, **depths: int) -> tuple[nn.Module, Family]:
    """A random frozen transformer of a published width, with so many blocks, and its family."""
    import diffusers

    base = BASES[name]
    torch.manual_seed(0)
    model = getattr(diffusers, base.transformer_class)(**(base.config | depths))
    return model.requires_grad_(False), Published(base)


def family_batch(name: str, batch: int, height: int, width: int) -> tuple:
    """Latents (batch, C, height, width), times, prompts, target."""
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape)

    latents, target = (normal(BASES[name].channels, height, width) for _ in range(2))
    prompts = {key: normal(*shape) for key, shape in BASES[name].prompts.items()}
    if "encoder_attention_mask" in prompts:
        prompts["encoder_attention_mask"] = torch.ones(batch, TEXT_TOKENS, dtype=torch.int64)
    return latents, torch.linspace(100, 900, batch), prompts, target


def recorded_base(folder: str, layers: int) -> tuple[nn.Module, Family, object]:
    """A random denoiser of the width of a pipeline's, its family, which is recorded, and the pipeline.

    Args:
        folder: a pipeline of diffusers; the weights of its denoiser are not read.
        layers: blocks of each of the denoiser's lists, as far as its settings say their number.
    """
    import diffusers

    index = model_index(folder)
    name = next((part for part in DENOISERS if index.get(part, [None])[0]), None)
    if name is None:
        raise ValueError(f"'{folder}' has neither a transformer nor a unet")
    cls = getattr(diffusers, index[name][1])
    torch.manual_seed(0)
    model = cls.from_config(shallow(cls, cls.load_config(folder, subfolder=name), layers)).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # as gates and outputs are made, through which no probe would see
                parameter.normal_(std=0.02)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **{name: model})
    pipeline.set_progress_bar_config(disable=True)
    return model, family_of(pipeline), pipeline


def shallow(cls: type, config: dict, layers: int) -> dict:
    """A denoiser's settings with so many blocks in each list, where one of them is a number of blocks."""

    def blocks(settings: dict) -> int:
        with torch.device("meta"):
            return len(blocks_of(cls.from_config(settings)))

    numbers = [key for key, value in config.items() if key.startswith(("num_", "n_")) and type(value) is int]
    for key in (key for key in numbers if config[key] > layers and ("layers" in key or "blocks" in key)):
        fewer = config | {key: layers}
        with suppress(Exception):  # a number of something else, of which so few make no denoiser
            config = fewer if blocks(fewer) < blocks(config) else config
    return config


def recorded_batch(family: Family, pipeline, batch: int, side: int) -> tuple:
    """Latents (batch, C, ...) of images of this side, in latents, with times, prompts, and a target."""
    torch.manual_seed(0)
    pixels = side * family.pixels_of_latent(pipeline)
    latents, target = torch.randn(2, batch, *family.latent_shape(pipeline, pixels, pixels))
    with torch.no_grad():
        prompts = family.encode_conditions(pipeline, [family.at_size(PROMPT, pixels)] * batch)
    return latents, torch.linspace(100, 900, batch), prompts, target


# ---------------------------------------------------------------------------------------------------
# The peers, on the family's targets.


def _ours(method: str) -> Callable:
    return lambda model, targets: inject_adapter(model, AdapterConfig(method=method, targets=targets))


def _peft(kind: str, **settings) -> Callable:
    def build(model, targets):
        import peft

        from onelora_diffusion.peft import OneLoraConfig

        config = {"miss": peft.MissConfig, "lora": peft.LoraConfig, "1lora": OneLoraConfig}[kind]
        layers = list(target_layers(model, targets))
        return peft.get_peft_model(model, config(target_modules=layers, **settings)).get_base_model()

    return build


PEERS = {
    "1LoRA": _ours("1lora"),
    "BitFit": _ours("bitfit"),
    "PEFT MiSS r=1": _peft("miss", r=1),
    "PEFT OneLoraConfig": _peft("1lora"),
    "PEFT LoRA r=1": _peft("lora", r=1, lora_alpha=1),
    REFERENCE: _peft("lora", r=16, lora_alpha=16),
}


def family_peer(name: str, base: nn.Module, family: Family) -> nn.Module:
    """The base with a peer on it, in train mode, its trained values in fp32 and off their start."""
    torch.manual_seed(0)
    model = PEERS[name](twin(base), family.targets).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.float() + 1e-3 * torch.randn_like(parameter, dtype=torch.float32)
    return model


class FamilyStep:
    """Forward, mean squared error, backward and AdamW update of one peer on a fixed batch."""

    def __init__(self, model: nn.Module, family: Family, batch: tuple, precision: str):
        self.model, self.family, self.batch, self.precision = model, family, batch, precision
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0, fused=True)

    def loss(self) -> Tensor:
        latents, timesteps, prompts, target = self.batch
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision != "fp32"):
            output = self.family.predict(self.model, latents, timesteps, prompts)
        return (output[:, : target.shape[1]].float() - target).square().mean()

    def train(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


def held_in(base: nn.Module, precision: str) -> nn.Module:
    """The base, a copy of it in bf16, or one with torchao's int8 weights."""
    if precision in ("fp32", "bf16"):
        return base
    base = copy.deepcopy(base).bfloat16()
    if precision == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(base, Int8WeightOnlyConfig())
    return base


def family_speed(settings) -> dict:
    """Measure a family's step at its full width and a few blocks; print the tables, and write them.

    Args:
        settings: of `benchmark.py speed`.
    """
    torch.set_num_threads(settings.threads)
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    if settings.family in BASES:
        base, family = family_base(settings.family, **BASES[settings.family].depths)
        side = settings.sample_size
        batch = family_batch(settings.family, settings.batch, side, side)
    else:
        base, family, pipeline = recorded_base(settings.family, settings.layers)
        batch = recorded_batch(family, pipeline, settings.batch, settings.sample_size)
    clock = time.process_time if settings.clock == "cpu" else time.perf_counter
    rows = []
    for precision in settings.precisions:
        held = held_in(base, precision)
        # PEFT's MiSS refuses torchao's layers.
        names = [name for name in PEERS if precision != "int8" or "MiSS" not in name]
        peers = {name: family_peer(name, held, family) for name in names}
        steps = {name: FamilyStep(model, family, batch, precision) for name, model in peers.items()}
        times = dict.fromkeys(steps, {"seconds": None, "ours_over_it": None})
        if precision not in settings.untimed:
            seconds = interleave(
                {name: step.train for name, step in steps.items()}, settings.rounds, clock=clock, label=precision
            )
            times = {
                name: {"seconds": float(np.median(of_it)), "ours_over_it": ratio(seconds["1LoRA"], of_it)}
                for name, of_it in seconds.items()
            }
        for name, step in steps.items():
            rows.append(
                {"precision": precision, "peer": name, **times[name]}
                | {"num_trainable_params": sum(parameter.numel() for parameter in step.trained)}
                | {"saved_bytes": saved_bytes(step.model, step.loss), "base_bytes": resident_bytes(held)}
            )
    results = {"settings": dataclasses.asdict(settings) | {"output_dir": str(settings.output_dir)}, "train": rows}
    results["base"] = titled(settings.family, base)
    report, name = family_markdown(results), Path(settings.family).name
    print(report)
    (settings.output_dir / f"{name}.md").write_text(report)
    (settings.output_dir / f"{name}.json").write_text(json.dumps(results, indent=1))
    plot_families(settings.output_dir)
    return results


def plot_families(folder: Path) -> None:
    """families.png: of each family that was measured into the folder, a step and what it keeps, by LoRA r=16's."""
    from matplotlib.figure import Figure

    groups = {}
    for name in BASES:
        if (folder / f"{name}.json").is_file():
            for row in json.loads((folder / f"{name}.json").read_text())["train"]:
                groups.setdefault(f"{BASES[name].title}\n{row['precision']}", {})[row["peer"]] = row
    figure = Figure(figsize=(1.5 + 1.6 * len(groups), 5), layout="constrained")
    panels = zip(figure.subplots(2, 1, sharex=True), ("seconds", "saved_bytes"), ("a step", "kept"), strict=True)
    for axes, key, label in panels:
        for number, peer in enumerate(PEERS):
            measured = {
                place: rows
                for place, rows in enumerate(groups.values())
                if peer in rows and rows[peer][key] is not None
            }
            shares = [rows[peer][key] / rows[REFERENCE][key] for rows in measured.values()]
            bars = axes.bar(
                np.array(list(measured)) + 0.16 * (number - (len(PEERS) - 1) / 2), shares, 0.15, label=peer
            )
            axes.bar_label(bars, [f"{share:.2f}" for share in shares], fontsize=7)
        axes.set(ylabel=f"{label} / {REFERENCE}'s", ylim=(0, 1.2), xticks=range(len(groups)))
        axes.set_xticklabels(groups)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=len(PEERS))
    figure.savefig(folder / "families.png", dpi=120)


def titled(name: str, model: nn.Module) -> str:
    """The base in words, with its depth."""
    if name not in BASES:
        return f"{type(model).__name__} of {Path(name).name} at its full width, {len(blocks_of(model))} blocks"
    depths = " and ".join(f"{key} {value}" for key, value in BASES[name].depths.items())
    return f"{BASES[name].title} at its full width, {depths}"


def family_markdown(results: dict) -> str:
    settings = results["settings"]
    tokens = f" and {TEXT_TOKENS} tokens of text" if settings["family"] in BASES else ""
    lines = [
        f"{results['base']}, batch {settings['batch']} of "
        f"{settings['sample_size']} x {settings['sample_size']} latents{tokens},",
        f"{settings['threads']} threads, {settings['clock']} time, median over {settings['rounds']} rounds "
        "(± half the distance of the quartiles).",
    ]
    for precision in dict.fromkeys(row["precision"] for row in results["train"]):
        rows = [row for row in results["train"] if row["precision"] == precision]
        kept = {row["peer"]: row["saved_bytes"] for row in rows}
        cells = [
            [
                row["peer"],
                *timed_cells(row),
                f"{row['saved_bytes'] / 1e6:.1f}",
                f"{kept['1LoRA'] / row['saved_bytes']:.2f}",
                f"{row['num_trainable_params']:,}",
                f"{row['base_bytes'] / 1e6:,.0f}",
            ]
            for row in rows
        ]
        header = ["method", "ms", "1LoRA/it", "saved MB", "1LoRA/it", "trained", "base MB"]
        lines += ["", f"### Training step, {precision} base", "", *table(header, cells)]
    return "\n".join(lines) + "\n"


def timed_cells(row: dict) -> list[str]:
    if row["seconds"] is None:
        return ["-", "-"]
    middle, lower, upper = row["ours_over_it"]
    return [f"{1e3 * row['seconds']:.0f}", f"{middle:.3f} ±{(upper - lower) / 2:.2f}"]


# ---------------------------------------------------------------------------------------------------
# Memory on paper


@dataclasses.dataclass
class MemorySettings:
    """Count what training a whole text-to-image transformer holds, without its weights: on tensors that are shapes."""

    bases: tuple[str, ...] = ("sd3", "flux", "sana")
    """Which transformers."""
    resolutions: tuple[int, ...] = (512, 1024)
    """Pixels a side; batch 1."""
    output_dir: Path = Path("runs/memory")
    """Where memory.md and memory.json go."""


BYTES_OF_WEIGHT = {"bf16": 2.0, "int8": 1.0, "nf4": 0.5 + 4 / 64}  # nf4: a float32 scale for each 64 weights


def memory(settings: MemorySettings) -> dict:
    """Weights by precision, what is kept for backward, and the optimiser, of 1LoRA and of LoRA r=16; in bytes.

    Kept for backward is counted in a forward pass of the whole depth in bf16, on tensors that are shapes, where
    attention keeps no matrix of tokens by tokens, as on a GPU; with checkpointing it is the input of each block and
    what the largest one keeps. Weights of linear layers count as packed, all else as bf16. The product of torchao's
    int8 layers keeps a bf16 copy of their weight for backward; that of bitsandbytes' keeps none.
    """
    settings.output_dir.mkdir(parents=True, exist_ok=True)
    rows, cells = [], []
    for name in settings.bases:
        for resolution in settings.resolutions:
            for peer in ("1LoRA", REFERENCE):
                row = {"base": BASES[name].title, "resolution": resolution, "peer": peer}
                rows.append(row | counted(name, resolution, peer))
    for row in rows:
        whole = [
            f"{(row['weights'][precision] + row['saved' + way] + copies + row['optimizer']) / 1e9:.1f}"
            for way in ("", "_checkpointed")
            for precision in BYTES_OF_WEIGHT
            for copies in (row["copies" + way] if precision == "int8" else 0,)
        ]
        cells.append(
            [f"{row['base']}, {row['resolution']}, {row['peer']}", f"{row['weights']['bf16'] / 1e9:.1f}"]
            + [f"{row[key] / 1e9:.2f}" for key in ("saved", "saved_checkpointed", "optimizer")]
            + whole
        )
    header = ["GB", "bf16 base", "kept", "checkpointed", "trained"]
    header += [*BYTES_OF_WEIGHT, *(f"{precision}, chkp." for precision in BYTES_OF_WEIGHT)]
    report = "\n".join(table(header, cells)) + "\n"
    print(report)
    (settings.output_dir / "memory.md").write_text(report)
    (settings.output_dir / "memory.json").write_text(json.dumps(rows, indent=1))
    return {"rows": rows}


def counted(name: str, resolution: int, peer: str) -> dict:
    """Bytes of a whole transformer in training: `weights` by precision, `saved`, `optimizer`, bf16 `copies`."""
    depths = {key: BASES[name].config[key] for key in BASES[name].depths}
    linear, others = numbers_of(name)
    step = shapes_of_step(name, resolution, peer, depths)
    one = dict.fromkeys(depths, 1)
    of_one = kept(shapes_of_step(name, resolution, peer, one))
    block = max(kept(shapes_of_step(name, resolution, peer, one | {key: 2})) for key in depths) - of_one
    block_linear = max(numbers_of(name, **(one | {key: 2}))[0] for key in depths) - numbers_of(name, **one)[0]
    saved = kept(step)
    step.model.enable_gradient_checkpointing()
    return {
        "weights": {precision: linear * size + others * 2 for precision, size in BYTES_OF_WEIGHT.items()},
        "saved": saved,
        "saved_checkpointed": kept(step) + block,
        "copies": 2 * linear,
        "copies_checkpointed": 2 * block_linear,
        # values, gradients and two moments, all float32
        "optimizer": 4 * 4 * sum(parameter.numel() for parameter in step.trained),
    }


def numbers_of(name: str, **depths: int) -> tuple[int, int]:
    """(weights of linear layers, all other numbers) of a transformer."""
    with torch.device("meta"):
        model, _ = family_base(name, **depths)
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    return linear, sum(parameter.numel() for parameter in model.parameters()) - linear


def shapes_of_step(name: str, resolution: int, peer: str, depths: dict[str, int]) -> FamilyStep:
    """A step of a bf16 base on the meta device."""
    with torch.device("meta"):
        model, family = family_base(name, **depths)
        model = PEERS[peer](model.bfloat16(), family.targets).train()
    if peer not in ("1LoRA", "BitFit"):  # there is no autocast there, in which products of float32 are taken in bf16
        model.bfloat16()
    size = resolution // BASES[name].pixels
    batch = family_batch(name, 1, size, size)
    latents, timesteps, prompts, target = send_to_device(batch, "meta")
    prompts = {key: value.bfloat16() if value.is_floating_point() else value for key, value in prompts.items()}
    return FamilyStep(model.to("meta"), family, (latents.bfloat16(), timesteps, prompts, target), "fp32")


def kept(step: FamilyStep) -> int:
    """Bytes kept for backward, with the attention that a GPU has: it keeps no matrix of tokens by tokens."""

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
        if attn_mask is not None:
            attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
        )[0]

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", attention):
        return saved_bytes(step.model, step.loss)
