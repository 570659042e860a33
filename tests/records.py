"""A record of a run without a model: trained tensors, and updates with gradients that the step decides."""

import torch

from onelora_diffusion.training.run import Run
from onelora_diffusion.training.stopping import Clock


def run_of(accelerator, settings, shapes):
    trained = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    return Run(settings, accelerator, trained, Clock())


def update(run):
    """An update with gradients that the step decides, its losses, and a measured distance at every second one."""
    generator = torch.Generator().manual_seed(run.step)
    for tensor in run.trained.values():
        tensor.grad = torch.randn(tensor.shape, generator=generator)
    run.optimizer.step()
    run.step += 1
    for average in run.averages:
        average.update(run.step)
    run.losses.add({"loss": torch.tensor(1.0 / run.step)})
    if run.step % 2 == 0:
        run.keep_if_best({"step": run.step, "distance": abs(run.step - 4.0)})
