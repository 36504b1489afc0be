"""The fault campaign's plan depends on its seed alone, and its judge sees every kind of damage."""

from dataclasses import replace

import pytest

from latte_flow.training.configs.parser import parse_config
from tests.faults.campaign import Start, stopped_between, training_arguments
from tests.faults.inspection import VALID, checkpoint_states, damage, left_behind, newest_valid, resumed_from
from tests.faults.moments import REMOVAL, RESUME, STEP, saved_step
from tests.faults.plan import (
    ALL_RANKS,
    DAMAGES,
    KILL_MOMENTS,
    LAUNCHER,
    LEAVES,
    SIGNAL_MOMENTS,
    STOPS,
    TERM,
    VICTIMS,
    Fault,
    Schedule,
    kill_cases,
    signal_cases,
)
from tests.unit.test_checkpoint_files import CONTENTS, write_checkpoint

SCHEDULE = Schedule(max_steps=12, save_every=3, grid_every=3, keep_last=2, batch=64)


def kills(seed=0, runs=60, kills_per_run=1, schedule=SCHEDULE):
    return kill_cases(schedule, seed=seed, runs=runs, kills_per_run=kills_per_run)


class TestPlan:
    def test_depends_on_the_seed_alone(self):
        assert kills() == kills()
        assert kills(seed=1) != kills()

    def test_a_longer_campaign_begins_with_the_shorter_one(self):
        assert kills(runs=60)[:17] == kills(runs=17)

    def test_sixty_runs_put_each_victim_into_each_moment(self):
        pairs = [(case.faults[-1].action, case.faults[-1].moment) for case in kills()]
        assert set(pairs) == {(victim, moment) for victim in VICTIMS for moment in KILL_MOMENTS}

    def test_only_a_kill_while_resuming_has_another_before_it(self):
        for case in kills():
            first, *more = case.faults
            assert bool(more) == (case.faults[-1].moment == RESUME)
            assert not more or (first.action == ALL_RANKS and first.step > SCHEDULE.save_every)

    @pytest.mark.parametrize("number", [2, 3, 4])
    def test_the_kills_of_one_run_lie_in_growing_intervals(self, number):
        for case in kills(runs=20, kills_per_run=number):
            own = [
                f for f, g in zip(case.faults, (*case.faults[1:], None), strict=True) if not (g and g.moment == RESUME)
            ]
            intervals = [(max(fault.step, 1) - 1) // SCHEDULE.save_every for fault in own]
            assert len(own) == number
            assert intervals == sorted(set(intervals))

    @pytest.mark.parametrize("number", [0, 5])
    def test_a_run_has_a_checkpoint_for_each_kill(self, number):
        with pytest.raises(ValueError, match=r"kills_per_run: got \d; accepted: 1 to 4"):
            kills(kills_per_run=number)

    def test_moments_that_never_come_are_not_drawn(self):
        schedule = replace(SCHEDULE, grid_every=0, keep_last=0)
        drawn = {fault.moment for case in kills(schedule=schedule) for fault in case.faults}
        assert not drawn & {"drawing the grid", REMOVAL}

    def test_each_signal_comes_in_each_moment_and_before_the_end(self):
        cases = signal_cases(SCHEDULE)
        pairs = [(case.faults[0].action, case.faults[0].moment) for case in cases]
        assert sorted(pairs) == sorted((s, m) for s in (*STOPS, *LEAVES) for m in SIGNAL_MOMENTS)
        assert all(case.faults[0].step < SCHEDULE.max_steps - 1 for case in cases)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"checkpoint.every": 5}, "checkpoint.every: got 5 with max_steps 12"),
            ({"checkpoint.every": 2}, "checkpoint.every: got 2 with max_steps 12"),
            ({"max_steps": 9}, "checkpoint.every: got 3 with max_steps 9"),
            ({"logging.every": 2}, "logging.every: got 2; accepted: 1"),
        ],
    )
    def test_a_training_without_room_for_faults_is_refused(self, fields, message):
        with pytest.raises(ValueError, match=message):
            Schedule.of(parse_config(training_arguments(fields)))

    def test_the_default_training_has_room(self):
        assert Schedule.of(parse_config(training_arguments())) == SCHEDULE


class TestJudge:
    def test_whole_partial_and_torn_folders(self, tmp_path):
        for step in (3, 6, 9, 12):
            write_checkpoint(tmp_path, step)
        folder = tmp_path / "checkpoints"
        (folder / "step_0000012").rename(folder / "step_0000012.partial")
        (folder / "step_0000009" / "manifest.json").unlink()
        assert checkpoint_states(tmp_path) == {
            "step_0000003": VALID,
            "step_0000006": VALID,
            "step_0000009": "no manifest",
            "step_0000012.partial": "partial",
        }
        assert newest_valid(checkpoint_states(tmp_path)) == "step_0000006"

    @pytest.mark.parametrize("kind", DAMAGES)
    @pytest.mark.parametrize("which", [0.0, 0.5, 0.99])
    def test_every_damage_is_seen(self, tmp_path, kind, which):
        contents = {name: content for name, content in CONTENTS.items() if content}
        folder = write_checkpoint(tmp_path, 3, contents)
        name = damage(folder, kind, which)
        assert name in contents
        assert name in checkpoint_states(tmp_path)["step_0000003"]
        assert newest_valid(checkpoint_states(tmp_path)) is None

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"files": {}}', '{"files": {"a": {"bytes": 1}}}'])
    def test_a_torn_manifest_is_not_valid(self, tmp_path, text):
        (write_checkpoint(tmp_path, 3) / "manifest.json").write_text(text)
        assert "manifest" in checkpoint_states(tmp_path)["step_0000003"]

    def test_the_newest_is_that_of_the_highest_step(self):
        assert newest_valid({"step_9999999": VALID, "step_10000000": VALID}) == "step_10000000"

    def test_what_a_start_says_it_went_on_from(self, tmp_path):
        log = tmp_path / "log"
        log.write_text("noise\nresumed from /some/run/checkpoints/step_0000006\nmore\n")
        assert resumed_from(log) == "step_0000006"
        log.write_text("nothing of the kind")
        assert resumed_from(log) is None

    def test_what_is_left_over(self, tmp_path):
        for run in ("ours", "reference"):
            write_checkpoint(tmp_path / run, 6)
            (tmp_path / run / "checkpoints" / "latest").write_text("step_0000006")
        assert left_behind(tmp_path / "ours", tmp_path / "reference") == []
        write_checkpoint(tmp_path / "ours", 3)
        (tmp_path / "ours" / "checkpoints" / "latest").write_text("step_0000003")
        assert left_behind(tmp_path / "ours", tmp_path / "reference") == ["step_0000003", "latest: step_0000003"]

    @pytest.mark.parametrize(
        ("action", "step", "between"),
        [(LAUNCHER, 10, True), (TERM, 11, True), (TERM, 9, False), (ALL_RANKS, 10, False)],
    )
    def test_only_who_is_asked_to_stop_may_leave_another_steps_checkpoint(self, action, step, between):
        start = Start(Fault(action, STEP, 10), before={}, stopped_at=step)
        assert stopped_between(start, save_every=3) is between

    @pytest.mark.parametrize(
        ("path", "step"),
        [
            ("runs/x/checkpoints/step_0000006.partial/mp_rank_00_model_states.pt", 6),
            ("runs/x/checkpoints/step_0000012", 12),
            ("runs/step_0000003/metrics.jsonl", 0),
        ],
    )
    def test_which_step_a_path_belongs_to(self, path, step):
        assert saved_step(path) == step
