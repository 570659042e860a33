"""The table of methods: each name with the function that builds its layer adapters."""

from onelora_diffusion.adapters.mora import build_mora
from onelora_diffusion.adapters.peft import build_peft_adapters
from onelora_diffusion.adapters.swap import build_copies
from onelora_diffusion.adapters.vector import build_vectors
from onelora_diffusion.config import METHODS, Method

METHODS |= {
    # The parts of the vector family, y = γ ⊙ (W0 x + bias + β + b·Σx), that each of its methods trains.
    "1lora": Method(build_vectors, parts={"sum": True, "bias": False, "scale": False, "norms": False}),
    "bitfit": Method(build_vectors, parts={"sum": False, "bias": True, "scale": False, "norms": False}),
    "difffit": Method(build_vectors, parts={"sum": False, "bias": True, "scale": True, "norms": True}),
    "mora1": Method(build_mora, serves_fused=True),
    "mora6": Method(build_mora, serves_fused=True),
    "lora": Method(build_peft_adapters, serves_fused=True, is_peft=True),
    "dora": Method(build_peft_adapters, serves_fused=True, is_peft=True),
    "vera": Method(build_peft_adapters, serves_fused=True, is_peft=True),
    "full": Method(build_copies, is_whole=True),
    "peft:<tuner>": Method(build_peft_adapters, serves_fused=True, is_peft=True),
}
