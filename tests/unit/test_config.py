"""The training configuration: what wins, what is refused, and the messages, what a file keeps."""

import contextlib
import copy
import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import latte_flow.training.configs.fields
from latte_flow.model.configuration import LatteFlowConfig
from latte_flow.training.configs.checked import from_values
from latte_flow.training.configs.deepspeed import load_deepspeed_config
from latte_flow.training.configs.fields import (
    Assumptions,
    DataConfig,
    HealthConfig,
    NetworkConfig,
    OptimizerConfig,
    TinyVlmConfig,
    TrainingConfig,
)
from latte_flow.training.configs.parser import DEFAULT_CONFIG, make_parser, parse_config
from latte_flow.training.configs.saved import differences, load_config, save_config, to_yaml
from latte_flow.training.distributed.batch_layout import BatchLayout
from latte_flow.training.errors import UserError
from latte_flow.training.objectives.base import find_objectives
from tests.unit.test_batch_and_deepspeed import checked_layout

PRESETS = sorted(Path(latte_flow.training.configs.fields.__file__).parent.glob("*.yaml"))
REPOSITORY = Path(latte_flow.training.configs.fields.__file__).parents[2]


def leaves(tree, prefix=()):
    """(path, value) of everything in a tree of dicts that is not a dict."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*prefix, key))
        else:
            yield (*prefix, key), value


FIELDS = dict(leaves(yaml.safe_load(to_yaml(parse_config([])))))
"""Path of every field -> its value in the default preset."""


def with_value(tree: dict, path: tuple[str, ...], value) -> dict:
    """A copy of a tree of dicts with one value set."""
    tree = copy.deepcopy(tree)
    section = tree
    for key in path[:-1]:
        section = section.setdefault(key, {})
    section[path[-1]] = value
    return tree


def write(folder: Path, content) -> str:
    path = folder / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(path)


class TestPrecedence:
    def test_file_over_defaults_and_command_line_over_file(self, tmp_path):
        file = write(tmp_path, {"seed": 7, "optimizer": {"lr": 0.25, "warmup_steps": 3}, "model": {"num_groups": 2}})
        config = parse_config(["--config", file, "--optimizer.lr", "0.125", "--model.modulation", "six"])
        assert (config.seed, config.optimizer.lr, config.optimizer.warmup_steps) == (7, 0.125, 3)
        assert (config.model.num_groups, config.model.modulation) == (2, "six")
        assert config.optimizer.betas == (0.9, 0.95)  # neither says

    @pytest.mark.parametrize("form", [["--config", "{}"], ["--config={}"]])
    def test_the_command_line_wins_also_in_front_of_the_file(self, tmp_path, form):
        """The documented command names --deepspeed before --config."""
        file = write(tmp_path, {"deepspeed": "from_file.json", "seed": 7})
        config = parse_config(["--deepspeed", "mine.json", *(part.format(file) for part in form), "--max_steps", "3"])
        assert (config.deepspeed, config.seed, config.max_steps) == ("mine.json", 7, 3)

    def test_without_a_file_the_digits_preset_is_the_start(self):
        assert parse_config([]) == parse_config(["--config", str(DEFAULT_CONFIG)])
        config = parse_config(["--max_steps", "3"])
        assert (config.max_steps, config.data.dataset, config.output_dir) == (3, "digits", "runs/digits")

    def test_a_file_replaces_the_digits_preset(self, tmp_path):
        assert parse_config(["--config", write(tmp_path, {"seed": 1})]).output_dir == TrainingConfig().output_dir

    def test_the_launchers_rank_is_accepted(self):
        assert parse_config(["--local_rank=1"]) == parse_config([])

    def test_defaults_are_the_papers_recipe(self):
        """paper.md section 6."""
        config = TrainingConfig()
        assert (config.global_batch_size, config.optimizer.lr, config.max_steps) == (2048, 5e-4, 240_000)
        assert (config.data.condition_drop, config.data.resolution, config.codec.kind) == (0.1, 256, "dc-ae")
        assert (config.optimizer.betas, config.optimizer.weight_decay) == ((0.9, 0.95), 0.01)
        assert (config.optimizer.grad_clip, config.optimizer.warmup_steps, config.optimizer.ema_decay) == (
            1,
            1000,
            0.9999,
        )
        assert (config.sample.num_steps, config.sample.cfg_scale, config.sample.solver) == (40, 5.0, "euler")


class TestBuiltInPython:
    """A dataclass checks itself, whoever builds it."""

    @pytest.mark.parametrize(
        ("build", "message"),
        [
            (lambda: TrainingConfig(max_steps=0), "max_steps: got 0; accepted: greater than 0"),
            (lambda: TrainingConfig(tensor_parallel=0), "tensor_parallel: got 0; accepted: greater than 0"),
            (lambda: TrainingConfig(seed=2**64), "seed: got an integer of 65 bits; accepted: less than 18446744073709551616"),
            (lambda: TrainingConfig(output_dir="a\0b"), "output_dir: got 'a\\x00b'; accepted: a path"),
            (lambda: DataConfig(resolution=0), "resolution: got 0; accepted: greater than 0"),
            (lambda: OptimizerConfig(betas=(0.9, 1.0)), "betas[1]: got 1.0; accepted: 0 to less than 1"),
            (lambda: HealthConfig(hang_minutes=1e6), "hang_minutes: got 1000000.0; accepted: less than or equal to 525600"),
            (lambda: TinyVlmConfig(hidden_size=24), "hidden_size: got 24; accepted: multiples of 4 x num_attention_heads 4"),
            (lambda: TinyVlmConfig(num_key_value_heads=3), "num_key_value_heads: got 3; accepted: divisors of"),
            (lambda: Assumptions(gpus=0), "gpus: got 0; accepted: greater than 0"),
        ],
    )  # fmt: skip
    def test_a_value_out_of_range_is_refused(self, build, message):
        with pytest.raises(UserError, match=f"^{re.escape(message)}"):
            build()

    def test_the_networks_fields_are_those_of_its_configuration(self):
        """Names, order and defaults; vlm_config and the latent's shape are decided by the VLM and the codec."""
        parameters = inspect.signature(LatteFlowConfig.__init__).parameters.values()
        derived = ("latent_channels", "latent_size")
        theirs = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in derived}
        ours = dataclasses.asdict(NetworkConfig())
        assert list(ours) == list(theirs)
        assert ours == theirs | {"shared_modules": list(theirs["shared_modules"])}


