"""The documented design in one machine: hosts, their containers and the switch between them, as network namespaces.

                      host-a                                       host-b
    container-a ── cni0   overlay0   eth0 ── switch ── eth0   overlay0   cni0 ── container-b
    10.244.1.96            172.16.130.140         172.16.130.164            10.244.2.194

Nothing appears in the machine's own network namespace. Needs Linux and root:
:func:`overlaynet.testing.namespaces.requirements` says what is missing.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from overlaynet import network, status, subnet_file
from overlaynet.errors import OverlaynetError
from overlaynet.model import JSON, Lease, Subnets
from overlaynet.testing import namespaces
from overlaynet.testing.daemons import DaemonProcess, wait_until
from overlaynet.testing.namespaces import NetworkNamespace

__all__ = [
    "ENCAPSULATION",
    "MOST_HOSTS",
    "NETWORK",
    "SWITCH_ADDRESS",
    "UNDERLAY",
    "Container",
    "DaemonProcess",
    "Host",
    "Lab",
    "standing",
    "take_down",
    "wait_until",
]

T = TypeVar("T")

NETWORK = IPv4Network("10.244.0.0/16")
UNDERLAY = IPv4Network("172.16.130.0/24")
SWITCH_ADDRESS = IPv4Interface("172.16.130.1/24")
ENCAPSULATION = 28
"""Bytes that the udp backend adds to each packet: an IPv4 header and a UDP header."""
MOST_HOSTS = 92

_HOST_NUMBERS = (140, 164)
_CONTAINER_NUMBERS = (96, 194)
_OTHER_CONTAINERS_NUMBER = 10
_DIRECTORY = Path("/run")
_NAME = re.compile(r"overlaynet-[a-z]+-[0-9]+(-[0-9]+)?")
_counter = itertools.count(1)


class Container:
    """A container: a namespace that is plugged into its host's ``cni0`` once the host has a subnet."""

    def __init__(self, host: Host, label: str, number: int) -> None:
        self.host = host
        self.label = label
        self.number = number
        self.namespace = NetworkNamespace(f"{host.lab.name}-{label}")
        self.address: IPv4Interface | None = None
        """``None`` until it is plugged in; then the address number ``number`` of the host's subnet."""
        self.namespace.ip("link set lo up")

    @property
    def ip(self) -> IPv4Address:
        """The address alone. :raises OverlaynetError: if it is not plugged in yet."""
        if self.address is None:
            raise OverlaynetError(f"{self.label} is not plugged in yet: call connect_containers() of {self.host.label}")
        return self.address.ip


