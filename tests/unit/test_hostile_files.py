"""Mutated configurations, DeepSpeed files and manifests: read, or refused with a UserError; nothing is executed or followed."""

import contextlib
import json
import re
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from latte_flow.training.checkpoint.manifest import manifest_digest, read_manifest
from latte_flow.training.checkpoint.opening import find_checkpoint
from latte_flow.training.configs.deepspeed import load_deepspeed_config
from latte_flow.training.configs.fields import TrainingConfig
from latte_flow.training.configs.parser import DEFAULT_CONFIG, parse_config
from latte_flow.training.configs.saved import load_config, save_config, to_yaml
from latte_flow.training.distributed.batch_layout import BatchLayout
from latte_flow.training.errors import UserError
from tests.unit.test_checkpoint_files import CONTENTS, entries, write_checkpoint

# Examples are shown as found: shrinking one that hangs would take hours.
HOSTILE = {"suppress_health_check": [HealthCheck.function_scoped_fixture], "phases": [Phase.explicit, Phase.generate]}
HANG_SECONDS = 120
"""Of one test, all its examples together: no file of some kilobytes keeps a reader busy for so long."""

NUMBERS = ("-1", "0", "-0.0", "1e400", "-1e400", "1e-400", "9" * 30, "9" * 400, "9" * 5000, "true", "null", "07", "1.5")
VALUES = (
    *NUMBERS,
    '""',
    '"x"',
    "[]",
    "[1, [2]]",
    "{}",
    '{"a": {"b": 1}}',
    '"' + "x" * 5000 + '"',
    '"a\\u0000b"',
    '"\\ud800"',
)
NESTED = ("[" * 5000, "[" * 500 + "]" * 500, '{"a": ' * 300 + "1" + "}" * 300)
JSON_VALUES = (*VALUES, *NESTED, "NaN", "Infinity", "-Infinity", '"auto"', '"../../etc/passwd"', '"/etc/passwd"')
CANARY = "latte_flow_canary"
BOMB = "&a [x, x, x, x, x, x, x, x, x]"
YAML_VALUES = (
    *VALUES, *NESTED, ".nan", ".inf", "-.inf", "~", "1:2:3", "0x" + "f" * 5000, "2020-99-99", "*a", "&a [*a]", "&a", BOMB,
    "!!python/object/apply:pathlib.Path.touch [EXECUTED]", "!!python/name:os.system", f"!!python/module:{CANARY}",
    "!!binary aGk=", "!!binary \x80", "!!set {a, b}", "!!timestamp x", "!!bool x", "!!float x", "!x y", "@", "%", "`", "'", '"',
    f"{CANARY}.Thing", f"{{class_path: {CANARY}.Thing, init_args: {{}}}}", "/dev/zero", "{__path__: x}", "{config: x}",
    "[" + "0, " * 5000 + "]", '"{:>999999999}"', '"{!z}"', "{1: 2}", "{~: 2}", "{[1]: 2}", "\ufeff", "a: b", "- 1", "# 1",
)  # fmt: skip
YAML_LINES = (
    *(f"{a}: &{a} [{', '.join([f'*{b}'] * 9)}]" for a, b in zip("bcdefghi", "abcdefgh", strict=True)),
    "a: " + BOMB, "model: {shared_modules: *i}", "<<: *a", "--- ", "...", "%YAML 9.9", "? [a]", "\t", f"config: {DEFAULT_CONFIG}",
    f"data.class_path: {CANARY}.Thing", "dry_run: [1]", "local_rank: x", "assume: {gpus: .nan}", "help: 1", "print_config: x",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_hang():
    def give_up(*_):
        raise TimeoutError(f"still reading after {HANG_SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(HANG_SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """Whether code was executed: a module on the path leaves a file when it is imported; so does what touches EXECUTED."""
    folder = tmp_path / "path"
    folder.mkdir()
    (folder / f"{CANARY}.py").write_text("import pathlib\npathlib.Path('EXECUTED').touch()\nclass Thing: pass\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.chdir(folder)
    yield lambda: (folder / "EXECUTED").exists() or CANARY in sys.modules
    sys.modules.pop(CANARY, None)


@st.composite
def mutated(draw, originals: list[str], values: tuple[str, ...], lines: tuple[str, ...] = ("",)) -> bytes:
    """One to three mutations of a text: of its bytes, its lines, or the values in its lines."""
    content = draw(st.sampled_from(originals)).encode()
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["value", "value", "value", "line", "remove", "repeat", "flip", "cut", "bytes"]))
        rows = content.split(b"\n")
        row = draw(st.integers(0, len(rows) - 1))
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        if kind == "value" and b":" in rows[row]:
            new = draw(st.sampled_from(values)).encode("utf-8", "surrogatepass")
            comma = b"," * rows[row].rstrip().endswith(b",")
            rows[row] = rows[row].split(b":", 1)[0] + b": " + new + comma
        elif kind == "line":
            rows.insert(row, draw(st.sampled_from(lines)).encode())
        elif kind == "remove":
            del rows[row]
        elif kind == "repeat":
            rows.insert(row, rows[draw(st.integers(0, len(rows) - 1))])
        content = b"\n".join(rows)
        if kind == "flip" and content:
            at = min(at, len(content) - 1)
            content = content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "bytes":
            content = content[:at] + draw(st.binary(min_size=1, max_size=3)) + content[at:]
    return content


@st.composite
def rearranged(draw, tree: dict, values: list, names: list[str]) -> dict:
    """One change to a tree of dicts: a value replaced, a key renamed, removed or added."""
    tree = json.loads(json.dumps(tree))
    sections = [tree]
    for section in sections:
        sections += [value for value in section.values() if isinstance(value, dict)]
    section = draw(st.sampled_from(sections))
    key = draw(st.sampled_from(sorted(section)))
    kind = draw(st.sampled_from(["replace", "replace", "rename", "remove", "add"]))
    value = draw(st.sampled_from(values)) if kind == "replace" else section.get(key)
    if kind in ("rename", "remove"):
        del section[key]
    if kind != "remove":
        section[draw(st.sampled_from(names)) if kind in ("rename", "add") else key] = value
    return tree


PRESET = DEFAULT_CONFIG.read_text()
FULL = to_yaml(parse_config([]))
DEEPSPEED_FILES = sorted(DEFAULT_CONFIG.parents[2].glob("ds_configs/*.json"))
LAYOUT = BatchLayout(64, 8, 2, 0)


MANIFEST = {"step": 7, "world_size": 1, "zero_stage": 2, "files": entries(CONTENTS)}
JUNK = [
    True,
    False,
    None,
    -1,
    0,
    1,
    3,
    7.0,
    1.5,
    2**63,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "x",
    "7",
    [],
    [7],
    {},
    {"a": 1},
]
FILE_NAMES = [
    "",
    ".",
    "..",
    "../checkpoints",
    "../../outside",
    "/etc/hostname",
    "a/b",
    "a\0b",
    "x" * 300,
    "\ud800",
    "a b",
    "other",
]


@pytest.mark.slow
@settings(max_examples=350, **HOSTILE)
@given(content=mutated([PRESET, FULL, FULL], YAML_VALUES, YAML_LINES))
def test_a_configuration_is_read_or_refused(tmp_path, canary, content):
    (tmp_path / "config.yaml").write_bytes(content)
    with contextlib.suppress(UserError):
        config = load_config(tmp_path / "config.yaml")
        save_config(config, tmp_path / "saved.yaml")
        assert to_yaml(load_config(tmp_path / "saved.yaml")) == to_yaml(config)  # as text: a NaN is not itself
    assert not canary()


TEN_TO_NINE = "".join(f"{a}: &{a} [{', '.join([f'*{b}'] * 10)}]\n" for a, b in zip("bcdefghi", "abcdefgh", strict=True))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        pytest.param(f"a: {BOMB}\n{TEN_TO_NINE}model: {{shared_modules: *i}}", "modules[0]: got [[[", id="aliases-of-aliases"),
        pytest.param("seed: &a [*a]", "seed: got [[[...]]]", id="a-list-in-itself"),
        pytest.param("model: &a {shared_modules: *a}", "model.shared_modules", id="a-mapping-in-itself"),
        pytest.param("seed: " + "[" * 30_000, "config.yaml", id="nested"),
        pytest.param("seed: 0x" + "f" * 5000, "seed: got an integer of 20000 bits", id="an-integer-that-cannot-be-printed"),
        pytest.param("optimizer: {lr: " + "9" * 400 + "}", "optimizer.lr: got an integer", id="an-integer-that-is-no-float"),
        pytest.param("seed: !!timestamp x", "config.yaml is not valid YAML", id="no-time"),
        pytest.param("seed: !!bool x", "config.yaml is not valid YAML", id="no-truth"),
        pytest.param("seed: 1\nseed: 2", "seed is set twice", id="twice"),
        pytest.param("data: {resolution: 1}\ndata: {}", "data is set twice", id="a-section-twice"),
        pytest.param(f"data: {{class_path: {CANARY}.Thing}}", "data.class_path", id="a-class"),
        pytest.param(f"optimizer.class_path: {CANARY}.Thing", "optimizer.class_path", id="a-class-by-a-dotted-name"),
        pytest.param(f"vlm: {{tiny: {CANARY}.Thing}}", "vlm.tiny: got", id="a-class-in-a-sections-place"),
        pytest.param(f"data: {DEFAULT_CONFIG}", "data: got", id="a-file-in-a-sections-place"),
        pytest.param(f"config: {DEFAULT_CONFIG}", "config: got", id="another-configuration"),
        pytest.param("data: {__path__: x}", "data.__path__", id="a-name-of-the-parsers-own"),
        pytest.param("data: {x: {}}", "data.x", id="an-empty-section-that-is-none"),
        pytest.param("1: 2", "[1]: got 1; accepted: names that are text", id="a-number-for-a-name"),
        pytest.param('output_dir: "a\\0b"', "output_dir: got 'a\\x00b'", id="no-path"),
        pytest.param("data: {path: " + "x" * 300 + "}", "data.path: got", id="a-path-too-long"),
        pytest.param('data: {prompt_template: "{:>999999999}"}', "data.prompt_template", id="a-gigabyte-of-blanks"),
        pytest.param('data: {prompt_template: "{!z}"}', "data.prompt_template", id="no-conversion"),
        pytest.param("dry_run: [1]", "dry_run: got", id="no-flag"),
        pytest.param("assume: {gpus: .inf}", "assume.gpus", id="infinitely-many"),
        pytest.param("vlm: {tiny: {hidden_size: 24, num_attention_heads: 4}}", "vlm.tiny.hidden_size: got 24", id="heads"),
        pytest.param("vlm: {tiny: {num_key_value_heads: 3}}", "vlm.tiny.num_key_value_heads: got 3", id="shared-heads"),
    ],
)  # fmt: skip
def test_a_dangerous_configuration_is_refused(tmp_path, canary, content, named):
    file = tmp_path / "config.yaml"
    file.write_text(content)
    with pytest.raises(UserError, match=re.escape(named)) as error:
        parse_config(["--config", str(file)])
    assert len(str(error.value)) < 600
    assert not canary()


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/stdin", "."])
def test_a_configuration_is_a_file(path):
    with pytest.raises(UserError, match=rf"config: {path} not found; accepted: a YAML file"):
        parse_config(["--config", path])


@pytest.mark.parametrize("value", ["9" * 400, "-" + "9" * 400, "9" * 5000, "1e400", "nan"])
@pytest.mark.parametrize("field", ["max_steps", "optimizer.lr", "sample.cfg_scale", "checkpoint.keep_last"])
def test_a_number_beyond_all_numbers_on_the_command_line(field, value):
    with pytest.raises(UserError, match=field):
        parse_config([f"--{field}={value}"])


@settings(max_examples=300, **HOSTILE)
@given(content=mutated([file.read_text() for file in DEEPSPEED_FILES], JSON_VALUES))
def test_a_deepspeed_file_is_read_or_refused(tmp_path, content):
    (tmp_path / "ds.json").write_bytes(content)
    config = TrainingConfig(deepspeed=str(tmp_path / "ds.json"), global_batch_size=64)
    with contextlib.suppress(UserError):
        result = load_deepspeed_config(config, LAYOUT)
        assert result["zero_optimization"]["stage"] in (1, 2, 3)
        assert result["train_batch_size"] == 64
        assert result["zero_allow_untested_optimizer"] is True


def check_manifest(folder: Path, content: bytes) -> None:
    """What is read of a manifest is what a run can have written, or it is damaged."""
    (folder / "manifest.json").write_bytes(content)
    with contextlib.suppress(UserError):
        assert find_checkpoint(folder) == folder  # every file is as the manifest says
    with contextlib.suppress(UserError):
        manifest = read_manifest(folder)
        for name, entry in manifest["files"].items():
            assert Path(folder, name).resolve().parent == folder.resolve()
            assert type(entry["bytes"]) is int
            assert entry["bytes"] >= 0
        shards = sum(name.endswith("_optim_states.pt") for name in manifest["files"])
        assert shards == manifest["world_size"] > 0
        for name, low, high in (("step", 0, 2**63), ("world_size", 1, 2), ("zero_stage", 1, 4)):
            assert type(manifest[name]) is int
            assert low <= manifest[name] < high


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "outside").write_bytes(CONTENTS["empty"])
    return write_checkpoint(tmp_path, 7)


@settings(max_examples=300, **HOSTILE)
@given(manifest=rearranged(MANIFEST, JUNK, FILE_NAMES))
def test_a_manifest_that_vouches_for_anything_is_read_or_damaged(folder, manifest):
    check_manifest(folder, json.dumps(manifest | {"sha256": manifest_digest(manifest)}).encode())


@settings(max_examples=300, **HOSTILE)
@given(content=mutated([json.dumps(MANIFEST | {"sha256": manifest_digest(MANIFEST)}, indent=1)], JSON_VALUES))
def test_a_damaged_manifest_is_read_or_damaged(folder, content):
    check_manifest(folder, content)
