"""1LoRA for programs that train LoRA through PEFT: a `LoraConfig` whose A is ones and is not trained."""

import dataclasses

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from onelora_diffusion.adapters.functional import add_outer_, feature_sum
from onelora_diffusion.injection.linear import makes_new_memory, why_not_writable

# The value of `init_lora_weights` inside PEFT. If another LoRA was added to a layer first, PEFT's own layer refuses
# this value and quotes it in its error: "Unknown initialization init_lora_weights='...'".
ONES = "A is ones; add the adapter of a OneLoraConfig before any other LoRA"

# The settings of a LoRA that have the same meaning for 1LoRA. All others must have PEFT's default.
UNDERSTOOD = {
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights"),
    "modules_to_save",
}


@dataclasses.dataclass
class OneLoraConfig(LoraConfig):
    """1LoRA as a LoRA of PEFT: y = W0 x + bias + α · b · Σᵢ xᵢ, where A = (1 … 1) is frozen and B = b is trained.

    It replaces `peft.LoraConfig` in `get_peft_model`, in the `add_adapter` of diffusers' models, and in every program
    that passes a `LoraConfig` to one of them. An ordinary LoRA of rank 1 is saved, which loads without this library.
    `init_lora_weights` may be True or "gaussian", the values of training scripts: A is ones, B zeros.

    Args:
        r: must be 1, the default.
        lora_alpha: α, a factor on b; the default is 1. `use_rslora` changes nothing at rank 1.

    Raises:
        ValueError: another rank, or a setting that 1LoRA does not have, such as `use_dora`.
    """

    r: int = 1
    lora_alpha: int = 1

    def __post_init__(self):
        if self.init_lora_weights == ONES:
            raise ValueError(
                "a OneLoraConfig is not changed by dataclasses.replace, as PEFT's add_weighted_adapter does, which "
                "would scale A as well as B: mix adapters by set_adapters(names, weights), or export them and mix "
                "them by onelora_diffusion.combine_adapters"
            )
        for name, value, instead in self._not_understood():
            raise ValueError(f"OneLoraConfig: {name}={value!r} is no setting of 1LoRA: {instead}")
        super().__post_init__()
        self.init_lora_weights = ONES
        self._register_custom_module({nn.Linear: OneLoraLinear, nn.Module: _refuse_layer})

    def _not_understood(self):
        """Yield (name, value, advice) of the settings that 1LoRA does not have."""
        for name, rank in {"r": self.r, **(self.rank_pattern or {})}.items():
            if rank != 1:
                yield name, rank, "its rank is 1 everywhere; give r=1 (--rank 1), or leave it out"
        if self.init_lora_weights not in (True, "gaussian"):
            yield "init_lora_weights", self.init_lora_weights, "A is ones and B starts at zero; leave it out"
        for field in dataclasses.fields(self):
            has_factory = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if has_factory else field.default
            if field.name not in UNDERSTOOD and getattr(self, field.name) != default:
                yield field.name, getattr(self, field.name), f"leave it at its default, {default!r}"

    def to_dict(self) -> dict:
        """The settings as those of an ordinary LoRA, which is saved."""
        return super().to_dict() | {"init_lora_weights": True}

    @classmethod
    def from_peft_type(cls, **kwargs):
        """Create a config of this class from settings with `peft_type="LORA"`."""
        kwargs.pop("peft_type", None)
        return super().from_peft_type(**kwargs)


class Ones(nn.Linear):
    """The A of 1LoRA, a row of ones, which is never trained."""

    def __init__(self, in_features: int):
        super().__init__(in_features, 1, bias=False)
        nn.init.ones_(self.weight)
        self.weight.requires_grad_(False)
        self.checked = None

    def check(self) -> None:
        """ValueError unless the weight is all ones; checked again whenever it was changed or replaced."""
        state = self.weight.data_ptr(), self.weight._version
        if self.checked != state:
            if self.weight.device.type != "meta" and not (self.weight == 1).all():
                raise ValueError(
                    "lora_A of a OneLoraConfig's adapter holds other numbers than ones, and would train as another "
                    "method: load this LoRA by a LoraConfig, or under another adapter name"
                )
            self.checked = state

    def _load_from_state_dict(self, state_dict, prefix, *args):
        loaded = state_dict.get(f"{prefix}weight")
        if loaded is not None and loaded.device.type != "meta" and not (loaded == 1).all():
            raise ValueError(
                f"{prefix}weight holds other numbers than ones: this is no 1LoRA, and cannot be loaded into an "
                "adapter of OneLoraConfig; load it by a LoraConfig"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


class OneLoraLinear(LoraLinear):
    """PEFT's LoRA layer, whose 1LoRA adapters are computed by `adapters.functional`."""

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: bool | str) -> None:
        if init_lora_weights != ONES:  # another LoRA is added to the same layer
            return super().reset_lora_parameters(adapter_name, init_lora_weights)
        self.lora_A[adapter_name] = Ones(self.in_features).to(self.lora_A[adapter_name].weight.device)
        nn.init.zeros_(self.lora_B[adapter_name].weight)

    def set_adapter(self, *args, **kwargs) -> None:
        super().set_adapter(*args, **kwargs)
        self._freeze()

    def set_requires_grad(self, *args, **kwargs) -> None:
        super().set_requires_grad(*args, **kwargs)
        self._freeze()

    def _freeze(self) -> None:
        for lora_a in self.lora_A.values():
            if isinstance(lora_a, Ones):
                lora_a.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """y = W0 x + bias + Σ over active adapters of α · b · Σᵢ xᵢ; (..., in_features) -> (..., out_features)."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        by_peft = self.disable_adapters or self.merged or args or kwargs
        if by_peft or not all(isinstance(self.lora_A[name], Ones) for name in active):
            return super().forward(x, *args, **kwargs)
        out = self.base_layer(x)
        if active and not torch.compiler.is_compiling() and not makes_new_memory(self.base_layer):
            out = out.clone()  # other code may have kept a reference to it
        for name in active:
            b, scale = self.lora_B[name].weight.flatten(), self.scaling[name]
            if isinstance(scale, torch.Tensor) or scale != 1:
                b = scale * b
            s = self._compressed(self.lora_dropout[name](x), self.lora_A[name], out.dtype)
            out = add_outer_(out, s, b)
        return out

    def _compressed(self, x: torch.Tensor, lora_a: Ones, dtype: torch.dtype) -> torch.Tensor:
        """A x, (..., in_features) -> (...), for an output of this dtype; computed as the feature sum in training."""
        if torch.is_grad_enabled():
            if not torch.compiler.is_compiling():
                lora_a.check()
            return feature_sum(x)
        # PEFT's hotswap overwrites this A with another LoRA's without notice.
        if dtype == torch.float16:  # 65504 is soon reached by a sum of thousands of features
            return (x * lora_a.weight[0]).sum(-1, dtype=torch.float32)
        return nn.functional.linear(x, lora_a.weight.to(x.dtype)).squeeze(-1)

    def merge(self, *args, **kwargs) -> None:
        if reason := why_not_writable(self.get_base_layer()):
            raise ValueError(f"a layer that is to take up 1LoRA {reason}")
        super().merge(*args, **kwargs)


def _refuse_layer(target: nn.Module, adapter_name: str, **kwargs):
    """Called by PEFT for a target that is no linear layer."""
    layer = target.get_base_layer() if hasattr(target, "get_base_layer") else target
    raise ValueError(
        f"target_modules names {kwargs.get('target_name', '')} {layer}, and 1LoRA is for linear layers: leave it out"
    )
