"""The documented design in one machine: hosts, their containers and the switch between them, as network namespaces.

                      host-a                                       host-b
    container-a ── cni0   overlay0   eth0 ── switch ── eth0   overlay0   cni0 ── container-b
    10.244.1.96            172.16.130.140         172.16.130.164            10.244.2.194

The overlay and the underlay may have IPv6 as well, or instead: fd00:10:244:1::96, fd00:16::140 and so on.

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
from collections.abc import Collection, Sequence
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
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
    "NETWORK6",
    "SWITCH_ADDRESS",
    "SWITCH_ADDRESS6",
    "UNDERLAY",
    "UNDERLAY6",
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
NETWORK6 = IPv6Network("fd00:10:244::/48")
UNDERLAY6 = IPv6Network("fd00:16::/64")
SWITCH_ADDRESS6 = IPv6Interface("fd00:16::1/64")
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
        """The host that it is on."""
        self.label = label
        """Its name in messages, such as ``container-a``."""
        self.number = number
        """The last digits of its addresses."""
        self.namespace = NetworkNamespace(f"{host.lab.name}-{label}")
        """Where its processes run."""
        self.address: IPv4Interface | None = None
        """``None`` until it is plugged in; then the address number ``number`` of the host's subnet, if that has one."""
        self.address6: IPv6Interface | None = None
        """Likewise; it ends in the same digits."""
        self.namespace.ip("link set lo up")

    @property
    def ip(self) -> IPv4Address:
        """The address alone. :raises OverlaynetError: if it is not plugged in yet."""
        return _plugged_in(self.address, self).ip

    @property
    def ip6(self) -> IPv6Address:
        """The IPv6 address alone. :raises OverlaynetError: if it has none (yet)."""
        return _plugged_in(self.address6, self).ip

    def reaches(self, other: Container, *arguments: str, version: int = 4) -> bool:
        """True if the other container answers a ``ping`` to its IPv4 or IPv6 address within two seconds.

        :param arguments: more arguments of ``ping``, such as ``-s 1400``.
        :raises OverlaynetError: if the other has no address of that version (yet).
        """
        address = other.ip if version == 4 else other.ip6
        command = ["ping", "-n", "-c", "1", "-W", "2", *arguments, str(address)]
        return self.namespace.execute(command, check=False).returncode == 0


