"""Settings of an adapter: one flat dataclass, written beside the weights as JSON."""

import dataclasses
import json
from dataclasses import dataclass

METHODS = ("1lora", "bitfit", "difffit", "mora1", "mora6", "lora", "dora", "vera", "full")

# The parts of the vector family, y = γ ⊙ (W0 x + bias + β + b·Σx), that each method trains.
VECTOR_METHODS = {
    "1lora": {"sum": True, "bias": False, "scale": False, "norms": False},
    "bitfit": {"sum": False, "bias": True, "scale": False, "norms": False},
    "difffit": {"sum": False, "bias": True, "scale": True, "norms": True},
}


@dataclass(frozen=True)
class AdapterConfig:
    """What is trained on top of a frozen base model.

    `sum` (b), `bias` (β), `scale` (γ) and `norms` combine freely on the vector family
    (1LoRA, Tables S11 and S12); left at None they take the method's own value.

    Args:
        method: `1lora`, `bitfit`, `difffit`, `mora1`, `mora6`, `lora`, `dora`, `vera` or `full`.
        rank: r of LoRA, DoRA and VeRA; the vector family and MoRA have none and ignore it.
        targets: names of linear layers. A name matches a path or its last components (`to_q`, `ff.net.2`);
            `*` and `?` match as in a shell. None: the paper's set on a DiT, every linear but the output
            head on any other model.
        num_classes: N trains a new class table of N + 1 rows, the null row last. None keeps the base's.
        fuse_qkv: compute q, k and v by one matrix product. Vector adapters stay the same, and so do their
            files; LoRA, DoRA, VeRA and MoRA then have one adapter for the three.
        compression: `sum`, or `random`: a fixed vector drawn from `seed` in its place (ablation B.2).
        seed: of everything drawn for the adapter: new class rows, random compression, LoRA's A.
    """

    method: str = "1lora"
    rank: int = 1
    targets: tuple[str, ...] | None = None
    num_classes: int | None = None
    fuse_qkv: bool = False
    sum: bool | None = None
    bias: bool | None = None
    scale: bool | None = None
    norms: bool | None = None
    compression: str = "sum"
    seed: int = 0

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"unknown method '{self.method}': choose one of {', '.join(METHODS)}")
        if self.compression not in ("sum", "random"):
            raise ValueError(f"unknown compression '{self.compression}': choose 'sum' or 'random'")
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {self.num_classes}")
        if isinstance(self.targets, str):
            raise ValueError(f"targets is a tuple of names, not the string '{self.targets}'")
        if self.targets is not None:
            object.__setattr__(self, "targets", tuple(self.targets))
        for part, default in VECTOR_METHODS.get(self.method, dict.fromkeys(VECTOR_METHODS["1lora"], False)).items():
            if getattr(self, part) is None:
                object.__setattr__(self, part, default)
            elif getattr(self, part) and not self.is_vector:
                raise ValueError(f"{part}=True goes with {', '.join(VECTOR_METHODS)}, not with '{self.method}'")
        if self.is_vector and not (self.sum or self.bias or self.scale or self.norms or self.num_classes):
            raise ValueError("nothing to train: sum, bias, scale and norms are all False and num_classes is None")

    @property
    def is_vector(self) -> bool:
        return self.method in VECTOR_METHODS

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "AdapterConfig":
        """Raises ValueError naming any key this version does not know."""
        values = json.loads(text)
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown adapter settings {', '.join(unknown)}: known are {', '.join(sorted(known))}")
        return cls(**values)
