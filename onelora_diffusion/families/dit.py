"""DiT (Peebles & Xie 2023): classes in place of prompts."""

from torch import Tensor, nn

from onelora_diffusion.families.family import Family, Prompts


class DiT(Family):
    name = "dit"
    transformer_class = "DiTTransformer2DModel"
    targets = None  # the paper's set, which `target_layers` has

    def predict(self, transformer: nn.Module, latents: Tensor, timesteps: Tensor, prompts: Prompts) -> Tensor:
        return transformer(latents, timestep=timesteps, class_labels=prompts["class_labels"]).sample
