"""Metrics: means against NumPy, lines that a resumed run keeps, and what TensorBoard reads."""

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from latte_flow.training.monitor.metrics import LossMeter, MetricsWriter
from latte_flow.training.objectives.flow_matching import FlowMatching, loss_columns, loss_names

CPU = torch.device("cpu")


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class GroupMeter(LossMeter):
    """The meter of flow matching: all losses under ``loss``, and each under its group and its bin of tau."""

    def __init__(self, num_groups: int, bins: int):
        super().__init__(["loss", *loss_names(num_groups, bins)], CPU)
        self.partition = num_groups, bins

    def add(self, losses: torch.Tensor, groups: torch.Tensor, taus: torch.Tensor) -> None:
        own = torch.zeros_like(groups)[None]
        self.update(losses, torch.cat([own, 1 + loss_columns(groups, taus, *self.partition)]))


class TestLossMeter:
    SAMPLES = st.lists(
        st.tuples(st.floats(0, 10, width=32), st.integers(0, 3), st.floats(0, 1000, width=32)), min_size=1, max_size=30
    )

    @given(SAMPLES, st.integers(1, 12), st.integers(1, 30))
    def test_means_are_numpys(self, samples, bins, cut):
        """Over all, per group and per bin of tau; fed in any two pieces."""
        losses, groups, taus = (np.array(column) for column in zip(*samples, strict=True))
        meter = GroupMeter(4, bins)
        for part in (slice(0, cut), slice(cut, None)):
            loss, group, tau = (torch.from_numpy(x[part]) for x in (losses, groups, taus))
            meter.add(loss.float(), group, tau.float())
        metrics = meter.compute()
        assert metrics.pop("loss") == pytest.approx(losses.mean(), rel=1e-6, abs=1e-9)
        expected = {f"loss_group_{g}": losses[groups == g].mean() for g in set(groups.tolist())}
        edges = np.linspace(0, 1000, bins + 1)
        for i in range(bins):
            last = i == bins - 1
            # the float32 quotient decides at an edge: leave samples within rounding of one out of the comparison
            near = np.abs(taus[:, None] - edges[None, 1:-1]).min(axis=1, initial=np.inf) < 1e-3
            inside = (taus >= edges[i]) & ((taus <= edges[i + 1]) if last else (taus < edges[i + 1]))
            if not near.any() and inside.any():
                expected[f"loss_tau_{round(edges[i]):04d}_{round(edges[i + 1]):04d}"] = losses[inside].mean()
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
        assert {name for name in metrics if name.startswith("loss_group")} == {
            name for name in expected if name.startswith("loss_group")
        }

    def test_bins_by_hand(self):
        """Four bins: 0-250, 250-500, 500-750, 750-1000, the last with its end."""
        meter = GroupMeter(2, 4)
        taus = torch.tensor([0.0, 249.0, 250.0, 999.0, 1000.0])
        meter.add(torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0]), torch.tensor([1, 1, 1, 0, 0]), taus)
        assert meter.compute() == {
            "loss": 5.0,
            "loss_group_0": 8.0,
            "loss_group_1": 3.0,
            "loss_tau_0000_0250": 2.0,
            "loss_tau_0250_0500": 5.0,
            "loss_tau_0750_1000": 8.0,
        }

    def test_starts_again_after_a_report(self):
        meter = GroupMeter(1, 1)
        meter.add(torch.tensor([100.0]), torch.tensor([0]), torch.tensor([5.0]))
        meter.compute()
        meter.add(torch.tensor([2.0]), torch.tensor([0]), torch.tensor([5.0]))
        assert meter.compute()["loss"] == 2.0

    def test_holds_no_graph(self):
        meter = GroupMeter(1, 1)
        meter.add(torch.ones(1, requires_grad=True) * 2, torch.tensor([0]), torch.tensor([5.0]))
        assert not meter.totals.requires_grad

    def test_many_small_losses_do_not_vanish(self):
        """In float32 a sum of 2^24 would swallow ones."""
        meter = GroupMeter(1, 1)
        meter.add(torch.tensor([2.0**24]), torch.tensor([0]), torch.tensor([5.0]))
        for _ in range(100):
            meter.add(torch.tensor([1.0]), torch.tensor([0]), torch.tensor([5.0]))
        assert meter.compute()["loss"] == (2**24 + 100) / 101

    def test_saved_and_loaded_in_between_it_reports_the_same(self, one_rank):
        """Through JSON's numbers, as in a checkpoint."""
        meters = [GroupMeter(2, 3), GroupMeter(2, 3)]
        batches = [(torch.rand(5), torch.randint(2, (5,)), torch.rand(5) * 1000) for _ in range(2)]
        for meter in meters:
            meter.add(*batches[0])
        resumed = GroupMeter(2, 3)
        resumed.load_state_dict(json.loads(json.dumps(meters[1].state_dict())))
        for meter in (meters[0], resumed):
            meter.add(*batches[1])
        assert meters[0].compute() == resumed.compute()

    def test_sums_of_more_ranks_are_added(self, one_rank):
        """Saved by two ranks, resumed by one."""
        parts = [GroupMeter(1, 1) for _ in range(2)]
        for meter, loss in zip(parts, (1.0, 4.0), strict=True):
            meter.add(torch.tensor([loss]), torch.tensor([0]), torch.tensor([5.0]))
        resumed = GroupMeter(1, 1)
        states = [meter.state_dict() for meter in parts]
        resumed.load_state_dict(states[0] | {"totals": [total for state in states for total in state["totals"]]})
        assert resumed.compute()["loss"] == 2.5

    def test_other_bins_keep_what_still_fits_and_print_what_does_not(self, one_rank, capsys):
        """logging.timestep_bins may change on resume, in the middle of a logged interval; of two bins the second is filled."""
        saved, resumed = GroupMeter(2, 2), GroupMeter(2, 5)
        saved.add(torch.tensor([1.0, 4.0]), torch.tensor([0, 1]), torch.tensor([700.0, 900.0]))
        resumed.load_state_dict(json.loads(json.dumps(saved.state_dict())))
        assert "metrics: loss_tau_0500_1000 since the last logged step" in capsys.readouterr().out
        resumed.add(torch.tensor([7.0]), torch.tensor([1]), torch.tensor([950.0]))
        expected = {"loss": 4.0, "loss_group_0": 1.0, "loss_group_1": 5.5, "loss_tau_0800_1000": 7.0}
        assert resumed.compute() == expected

    def test_sums_of_an_older_version_are_not_dropped_silently(self, one_rank, capsys):
        meter = GroupMeter(1, 1)
        meter.load_state_dict([[[0.0, 0.0], [0.0, 0.0]]])
        assert capsys.readouterr().out == ""  # there was nothing to lose
        meter.load_state_dict([[[2.5, 2.5], [1.0, 1.0]]])
        assert "have no names and are dropped" in capsys.readouterr().out
        assert meter.compute() == {}


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def write_run(folder, first: int, last: int, resumed_step: int = 0, **extra) -> None:
    writer = MetricsWriter(folder, resumed_step)
    for step in range(first, last + 1):
        writer.scalars(step, {"loss": 1.0 / step, **extra})


