"""A private etcd: one server or a whole cluster, in a directory of its own, as short-lived as the ``with`` block.

Needs ``/usr/bin/etcd`` (or another ``etcd`` in ``PATH``) and, for :func:`make_certificates`, ``openssl``. What is stored is
not meant to outlast the machine: writes are not flushed to disk.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import attrs

from overlaynet.errors import OverlaynetError
from overlaynet.testing import namespaces
from overlaynet.testing._processes import ProcessStart

_START_SECONDS = 30.0
_STOP_SECONDS = 10.0
_LOG_LINES_SHOWN = 5
# Below the ports that Linux gives to outgoing connections: one that is free now is free after a restart, too.
_PORTS = range(10240, 32768)


@attrs.frozen
class Certificates:
    """A certificate authority and what it signed, as PEM files."""

    cafile: Path
    """The authority's certificate."""
    server_certificate: Path
    """For servers."""
    server_key: Path
    """Its key."""
    client_certificate: Path
    """For clients."""
    client_key: Path
    """Its key."""


def make_certificates(
    directory: Path,
    server_names: Sequence[str] = ("DNS:localhost", "IP:127.0.0.1", "IP:::1"),
    *,
    authority: Certificates | None = None,
    validity: tuple[datetime, datetime] | None = None,
) -> Certificates:
    """Make a throw-away authority, and one certificate of it for etcd servers and one for clients.

    :param directory: for the files; of its own for each call.
    :param server_names: who the server claims to be, as OpenSSL writes alternative names.
    :param authority: what an earlier call has made: its authority signs, and none is made.
    :param validity: from when until when all that is made is valid, in whole seconds; by default for two days from now.
    :raises OverlaynetError: if openssl is missing or fails.
    """
    directory.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    since, until = validity or (now - timedelta(minutes=1), now + timedelta(days=2))
    ca = directory / "ca.crt" if authority is None else authority.cafile
    # Of the commands that sign, only this one takes dates, and it keeps books.
    (directory / "index.txt").touch()
    (directory / "books.cnf").write_text(
        f"[ca]\ndefault_ca = ca\n[ca]\ndatabase = {directory}/index.txt\nnew_certs_dir = {directory}\n"
        "rand_serial = yes\nunique_subject = no\ndefault_md = sha256\npolicy = policy\n"
        "[policy]\norganizationName = supplied\n"
    )

    def make(name: str, *extensions: str) -> None:
        settings, request = directory / f"{name}.cnf", directory / f"{name}.csr"
        settings.write_text(
            # No common name: etcd's HTTP gateway refuses clients that have one once users are enabled.
            "[req]\nprompt = no\ndistinguished_name = subject\n"
            f"[subject]\nO = overlaynet test {name}\n[extensions]\nsubjectKeyIdentifier = hash\n"
            "authorityKeyIdentifier = keyid\n" + "".join(f"{line}\n" for line in extensions)
        )
        key, certificate = directory / f"{name}.key", directory / f"{name}.crt"
        _openssl("req", "-new", "-config", settings, "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
                 "-keyout", key, "-out", request)  # fmt: skip
        _openssl("ca", "-batch", "-notext", "-config", directory / "books.cnf", "-keyfile", ca.with_suffix(".key"),
                 *(["-selfsign"] if certificate == ca else ["-cert", ca]), "-extfile", settings, "-extensions", "extensions",
                 "-startdate", f"{since:%Y%m%d%H%M%SZ}", "-enddate", f"{until:%Y%m%d%H%M%SZ}",
                 "-in", request, "-out", certificate)  # fmt: skip

    if authority is None:
        make("ca", "basicConstraints = critical,CA:TRUE", "keyUsage = critical,keyCertSign,cRLSign")
    usage = ["basicConstraints = critical,CA:FALSE", "keyUsage = critical,digitalSignature"]
    # The gateway inside etcd is a client of its own server, with the server's certificate: hence both usages.
    both = "extendedKeyUsage = serverAuth,clientAuth"
    make("server", *usage, both, f"subjectAltName = {','.join(server_names)}")
    make("client", *usage, "extendedKeyUsage = clientAuth")
    return Certificates(
        ca,
        directory / "server.crt",
        directory / "server.key",
        directory / "client.crt",
        directory / "client.key",
    )


