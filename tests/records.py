"""A record of a run without a model: trained tensors, and updates with gradients that the step decides."""

import torch

from onelora_diffusion.training.optimizers import averaged_values
from onelora_diffusion.training.run import Run
from onelora_diffusion.training.stopping import Clock


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free Adam (Defazio et al., 2024, algorithm 1), a stand-in where the package is not installed.

    It keeps what the package's keeps: z and exp_avg_sq of a tensor; k, weight_sum, lr_max, train_mode of a group.
    """

    BETA = 0.9

    def __init__(self, groups, weight_decay):
        assert weight_decay == 0.0
        super().__init__(groups, dict(lr=1e-3, k=0, train_mode=False, weight_sum=0.0, lr_max=-1.0))

    def train(self):
        self._mix(True, 1 - self.BETA)

    def eval(self):
        self._mix(False, 1 - 1 / self.BETA)

    @torch.no_grad()
    def _mix(self, mode, share):
        for group in self.param_groups:
            if group["train_mode"] != mode:
                for y in group["params"]:
                    if y in self.state:
                        y.lerp_(self.state[y]["z"], share)
            group["train_mode"] = mode

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["lr_max"] = max(group["lr"], group["lr_max"])
            weight = (group["k"] + 1) * group["lr_max"] ** 2
            group["weight_sum"] += weight
            share = weight / group["weight_sum"]
            group["k"] += 1
            for y in group["params"]:
                state = self.state[y]
                if not state:
                    state["z"], state["exp_avg_sq"] = y.clone(), torch.zeros_like(y)
                state["exp_avg_sq"].lerp_(y.grad**2, 0.1)
                move = y.grad / (state["exp_avg_sq"] / (1 - 0.9 ** group["k"])).sqrt().add(1e-8)
                y.lerp_(state["z"], share).add_(move, alpha=group["lr"] * (self.BETA * (1 - share) - 1))
                state["z"].sub_(move, alpha=group["lr"])


def run_of(accelerator, settings, shapes):
    trained = {name: torch.nn.Parameter(torch.zeros(shape)) for name, shape in shapes.items()}
    return Run(settings, accelerator, trained, Clock())


def update(run):
    """An update with gradients and a rate that the step decides, its losses, and a distance at every second one."""
    generator = torch.Generator().manual_seed(run.step)
    for tensor in run.trained.values():
        tensor.grad = torch.randn(tensor.shape, generator=generator)
    for group in run.optimizer.param_groups:
        group["lr"] = 2 * group["peak_lr"] / (1 + run.step)
    run.optimizer.step()
    run.step += 1
    with averaged_values(run.optimizer):
        for average in run.averages:
            average.update(run.step)
    run.losses.add({"loss": torch.tensor(1.0 / run.step)})
    if run.step % 2 == 0:
        run.keep_if_best({"step": run.step, "distance": abs(run.step - 4.0)})
