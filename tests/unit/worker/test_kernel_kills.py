"""Counting what the kernel ended, in control groups of both versions."""

from pathlib import Path

import pytest

from selfloop.worker.launchers import kernel_kills


def test_kills_are_counted_in_groups_of_both_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    groups, own, machine = tmp_path / "groups", tmp_path / "cgroup", tmp_path / "vmstat"
    monkeypatch.setattr(kernel_kills, "_GROUPS", groups)
    monkeypatch.setattr(kernel_kills, "_OWN", own)
    monkeypatch.setattr(kernel_kills, "_MACHINE", machine)
    assert kernel_kills.num_kernel_kills() == 0
    machine.write_text("nr_free_pages 7\noom_kill 2\n")
    own.write_text("0::/service\n4:cpu,memory:/old\n3:cpuset:/\n")
    (groups / "service").mkdir(parents=True)
    (groups / "service" / "memory.events").write_text("low 0\noom 9\noom_kill 3\noom_group_kill 0\n")
    (groups / "memory" / "old").mkdir(parents=True)
    (groups / "memory" / "old" / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 4\n")
    assert kernel_kills.num_kernel_kills() == 9


def test_a_process_is_put_before_others_and_never_back(tmp_path: Path):
    score = tmp_path / "oom_score_adj"
    score.write_text("0\n")
    kernel_kills.be_ended_first(score)
    assert int(score.read_text()) == 500
    score.write_text("900\n")
    kernel_kills.be_ended_first(score)
    assert int(score.read_text()) == 900
    kernel_kills.be_ended_first(tmp_path / "absent")