class TestFoundByName:
    @pytest.mark.parametrize("name", ["digits", "training/configs/digits.yaml"])
    def test_a_preset_outside_a_checkout(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        assert parse_config(["--config", name]) == parse_config([])

    @pytest.mark.parametrize("name", ["zero3", "zero3.json", "ds_configs/zero3.json"])
    def test_a_deepspeed_file_outside_a_checkout(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        config = parse_config(["--deepspeed", name])
        assert load_deepspeed_config(config, BatchLayout(256, 256, 1, 0))["zero_optimization"]["stage"] == 3
        assert config.deepspeed == name  # config.yaml keeps what was given

    def test_a_file_that_is_there_wins(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "digits").write_text("seed: 7")
        assert parse_config(["--config", "digits"]).seed == 7

    def test_an_unknown_name_lists_the_known_ones(self):
        with pytest.raises(
            UserError, match=r"^config: nowhere not found; accepted: .* blend_imagenet256\.yaml, .*digits\.yaml"
        ):
            parse_config(["--config", "nowhere"])
        config = TrainingConfig(deepspeed="zero9")
        with pytest.raises(
            UserError,
            match=r"^deepspeed: zero9 not found; .* zero1\.json, zero2\.json, zero2_offload\.json, zero3\.json$",
        ):
            load_deepspeed_config(config, BatchLayout(2048, 2048, 1, 0))


class TestHelp:
    def test_every_field_has_a_meaning(self, monkeypatch):
        monkeypatch.setenv("COLUMNS", "2000")  # an entry a line
        text = make_parser().format_help()
        for path in FIELDS:
            name = ".".join(path[:1] if path[0] == "objectives" else path)
            option = rf"^  --{re.escape(name)} .*?(\n {{20,}}| {{2,}})"
            assert re.search(option + r"[\w`].* \(type: .*, default: .*\)$", text, re.MULTILINE), path

    def test_the_defaults_are_those_of_a_bare_run(self):
        defaults = make_parser().get_defaults().as_dict()
        fields = {f.name: defaults[f.name] for f in dataclasses.fields(TrainingConfig)}
        assert from_values(TrainingConfig, fields) == parse_config([])


class TestErrors:
    @pytest.mark.parametrize("field", ["lr", "optimizer.rate", "model.depth", "model.vlm_config", "vlm.tiny.x"])
    def test_an_unknown_field_is_named(self, tmp_path, field):
        with pytest.raises(UserError, match=re.escape(field)):
            parse_config([f"--{field}", "1"])
        tree = with_value({}, tuple(field.split(".")), 1)
        with pytest.raises(UserError, match=re.escape(field.split(".")[-1])):
            parse_config(["--config", write(tmp_path, tree)])

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("seed", "one"),
            ("max_steps", 1.5),
            ("optimizer.lr", "fast"),
            ("optimizer.betas", [0.9]),
            ("data.horizontal_flip", "perhaps"),
            ("data", [1]),
            ("precision", "fp16"),
            ("groups_per_sample", 2),
            ("sample.solver", "rk4"),
            ("codec.kind", "vae"),
            ("model.variant", "mixed"),
            ("model.num_groups", "four"),
            ("model.shared_modules", 3),
        ],
    )
    def test_a_value_of_the_wrong_type_names_the_field(self, tmp_path, field, value):
        with pytest.raises(UserError, match=re.escape(field)):
            parse_config(["--config", write(tmp_path, with_value({}, tuple(field.split(".")), value))])

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("max_steps", 0),
            ("global_batch_size", -2),
            ("checkpoint.every", 0),
            ("logging.every", 0),
            ("logging.timestep_bins", 0),
            ("data.resolution", 0),
            ("optimizer.lr", 0.0),
            ("optimizer.lr", float("nan")),
            ("optimizer.lr", float("inf")),
            ("optimizer.betas", [0.9, 1.0]),
            ("optimizer.betas", [-0.1, 0.9]),
            ("optimizer.ema_decay", 1.0),
            ("optimizer.ema_decay", float("nan")),
            ("optimizer.weight_decay", -0.1),
            ("optimizer.grad_clip", float("nan")),
            ("data.condition_drop", 1.0),
            ("data.num_workers", -1),
            ("sample.num_images", 0),
            ("sample.seed", 2**32),
            ("sample.cfg_scale", float("inf")),
            ("seed", -1),
            ("seed", 2**64),
            ("codec.patch", 0),
            ("max_steps", True),
            ("seed", "1"),
            ("vlm", None),
            ("model.num_groups", 0),
            ("model.rope_2d_theta", float("nan")),
            ("vlm.tiny.hidden_size", 0),
            ("vlm.tiny.initializer_range", 0.0),
        ],
    )
    def test_a_value_out_of_range_names_the_field(self, tmp_path, field, value):
        path = write(tmp_path, with_value({}, tuple(field.split(".")), value))
        with pytest.raises(UserError, match=rf"^{re.escape(field)}(\[\d\])?: got .*; accepted: "):
            parse_config(["--config", path])

    @pytest.mark.parametrize(
        "template", ["no blank", "{} and {}", "{name}", "{} {name}", "{0}", "{{}}", "{", "{} }", ""]
    )
    def test_a_prompt_template_has_one_blank(self, template):
        with pytest.raises(UserError, match=r"data.prompt_template: got .* exactly once"):
            parse_config([f"--data.prompt_template={template}"])

    def test_doubled_braces_in_a_prompt_template_are_braces(self):
        template = parse_config(["--data.prompt_template={{a}} {}"]).data.prompt_template
        assert template.format("cat") == "{a} cat"

    def test_a_list_is_given_as_a_whole(self):
        with pytest.raises(UserError, match=r"--model\.shared_modules\+=mlp: accepted: the whole list"):
            parse_config(["--model.shared_modules+=mlp"])

    @pytest.mark.parametrize("value", ["5e-4", "5E-4", "0.5e-3", ".5e-3", "5.e-4", "0.0005", "+5e-4"])
    def test_a_number_with_an_exponent_is_one(self, tmp_path, value):
        assert parse_config(["--config", write(tmp_path, f"optimizer: {{lr: {value}}}")]).optimizer.lr == 5e-4

    def test_a_second_file_changes_single_fields_of_the_first(self, tmp_path):
        (tmp_path / "second.yaml").write_text("optimizer: {lr: 0.5}")
        first = write(tmp_path, {"optimizer": {"lr": 0.25, "warmup_steps": 3}})
        config = parse_config(["--config", first, "--config", str(tmp_path / "second.yaml")])
        assert (config.optimizer.lr, config.optimizer.warmup_steps) == (0.5, 3)

    def test_a_value_in_a_sections_place_stays_an_error_beside_the_sections_fields(self, tmp_path):
        with pytest.raises(UserError, match=r"^data: got 3; accepted: a mapping of its fields"):
            parse_config(["--config", write(tmp_path, "data: 3"), "--data.resolution", "8"])

    def test_a_missing_file_is_named(self):
        with pytest.raises(UserError, match=r"/nowhere/config.yaml"):
            parse_config(["--config", "/nowhere/config.yaml"])
        with pytest.raises(UserError, match=r"/nowhere/config.yaml: not found; accepted: the config.yaml"):
            load_config(Path("/nowhere/config.yaml"))

    @pytest.mark.parametrize(
        "content", ["{", "- 1\n- 2", "just text", "a: b: c", "\x00", "seed: [", "!!python/object:x {}"]
    )
    def test_a_file_that_is_no_configuration(self, tmp_path, content):
        with pytest.raises(UserError):
            parse_config(["--config", write(tmp_path, content)])

    def test_errors_are_one_line(self):
        for argv in (["--seed", "x"], ["--nope", "1"], ["--config", "/nowhere"], ["--model.variant", "mixed"]):
            with pytest.raises(UserError) as error:
                parse_config(argv)
            assert "\n" not in str(error.value)


