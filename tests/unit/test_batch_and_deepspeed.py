"""What the training configuration decides elsewhere: the batch over the ranks, and the fields of DeepSpeed's JSON."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest

from latte_flow.training.configs.deepspeed import load_deepspeed_config, zero_settings
from latte_flow.training.configs.fields import TrainingConfig
from latte_flow.training.distributed.batch_layout import BatchLayout, make_batch_layout
from latte_flow.training.errors import UserError
from latte_flow.training.objectives.flow_matching import FlowMatching

REPOSITORY = Path(__file__).parents[2]


def checked_layout(config: TrainingConfig, num_groups: int, world_size: int = 1) -> BatchLayout:
    """Return the layout of a run of flow matching without sample grids, whose network has these groups."""
    layout = make_batch_layout(config, world_size=world_size, rank=0)
    with patch.object(config.sample, "every", 0):
        FlowMatching.check(config, SimpleNamespace(num_groups=num_groups), layout)
    return layout


def batch_config(**changes) -> TrainingConfig:
    return TrainingConfig(**({"global_batch_size": 64} | changes))


class TestBatchLayout:
    @pytest.mark.parametrize(
        ("world_size", "micro", "expected_micro", "accumulation"),
        [(1, None, 64, 1), (4, None, 16, 1), (2, 8, 8, 4), (1, 64, 64, 1), (8, 8, 8, 1)],
    )
    def test_micro_batches(self, world_size, micro, expected_micro, accumulation):
        layout = checked_layout(batch_config(micro_batch_size=micro), 4, world_size)
        assert (layout.micro_batch_size, layout.accumulation_steps) == (expected_micro, accumulation)

    @pytest.mark.parametrize(
        ("world_size", "micro", "num_groups", "message"),
        [
            (3, None, 4, r"global_batch_size: 64 is not a multiple of the 3 ranks"),
            (
                2,
                24,
                4,
                r"micro_batch_size: 24 on 2 ranks does not divide global_batch_size 64; accepted: divisors of 32",
            ),
            (2, 64, 4, r"micro_batch_size: 64 on 2 ranks"),
            (1, 0, 4, r"micro_batch_size: 0 on 1 ranks"),
            (1, -8, 4, r"micro_batch_size: -8 on 1 ranks"),
            (1, 2, 4, r"micro_batch_size: 2 .* is not a multiple of the 4 groups .*model.num_groups"),
            (32, None, 4, r"micro_batch_size: 2 .* is not a multiple of the 4 groups"),
            (1, 16, 7, r"is not a multiple of the 7 groups"),
            (128, None, 1, r"global_batch_size: 64 is not a multiple of the 128 ranks"),
        ],
    )
    def test_what_cannot_be_split_is_refused(self, world_size, micro, num_groups, message):
        with pytest.raises(UserError, match=message):
            checked_layout(batch_config(micro_batch_size=micro), num_groups, world_size)

    def test_every_group_on_every_sample_needs_no_multiple(self):
        config = batch_config(micro_batch_size=2, groups_per_sample="all")
        assert checked_layout(config, 4).accumulation_steps == 32


class TestDeepSpeedFile:
    LAYOUT = BatchLayout(64, 8, 2, 0)

    def load(self, folder: Path, content, **changes) -> dict:
        path = folder / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return load_deepspeed_config(batch_config(deepspeed=str(path), **changes), self.LAYOUT)

    @pytest.mark.parametrize("precision", ["bf16", "fp32"])
    @pytest.mark.parametrize("style", ["auto", "left out", "agreeing"])
    def test_fields_are_filled_from_the_run(self, tmp_path, style, precision):
        expected = {
            "train_batch_size": 64,
            "train_micro_batch_size_per_gpu": 8,
            "gradient_accumulation_steps": 4,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": precision == "bf16"},
        }
        auto = dict.fromkeys(expected, "auto") | {"bf16": {"enabled": "auto"}}
        content = {"auto": auto, "left out": {}, "agreeing": expected}[style] | {"zero_optimization": {"stage": 2}}
        result = self.load(tmp_path, content, precision=precision)
        assert result == expected | {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}

    def test_other_fields_pass_unchanged(self, tmp_path):
        extra = {
            "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e7, "overlap_comm": True},
            "steps_per_print": 7,
        }
        result = self.load(tmp_path, extra)
        assert {name: result[name] for name in extra} == extra

    @pytest.mark.parametrize("stage", [2, 3])
    def test_auto_in_the_zero_section_is_deepspeeds_default(self, tmp_path, stage):
        names = ["reduce_bucket_size", "overlap_comm", "stage3_prefetch_bucket_size"]
        section = {
            "stage": stage,
            **dict.fromkeys(names, "auto"),
            "offload_optimizer": {"device": "cpu", "ratio": "auto"},
        }
        result = self.load(tmp_path, {"zero_optimization": section})
        assert result["zero_optimization"] == {"stage": stage, "offload_optimizer": {"device": "cpu"}}
        settings = zero_settings(result)
        assert (settings.reduce_bucket_size, settings.overlap_comm) == (500_000_000, stage == 3)

    @pytest.mark.parametrize("field", ["prescale_gradients", "data_types.grad_accum_dtype"])
    def test_auto_that_nothing_fills_is_refused(self, tmp_path, field):
        *sections, name = field.split(".")
        content = {name: "auto"}
        for section in sections:
            content = {section: content}
        with pytest.raises(UserError, match=rf'{field} to "auto"; accepted: a value, or no such field'):
            self.load(tmp_path, content | {"zero_optimization": {"stage": 2}})
        content = {"zero_optimization": {"stage": 2}, "data_types": {"keep_in_fp32_modules": "auto"}}
        assert self.load(tmp_path, content)["data_types"] == {"keep_in_fp32_modules": "auto"}  # DeepSpeed's own word

    @pytest.mark.parametrize(
        ("content", "field"),
        [
            ({"train_batch_size": 128}, "global_batch_size"),
            ({"train_micro_batch_size_per_gpu": 16}, "micro_batch_size"),
            ({"gradient_accumulation_steps": 1}, "global_batch_size"),
            ({"gradient_clipping": 0.5}, "optimizer.grad_clip"),
            ({"bf16": {"enabled": False}}, "precision"),
            ({"zero_allow_untested_optimizer": False}, "optimizer"),
        ],
    )
    def test_a_contradiction_names_the_field_and_the_file(self, tmp_path, content, field):
        with pytest.raises(UserError, match=rf"^{re.escape(field)}: .*ds.json"):
            self.load(tmp_path, content | {"zero_optimization": {"stage": 2}})

    @pytest.mark.parametrize("stage", [0, 4, "two", None, True, 2.0])
    def test_an_unsupported_stage_is_refused(self, tmp_path, stage):
        with pytest.raises(UserError, match=rf"zero_optimization.stage {stage}; accepted: 1, 2, 3"):
            self.load(tmp_path, {"zero_optimization": {"stage": stage}})

    def test_float32_gradients_are_refused_where_deepspeed_has_another_optimizer_for_them(self, tmp_path):
        content = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}
        with pytest.raises(UserError, match=r"data_types.grad_accum_dtype fp32 with .* 1, .*; accepted: stage 2 or 3"):
            self.load(tmp_path, content, precision="bf16")
        self.load(tmp_path, content, precision="fp32")

    @pytest.mark.parametrize(
        ("section", "name"), [("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")]
    )
    def test_what_finds_steps_that_are_not_finite_stays_on(self, tmp_path, section, name):
        content = {"zero_optimization": {"stage": 2}}
        content[section] = content.get(section, {}) | {name: False}
        with pytest.raises(UserError, match=rf"sets {section}.{name} to False; accepted: true"):
            self.load(tmp_path, content)

    @pytest.mark.parametrize("section", ["optimizer", "scheduler", "fp16"])
    def test_what_the_trainer_brings_itself_is_refused(self, tmp_path, section):
        with pytest.raises(UserError, match=f"has '{section}'"):
            self.load(tmp_path, {section: {}, "zero_optimization": {"stage": 2}})

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "not valid JSON"),
            ("[1]", "holds a list; accepted: a JSON object"),
            ("3", "holds a int"),
            ({"bf16": True}, "bf16"),
            ({"bf16": "auto"}, "bf16"),
            ({"zero_optimization": 2}, "zero_optimization"),
            ("[" * 100_000, "not valid JSON"),
            (
                {"zero_optimization": {"stage": 2, "reduce_buket_size": 5}},
                "DeepSpeed rejects .*: .*reduce_buket_size",
            ),
            (
                {"zero_optimization": {"stage": 2, "reduce_bucket_size": "large"}},
                "DeepSpeed rejects .* reduce_bucket_size",
            ),
            ({"zero_optimization": {"stage": 2}, "steps_per_print": []}, "steps_per_print"),
            (
                {"zero_optimization": {"stage": 2}, "wall_clock_breakdown": 1},
                "wall_clock_breakdown to 1; accepted: bool",
            ),
        ],
    )
    def test_a_file_of_another_form_is_refused(self, tmp_path, content, message):
        with pytest.raises(UserError, match=rf"deepspeed: .*{message}"):
            self.load(tmp_path, content)

    def test_a_file_that_is_no_text_is_refused(self, tmp_path):
        (tmp_path / "ds.json").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UserError, match=r"deepspeed: .*not valid JSON"):
            load_deepspeed_config(batch_config(deepspeed=str(tmp_path / "ds.json")), self.LAYOUT)

    def test_a_missing_file_is_named(self):
        with pytest.raises(UserError, match=r"deepspeed: /nowhere/ds.json not found"):
            load_deepspeed_config(batch_config(deepspeed="/nowhere/ds.json"), self.LAYOUT)

    @pytest.mark.parametrize("file", sorted((REPOSITORY / "ds_configs").glob("*.json")), ids=lambda f: f.stem)
    def test_shipped_files_take_any_run(self, file):
        result = load_deepspeed_config(batch_config(deepspeed=str(file), precision="fp32"), self.LAYOUT)
        assert result["train_micro_batch_size_per_gpu"] == 8
        assert result["bf16"] == {"enabled": False}
        assert "auto" not in json.dumps(result)