class Host:
    """A host: a namespace whose ``eth0`` is plugged into the lab's switch, with IP forwarding on."""

    def __init__(self, lab: Lab, number: int) -> None:
        letter = _letters(number)
        self.lab = lab
        self.number = number
        self.label = f"host-{letter}"
        last = _HOST_NUMBERS[number - 1] if number <= 2 else _HOST_NUMBERS[1] + number - 2
        self.address = IPv4Interface((UNDERLAY.network_address + last, UNDERLAY.prefixlen))
        self.directory = lab.directory / self.label
        self.directory.mkdir()
        self.subnet_file = self.directory / "subnet.env"
        self.status_socket = self.directory / "status.sock"
        self.daemon: DaemonProcess | None = None
        """The daemon that was started last."""
        self._starts = 0
        self._connected_as: tuple[str, str] | None = None
        self.namespace = NetworkNamespace(f"{lab.name}-{self.label}")
        container = _CONTAINER_NUMBERS[number - 1] if number <= 2 else _OTHER_CONTAINERS_NUMBER
        self.containers = [Container(self, f"container-{letter}", container)]
        self._plug_in()

    def _plug_in(self) -> None:
        lab = self.lab
        lab.switch.ip(
            f"link add {self.label} mtu {lab.mtu} type veth peer name eth0 mtu {lab.mtu} netns {self.namespace.name}",
            f"link set {self.label} master switch0 up",
        )
        self.namespace.ip(
            "link set lo up",
            "link set eth0 up",
            f"address add {self.address} dev eth0",
            *([f"route add default via {SWITCH_ADDRESS.ip}"] if lab.default_route else []),
        )
        self.namespace.set_sysctl("net.ipv4.ip_forward", 1)

    def seed_subnet_file(self, subnet: IPv4Network) -> None:
        """Write the subnet file as an earlier run on this host would have left it: the daemon then prefers that subnet."""
        text = subnet_file.render(self.lab.overlay, Lease(Subnets(ipv4=subnet)), self.lab.mtu - ENCAPSULATION)
        subnet_file.write(self.subnet_file, text)

    def start_overlaynet(
        self, store: Sequence[str | Path], extra: Sequence[str | Path] = (), *, wait: bool = True
    ) -> DaemonProcess:
        """Start ``overlaynet run`` on this host.

        :param store: the arguments that choose the store, such as :attr:`Lab.file_store`.
        :param extra: more arguments; of a setting that is given twice, the later one counts.
        :param wait: return only when it is ready.
        :raises OverlaynetError: if a daemon of this host runs already, or with ``wait``, if it does not get ready.
        """
        if self.daemon is not None and self.daemon.running:
            raise OverlaynetError(f"overlaynet runs on {self.label} already; stop it first")
        self._starts += 1
        log_file = self.directory / f"overlaynet-{self._starts}.log"
        # -P: what lies in the working directory must not pass for the package.
        command: list[str | Path] = [sys.executable, "-P", "-m", "overlaynet", "run", "--backend", "udp", *store]
        command += ["--network", str(self.lab.overlay), "--iface", "eth0", "--node", self.label]
        command += ["--subnet-file", self.subnet_file, "--status-socket", self.status_socket]
        command += ["--log-format", "json", *extra]
        # Nor must the settings of whoever runs the lab.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OVERLAYNET_")}
        with log_file.open("xb") as log:
            process = self.namespace.popen(command, stdout=log, stderr=log, env=environment)
        self.daemon = DaemonProcess(self.label, process, log_file, self.subnet_file)
        if wait:
            self.daemon.wait_until_ready()
        return self.daemon

    def status(self) -> dict[str, JSON]:
        """What the daemon answers to ``overlaynet status``. :raises OverlaynetError: if it does not answer."""
        return status.ask(str(self.status_socket))

    def connect_containers(self) -> None:
        """Do what a container runtime does: make ``cni0`` as the subnet file says, and plug the containers in.

        Nothing changes if they are plugged in that way already.

        :raises OverlaynetError: if there is no subnet file yet.
        """
        if not self.subnet_file.exists():
            raise OverlaynetError(f"there is no {self.subnet_file}: {self.label} has no subnet yet")
        lines = self.subnet_file.read_text(encoding="ascii").splitlines()
        values = dict(line.split("=", 1) for line in lines if "=" in line)
        bridge, mtu = IPv4Interface(values["FLANNEL_SUBNET"]), values["FLANNEL_MTU"]
        if self._connected_as == (str(bridge), mtu):
            return
        if self._connected_as is not None:
            for container in self.containers:
                container.namespace.ip("link delete eth0")
            self.namespace.ip("link delete cni0")
        self._connected_as = (str(bridge), mtu)
        self.namespace.ip(
            "link add cni0 type bridge mcast_snooping 0",
            f"link set cni0 mtu {mtu} up",
            f"address add {bridge} dev cni0",
        )
        for place, container in enumerate(self.containers):
            container.address = IPv4Interface(
                (bridge.network.network_address + container.number, bridge.network.prefixlen)
            )
            inside, port = container.namespace, f"veth{place}"
            self.namespace.ip(
                f"link add {port} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {inside.name}",
                f"link set {port} master cni0 up",
            )
            inside.ip(
                "link set eth0 up", f"address add {container.address} dev eth0", f"route add default via {bridge.ip}"
            )

    def disconnect(self) -> None:
        """Cut the link between ``eth0`` and the switch: the carrier is gone, addresses and routes stay."""
        self.lab.switch.ip(f"link set {self.label} down")

    def reconnect(self) -> None:
        """Restore the link that :meth:`disconnect` cut."""
        self.lab.switch.ip(f"link set {self.label} up")


