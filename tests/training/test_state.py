import pytest
import torch
from safetensors.torch import load, save

from onelora_diffusion.training.ema import ExponentialMovingAverage
from onelora_diffusion.training.optimizers import averaged_values, make_optimizer, restore_running, running_values
from onelora_diffusion.training.state import restore_training_tensors, training_tensors

PACKAGES = {"adamw": "torch", "adamw-8bit": "bitsandbytes", "schedule-free": "schedulefree"}


class Run:
    """A vector large enough for 8-bit moments, a small one, and a class table, with gradients drawn by the step."""

    def __init__(self, name):
        sizes = {"a.onelora_b": (5000,), "b.onelora_b": (3,), "class_embedding.weight": (4, 2)}
        self.trained = {key: torch.nn.Parameter(torch.zeros(size)) for key, size in sizes.items()}
        self.optimizer = make_optimizer(name, self.trained, learning_rate=0.01, table_rate=0.1)
        self.emas = [ExponentialMovingAverage(self.trained, decay) for decay in (0.1, 0.9)]

    def steps(self, first, last):
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            for parameter in self.trained.values():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            self.optimizer.step()
            with averaged_values(self.optimizer):
                for ema in self.emas:
                    ema.update(step + 1)
        return self

    def tensors(self):
        best = {name: torch.ones_like(parameter) for name, parameter in self.trained.items()}
        return load(save({k: t.detach().clone() for k, t in self.state(best).items()}))

    def state(self, best=None):
        return training_tensors(self.trained, self.emas, self.optimizer, best)


@pytest.mark.parametrize("name", PACKAGES)
def test_a_run_restored_from_its_tensors_goes_on_bit_for_bit(name):
    pytest.importorskip(PACKAGES[name])
    half, again = Run(name).steps(0, 3), Run(name)
    best = restore_training_tensors(half.tensors(), again.trained, again.emas, again.optimizer)
    restore_running(again.optimizer, running_values(half.optimizer))
    assert torch.equal(best["b.onelora_b"], torch.ones(3))
    whole, resumed = Run(name).steps(0, 6).state(), again.steps(3, 6).state()
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert not torch.equal(whole["ema.b.onelora_b"], whole["ema2.b.onelora_b"])


def test_the_class_table_has_its_own_rate():
    run = Run("adamw").steps(0, 1)  # Adam's first step is as long as the learning rate
    assert run.trained["a.onelora_b"].abs().max().item() == pytest.approx(0.01, rel=1e-3)
    assert run.trained["class_embedding.weight"].abs().max().item() == pytest.approx(0.1, rel=1e-3)
    assert make_optimizer("adamw", run.trained, 0.01, table_rate=0.0).param_groups[1]["lr"] == 0.0
    assert make_optimizer("adamw", run.trained, 0.01).param_groups[1]["lr"] == 0.01