class Host:
    """A host: a namespace whose ``eth0`` is plugged into the lab's switch, with IP forwarding on."""

    def __init__(self, lab: Lab, number: int) -> None:
        letter = _letters(number)
        self.lab = lab
        """The lab that it is in."""
        self.number = number
        """From 1."""
        self.label = f"host-{letter}"
        """Its name in messages, such as ``host-a``."""
        last = _HOST_NUMBERS[number - 1] if number <= 2 else _HOST_NUMBERS[1] + number - 2
        self.address = IPv4Interface((UNDERLAY.network_address + last, UNDERLAY.prefixlen))
        """What ``eth0`` has if the underlay has IPv4."""
        self.address6 = IPv6Interface((_same_digits(UNDERLAY6, last), UNDERLAY6.prefixlen))
        """What ``eth0`` has if the underlay has IPv6."""
        self.directory = lab.directory / self.label
        """Its own, for files; gone with the lab."""
        self.directory.mkdir()
        self.subnet_file = self.directory / "subnet.env"
        """What its daemon writes for container runtimes."""
        self.status_socket = self.directory / "status.sock"
        """Where its daemon is asked for its status."""
        self.daemons: list[DaemonProcess] = []
        """Those that were started on it, whether or not they still run."""
        self._starts = 0
        self._connected_as: tuple[str | None, ...] | None = None
        self.namespace = NetworkNamespace(f"{lab.name}-{self.label}")
        """Where its processes run."""
        container = _CONTAINER_NUMBERS[number - 1] if number <= 2 else _OTHER_CONTAINERS_NUMBER
        self.containers = [Container(self, f"container-{letter}", container)]
        """Those on it; one, unless more are added."""
        self.plug_in()

    @property
    def daemon(self) -> DaemonProcess:
        """The daemon that was started last. :raises OverlaynetError: if none was."""
        if not self.daemons:
            raise OverlaynetError(f"{self.label} has had no daemon yet: call its start_overlaynet()")
        return self.daemons[-1]

    @property
    def running(self) -> bool:
        """True if it has a daemon that runs."""
        return bool(self.daemons) and self.daemon.running

    def plug_in(self) -> None:
        """Make ``eth0`` and plug it into the switch: done at first, and to be done again after somebody has deleted it."""
        lab = self.lab
        lab.switch.ip(
            f"link add {self.label} mtu {lab.mtu} type veth peer name eth0 mtu {lab.mtu} netns {self.namespace.name}",
            f"link set {self.label} master switch0 up",
        )
        self.namespace.ip(
            "link set lo up",
            "link set eth0 up",
        )
        for version, address, gateway in ((4, self.address, SWITCH_ADDRESS), (6, self.address6, SWITCH_ADDRESS6)):
            if version in lab.underlay:
                self.namespace.ip(f"address add {address} dev eth0 {'nodad' if version == 6 else ''}")
                if lab.default_route:
                    self.namespace.ip(f"route add default via {gateway.ip}")
        self.namespace.set_sysctl("net.ipv4.ip_forward", 1)
        if lab.overlay.ipv6 is not None:
            self.namespace.set_sysctl("net.ipv6.conf.all.forwarding", 1)

    def seed_subnet_file(self, subnet: IPv4Network | None, subnet6: IPv6Network | None = None) -> None:
        """Write the subnet file as an earlier run on this host would have left it: the daemon then prefers these subnets."""
        text = subnet_file.render(self.lab.overlay, Lease(Subnets(subnet, subnet6)), self.lab.mtu - ENCAPSULATION)
        subnet_file.write(self.subnet_file, text)

    def start_overlaynet(
        self, store: Sequence[str | Path], extra: Sequence[str | Path] = (), *, wait: bool = True, named: bool = True
    ) -> DaemonProcess:
        """Start ``overlaynet run`` on this host.

        :param store: the arguments that choose the store, such as :attr:`Lab.file_store`.
        :param extra: more arguments; of a setting that is given twice, the later one counts.
        :param wait: return only when it is ready.
        :param named: give it this host's label as its identity; else it makes one for itself.
        :raises OverlaynetError: if a daemon of this host runs already, or with ``wait``, if it does not get ready.
        """
        if self.running:
            raise OverlaynetError(f"overlaynet runs on {self.label} already; stop it first")
        self._starts += 1
        log_file = self.directory / f"overlaynet-{self._starts}.log"
        # -P: what lies in the working directory must not pass for the package.
        command: list[str | Path] = [sys.executable, "-P", "-m", "overlaynet", "run"]
        command += ["--backend", self.lab.backend, *store]
        command += [*self.lab.network_arguments(store), "--iface", "eth0"]
        command += ["--node", self.label] if named else []
        command += ["--subnet-file", self.subnet_file, "--status-socket", self.status_socket]
        command += ["--state-directory", self.directory / "state"]
        command += ["--log-format", "json", *extra]
        # Nor must the settings of whoever runs the lab.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("OVERLAYNET_")}
        with log_file.open("xb") as log:
            process = self.namespace.popen(command, stdout=log, stderr=log, env=environment)
        self.daemons.append(DaemonProcess(self.label, process, log_file, self.subnet_file))
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
        texts = values.get("FLANNEL_SUBNET"), values.get("FLANNEL_IPV6_SUBNET")
        bridge = None if texts[0] is None else IPv4Interface(texts[0])
        bridge6 = None if texts[1] is None else IPv6Interface(texts[1])
        mtu = values["FLANNEL_MTU"]
        if self._connected_as == (*texts, mtu):
            return
        if self._connected_as is not None:
            for container in self.containers:
                container.namespace.ip("link delete eth0")
            self.namespace.ip("link delete cni0")
        self._connected_as = (*texts, mtu)
        self.namespace.ip("link add cni0 type bridge mcast_snooping 0", f"link set cni0 mtu {mtu} up")
        if bridge is not None:
            self.namespace.ip(f"address add {bridge} dev cni0")
        if bridge6 is not None:
            self.namespace.ip(f"address add {bridge6} dev cni0 nodad")
        for place, container in enumerate(self.containers):
            inside, port = container.namespace, f"veth{place}"
            self.namespace.ip(
                f"link add {port} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {inside.name}",
                f"link set {port} master cni0 up",
            )
            inside.ip("link set eth0 up")
            if bridge is not None:
                address = bridge.network.network_address + container.number
                container.address = IPv4Interface((address, bridge.network.prefixlen))
                inside.ip(f"address add {container.address} dev eth0", f"route add default via {bridge.ip}")
            if bridge6 is not None:
                address6 = _same_digits(bridge6.network, container.number)
                container.address6 = IPv6Interface((address6, bridge6.network.prefixlen))
                inside.ip(f"address add {container.address6} dev eth0 nodad", f"route add default via {bridge6.ip}")

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
    :param overlay: the overlay's IPv4 network, if it has one.
    :param overlay6: its IPv6 network, if it has one.
    :param underlay: the IP versions of the underlay.
    :param backend: which carries the hosts' packets.
    :param mtu: of every ``eth0``, in bytes.
    :param default_route: whether the hosts have one, to the switch's address (where nobody forwards anything).
    :param seed: whether the hosts' subnet files are written beforehand.
    """

    def __init__(
        self,
        label: str = "lab",
        *,
        hosts: int = 2,
        overlay: IPv4Network | None = NETWORK,
        overlay6: IPv6Network | None = None,
        underlay: Collection[int] = (4,),
        backend: str = "udp",
        mtu: int = 1500,
        default_route: bool = False,
        seed: bool = True,
    ) -> None:
        if not 1 <= hosts <= MOST_HOSTS:
            raise OverlaynetError(f"a lab has from 1 to {MOST_HOSTS} hosts, not {hosts}")
        if not re.fullmatch("[a-z]+", label):
            raise ValueError(f"a lab's label is made of small letters, not {label!r}")
        document: dict[str, JSON] = {"EnableIPv4": False} if overlay is None else {"Network": str(overlay)}
        if overlay6 is not None:
            document |= {"EnableIPv6": True, "IPv6Network": str(overlay6)}
        self.overlay = network.parse(json.dumps(document))
        """The network that its hosts are to form."""
        self.underlay = underlay
        self.backend = backend
        self.mtu = mtu
        self.default_route = default_route
        self.hosts: list[Host] = []
        """In the order of their numbers; empty unless it is open."""
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
            *([f"address add {SWITCH_ADDRESS6} dev switch0 nodad"] if 6 in self.underlay else []),
            "link set switch0 up",
        )
        for number in range(1, self._count + 1):
            host = Host(self, number)
            self.hosts.append(host)
            ranges = self.overlay.ipv4, self.overlay.ipv6
            if self._seed and all(each is None or number <= each.size for each in ranges):
                host.seed_subnet_file(
                    None if ranges[0] is None else ranges[0][number - 1],
                    None if ranges[1] is None else ranges[1][number - 1],
                )

    def network_arguments(self, store: Sequence[str | Path]) -> list[str | Path]:
        """What makes ``overlaynet run`` create the network document; if it takes more than a flag, it is written now.

        :param store: the arguments that choose the store.
        """
        flags = [] if self.overlay.ipv4 is None else ["--network", str(self.overlay.ipv4.network)]
        if self.overlay.ipv6 is None:
            return [*flags]
        flags += ["--ipv6-network", str(self.overlay.ipv6.network), "--backend", self.backend]
        command: list[str | Path] = [sys.executable, "-P", "-m", "overlaynet", "network", "set", *flags, *store]
        self.switch.execute(command)
        return []

    def wait_until_acquainted(self, seconds: float = 30) -> None:
        """Wait until each daemon that runs has all the others as peers.

        :raises TimeoutError: if that is not so within so many seconds.
        """
        nodes = [host for host in self.hosts if host.running]
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
            _end_all_inside(namespace.name)  # whoever has started it, and while it can be found by the name
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


def _same_digits(network: IPv6Network, number: int) -> IPv6Address:
    """The address of the network that ends in the digits of a decimal number: fd00:16::140 for 140."""
    return network.network_address + int(str(number), 16)


def _plugged_in(address: T | None, container: Container) -> T:
    if address is None:
        raise OverlaynetError(
            f"{container.label} is not plugged in yet: call connect_containers() of {container.host.label}"
        )
    return address


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
        _end_all_inside(member)
        namespaces.delete(member)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(directory)
    return found


def _end_all_inside(member: str) -> None:
    """Kill all processes in a namespace, and wait for their end; 5 seconds at most, for the kernel may be at work for one."""
    with contextlib.suppress(TimeoutError):
        wait_until(lambda: not _kill_inside(member), 5, f"the end of what runs in {member}")


def _kill_inside(member: str) -> list[int]:
    """Kill all processes in a namespace but this one; those that were still there."""
    there = [identifier for identifier in namespaces.process_ids(member) if identifier != os.getpid()]
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
