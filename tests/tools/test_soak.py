"""A run that is killed at random moments ends as one that is left alone; `tools/soak.py` does it for longer."""

from benchmarks.tiny_dit import make_dit_pipeline
from tools.soak import Kills, kill_often


def test_a_run_that_is_killed_again_and_again_ends_bit_for_bit_as_one_left_alone(tmp_path, capsys):
    make_dit_pipeline().save_pretrained(tmp_path / "base")
    assert kill_often(Kills(kills=4, max_steps=400), tmp_path) == []
    assert "killed 4 times" in capsys.readouterr().out