class Lab:
    """Hosts with one container each, on one switch. It exists from :meth:`open` (or entering the ``with`` block) until
    :meth:`close`, which kills everything that runs in it.

    Host number n is to lease the subnet number n of the network (10.244.n.0/24): its subnet file says so.

    :param label: what the lab is for; its :attr:`name` and those of its namespaces begin with ``overlaynet-LABEL-``.
    :param hosts: how many, from 1 to :data:`MOST_HOSTS`.
    :param overlay: the overlay's network.
    :param mtu: of every ``eth0``, in bytes.
    :param default_route: whether the hosts have one, to the switch's address (where nobody forwards anything).
    :param seed: whether the hosts' subnet files are written beforehand.
    """

    def __init__(
        self,
        label: str = "lab",
        *,
        hosts: int = 2,
        overlay: IPv4Network = NETWORK,
        mtu: int = 1500,
        default_route: bool = False,
        seed: bool = True,
    ) -> None:
        if not 1 <= hosts <= MOST_HOSTS:
            raise OverlaynetError(f"a lab has from 1 to {MOST_HOSTS} hosts, not {hosts}")
        if not re.fullmatch("[a-z]+", label):
            raise ValueError(f"a lab's label is made of small letters, not {label!r}")
        self.overlay = network.parse(json.dumps({"Network": str(overlay)}))
        self.mtu = mtu
        self.default_route = default_route
        self.hosts: list[Host] = []
        self._label = label
        self._count = hosts
        self._seed = seed
        self._name: str | None = None
        self._switch: NetworkNamespace | None = None

    @property
    def name(self) -> str:
        """What the names of all its namespaces begin with, and what :func:`take_down` takes."""
        return _opened(self._name)

    @property
    def directory(self) -> Path:
        """Where its files lie; removed with it."""
        return _DIRECTORY / self.name

    @property
    def switch(self) -> NetworkNamespace:
        """The namespace of the switch, which the hosts reach at :data:`SWITCH_ADDRESS`."""
        return _opened(self._switch)

    @property
    def containers(self) -> list[Container]:
        """The containers of all hosts."""
        return [container for host in self.hosts for container in host.containers]

    @property
    def file_store(self) -> list[str | Path]:
        """The arguments for a file store that the hosts share, as only hosts on one machine can."""
        return ["--store", "file", "--store-path", self.directory / "store"]

    def __enter__(self) -> Self:
        try:
            self.open()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(self) -> None:
        """Make everything. Whatever happens, call :meth:`close`.

        :raises OverlaynetError: if that is not possible here.
        """
        self._claim_name()
        self._switch = NetworkNamespace(f"{self.name}-switch")
        self._switch.ip(
            "link set lo up",
            f"link add switch0 mtu {self.mtu} type bridge mcast_snooping 0",
            f"address add {SWITCH_ADDRESS} dev switch0",
            "link set switch0 up",
        )
        for number in range(1, self._count + 1):
            host = Host(self, number)
            self.hosts.append(host)
            if self._seed and self.overlay.ipv4 is not None and number <= len(self.overlay.ipv4):
                host.seed_subnet_file(self.overlay.ipv4[number - 1])

    def wait_until_acquainted(self, seconds: float = 30) -> None:
        """Wait until each daemon that runs has all the others as peers.

        :raises TimeoutError: if that is not so within so many seconds.
        """
        nodes = [host for host in self.hosts if host.daemon is not None and host.daemon.running]
        for host in nodes:
            wait_until(
                lambda host=host: host.status().get("peers") == len(nodes) - 1,  # type: ignore[misc]
                seconds,
                f"{host.label} to know {len(nodes) - 1} peers",
            )

    def close(self) -> None:
        """Kill what runs in it, and remove its namespaces and files. Idempotent."""
        if self._name is None:
            return
        made = [host.namespace for host in self.hosts]
        made += [container.namespace for container in self.containers]
        if self._switch is not None:
            made.append(self._switch)
        for namespace in made:
            namespace.close()
        # And what was being made when an interruption came.
        take_down(self._name)
        self._name = None

    def _claim_name(self) -> None:
        for number in _counter:
            name = f"overlaynet-{self._label}-{os.getpid()}" + (f"-{number}" if number > 1 else "")
            try:
                (_DIRECTORY / name).mkdir(mode=0o700)
            except FileExistsError:
                continue  # left up by a process that had our id
            except OSError as error:
                raise OverlaynetError(f"the directory {_DIRECTORY / name} cannot be made: {error.strerror}") from error
            self._name = name
            return


def standing() -> list[str]:
    """The names of the labs that are up on this machine, sorted."""
    found = {match[1] for name in namespaces.names() if (match := _member_pattern(_NAME.pattern).fullmatch(name))}
    return sorted(found)


def take_down(name: str) -> bool:
    """Kill what runs in a lab, and remove its namespaces and files, whoever made it. Idempotent.

    :return: whether there was anything left of it.
    :raises OverlaynetError: if that is no name of a lab, or something withstands.
    """
    if not _NAME.fullmatch(name):
        raise OverlaynetError(f"{name!r} is not the name of a lab, such as overlaynet-demo-1234")
    directory = _DIRECTORY / name
    members = [other for other in namespaces.names() if _member_pattern(re.escape(name)).fullmatch(other)]
    found = bool(members) or directory.is_dir()
    for member in members:
        with contextlib.suppress(TimeoutError):  # the name goes nevertheless; the kernel keeps the rest until it ends
            wait_until(lambda member=member: not _kill_inside(member), 5, f"the end of what runs in {member}")  # type: ignore[misc]
        namespaces.delete(member)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)
    return found


def _kill_inside(member: str) -> list[int]:
    """Kill all processes in a namespace; those that were still there."""
    there = namespaces.process_ids(member)
    for identifier in there:
        with contextlib.suppress(ProcessLookupError):
            os.kill(identifier, signal.SIGKILL)
    return there


def _member_pattern(lab: str) -> re.Pattern[str]:
    return re.compile(f"({lab})-(?:switch|(?:host|container)-[a-z]+)")


def _letters(number: int) -> str:
    """``a`` to ``z``, ``aa``, ``ab`` and so on, as spreadsheets name their columns."""
    letters = ""
    while number:
        number, place = divmod(number - 1, 26)
        letters = chr(ord("a") + place) + letters
    return letters


def _opened(value: T | None) -> T:
    if value is None:
        raise OverlaynetError("a lab is used as a context manager: with Lab() as lab")
    return value
