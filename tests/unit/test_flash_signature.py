"""The flash backend's call against flash-attn's own source: its signature, its docstring and its kernel's limits.

flash-attn compiles only beside CUDA, but its source distribution can be read anywhere. It is fetched once with pip and
kept in .cache/flash_attn_sdist; remove that folder to look at newer releases.
"""

import ast
import configparser
import inspect
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import torch

from latte_flow.model.attention import FLASH_MAX_HEAD_DIM, AttentionSpec
from tests.attention_oracle import make_chain, run_model

pytestmark = pytest.mark.slow  # the first run downloads

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "flash_attn_sdist"


def requirement(age: str) -> str:
    """Return what setup.cfg asks for, ``newest``, or the first release series that satisfies it, ``oldest``."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    (wanted,) = re.findall(r"^(flash-attn>=[\d.]+)$", config["options.extras_require"]["gpu"], flags=re.MULTILINE)
    return wanted if age == "newest" else wanted.replace(">=", "==") + ".*"


def fetch_sdist(wanted: str, folder: Path) -> Path:
    """Return the source distribution in the folder, downloaded first when it is not there."""
    if not any(folder.glob("*.tar.gz")):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            # pip runs the package's setup.py for its metadata; the variable keeps it from asking for a CUDA compiler.
            result = subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"),
                    *("--no-build-isolation", "--retries", "1", "--timeout", "30", "--dest", scratch, wanted),
                ],
                env=os.environ | {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"},
                capture_output=True,
                text=True,
            )
            output = result.stdout + result.stderr
            if result.returncode:
                assert "subprocess-exited-with-error" not in output, (
                    f"pip reached {wanted} but not its metadata:\n{output}"
                )
                last = output.strip().splitlines()[-1] if output.strip() else f"exit status {result.returncode}"
                pytest.skip(f"{wanted} is not in {CACHE} and the package registry could not be reached: {last}")
            (sdist,) = Path(scratch).glob("*.tar.gz")
            shutil.move(sdist, folder / sdist.name)
    return max(folder.glob("*.tar.gz"), key=lambda path: path.stat().st_mtime)


@pytest.fixture(scope="module", params=["newest", "oldest"])
def sdist(request) -> dict[str, str]:
    """The text of the files that matter, by their path in the distribution."""
    wanted = ("flash_attn/flash_attn_interface.py", "csrc/flash_attn/flash_api.cpp")
    texts = {}
    with tarfile.open(fetch_sdist(requirement(request.param), CACHE / request.param)) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            if name in wanted:
                texts[name] = archive.extractfile(member).read().decode()
    assert set(texts) == set(wanted)
    return texts


@pytest.fixture(scope="module")
def function(sdist) -> ast.FunctionDef:
    tree = ast.parse(sdist["flash_attn/flash_attn_interface.py"])
    (found,) = (x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == "flash_attn_varlen_func")
    return found


@pytest.fixture(scope="module")
def signature(function) -> inspect.Signature:
    """The signature as Python would see it, built without importing the package."""
    arguments = function.args
    assert arguments.vararg is None
    assert arguments.kwarg is None
    positional = [
        *((argument, inspect.Parameter.POSITIONAL_ONLY) for argument in arguments.posonlyargs),
        *((argument, inspect.Parameter.POSITIONAL_OR_KEYWORD) for argument in arguments.args),
    ]
    defaults = [inspect.Parameter.empty] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    keyword_only = [(argument, inspect.Parameter.KEYWORD_ONLY) for argument in arguments.kwonlyargs]
    defaults += [inspect.Parameter.empty if default is None else default for default in arguments.kw_defaults]
    return inspect.Signature(
        [
            inspect.Parameter(argument.arg, kind, default=default)
            for (argument, kind), default in zip(positional + keyword_only, defaults, strict=True)
        ]
    )


MASK = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0]], dtype=torch.bool)


@pytest.fixture(params=[None, MASK], ids=["no context", "padded context"])
def call(request, flash_attn) -> dict:
    """The keyword arguments with which the backend calls the kernel for a layer with a residual."""
    spec = AttentionSpec(
        backend="flash",
        residual=True,
        residual_source="raw",
        residual_space="logits",
        head_dim=8,
        num_image_tokens=5,
    )
    run_model(make_chain(depth=2, mask=request.param), spec, causal=True)
    (_, _), (args, kwargs) = flash_attn.calls
    assert args == (), "the backend names every argument"
    return kwargs


def test_every_argument_exists_and_every_required_one_is_passed(call, signature):
    parameters = signature.parameters.values()
    by_name = {p.name for p in parameters if p.kind is not inspect.Parameter.POSITIONAL_ONLY}
    required = {p.name for p in parameters if p.default is inspect.Parameter.empty}
    assert set(call) - by_name == set(), "passed, but not an argument of flash_attn_varlen_func"
    assert required - set(call) == set(), "required by flash_attn_varlen_func, but not passed"
    signature.bind(**call)


def test_tensors_have_the_documented_shapes_and_types(call, function):
    """Each line of the docstring's argument list that we rely on, and our call beside it."""
    documented = " ".join(ast.get_docstring(function).split())
    total_k = 3 * 5 + (4 * 3 if len(call["k"]) > 15 else 0)

    assert "q: (total_q, nheads, headdim)" in documented
    assert call["q"].shape == (3 * 5, 4, 16)
    assert "k: (total_k, nheads_k, headdim)" in documented
    assert "v: (total_k, nheads_k, headdim)" in documented
    assert call["k"].shape == call["v"].shape == (total_k, 2, 16)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        assert f"{name}: (batch_size + 1,), dtype torch.int32" in documented
        assert call[name].shape == (3 + 1,)
        assert call[name].dtype == torch.int32
        assert call[name][0] == 0
    for name in ("max_seqlen_q", "max_seqlen_k"):
        assert f"{name}: int." in documented
        assert type(call[name]) is int
    assert "softmax_scale: float. The scaling of QK^T before applying softmax." in documented
    assert call["softmax_scale"] == pytest.approx(1 / 8**0.5)  # of the model's heads, not of the concatenated ones
    assert "causal: bool." in documented
    assert call["causal"] is True


