"""The stores that the ranks meet at: the address they listen on."""

import socket
from datetime import timedelta
from pathlib import Path

import pytest

from latte_flow.training.distributed import rendezvous
from latte_flow.training.distributed.rendezvous import host_store
from latte_flow.training.errors import UserError
from tests.integration.launching import listening

SOON = {"timeout": timedelta(seconds=10), "wait_for_workers": False}


@pytest.fixture
def name(monkeypatch):
    """A name that this machine resolves to an address of its own loopback interface, as Debian does."""
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: resolve("127.0.1.1" if host == "this-node" else host, *a, **k)
    )
    return "this-node"


def test_a_store_listens_on_its_address_only():
    before = listening(Path("/proc/self"))
    store = host_store("127.0.0.1", 0, **SOON)
    store.set("key", "value")
    assert listening(Path("/proc/self")) - before == {("127.0.0.1", store.port)}
    assert store.get("key") == b"value"


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"MASTER_PORT: {port} is in use on 127.0.0.1; accepted: another one"):
            host_store("127.0.0.1", port, **SOON)


def test_an_address_of_another_machine_or_of_a_translation_is_not_listened_on():
    assert rendezvous._listen("192.0.2.1", 0) is None


@pytest.mark.parametrize(("here", "world", "is_bound"), [("2", "2", True), ("2", "4", False), (None, "2", False)])
def test_a_name_that_only_this_machine_resolves_to_its_loopback(monkeypatch, name, here, world, is_bound):
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if here is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    listener = rendezvous._listen(name, 0)
    assert (listener is not None) == is_bound
    if listener is not None:
        assert listener.getsockname()[0] == "127.0.1.1"
        listener.close()
