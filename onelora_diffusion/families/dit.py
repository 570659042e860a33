"""DiT (Peebles & Xie 2023), whose conditions are classes."""

import torch
from torch import Tensor, nn

from onelora_diffusion.families.arguments import on
from onelora_diffusion.families.family import Condition, Conditions, Family


class DiT(Family):
    name = "dit"
    transformer_class = "DiTTransformer2DModel"
    pipeline_class = "DiTPipeline"
    condition = int
    targets = None  # the paper's set, which `target_layers` has
    takes_samplers = True
    images_at_once = 16  # enough to fill a GPU
    merges_adapters = True

    def shared_by_blocks(self, transformer: nn.Module) -> list[nn.Module]:
        return list(dict.fromkeys(block.norm1.emb for block in transformer.transformer_blocks))

    def encode_conditions(self, pipeline, conditions: list[Condition], max_length: int | None = None) -> Conditions:
        null_label = null_and_last_label(pipeline.transformer)[0] if None in conditions else None
        labels = [null_label if label is None else int(label) for label in conditions]
        return {"class_labels": torch.tensor(labels, dtype=torch.long)}

    def check_conditions(self, pipeline, conditions: list[Condition]) -> None:
        null_label, last_label = null_and_last_label(pipeline.transformer)
        for label in conditions:
            if label is not None and not 0 <= label <= last_label and label != null_label:
                raise ValueError(
                    f"label {label} is none of the model's {last_label} classes: give 0 to {last_label - 1}"
                )

    def of_base(self, pipeline, condition: int | str) -> int | str:
        return condition % pipeline.transformer.config.num_embeds_ada_norm

    def encoders(self, pipeline) -> dict[str, object]:
        return {}

    def pixels_of_latent(self, pipeline) -> int:
        return 2 ** (len(pipeline.vae.config.block_out_channels) - 1)

    def check_resolution(self, pipeline, *sides: int) -> None:
        own = self.resolution(pipeline)
        if set(sides) != {own}:
            raise ValueError(f"size is {' by '.join(map(str, sides))}; this base draws {own} by {own} pixels")

    def predict(self, denoiser: nn.Module, latents: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        times = on(times, latents.device)
        return denoiser(latents, timestep=times, class_labels=conditions["class_labels"]).sample


def null_and_last_label(transformer: nn.Module) -> tuple[int, int]:
    """(the label that is the null label of all class tables, the last label of the active table)."""
    embedder = transformer.transformer_blocks[0].norm1.emb.class_embedder
    # This is the last row of the largest class table; in smaller tables it selects the null row, too.
    null_label = max(len(table) for table in embedder.parameters()) - 1
    serving = transformer._onelora.class_tables.active_table() if hasattr(transformer, "_onelora") else None
    return null_label, len(embedder.embedding_table.weight if serving is None else serving) - 1