# A parse takes 60 ms: a failing example is shown as found instead of being shrunk for minutes.
FILES = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "phases": [Phase.explicit, Phase.generate]}
JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.integers(), st.floats(), st.text(max_size=5),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


LOOKALIKES = ("null", "yes", "1e3", "0E0", "[1]", "{a: b}", "# no", " x ", "- 1", "07", "~", "a: b", "two\nlines", "")
"""Texts that another reader of YAML might take for something else."""


class TestFuzz:
    @pytest.mark.slow
    @settings(max_examples=50, **FILES)
    @given(data=st.data())
    def test_a_changed_preset_is_a_configuration_or_a_user_error(self, tmp_path, data):
        """One to three fields are replaced, added or removed; nothing but a UserError may come out."""
        tree = yaml.safe_load(DEFAULT_CONFIG.read_text())
        for _ in range(data.draw(st.integers(1, 3))):
            path = data.draw(st.sampled_from(sorted(FIELDS)) | st.sampled_from([("data",), ("vlm", "tiny"), ("x",)]))
            value = data.draw(JUNK)
            try:
                tree = with_value(tree, path, value)
            except (AttributeError, TypeError):  # an earlier change put something else in the section's place
                continue
        try:
            config = parse_config(["--config", write(tmp_path, tree)])
        except UserError:
            pass
        else:
            assert parse_config(["--config", write(tmp_path, to_yaml(config))]) == config

    @settings(max_examples=30, **FILES)
    @given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
    def test_any_bytes_are_a_configuration_or_a_user_error(self, tmp_path, content):
        (tmp_path / "config.yaml").write_bytes(content)
        with contextlib.suppress(UserError):
            assert isinstance(parse_config(["--config", str(tmp_path / "config.yaml")]), TrainingConfig)

    @settings(max_examples=30, phases=FILES["phases"])
    @given(st.sampled_from(sorted(FIELDS)), st.text(max_size=8))
    def test_any_text_on_the_command_line_is_a_configuration_or_a_user_error(self, path, text):
        with contextlib.suppress(UserError):
            assert isinstance(parse_config([f"--{'.'.join(path)}={text}"]), TrainingConfig)


