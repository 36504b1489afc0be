"""The fault campaign's plan depends on its seed alone, and its judge sees every kind of damage."""

import json
from dataclasses import replace

import pytest

from latte_flow.tools.fault_campaign import claim_folder, earlier_result, main, training_arguments
from latte_flow.tools.faults.campaign import Result, Start
from latte_flow.tools.faults.inspection import VALID, checkpoint_states, damage, left_behind, newest_valid, resumed_from
from latte_flow.tools.faults.moments import LAUNCH, REMOVAL, RESUME, saved_step
from latte_flow.tools.faults.plan import (
    ALL_RANKS,
    DAMAGES,
    KILL_MOMENTS,
    LEAVES,
    SIGNAL_MOMENTS,
    STOPS,
    VICTIMS,
    Case,
    Fault,
    Schedule,
    kill_cases,
    signal_cases,
)
from latte_flow.tools.faults.tables import kill_table, one_line, signal_table
from latte_flow.training.configs.parser import parse_config
from latte_flow.training.errors import UserError
from tests.unit.test_checkpoint_files import CONTENTS, write_checkpoint

SCHEDULE = Schedule(max_steps=12, save_every=3, grid_every=3, keep_last=2, batch=64)


def kills(seed=0, runs=60, kills_per_run=1, schedule=SCHEDULE):
    return kill_cases(schedule, seed=seed, runs=runs, kills_per_run=kills_per_run, ranks=2)


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
        with pytest.raises(UserError, match=r"kills_per_run: got \d; accepted: 1 to 4"):
            kills(kills_per_run=number)

    def test_moments_that_never_come_are_not_drawn(self):
        schedule = replace(SCHEDULE, grid_every=0, keep_last=0)
        drawn = {fault.moment for case in kills(schedule=schedule) for fault in case.faults}
        assert not drawn & {"drawing the grid", REMOVAL}

    def test_each_signal_comes_in_each_moment_and_before_the_end(self):
        cases = signal_cases(SCHEDULE, ranks=2)
        pairs = [(case.faults[0].action, case.faults[0].moment) for case in cases]
        assert sorted(pairs) == sorted((s, m) for s in (*STOPS, *LEAVES) for m in SIGNAL_MOMENTS)
        assert all(case.faults[0].step < SCHEDULE.max_steps - 1 for case in cases)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ("--checkpoint.every 5", "checkpoint.every: got 5 with max_steps 12"),
            ("--checkpoint.every 2", "checkpoint.every: got 2 with max_steps 12"),
            ("--max_steps 9", "checkpoint.every: got 3 with max_steps 9"),
            ("--logging.every 2", "logging.every: got 2; accepted: 1"),
        ],
    )
    def test_a_training_without_room_for_faults_is_refused(self, fields, message):
        with pytest.raises(UserError, match=message):
            Schedule.of(parse_config(training_arguments(fields.split())))

    def test_the_default_training_has_room(self):
        assert Schedule.of(parse_config(training_arguments([]))) == SCHEDULE


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
        ("path", "step"),
        [
            ("runs/x/checkpoints/step_0000006.partial/mp_rank_00_model_states.pt", 6),
            ("runs/x/checkpoints/step_0000012", 12),
            ("runs/step_0000003/metrics.jsonl", 0),
        ],
    )
    def test_which_step_a_path_belongs_to(self, path, step):
        assert saved_step(path) == step


def result_of(action: str, moment: str, **second) -> Result:
    first = Start(Fault(action, moment, 6), before={}, after={"step_0000003": VALID, "step_0000006.partial": "partial"})
    then = Start(None, before=first.after, exit_code=0, **second)
    return Result(Case(0, (first.fault,)), [first, then], {"weights": True, "metrics": True, "grids": True})


class TestReport:
    def test_a_result_is_read_as_it_was_written(self):
        result = result_of(ALL_RANKS, "save: before latest", resumed_from="step_0000003")
        assert Result.from_json(result.to_json()) == result

    def test_a_torn_checkpoint_that_was_accepted_is_counted(self):
        good = result_of(ALL_RANKS, "save: before latest", resumed_from="step_0000003")
        assert kill_table([good]).splitlines()[-1] == "| **all** |  | 1 | 1 | 0 | 0 | 1 | 1 | 0 |"
        bad = result_of(ALL_RANKS, "save: before latest", resumed_from="step_0000006.partial", resumed_wrong=True)
        assert kill_table([good, bad]).splitlines()[-1] == "| **all** |  | 2 | 2 | 0 | 1 | 1 | 2 | 0 |"

    def test_a_broken_promise_is_told(self):
        result = result_of(STOPS[0], SIGNAL_MOMENTS[0], resumed_from="step_0000003")
        result.problems = ["no file requeue"]
        assert one_line(result).startswith("BROKEN SIGTERM to all: save: a shard half written 6 -> no file requeue")
        assert "no file requeue" in signal_table([result])

    def test_an_interrupted_campaign_goes_on_with_the_results_of_its_own_plan(self, tmp_path):
        result = result_of(ALL_RANKS, LAUNCH)
        assert earlier_result(tmp_path, result.case) is None
        (tmp_path / "run_000").mkdir()
        (tmp_path / "run_000" / "result.json").write_text(result.to_json())
        assert earlier_result(tmp_path, result.case) == result
        assert earlier_result(tmp_path, Case(0, (Fault(ALL_RANKS, LAUNCH, 0, rank=1),))) is None


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ("--runs 0", "runs: got 0; accepted: 1 or more"),
            ("--ranks 0", "ranks: got 0; accepted: 1 or more"),
            ("--kills_per_run 9", "kills_per_run: got 9; accepted: 1 to 4"),
            ("--only 60", "only: got 60; accepted: 0 to 59"),
            ("-- --output_dir x", "output_dir: is set by the campaign"),
            ("-- --data.num_workers=2", "data.num_workers: is set by the campaign"),
            ("-- --logging.every 4", "logging.every: got 4"),
        ],
    )
    def test_a_wrong_value_is_named(self, tmp_path, monkeypatch, arguments, message):
        output = tmp_path / "campaign"
        monkeypatch.setattr("sys.argv", ["fault_campaign.py", "kill", "--output", str(output), *arguments.split()])
        with pytest.raises(UserError, match=message):
            main()
        assert not output.exists()

    def test_a_folder_of_something_else_is_refused(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(UserError, match="exists and is no campaign's"):
            claim_folder(tmp_path, {"seed": 0})

    def test_a_folder_of_another_campaign_is_refused(self, tmp_path):
        claim_folder(tmp_path / "new", {"seed": 0})
        claim_folder(tmp_path / "new", {"seed": 0})
        assert json.loads((tmp_path / "new" / "campaign.json").read_text()) == {"seed": 0}
        with pytest.raises(UserError, match="holds another campaign"):
            claim_folder(tmp_path / "new", {"seed": 1})
