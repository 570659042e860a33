"""The public names as a program uses them, for `make types`: it is read by a type checker, and not run."""

from pathlib import Path

import torch

from onelora_diffusion import (
    AdapterConfig,
    OneLoRADiTPipeline,
    OneLoRALoaderMixin,
    adapter_state_dict,
    combine_adapters,
    count_trainable,
    disable_adapter,
    export_lora,
    inject_adapter,
    load_adapter,
    merge_adapter,
    miniature_path,
    push_to_hub,
    read_adapter,
    route_adapters,
    save_adapter,
    set_adapters,
    train_adapters,
    unload_adapter,
    unmerge_adapter,
)
from onelora_diffusion.diffusion import training_losses

pipe = OneLoRADiTPipeline.from_pretrained(miniature_path())
model = inject_adapter(pipe.transformer, AdapterConfig(method="1lora", num_classes=5))
n: int = count_trainable(model)
tensors: dict[str, torch.Tensor] = adapter_state_dict(model)
path: Path = save_adapter(model, "x.safetensors", id2label={0: "a"})
load_adapter(model, path, adapter_name="again")
names, weights = ["default", "again"], [0.5, 0.5]
set_adapters(model, names, weights)
train_adapters(model, names)
with disable_adapter(model):
    pass
with route_adapters(model, names):
    pass
merge_adapter(model)
unmerge_adapter(model)
unload_adapter(model)
info = read_adapter(path)
print(info.config.method)
pipe.load_lora_weights("folder", adapter_name="a")
pipe.set_adapters(names, weights)
pipe.fuse_lora()
pipe.unload_lora_weights()
push_to_hub(path, "somebody/something")
export_lora(model, "lora.safetensors")
combine_adapters(model, names, weights, "both")
loader: type[OneLoRALoaderMixin] = type(pipe)
print(training_losses.__doc__)
