import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
