"""What the components of a run are built of, and whose errors end as one line."""

from pathlib import Path

import pytest

from latte_flow.training import components
from latte_flow.training.configs.parser import parse_config
from latte_flow.training.data.datasets import load_image_dataset
from latte_flow.training.errors import UserError


def test_a_bug_in_building_the_components_keeps_its_traceback(monkeypatch):
    """A ValueError of another library, or of this one, is not an error of the user."""
    config = parse_config(["--config=training/configs/digits.yaml"])
    images = load_image_dataset(config.data)

    def broken(*_args, **_kwargs):
        raise ValueError("setting an array element with a sequence")

    monkeypatch.setattr(components, "load_codec", broken)
    with pytest.raises(ValueError, match="array element") as raised:
        components.build_components(config, images, Path("none"))
    assert not isinstance(raised.value, UserError)


def test_a_check_of_the_network_is_an_error_of_the_user():
    config = parse_config(["--config=training/configs/digits.yaml", "--model.num_groups=3"])
    images = load_image_dataset(config.data)
    with pytest.raises(UserError, match=r"num_groups: 3"):
        components.build_components(config, images, Path("none"))
