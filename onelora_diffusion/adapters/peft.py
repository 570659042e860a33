"""LoRA, DoRA, VeRA and any other PEFT tuner: PEFT's own layers around the base's linear layers."""

import contextlib
import re
import warnings

import torch
from torch import nn

from onelora_diffusion.adapters.base_layer import features_of, offload_group, weights_present, why_not_its_product
from onelora_diffusion.adapters.contract import LayerAdapter
from onelora_diffusion.config import AdapterConfig

TUNER_NAME = "default"  # the name of the one adapter in each of PEFT's layers

# Tuners of other than linear layers, or that need calls from the training loop or additional inputs.
OTHER_TUNERS = {"ADALORA", "ADAPTION_PROMPT", "LN_TUNING", "POLY", "SHADOW", "TRAINABLE_TOKENS"}

READING = "DoRA, or another tuner whose forward reads a layer's weight, serves a layer that"
OTHER_METHODS = "serve adapters of another method there"


class PeftAdapter(LayerAdapter):
    """One tuner layer of PEFT. The base layer stays in the model under its own name.

    The tuner gets a `BaseLinear` as its base layer, which returns the output that the base layer has already computed.
    Trained tensors are fp32 and keep the names that PEFT gives them (`lora_A.weight`, `vera_lambda_b`).
    """

    def __init__(self, tuner: nn.Module):
        super().__init__()
        self.tuner = tuner
        base = tuner._modules.pop("base_layer")
        tuner.__dict__["base_layer"] = base  # no child module: the base's weights are not part of the adapter
        self.trained = [name for name, parameter in tuner.named_parameters() if parameter.requires_grad]

    def forward(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """(..., in_features) and the base layer's (..., out_features) -> (..., out_features)."""
        with self.tuner.base_layer.holding(given=(x, out)):
            return self.tuner(x)

    def merged(self, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The base layer's fp32 weight and bias with this adapter merged into them by the tuner itself."""
        own = [nn.Parameter(tensor.clone(), requires_grad=False) for tensor in (weight, bias)]
        with self.tuner.base_layer.holding(own=own) as base:
            try:
                self.tuner.merge()
            except (NotImplementedError, AttributeError) as error:
                tuner = type(self.tuner).__module__.split(".")[-2]  # peft.tuners.<tuner>.layer
                raise ValueError(f"PEFT's {tuner} cannot be merged into a linear layer") from error
            finally:
                self.tuner.merged_adapters.clear()
            return base.weight.detach(), base.bias.detach()

    def serve(self, layer: nn.Linear) -> None:
        self.tuner.base_layer.serve(layer)

    def trained_tensors(self) -> dict[str, nn.Parameter]:
        plain = {name: re.sub(rf"\.{TUNER_NAME}(?=\.|$)", "", name) for name in self.trained}
        return {f"onelora_{plain[name]}": self.tuner.get_parameter(name) for name in self.trained}


class BaseLinear(nn.Linear):
    """Stands in for the base layer inside a tuner: refers to its weights and returns its output, computing nothing."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = features_of(linear)
        self.given = self.own = None  # what `forward` returns for one input; the weight and bias that the tuner reads
        self.is_read_rightly = False  # set once `why_not_its_product` has found no reason
        self.is_built = False  # until then weights are read in fp32, so that the tuner derives fp32 values from them
        self.serve(linear)

    def serve(self, linear: nn.Linear) -> None:
        self.__dict__["linear"] = linear

    @property
    def weight(self) -> torch.Tensor:
        if self.own is not None:
            return self.own[0]
        if self.is_built:
            return self._values("weight")
        if self.linear.weight.is_meta:  # the base has no values, but the adapter needs memory all the same
            return torch.zeros(()).expand(self.out_features, self.in_features)
        return self.linear.weight.float().flatten(1)

    def _values(self, name: str) -> torch.Tensor:
        """The layer's weight or bias, for a tuner whose forward reads it; PEFT unpacks a quantised weight."""
        if getattr(offload_group(self.linear), "offload_to_disk_path", None):
            raise ValueError(f"{READING} is offloaded to the disk by enable_group_offload: {OTHER_METHODS}")
        with weights_present(self.linear):
            tensor = getattr(self.linear, name)
            if type(tensor) is not nn.Parameter or not tensor.is_floating_point():
                return tensor
            if not self.is_read_rightly and (reason := why_not_its_product(self.linear)):
                raise ValueError(f"{READING} {reason}: {OTHER_METHODS}")
        self.is_read_rightly = True
        tensor = tensor if tensor.dtype.itemsize > 1 else tensor.float()
        return tensor.flatten(1) if tensor.ndim == 4 else tensor

    @property
    def bias(self) -> torch.Tensor | None:
        if self.own is not None:
            return self.own[1]
        return self._values("bias") if self.is_built else self.linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.given is not None and x is self.given[0]:
            return self.given[1]
        return nn.functional.linear(x, self.weight, self.bias)  # the tuner has changed the input

    @contextlib.contextmanager
    def holding(self, **values):
        """Context manager in which `given` or `own` has this value, and not the layer's."""
        for name, value in values.items():
            setattr(self, name, value)
        try:
            yield self
        finally:
            for name in values:
                setattr(self, name, None)


def build_peft_adapters(layers: dict[str, nn.Linear], config: AdapterConfig) -> dict[str, PeftAdapter]:
    """PEFT's tuner layers for these linear layers, by path.

    PEFT injects into a tree that holds only stand-ins for the layers, under their own paths. So PEFT itself sets up
    every tuner, including state that layers share, and the model is not touched. Random values come from
    `config.seed`. ValueError if PEFT is not installed, has no such tuner of linear layers, or that no such setting.
    """
    try:
        import peft
    except ImportError as error:
        raise ValueError("this method needs PEFT: pip install onelora-diffusion[peft]") from error
    tree = _tree_of({path: BaseLinear(linear) for path, linear in layers.items()})
    settings = _peft_config(peft, config, layers)
    tuner_class = peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[settings.peft_type]
    # DoRA's magnitudes are norms of weights; of weights on the meta device, which have no values, they are shapes too.
    is_meta = getattr(settings, "use_dora", False) and all(linear.weight.is_meta for linear in layers.values())
    device = torch.device("meta") if is_meta else contextlib.nullcontext()
    with device, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns about its own files, which are not used here
        torch.manual_seed(config.seed)
        tuner_class(tree, settings, TUNER_NAME)
    adapters = {}
    for path in layers:
        tuner = tree.get_submodule(path)
        tuner.base_layer.is_built = True
        adapters[path] = PeftAdapter(tuner)
    return adapters


def _peft_config(peft, config: AdapterConfig, layers: dict[str, nn.Linear]):
    """PEFT's settings: rank r and alpha = r (a scale of 1), then `config.peft_config`, which overrides them."""
    kind, settings = {
        "lora": ("LORA", {"r": config.rank, "lora_alpha": config.rank}),
        "dora": ("LORA", {"r": config.rank, "lora_alpha": config.rank, "use_dora": True}),
        "vera": ("VERA", {"r": config.rank, "projection_prng_key": config.seed}),
    }.get(config.method, (config.method.removeprefix("peft:").upper(), {}))
    configs = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    tuners = {
        name.value
        for name in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING
        if name.value not in OTHER_TUNERS and "target_modules" in configs[name].__dataclass_fields__
    }
    if kind not in tuners:
        known = ", ".join(sorted(tuners)).lower()
        raise ValueError(
            f"PEFT {peft.__version__} has no tuner of linear layers named '{kind.lower()}': it has {known}"
        )
    target_modules = "|".join(re.escape(path) for path in layers)
    try:
        return configs[kind](target_modules=target_modules, **settings | (config.peft_config or {}))
    except TypeError as error:
        raise ValueError(f"peft_config of '{config.method}': {error}") from error


def _tree_of(modules: dict[str, nn.Module]) -> nn.Module:
    """A module tree that holds these modules under their paths."""
    tree = nn.Module()
    tree.device_marker = nn.Parameter(torch.empty(0))  # PEFT takes the model's device from its first parameter
    for path, module in modules.items():
        *parents, name = path.split(".")
        parent = tree
        for part in parents:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(name, module)
    return tree
