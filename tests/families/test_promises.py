"""What is promised of every recorded base, of two whose denoisers keep what they compute, or compute with experts."""

from functools import partial

import pytest
from tiny_models import make_pipeline

from tools.try_promises import Promises

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.mark.parametrize("name", ["z_image", "hidream"])
def test_an_adapter_learns_and_is_resumed_drawn_with_and_exported(name, tmp_path, monkeypatch):
    monkeypatch.setattr("tools.try_promises.UPDATES", 2)
    found = Promises(partial(make_pipeline, name), 0, tmp_path, {"batch_size": 2}).kept()
    assert all(is_kept for _, is_kept in found.values()), found