def _openssl(*arguments: str | Path) -> None:
    command = ["openssl", *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError:
        raise OverlaynetError("there is no openssl; install it: apt-get install openssl") from None
    if done.returncode != 0:
        raise OverlaynetError(f"openssl {arguments[0]} failed: {done.stderr.strip()}")


class EtcdServer:
    """One etcd server, started by entering the context and gone, with its data, after it.

    It keeps its port and its data over :meth:`stop` or :meth:`kill` and :meth:`start`.

    :param address: what it listens on for clients.
    :param port: its port; by default a free one, or 2379 in a network namespace.
    :param network_namespace: name of the network namespace (``ip netns``) to run it in; needs root.
    :param certificates: serve TLS with these.
    :param client_certificates: demand a certificate of the same authority from every client.
    :param arguments: more arguments for etcd.
    :param directory: an existing directory to put its own into; by default that for temporary files.
    """

    def __init__(
        self,
        address: str = "127.0.0.1",
        port: int | None = None,
        *,
        network_namespace: str | None = None,
        certificates: Certificates | None = None,
        client_certificates: bool = False,
        arguments: Sequence[str] = (),
        directory: Path | None = None,
    ) -> None:
        self._parent = directory
        self.address = address
        self.network_namespace = network_namespace
        self.certificates = certificates
        self._port_given = port is not None or network_namespace is not None
        self.port = port or (_free_port(address) if network_namespace is None else 2379)
        self._arguments = list(arguments)
        if certificates is not None:
            self._arguments += ["--cert-file", str(certificates.server_certificate)]
            self._arguments += ["--key-file", str(certificates.server_key)]
            if client_certificates:
                self._arguments += ["--client-cert-auth", "--trusted-ca-file", str(certificates.cafile)]
        self._name = "default"
        self._members = ["default"]
        self._directory: Path | None = None
        self._start: ProcessStart | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._notifications: socket.socket | None = None

    @property
    def endpoint(self) -> str:
        """The URL for clients, such as ``http://127.0.0.1:2379``."""
        scheme = "http" if self.certificates is None else "https"
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{scheme}://{host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """The process's id; ``None`` when it is not running."""
        return None if self._process is None else self._process.pid

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="overlaynet-etcd-", dir=self._parent))
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Start it, and return when it serves requests.

        :raises OverlaynetError: if etcd is missing, ends, or is not ready in time; with its last words.
        """
        while True:
            self._spawn()
            try:
                self._wait_until_ready()
            except OverlaynetError:
                taken = "address already in use" in self.log()
                self.kill()
                if not taken or self._port_given:
                    raise
                self.port = _free_port(self.address)
            else:
                self._port_given = True
                return

    def stop(self) -> None:
        """End it as an operator would (SIGTERM), and wait until it has ended. Nothing happens when it is not running."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it as a crash would (SIGKILL)."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Let it hang: connections are accepted, and nothing is answered (SIGSTOP)."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after :meth:`pause`."""
        self._running().send_signal(signal.SIGCONT)

    def wipe(self) -> None:
        """Remove its data, while it does not run: it starts as an empty etcd, which takes itself for the same cluster."""
        shutil.rmtree(self._data())

    def back_up(self, directory: Path) -> None:
        """Copy its data, while it does not run, to a directory that does not exist yet."""
        shutil.copytree(self._data(), directory)

    def restore(self, directory: Path) -> None:
        """Put what :meth:`back_up` copied in place of its data, while it does not run."""
        self.wipe()
        shutil.copytree(directory, self._data())

    def close(self) -> None:
        """Kill it and remove its data; idempotent."""
        self.kill()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def log(self) -> str:
        """All that it has written since it was first started."""
        return (self._home() / f"{self._name}.log").read_text(errors="replace")

    def post(self, path: str, body: Mapping[str, Any], token: str | None = None) -> Any:
        """Send one request of etcd's HTTP gateway (``/v3/kv/put``), and return the parsed answer.

        :raises OverlaynetError: if the answer is not 200.
        """
        if self.network_namespace is None:
            return self._post(path, body, token)
        return namespaces.run_inside(self.network_namespace, self._post, path, body, token)

    def _post(self, path: str, body: Mapping[str, Any], token: str | None) -> Any:
        if self.certificates is None:
            connection = http.client.HTTPConnection(self.address, self.port, timeout=10)
        else:
            context = ssl.create_default_context(cafile=self.certificates.cafile)
            context.load_cert_chain(self.certificates.client_certificate, self.certificates.client_key)
            context.check_hostname = False
            connection = http.client.HTTPSConnection(self.address, self.port, timeout=10, context=context)
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"} | ({"Authorization": token} if token else {})
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read().decode()
        if response.status != http.HTTPStatus.OK:
            raise OverlaynetError(f"{path} at {self.endpoint} answered {response.status}: {text.strip()}")
        return json.loads(text)

    def _spawn(self) -> None:
        if self._process is not None:
            raise OverlaynetError(f"the etcd at {self.endpoint} is already running")
        program = shutil.which("etcd")
        if program is None:
            raise OverlaynetError("there is no etcd; install it: apt-get install etcd-server")
        home = self._home()
        command = [] if self.network_namespace is None else ["ip", "netns", "exec", self.network_namespace]
        command += [program, "--name", self._name, "--data-dir", f"{self._name}.data"]
        command += ["--listen-client-urls", self.endpoint, "--advertise-client-urls", self.endpoint]
        # Members talk over sockets in the common directory: no second port, and no network needed between them.
        command += ["--listen-peer-urls", f"unix://{self._name}:0"]
        command += ["--initial-advertise-peer-urls", f"unix://{self._name}:0"]
        command += ["--initial-cluster", ",".join(f"{name}=unix://{name}:0" for name in self._members)]
        command += ["--heartbeat-interval", "50", "--election-timeout", "500", "--unsafe-no-fsync"]
        command += ["--logger", "zap", "--log-outputs", "stderr", *self._arguments]
        notify = home / f"{self._name}.notify"
        self._notifications = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        notify.unlink(missing_ok=True)
        self._notifications.bind(str(notify))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
        environment["NOTIFY_SOCKET"] = str(notify)
        with (home / f"{self._name}.log").open("ab") as log:
            self._start = ProcessStart(
                lambda: subprocess.Popen(  # noqa: S603
                    command,
                    cwd=home,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # a terminal's Ctrl-C or hang-up is meant for us: we end it in order
                )
            )
            self._process = self._start.wait()

    def _wait_until_ready(self) -> None:
        process, notifications = self._running(), self._notifications
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise OverlaynetError(
                    f"etcd ended with status {process.returncode}; its last words: {self._last_words()}"
                )
            with contextlib.suppress(BlockingIOError):
                # What etcd tells systemd, too: it reaches us out of any network namespace, and with any TLS settings.
                if notifications is not None and b"READY=1" in notifications.recv(4096):
                    return
            time.sleep(0.01)
        raise OverlaynetError(f"etcd was not ready within {_START_SECONDS:.0f} s; its last words: {self._last_words()}")

    def _last_words(self) -> str:
        # Whatever is wrong with its arguments comes first, followed by all that would be right.
        said = self.log().partition("\nUsage:")[0].strip().splitlines()
        return "; ".join(map(_readable, said[-_LOG_LINES_SHOWN:])) or "none"

    def _end(self, with_signal: signal.Signals) -> None:
        process = self._start.give_up() if self._start is not None else None
        self._start = self._process = None
        if process is not None:
            process.send_signal(with_signal)
            process.send_signal(signal.SIGCONT)  # a paused process acts on no signal but SIGKILL
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._notifications is not None:
            self._notifications.close()
            self._notifications = None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise OverlaynetError(f"the etcd at {self.endpoint} is not running")
        return self._process

    def _data(self) -> Path:
        if self._process is not None:
            raise OverlaynetError(f"the etcd at {self.endpoint} is running; stop it before its data is touched")
        return self._home() / f"{self._name}.data"

    def _home(self) -> Path:
        if self._directory is None:
            raise OverlaynetError("an EtcdServer is used as a context manager: with EtcdServer() as server")
        return self._directory


