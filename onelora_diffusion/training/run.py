"""The state of a run: everything that updates change and checkpoints contain."""

from accelerate import Accelerator
from torch import Tensor

from onelora_diffusion.data.identity import DataIdentity
from onelora_diffusion.files import printable
from onelora_diffusion.training.checkpoints import Checkpoint
from onelora_diffusion.training.ema import ExponentialMovingAverage
from onelora_diffusion.training.metrics import LossWindow, check_finite
from onelora_diffusion.training.optimizers import make_optimizer, restore_running, running_values
from onelora_diffusion.training.settings import LARGER_IS_BETTER, RunSettings
from onelora_diffusion.training.state import restore_training_tensors, training_tensors
from onelora_diffusion.training.stopping import Clock
from onelora_diffusion.training.sum_rates import divide_groups

# The values of `Run.state` besides tensors, and their types in JSON.
STATE = {
    "seconds": int | float,
    "window": list,
    "optimizer": list,
    "scaler": dict | None,
    "best": dict | None,
    "settings": dict,
}


class Run:
    """The state that training changes; `trained` are the trained tensors of the model, by name."""

    def __init__(self, settings: RunSettings, accelerator: Accelerator, trained: dict[str, Tensor], clock: Clock):
        self.settings, self.accelerator, self.trained, self.clock = settings, accelerator, trained, clock
        rates = settings.learning_rate, settings.class_learning_rate
        self.optimizer = make_optimizer(settings.optimizer, trained, *rates)
        # Moving averages of the trained tensors; the first one is the adapter that is saved.
        self.averages = [ExponentialMovingAverage(trained, decay) for decay in settings.ema_decay]
        self.losses = LossWindow()  # since the last line of metrics
        self.step = 0  # the number of updates so far
        self.rate_factors: dict[str, float] | None = None  # on the learning rates of the vectors b, by name
        self.best: dict | None = None  # the line of metrics that is best by the measure in the settings
        self.best_values: dict[str, Tensor] = {}  # the averages that were measured in `best`
        self.data: DataIdentity | None = None  # of the training data, once it is known
        self.base: str | None = None  # a hash of some of the base's values
        self.training_adapter: str | None = None  # a hash of the adapter that serves in training, if there is one

    @property
    def num_trainable_params(self) -> int:
        return sum(tensor.numel() for tensor in self.trained.values())

    @property
    def learning_rate(self) -> float:
        """The learning rate of the last update, for a factor of 1."""
        group = self.optimizer.param_groups[0]
        return group["lr"] / group.get("factor", 1.0)

    def scale_rates(self, factors: dict[str, float]) -> None:
        """Multiply the learning rates of trained tensors by factors, given by name."""
        self.rate_factors = factors
        divide_groups(self.optimizer, self.trained, factors)

    def state(self) -> tuple[dict[str, Tensor], dict]:
        """(tensors by name, other values for JSON), on every process; NonFiniteError if a loss is infinite or NaN."""
        losses = self.losses.read(self.accelerator, self.step)
        known = {"rate_factors": self.rate_factors, "data": self.data and self.data._asdict()}
        known |= {"base": self.base, "training_adapter": self.training_adapter}
        tensors = training_tensors(self.trained, self.averages, self.optimizer, self.best_values)
        return tensors, {
            "seconds": self.clock.seconds,
            "window": losses,
            "optimizer": running_values(self.optimizer),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "best": self.best,
            "settings": self.settings.as_json(),
        } | {name: value for name, value in known.items() if value is not None}

    def restore(self, checkpoint: Checkpoint) -> None:
        """The inverse of `state`; ValueError if an undamaged checkpoint has not the state of such a run."""
        try:
            self._restore(checkpoint)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            path, reason = checkpoint.path, printable(str(error), 200)
            raise ValueError(f"{path} is no record of a run ({reason}): remove it, or use --fresh") from error

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        if self.settings.rates_by_sum and "rate_factors" in state:
            self.scale_rates({name: float(state["rate_factors"][name]) for name in state["rate_factors"]})
        best_values = restore_training_tensors(checkpoint.tensors, self.trained, self.averages, self.optimizer)
        self.step = checkpoint.step
        self.clock.resume(float(state["seconds"]))
        self.losses = LossWindow(state["window"])
        check_finite({f"loss {number} of its window": row for number, row in enumerate(self.losses.rows)}, self.step)
        restore_running(self.optimizer, state["optimizer"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        measure = self.settings.best_by
        if best_values and measure in state["best"]:
            self.best = state["best"] | {measure: float(state["best"][measure])}
            self.best_values = best_values

    def keep_if_best(self, line: dict) -> bool:
        """Keep a line and the current averages if its measure is the best so far; return whether it is."""
        measure = self.settings.best_by
        if measure not in line:
            return False
        sign = -1 if measure in LARGER_IS_BETTER else 1
        if self.best is not None and sign * line[measure] >= sign * self.best[measure]:
            return False
        self.best, self.best_values = line, {name: value.clone() for name, value in self.averages[0].values.items()}
        return True