class TestRoundTrip:
    def test_a_saved_configuration_loads_equal(self, tmp_path):
        config = parse_config(
            ["--groups_per_sample", "all", "--micro_batch_size", "64", "--optimizer.lr", "1e-5", "--data.path", "x y",
             "--model.timestep_boundaries", "[1000, 500.5, 20, 3, 0]", "--optimizer.betas", "[0.5, 0.75]"]
        )  # fmt: skip
        save_config(config, tmp_path / "config.yaml")
        loaded = load_config(tmp_path / "config.yaml")
        assert loaded == config
        assert differences(config, loaded) == []
        assert (loaded.optimizer.lr, loaded.groups_per_sample, loaded.micro_batch_size) == (1e-5, "all", 64)
        assert loaded.model.timestep_boundaries == [1000, 500.5, 20, 3, 0]

    def test_every_field_is_written(self, tmp_path):
        """A later version's defaults must not change an old run."""
        save_config(TrainingConfig(), tmp_path / "config.yaml")
        written = {path for path, _ in leaves(yaml.safe_load((tmp_path / "config.yaml").read_text()))}
        assert written == {path for path, _ in leaves(dataclasses.asdict(TrainingConfig()))}

    @settings(max_examples=20, **FILES)
    @given(
        st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=12)
        | st.sampled_from(LOOKALIKES)
    )
    def test_any_text_is_kept(self, tmp_path, text):
        """Also what looks like another type in YAML."""
        config = parse_config([])
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, null_prompt=text))
        save_config(config, tmp_path / "config.yaml")
        assert load_config(tmp_path / "config.yaml") == config


