"""More clients than the queue has places, a kill, a new start, SIGTERM; `tools/soak_serving.py` does it for longer."""

import pytest

pytest.importorskip("fastapi", reason="make test-serve installs it")

from benchmarks.tiny_dit import make_dit_pipeline
from tools.soak_serving import Serve, serve_long


def test_a_full_queue_loses_and_mixes_up_nothing_and_survives_a_kill(tmp_path, capsys):
    make_dit_pipeline().save_pretrained(tmp_path / "base")
    assert serve_long(Serve(minutes=0.2, clients=24, kills=1, growth_mb=100.0), tmp_path) == []
    assert "1 kills" in capsys.readouterr().out
