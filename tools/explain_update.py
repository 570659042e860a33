"""How much of a full fine-tuning an adapter of rank 1 could hold, by kind of layer.

    python tools/explain_update.py runs/compare/fashion-mnist/runs/full-seed-0.safetensors

The file is an adapter of `--method full`, beside the base it names. An update of rank 1 reads one number from a
layer's input. The table gives the share of ‖ΔW‖² that is held when that number is read along the best direction, as
LoRA and DoRA may learn it; along the sum, as 1LoRA reads it; and along a direction drawn at random, which holds 1/k
on average. All rest on the singular value decomposition of ΔW (1LoRA, figure 9).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from onelora_diffusion import load_adapter, read_adapter
from onelora_diffusion.evaluation.report import format_table
from onelora_diffusion.pipelines.base import load_base
from tools.analysis.alignment import alignment_by_kind


@dataclass
class Settings:
    """Compare the directions in a full fine-tuning's updates with the sum."""

    adapter: tyro.conf.Positional[Path]
    """File of an adapter whose method is full."""


def main(settings: Settings) -> None:
    file = read_adapter(settings.adapter)
    if file.config.method != "full":
        raise SystemExit(f"{settings.adapter} is of the method {file.config.method}: give one of full fine-tuning")
    base, finetuned = (load_base(file.base, named_by=settings.adapter).transformer.float() for _ in range(2))
    load_adapter(finetuned, settings.adapter)
    rows = {}
    for kind in alignment_by_kind(base, finetuned, num_components=2**31):
        along_sum = (kind.energy * kind.cosines["summation"].square()).sum(1)
        shares = [kind.energy[:, 0].mean(), along_sum.mean(), torch.tensor(1 / kind.in_features)]
        rows[kind.kind] = [str(kind.in_features), *(f"{share:.1%}" for share in shares)]
    print(format_table("share of the update, mean over the blocks", ["k", "best", "sum", "random"], rows))


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