class EtcdCluster:
    """Several etcd servers that are one cluster, at one address; used like :class:`EtcdServer`.

    :param settings: of each, as of :class:`EtcdServer`. In a network namespace, their ports are 2379, 2380 and so on.
    """

    def __init__(self, size: int = 3, address: str = "127.0.0.1", **settings: Any) -> None:
        ports = range(2379, 2379 + size) if settings.get("network_namespace") else [None] * size
        self.members = [EtcdServer(address, port, **settings) for port in ports]
        names = [f"member{number}" for number in range(size)]
        for member, name in zip(self.members, names, strict=True):
            member._name, member._members = name, names
        self._directory: Path | None = None

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The URLs of all members."""
        return tuple(member.endpoint for member in self.members)

    @property
    def leader(self) -> EtcdServer:
        """The member that leads now; waits for an election.

        :raises OverlaynetError: if there is no leader in time.
        """
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline:
            for member in self.members:
                with contextlib.suppress(OverlaynetError, OSError, http.client.HTTPException):
                    if member.pid is None:
                        continue
                    status = member.post("/v3/maintenance/status", {})
                    if status.get("leader", "0") == status["header"]["member_id"]:
                        return member
            time.sleep(0.05)
        raise OverlaynetError(f"the etcd cluster has no leader after {_START_SECONDS:.0f} s")

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="overlaynet-etcd-"))
        for member in self.members:
            member._directory = self._directory
        with contextlib.ExitStack() as undo:
            undo.callback(self.close)
            # A member is ready only once most of them are: they have to start side by side.
            errors = list(_side_by_side(self.members))
            if errors:
                raise errors[0]
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Kill all members and remove their data; idempotent."""
        for member in self.members:
            member.kill()
        for member in self.members:
            member.close()


def _side_by_side(members: Sequence[EtcdServer]) -> Iterator[BaseException]:
    """Start all at once; what went wrong."""
    errors: list[BaseException] = []

    def start(member: EtcdServer) -> None:
        try:
            member.start()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=start, args=[member]) for member in members]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield from errors


def _readable(line: str) -> str:
    """One line of etcd's log, without all but what happened."""
    try:
        content = json.loads(line)
        return ": ".join(str(content[name]) for name in ("msg", "error") if name in content)
    except (ValueError, TypeError):
        return line


def _free_port(address: str) -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in random.sample(_PORTS, 100):
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return port
    raise OverlaynetError(f"there is no free port at {address}")