class TestDifferences:
    OTHER = {  # noqa: RUF012
        str: "other", int: 12345, float: 0.4321, bool: None, type(None): 16, list: [0.5, 0.25],
    }  # fmt: skip
    MAY_CHANGE = (
        "output_dir", "run_id", "deepspeed", "resume", "max_steps", "micro_batch_size", "tensor_parallel", "checkpoint.",
        "health.", "logging.", "sample.", "data.num_workers", "data.allow_changed", "model.attention_backend",
        "vlm.context_cache", "activation_checkpointing",
    )  # fmt: skip

    @pytest.mark.parametrize("path", sorted(FIELDS), ids=".".join)
    def test_a_changed_field_is_reported_unless_it_may_change(self, path):
        """Every field, one at a time."""
        saved = parse_config([])
        old = FIELDS[path]
        new = (not old) if isinstance(old, bool) else self.OTHER[type(old)]
        current = copy.deepcopy(saved)
        target = current
        for key in path[:-1]:
            target = getattr(target, key)
        if isinstance(target, dict):
            target[path[-1]] = new
        else:
            setattr(target, path[-1], new)
        name = ".".join(path)
        if name.startswith(self.MAY_CHANGE):
            assert differences(saved, current) == []
        else:
            (line,) = differences(saved, current)
            assert line == f"{name}: the run has {old!r}, this command {new!r}"

    def test_a_list_and_a_tuple_of_the_same_are_the_same(self):
        saved = parse_config([])
        current = dataclasses.replace(saved, optimizer=dataclasses.replace(saved.optimizer, betas=[0.9, 0.95]))
        assert differences(saved, current) == []


