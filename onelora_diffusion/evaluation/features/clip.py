"""CLIP's embeddings of images and texts (Radford et al., ICML 2021)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from onelora_diffusion.evaluation.features.networks import NetworkFeatures, Published

CLIP = Published("openai/clip-vit-base-patch32", "3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268", "--clip-weights")
# The network of CMMD (Jayasumana et al., CVPR 2024).
CLIP_LARGE = Published(
    "openai/clip-vit-large-patch14-336", "ce19dc912ca5cd21c8a653c79e251e808ccabcd1", "--clip-large-weights"
)
COLOURS = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


class ClipFeatures(NetworkFeatures):
    """The projected embeddings of transformers' `CLIPModel`, not normalised; `embed_text` gives those of prompts."""

    def __init__(self, network: nn.Module, tokenizer, name: str, extractor: str):
        config = network.config
        super().__init__(network, name, extractor, config.projection_dim, config.vision_config.image_size, COLOURS)
        self.tokenizer = tokenizer

    def embed(self, images: Tensor) -> Tensor:
        return self.network.visual_projection(self.network.vision_model(pixel_values=images).pooler_output)

    @torch.no_grad()
    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings (prompts, d) in float64 on the CPU; tokens beyond the network's length are left out."""
        tokens = self.tokenizer(list(prompts), padding=True, truncation=True, return_tensors="pt")
        inputs = {name: tokens[name].to(self.network.device) for name in ("input_ids", "attention_mask")}
        return self.network.text_projection(self.network.text_model(**inputs).pooler_output).double().cpu()


def load_clip(published: Published, name: str, weights: str | Path | None) -> ClipFeatures:
    network, extractor = published.load("CLIPModel", weights)
    where = {"revision": published.revision} if weights is None else {}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(published.hub_id if weights is None else weights, **where)
    name = name if weights is None else f"{name}-{network.config.projection_dim}"
    return ClipFeatures(network, tokenizer, name, extractor)