class TestMetricsWriter:
    def test_one_json_object_a_logged_step(self, tmp_path):
        write_run(tmp_path, 1, 3, lr=0.5)
        assert lines(tmp_path) == [{"step": s, "loss": 1.0 / s, "lr": 0.5} for s in (1, 2, 3)]

    def test_a_resumed_run_drops_what_it_will_log_again(self, tmp_path):
        write_run(tmp_path, 1, 9, run=1)
        write_run(tmp_path, 6, 7, resumed_step=5, run=2)
        assert [(line["step"], line["run"]) for line in lines(tmp_path)] == [
            *((s, 1) for s in range(1, 6)), (6, 2), (7, 2)
        ]  # fmt: skip

    def test_a_line_that_a_kill_cut_off_is_dropped(self, tmp_path):
        write_run(tmp_path, 1, 3)
        content = (tmp_path / "metrics.jsonl").read_text()
        for cut in range(1, len(content.splitlines()[-1]) + 1):
            (tmp_path / "metrics.jsonl").write_text(content[:-cut])
            MetricsWriter(tmp_path, 3)
            assert [line["step"] for line in lines(tmp_path)] == [1, 2]

    @pytest.mark.parametrize("damage", [b"\xff\xfe", b"{}", b"[1]", b'{"step": "2"}', b"no JSON"])
    def test_a_damaged_line_is_left_out_and_said(self, tmp_path, capsys, damage):
        write_run(tmp_path, 1, 3)
        file = tmp_path / "metrics.jsonl"
        first, _, third = file.read_bytes().splitlines()
        file.write_bytes(b"\n".join([first, damage, third, b""]))
        MetricsWriter(tmp_path, 3)
        assert [line["step"] for line in lines(tmp_path)] == [1, 3]
        assert f"{file}: a damaged line is dropped" in capsys.readouterr().out

    def test_numbers_that_are_not_finite_become_null_and_lists_stay_out_of_tensorboard(self, tmp_path):
        writer = MetricsWriter(tmp_path, 0)
        writer.scalars(1, {"loss": float("nan"), "grad_norm": float("inf"), "skipped": [{"step": 1}], "lr": 1.0})
        assert lines(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "skipped": [{"step": 1}], "lr": 1.0}]

    def test_a_new_run_without_a_checkpoint_starts_a_new_file(self, tmp_path):
        write_run(tmp_path, 1, 3)
        write_run(tmp_path, 1, 1)
        assert [line["step"] for line in lines(tmp_path)] == [1]

    def test_tensorboard_reads_every_number_under_its_card(self, tmp_path):
        writer = MetricsWriter(tmp_path, 0, FlowMatching.cards)
        metrics = {
            "loss": 2.0,
            "loss_group_1": 3.0,
            "loss_tau_0000_0250": 4.0,
            "grad_norm": 5.0,
            "grad_norm_image_io": 6.0,
            "samples_per_second": 7.0,
        }
        writer.scalars(10, metrics)
        gates = {"gate/layer_01": torch.full((3, 2), 0.5), "gate/layer_12": torch.tensor([[-1.0, 0.0]])}
        writer.distributions(10, gates)
        writer.grid(10, np.zeros((4, 6), dtype=np.uint8))
        writer.grid(11, np.zeros((4, 6, 3), dtype=np.uint8))
        writer.text("config", "a: 1\nb: 2")

        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        tags = events.Tags()
        expected = {
            "train/loss": 2.0,
            "loss_per_group/1": 3.0,
            "loss_per_timestep/0000_0250": 4.0,
            "train/grad_norm": 5.0,
            "grad_norm_per_group/image_io": 6.0,
            "train/samples_per_second": 7.0,
            "gate_mean/layer_01": 0.5,
            "gate_mean/layer_12": -0.5,
        }
        assert {tag: events.Scalars(tag)[0].value for tag in tags["scalars"]} == expected
        assert {events.Scalars(tag)[0].step for tag in tags["scalars"]} == {10}
        assert sorted(tags["histograms"]) == ["gate/layer_01", "gate/layer_12"]
        assert events.Histograms("gate/layer_01")[0].histogram_value.num == 6
        assert tags["images"] == ["samples"]
        assert [(image.step, image.height, image.width) for image in events.Images("samples")] == [
            (10, 4, 6),
            (11, 4, 6),
        ]
        (text,) = (tag for tag in tags["tensors"] if tag.startswith("config"))
        assert b"    a: 1\n    b: 2" in events.Tensors(text)[0].tensor_proto.string_val[0]

    def test_tensorboard_shows_a_resumed_step_once(self, tmp_path):
        write_run(tmp_path, 1, 9, run=1)
        write_run(tmp_path, 6, 7, resumed_step=5, run=2)
        events = EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert [(e.step, e.value) for e in events.Scalars("train/run")] == [
            *((s, 1.0) for s in range(1, 6)), (6, 2.0), (7, 2.0)
        ]  # fmt: skip