@pytest.mark.parametrize("preset", PRESETS, ids=lambda p: p.stem)
class TestPresets:
    def test_parses_and_its_header_says_what_cost_result_and_command(self, preset):
        config = parse_config(["--config", str(preset)])
        assert config.output_dir != TrainingConfig().output_dir
        header = "".join(line for line in preset.read_text().splitlines(keepends=True) if line.startswith("#"))
        for word in ("What:", "Cost:", "Expected:", "Command:"):
            assert word in header
        assert f"--config {preset.relative_to(REPOSITORY)}" in header

    def test_sets_no_field_that_does_not_exist(self, preset):
        for path, _ in leaves(yaml.safe_load(preset.read_text())):
            assert path in FIELDS

    def test_its_deepspeed_file_is_there(self, preset):
        config = parse_config(["--config", str(preset)])
        layout = checked_layout(config, config.model.num_groups)
        assert load_deepspeed_config(config, layout)["train_batch_size"] == config.global_batch_size


class TestObjectives:
    def test_names_with_their_weights(self, tmp_path):
        file = write(tmp_path, {"objectives": {"flow_matching": 1, "one": 0.5}})
        assert parse_config(["--config", file]).objectives == {"flow_matching": 1.0, "one": 0.5}
        assert parse_config(["--objectives", '{"one": 2}']).objectives == {"one": 2.0}
        assert parse_config(["--objectives.one", "2e-1"]).objectives == {"one": 0.2}
        config = parse_config(["--config", file])
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config

    @pytest.mark.parametrize("value", ["{}", "{flow_matching: 0}", "{one: -1}", "{one: .nan}", "{one: .inf}", "one"])
    def test_an_invalid_weight_is_refused(self, value):
        with pytest.raises(UserError, match=r"objectives.*(accepted|Expected)"):
            parse_config(["--objectives", value])

    def test_an_unknown_one_is_named_with_those_that_exist(self):
        with pytest.raises(UserError, match="objectives: 'diffusion' is unknown; accepted values: flow_matching"):
            find_objectives(parse_config(["--objectives", "{diffusion: 1}"]))

    def test_one_more_or_another_weight_is_another_run(self):
        one, two = (parse_config(["--objectives", text]) for text in ("{flow_matching: 1}", "{flow_matching: 1, b: 1}"))
        assert differences(one, two) == ["objectives.b: the run has None, this command 1.0"]


PATTERNS = ["runs/lr[12]", "runs/a*", "what?", "a\nb", "-r", "zip://a::b.zip"]


@pytest.mark.parametrize("path", PATTERNS)
@pytest.mark.parametrize("field", ["output_dir", "resume", "init_from", "data.path", "codec.path", "vlm.path"])
def test_paths_that_a_library_reads_as_patterns_are_refused(field, path):
    with pytest.raises(UserError, match=rf"^{field}: got .*; accepted: a path without \* \? \[ \] :: or line breaks"):
        parse_config([f"--{field}={path}"])


def test_a_pattern_in_a_folder_above_counts_too(tmp_path, monkeypatch):
    (tmp_path / "a[1]").mkdir()
    monkeypatch.chdir(tmp_path / "a[1]")
    with pytest.raises(
        UserError, match=r"^output_dir: got 'run'; accepted: a path without .* in the folders above it too"
    ):
        parse_config(["--output_dir", "run"])
