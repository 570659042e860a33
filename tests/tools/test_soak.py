"""A run that is killed at random moments ends as one that is left alone; `tools/soak.py` does it for longer."""

from tools.soak import Kills, kill_often, write_smallest_base


def test_a_run_that_is_killed_again_and_again_ends_bit_for_bit_as_one_left_alone(tmp_path, capsys):
    write_smallest_base(tmp_path / "base")
    assert kill_often(Kills(kills=4, max_steps=400), tmp_path) == []
    assert "killed 4 times" in capsys.readouterr().out
