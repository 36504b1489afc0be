"""Where the ranks meet: stores that listen on the job's own address only, and DeepSpeed's communication on top of them.

A store answers anyone who reaches its port, and torch lets it listen on all addresses of the machine.
"""

import errno
import ipaddress
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from importlib import import_module

import deepspeed
import torch.distributed as dist

from latte_flow.training.errors import UserError

INIT_METHOD = "latte-flow://"
"""Like torch's env://, for init_process_group; the store of rank 0 listens on MASTER_ADDR only."""
LOCALHOST = "localhost"


def connect(timeout: timedelta) -> None:
    """Initialise torch.distributed and DeepSpeed's communication. Collective.

    Args:
        timeout: of the collectives.

    Raises:
        UserError: when MASTER_PORT is in use.
    """
    # An all-reduce for inference on CPUs, which nothing here calls. It compiles an operator at the first start, and leaves 66 MiB
    # per rank in /dev/shm after every run.
    vars(import_module("deepspeed.comm.torch"))["build_shm_op"] = lambda: None
    if _is_loopback(os.environ.get("MASTER_ADDR", "")):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    deepspeed.init_distributed(timeout=timeout, init_method=INIT_METHOD)


def host_store(host: str, port: int, **options) -> dist.TCPStore:
    """Return a store that listens on the address of ``host``; where that is impossible, on all addresses, and print so.

    Args:
        host: name or address of this machine, as the other ranks know it.
        port: 0 for any.
        options: passed to TCPStore.

    Raises:
        UserError: when the port is in use.
    """
    listener = _listen(host, port)
    if listener is None:
        print(
            f"{host} does not name an address of this machine that other nodes reach: a store of this run listens on all of its "
            "addresses; accepted for MASTER_ADDR: the address by which the other nodes reach it",
            flush=True,
        )
        return dist.TCPStore(host, port, is_master=True, **options)
    port = listener.getsockname()[1]
    # The store closes the descriptor.
    return dist.TCPStore(host, port, is_master=True, master_listen_fd=listener.detach(), **options)


def _listen(host: str, port: int) -> socket.socket | None:
    """Return a socket that listens on the address of a host, or None if it has none that the other ranks can use."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR: {host}: {error.strerror}; accepted: a name or address of rank 0's machine"
        ) from error
    # Debian resolves a machine's own name to 127.0.1.1, which other nodes cannot reach.
    if ipaddress.ip_address(address[0]).is_loopback and not _is_loopback(host) and not _all_ranks_are_here():
        return None
    try:
        return socket.create_server(address[:2], family=family, backlog=socket.SOMAXCONN)
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:  # behind address translation
            return None
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"MASTER_PORT: {port} is in use on {host}; accepted: another one (deepspeed --master_port N)"
            ) from error
        raise


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == LOCALHOST


def _all_ranks_are_here() -> bool:
    here = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))  # of torchrun, of DeepSpeed
    return here == os.environ.get("WORLD_SIZE")


def _meet(url: str, timeout: timedelta, **options) -> Iterator[tuple[dist.Store, int, int]]:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True):  # torchrun's agent holds the store
        yield from dist.rendezvous("env://", timeout=timeout)
        return
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    make = host_store if rank == 0 else dist.TCPStore
    yield make(host, port, world_size=world_size, timeout=timeout), rank, world_size


dist.register_rendezvous_handler(INIT_METHOD.removesuffix("://"), _meet)
