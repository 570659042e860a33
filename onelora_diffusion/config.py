"""Settings of an adapter: one flat dataclass, which is saved with the weights as JSON."""

import dataclasses
import json
import math
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass

PARTS = ("sum", "bias", "scale", "norms")


@dataclass(frozen=True)
class Method:
    """A method: a way to adapt layers."""

    build: Callable  # from (layers by path, `AdapterConfig`) to the adapter's modules by path
    parts: dict[str, bool] | None = None  # default of each of `PARTS`; None if the method has no such parts
    serves_fused: bool = False  # whether q, k and v have one adapter together under `fuse_qkv`
    is_peft: bool = False  # whether it takes `peft_config`
    is_whole: bool = False  # whether it trains the tensors of modules themselves instead of adding to linear layers


METHODS: dict[str, Method] = {}  # filled by adapters/methods.py, which has the table
COMPRESSIONS: dict[str, Callable] = {}  # filled by adapters/compressions.py: name -> its class


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of an adapter, which is trained on top of a frozen base model.

    For the vector methods `sum` (b), `bias` (β), `scale` (γ) and `norms` combine freely (1LoRA, Tables S11 and S12);
    None takes the method's own value.

    Args:
        method: `1lora`, `bitfit`, `difffit`, `mora1`, `mora6`, `lora`, `dora`, `vera`, `full`, or `peft:<tuner>`
            for any other tuner of PEFT (`peft:ia3`, `peft:fourierft`, …).
        rank: r of LoRA, DoRA and VeRA (LoRA's alpha is r as well, so its scale is 1). For the vector methods with
            `sum`, the number of values to which a layer's input is compressed, each with a vector b of its own: 1 is
            the paper's 1LoRA, and r with `compression="sum"` is MiSS of rank r. Methods without `sum` and MoRA ignore
            it; a `peft:<tuner>` has its own settings.
        targets: names of linear layers. A name matches a path or its last components (`to_q`, `ff.net.2`);
            `*` and `?` match as in a shell. None takes the paper's set on a DiT, on other models of
            diffusers the linear layers of their repeated blocks, and elsewhere every one but the output head.
            `full` trains every module that has weights, or only these layers.
        num_classes: N trains a new class table of N + 1 rows, the null row last. None keeps the base's table.
        class_table: name of the base's class table (`y_embedder.embedding_table`), whose last row is the null row.
            None takes a DiT's own, or the only table named `embedding_table`.
        fuse_qkv: compute q, k and v by one matrix product. It changes neither vector adapters nor their files. LoRA,
            DoRA, VeRA and MoRA then have one adapter for the three, at the layer `to_qkv`, which a custom attention
            processor must call.
        compression: the values that b multiplies. `sum`: the sum of the layer's inputs, or of `rank` groups of them.
            `outputs`: the same of the base layer's outputs, without its bias. `singular`: products with the `rank`
            directions of length 1 that the base layer amplifies most, computed from its weight. `random`: products
            with fixed vectors drawn from `seed` (ablation B.2).
        peft_config: further settings of LoRA, DoRA, VeRA or a `peft:<tuner>` under PEFT's own names, such as
            `{"lora_alpha": 8}` or `{"n_frequency": 500}`: texts, numbers, booleans, and lists and dicts of these.
        seed: seed of the adapter's random values: new class rows, random compression, LoRA's A.
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
    peft_config: dict | None = None
    class_table: str | None = None

    def __post_init__(self):
        _check_types(self)
        if self.method not in METHODS and not self.method.startswith("peft:"):
            raise ValueError(f"unknown method '{self.method}': choose one of {', '.join(METHODS)}")
        method = self.recipe
        if self.peft_config and not method.is_peft:
            *some, last = (name for name in METHODS if METHODS[name].is_peft)
            raise ValueError(f"peft_config goes with {', '.join(some)} and {last}, not '{self.method}'")
        try:  # the form in which a file returns it
            object.__setattr__(self, "peft_config", json.loads(json.dumps(self.peft_config)))
        except TypeError as error:
            raise ValueError(f"peft_config is written as JSON, and cannot be: {error}") from error
        _check_peft_config(self.peft_config or {})
        if self.fuse_qkv and method.is_whole:
            raise ValueError("fuse_qkv goes with a frozen base, not with 'full', which trains q, k and v themselves")
        if self.compression not in COMPRESSIONS:
            raise ValueError(f"unknown compression '{self.compression}': choose one of {', '.join(COMPRESSIONS)}")
        if not 1 <= self.rank < 2**31:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if self.num_classes is not None and not 1 <= self.num_classes < 2**31:
            raise ValueError(f"num_classes must be at least 1, not {self.num_classes}")
        if self.class_table is not None and self.num_classes is None:
            raise ValueError(f"class_table='{self.class_table}' is where new classes go: give their num_classes")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be a number of 64 bits, not {self.seed}")
        for part in PARTS:
            if getattr(self, part) is None:
                object.__setattr__(self, part, bool(method.parts and method.parts[part]))
            elif getattr(self, part) and method.parts is None:
                with_parts = ", ".join(name for name in METHODS if METHODS[name].parts)
                raise ValueError(f"{part}=True goes with {with_parts}, not with '{self.method}'")
        if method.parts and not (any(getattr(self, part) for part in PARTS) or self.num_classes):
            raise ValueError("nothing to train: sum, bias, scale and norms are all False and num_classes is None")

    @property
    def recipe(self) -> Method:
        return METHODS.get(self.method) or METHODS["peft:<tuner>"]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "AdapterConfig":
        """Read settings from JSON; ValueError for unknown keys, which it names."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"adapter settings are values by name, not {text[:40]}")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown adapter settings {', '.join(unknown)}: known are {', '.join(sorted(known))}")
        return cls(**values)


def _check_types(config: AdapterConfig) -> None:
    """Convert lists of targets to tuples; ValueError for any other value of a wrong type, which it names."""
    if isinstance(config.targets, list | set):
        object.__setattr__(config, "targets", tuple(config.targets))
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kinds = [typing.get_origin(kind) or kind for kind in typing.get_args(field.type) or [field.type]]
        if type(value) not in kinds:
            names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{field.name} must be {names}, not {str(value)[:40]!r}, which is {type(value).__name__}")
    for target in config.targets or ():
        if not isinstance(target, str):
            raise ValueError(f"targets are names of linear layers, not {str(target)[:40]!r}")


# Texts allowed in `peft_config`, which untrusted files contain: names, possibly after `.*`. Unlike other regular
# expressions they match quickly.
NAME_PATTERN = re.compile(r"(\.\*)?([\w.|^$:/-]|\\\.){0,1000}")
FIRST_VALUES = ("gaussian", "orthogonal", "lycoris")  # other values decompose the base's weights and change them


def _check_peft_config(settings: dict) -> None:
    """ValueError for settings that make PEFT compile patterns, import code, loop without end or change the base."""
    for name, value in settings.items():
        is_other_start = name.startswith("init") and isinstance(value, str) and value not in FIRST_VALUES
        if name.startswith("megatron") or is_other_start:
            raise ValueError(f"peft_config has {name}={str(value)[:40]!r}, which would reach beyond the adapter")
        values = [part for pair in value.items() for part in pair] if isinstance(value, dict) else value
        is_size = not any(word in name for word in ("seed", "prng_key", "alpha"))
        limit = 1000 if "iter" in name else 2**20 if is_size else 2**63
        for part in values if isinstance(values, list) else [values]:
            is_name = isinstance(part, str) and NAME_PATTERN.fullmatch(part)
            is_number = isinstance(part, bool | int | float) and math.isfinite(part) and abs(part) < limit
            if not (part is None or is_name or is_number):
                raise ValueError(
                    f"peft_config has {name}={str(part)[:40]!r}; it takes numbers below {limit}, and names"
                )