def test_sequences_are_packed_to_their_real_tokens(call):
    context = [4, 2, 0] if call["max_seqlen_k"] > 5 else [0, 0, 0]
    assert call["cu_seqlens_q"].tolist() == [0, 5, 10, 15]
    assert call["cu_seqlens_k"].diff().tolist() == [length + 5 for length in context]
    assert call["max_seqlen_k"] >= max(context) + 5


def test_stand_in_does_what_the_docstring_describes(flash_attn, function):
    """Bottom-right causal mask, grouped heads and default scale: the examples of flash-attn's docstring, computed."""
    documented = " ".join(ast.get_docstring(function).split())

    def visible(seqlen_q: int, seqlen_k: int) -> str:
        """Attend with equal weights to one-hot values: a row of the output is the row of the mask over its sum."""
        ends = [torch.tensor([0, length], dtype=torch.int32) for length in (seqlen_q, seqlen_k)]
        output = flash_attn.flash_attn_varlen_func(
            torch.zeros(seqlen_q, 1, seqlen_k),
            torch.zeros(seqlen_k, 1, seqlen_k),
            torch.eye(seqlen_k)[:, None],
            *ends,
            seqlen_q,
            seqlen_k,
            causal=True,
        )[:, 0]
        assert torch.equal(output.sum(dim=1), (output > 0).any(dim=1).float())
        return " ".join(str(int(x > 0)) for x in output.flatten())

    example = "if seqlen_q = 2 and seqlen_k = 5, the causal mask (1 = keep, 0 = masked out) is: "
    assert example + visible(2, 5) + " If" in documented
    assert "If seqlen_q = 5 and seqlen_k = 2, the causal mask is: " + visible(5, 2) + " If" in documented

    example = (
        "if Q has 6 heads and K, V have 2 heads, head 0, 1, 2 of Q will attention to head 0 of K, V, and head 3, 4, 5"
    )
    assert example in documented
    end = torch.tensor([0, 1], dtype=torch.int32)
    value = torch.tensor([10.0, 20.0]).view(1, 2, 1)
    output = flash_attn.flash_attn_varlen_func(torch.zeros(1, 6, 1), torch.zeros(1, 2, 1), value, end, end, 1, 1)
    assert output.flatten().tolist() == [10, 10, 10, 20, 20, 20]

    assert "Default to 1 / sqrt(headdim)." in documented
    query = torch.randn(1, 1, 4, generator=torch.Generator().manual_seed(0))
    pair = torch.tensor([0, 2], dtype=torch.int32)
    output = flash_attn.flash_attn_varlen_func(
        query, torch.eye(2, 4)[:, None], torch.eye(2, 4)[:, None], end, pair, 1, 2
    )
    torch.testing.assert_close(output[0, 0, :2], torch.softmax(query[0, 0, :2] / 2, dim=0))


def test_widest_head_is_the_kernels_own_limit(sdist):
    limits = re.findall(r"only supports head dimension at most (\d+)", sdist["csrc/flash_attn/flash_api.cpp"])
    assert {int(limit) for limit in limits} == {FLASH_MAX_HEAD_DIM}
