import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from onelora_diffusion.training.ema import ExponentialMovingAverage
from onelora_diffusion.training.optimizers import learning_rate_factor
from onelora_diffusion.training.weighting import check_weighting, loss_weights, min_snr_weights


def test_average_equals_the_formula_by_hand():
    value = torch.zeros(1)
    ema = ExponentialMovingAverage({"b": value}, decay=0.25)
    value.fill_(11.0)
    ema.update(1)  # decay min(0.25, 2 / 11): 9 / 11 of 11
    assert ema.values["b"].item() == pytest.approx(9.0)
    value.fill_(1.0)
    ema.update(2)  # decay min(0.25, 3 / 12): 0.25 · 9 + 0.75 · 1
    assert ema.values["b"].item() == pytest.approx(3.0)
    ema.update(1000)
    assert ema.values["b"].item() == pytest.approx(1.5)


def test_averages_serve_inside_the_context_and_values_come_back_bit_for_bit():
    parameter = torch.nn.Parameter(torch.randn(5))
    before = parameter.detach().clone()
    ema = ExponentialMovingAverage({"b": parameter}, decay=0.5)
    ema.values["b"].fill_(2.0)
    with pytest.raises(KeyboardInterrupt), ema.applied():
        assert torch.equal(parameter, torch.full((5,), 2.0))
        raise KeyboardInterrupt
    assert torch.equal(parameter, before)


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5]),
        ("cosine", [0.5, 1.0, 1.0, (1 + 0.5**0.5) / 2, 0.5]),
    ],
)
def test_schedules_by_hand(schedule, factors):
    found = [learning_rate_factor(step, schedule, warmup_steps=2, max_steps=6) for step in range(5)]
    assert found == pytest.approx(factors)


def test_min_snr_weights_by_hand():
    scheduler = DDIMScheduler()
    scheduler.alphas_cumprod = torch.tensor([0.9, 0.5, 0.1])  # signal to noise 9, 1 and 1 / 9
    weights = min_snr_weights(torch.tensor([0, 1, 2]), scheduler, gamma=5.0)
    assert weights.tolist() == pytest.approx([5 / 9, 1, 1])


def test_min_snr_weights_of_a_velocity_by_hand():
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    scheduler.alphas_cumprod = torch.tensor([0.9, 0.5, 0.1])
    weights = min_snr_weights(torch.tensor([0, 1, 2]), scheduler, gamma=5.0)
    assert weights.tolist() == pytest.approx([5 / 10, 1 / 2, (1 / 9) / (10 / 9)])


def test_weights_of_flow_matching_by_hand():
    scheduler, timesteps = FlowMatchEulerDiscreteScheduler(shift=1.0), torch.tensor([499, 999])  # σ = 0.5 and 1
    assert loss_weights(timesteps, scheduler, None, "none") is None
    assert loss_weights(timesteps, scheduler, None, "sigma-sqrt").tolist() == pytest.approx([4, 1])
    cosmap = loss_weights(timesteps, scheduler, None, "cosmap")
    assert cosmap.tolist() == pytest.approx([4 / torch.pi, 2 / torch.pi])


def test_weights_that_do_not_go_with_the_model_are_refused():
    check_weighting(DDIMScheduler(), 5.0, "none")
    check_weighting(FlowMatchEulerDiscreteScheduler(), None, "cosmap")
    with pytest.raises(ValueError, match="--loss-weighting cosmap is for flow matching"):
        check_weighting(DDIMScheduler(), None, "cosmap")
    with pytest.raises(ValueError, match="--snr-gamma weighs the error of noise"):
        check_weighting(FlowMatchEulerDiscreteScheduler(), 5.0, "none")
