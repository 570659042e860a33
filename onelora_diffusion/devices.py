"""Precision, compilation and memory of a device, and their description in reports."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch

from onelora_diffusion.denoisers import autoencoder_of, blocks_of, denoiser_of

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class ComputeSettings:
    """The precision in which a pipeline generates, and whether it is compiled."""

    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the base's weights and computation; no is float32. Trained values and the sampler stay float32, as
    does a VAE that overflows in half precision."""
    tf32: bool = True
    """On CUDA, float32 products round their factors to TF32 (ten bits of mantissa), which is several times as fast."""
    compile: bool = False
    """Compile the denoiser's blocks (torch.compile): the start is slow, then steps are faster."""

    def place(self, pipeline, device: torch.device) -> None:
        """Move a pipeline to `device` in this precision; adapters keep theirs. Blocks are compiled at their first run.

        ValueError if the precision is fp16 and the device a CPU, which cannot compute in it.
        """
        if self.mixed_precision == "fp16" and device.type == "cpu":
            raise ValueError("--mixed-precision fp16 needs a GPU: choose bf16 or no")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        dtype = DTYPES[self.mixed_precision]
        denoiser, autoencoder = denoiser_of(pipeline), autoencoder_of(pipeline)
        overflows = dtype == torch.float16 and autoencoder.config.get("force_upcast")
        denoiser.to(device, dtype)
        autoencoder.to(device, torch.float32 if overflows else dtype)
        if self.compile:
            for block in blocks_of(denoiser):
                block.compile()

    def report(self, device: torch.device) -> dict:
        """The settings of the device on which reported numbers depend."""
        return {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "num_threads": torch.get_num_threads() if device.type == "cpu" else None,
            "mixed_precision": self.mixed_precision,
            "tf32": device.type == "cuda" and self.tf32,
            "compiled": self.compile,
        }


def in_words(report: dict) -> str:
    """Describe a report in words: `bf16 on NVIDIA H100, compiled`, or `float32 on cpu, 2 thread(s)`."""
    name = "float32" if report["mixed_precision"] == "no" else report["mixed_precision"]
    products = " (TF32 products)" if report["tf32"] else ""
    threads = f", {report['num_threads']} thread(s)" if report["num_threads"] else ""
    return f"{name}{products} on {report['device']}{threads}{', compiled' if report['compiled'] else ''}"


def peak_memory_bytes(device: torch.device) -> int:
    """The peak memory of a GPU in bytes; for a CPU, the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
