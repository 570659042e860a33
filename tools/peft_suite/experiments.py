"""The experiments of PEFT's method comparisons that are 1LoRA, as those read them.

MiSS of rank 1 adds b · Σᵢ xᵢ to a layer's output, as 1LoRA does, and PEFT has it. Of the training settings only the
learning rate differs from the comparison's defaults. Adam moves each number by about the rate ρ at first, and so the
output of MiSS of rank r by about ρ √(r · in_features), where features are independent: the rate of rank 1 is that of
the comparison's MiSS times √r, rounded. No rate was tried on the weights.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import MissConfig, get_peft_model
from torch import nn


@dataclass(frozen=True)
class Experiment:
    """One experiment of a comparison; the base's sizes are its published ones.

    Attributes:
        comparison: the comparison's folder in `method_comparison/` of PEFT.
        name: the experiment's folder in `experiments/miss/`.
        base: the model that the comparison trains, at the hub.
        targets: the layers that get adapters, by the ends of their names.
        optimizer_kwargs: the comparison's own, but for the learning rate.
    """

    comparison: str
    name: str
    base: str
    targets: tuple[str, ...]
    optimizer_kwargs: dict[str, float]

    def folder(self, output: Path) -> Path:
        return output / self.comparison / "experiments" / "miss" / self.name

    def config(self) -> MissConfig:
        return MissConfig(r=1, target_modules=list(self.targets))

    def __str__(self) -> str:
        rates = ", ".join(f"{name} {value:g}" for name, value in self.optimizer_kwargs.items())
        return f"base {self.base}; targets {' '.join(self.targets)}; {rates}; {count(self):,} trained numbers"


ATTENTION = ("q_proj", "v_proj")
EXPERIMENTS = (
    Experiment(
        "image-gen",
        "flux2-klein-rank1-1lora",
        "black-forest-labs/FLUX.2-klein-base-4B",
        (
            *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
            *("linear_in", "linear_out", "to_qkv_mlp_proj"),
        ),
        {"lr": 6e-4, "weight_decay": 1e-4},  # its MiSS: rank 32, 1e-4
    ),
    Experiment(
        "MetaMathQA",
        "llama-3.2-3B-rank1-1lora",
        "meta-llama/Llama-3.2-3B",
        ATTENTION,  # as its MiSS and LoRA have
        {"lr": 8e-4, "weight_decay": 0.1},  # its MiSS: rank 64, 1e-4
    ),
    Experiment(
        "MetaMathQA",
        "llama-3.2-3B-rank1-1lora-all-linear",
        "meta-llama/Llama-3.2-3B",
        (*ATTENTION, "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        {"lr": 8e-4, "weight_decay": 0.1},
    ),
)


def write(experiment: Experiment, output: Path) -> Path:
    """Write `adapter_config.json` and `training_params.json`, and return their folder."""
    folder = experiment.folder(output)
    experiment.config().save_pretrained(folder)
    params = json.dumps({"optimizer_kwargs": experiment.optimizer_kwargs}, indent=2)
    (folder / "training_params.json").write_text(params + "\n")
    return folder


def count(experiment: Experiment) -> int:
    """Numbers that are trained, by PEFT on a base of the published sizes without values."""
    with torch.device("meta"):
        model = get_peft_model(_empty_base(experiment.base), experiment.config())
    return model.get_nb_trainable_parameters()[0]


def _empty_base(base: str) -> nn.Module:
    if base.endswith("Llama-3.2-3B"):
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}
        heads = {"num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128}
        return LlamaForCausalLM(LlamaConfig(vocab_size=128256, **sizes, **heads))
    from diffusers import Flux2Transformer2DModel

    sizes = {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680}
    return Flux2Transformer2DModel(**sizes, guidance_embeds=False)
