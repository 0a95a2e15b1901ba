"""A machine for tests whose process 1 is a real systemd: its own files, processes and control groups, in namespaces."""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from overlaynet.errors import OverlaynetError
from overlaynet.testing.daemons import wait_until
from overlaynet.testing.namespaces import NetworkNamespace

SOURCE = Path(__file__).parents[2]
SOURCE_INSIDE = Path("/opt/overlaynet/source")
"""Where the machine has the source tree, read-only."""

_START_SECONDS = 30.0
_counter = itertools.count(1)

# A control group of its own, which the second unshare makes the root of all that systemd sees of them.
_ISOLATE = """
set -eu
mount -t cgroup2 cgroup2 /mnt
mkdir "/mnt/$1"
echo $$ >"/mnt/$1/cgroup.procs"
umount /mnt
shift
exec unshare --pid --fork --kill-child --cgroup --uts --ipc sh -c "$@"
"""
# The files of this machine, under a layer that is lost with the namespace. What would reach beyond the namespaces is
# read-only or left out: kernel parameters but those of the network, devices, and all units that a boot would start.
_BOOT = """
set -eu
mount -t tmpfs tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/proc /mnt/root
root=/mnt/root
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay $root
mount -t proc proc /mnt/proc
mount -t proc proc $root/proc
mount -o bind,ro /mnt/proc/sys $root/proc/sys
mount --bind /mnt/proc/sys/net $root/proc/sys/net
mount -t sysfs -o ro sysfs $root/sys
mount -t cgroup2 cgroup2 $root/sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs $root/run
mount -t tmpfs tmpfs $root/tmp
mount -t tmpfs -o mode=755 tmpfs $root/dev
mkdir $root/dev/net $root/dev/shm
while read -r name major minor; do mknod -m 666 $root/dev/$name c $major $minor; done <<DEVICES
null 1 3
zero 1 5
full 1 7
random 1 8
urandom 1 9
tty 5 0
ptmx 5 2
net/tun 10 200
DEVICES
ln -s /proc/self/fd $root/dev/fd

rm -rf $root/etc/systemd $root/etc/fstab $root/lib/systemd/system/*.wants $root/lib/systemd/system-generators
mkdir -p $root/etc/systemd/system $root/etc/systemd/journald.conf.d
printf '[Journal]\\nStorage=volatile\\nRateLimitIntervalSec=0\\n' >$root/etc/systemd/journald.conf.d/test.conf
printf '[Unit]\\nWants=systemd-journald.service\\n' >$root/etc/systemd/system/test.target
rm -f $root/etc/machine-id
echo "$1" >$root/etc/machine-id
hostname machine

# overlaynet as if it were installed, out of reach of what ProtectHome= hides.
mkdir -p $root/opt/overlaynet/python $root/opt/overlaynet/packages $root/opt/overlaynet/source
mount -o bind,ro "$2" $root/opt/overlaynet/python
mount -o bind,ro "$3" $root/opt/overlaynet/packages
mount -o bind,ro "$4" $root/opt/overlaynet/source
cat >$root/usr/local/bin/overlaynet <<LAUNCHER
#!/bin/sh
export LD_LIBRARY_PATH=/opt/overlaynet/python/lib PYTHONPATH=/opt/overlaynet/source:/opt/overlaynet/packages
exec /opt/overlaynet/python/bin/$5 -m overlaynet "\\$@"
LAUNCHER
chmod 755 $root/usr/local/bin/overlaynet

mkdir $root/old
cd $root
pivot_root . old
umount -l /old
exec env -i container=test PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \\
    /lib/systemd/systemd --unit=test.target --show-status=no --log-target=journal
"""
_REMOVE_CONTROL_GROUP = """
mount -t cgroup2 cgroup2 /mnt
find "/mnt/$1" -depth -type d -exec rmdir {} \\;
[ ! -e "/mnt/$1" ]
"""


class SystemdMachine:
    """A machine in a network namespace, booted by entering the context and gone, with all that it wrote, after it.

    It has the programs of this machine, ``/usr/local/bin/overlaynet``, and no service but the journal. Needs root and a
    kernel with control groups of version 2 and overlayfs.
    """

    def __init__(self, network: NetworkNamespace) -> None:
        self._network = network
        self._name = f"overlaynet-test-{os.getpid()}-{next(_counter)}"
        self._process: subprocess.Popen[bytes] | None = None
        self._systemd: int | None = None

    def __enter__(self) -> Self:
        python = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = sysconfig.get_path("purelib")
        machine_id = f"{os.getpid():032x}"
        boot: list[str | Path] = [_BOOT, "boot", machine_id, sys.base_prefix, packages, SOURCE, python]
        try:
            self._process = self._network.popen(
                ["unshare", "--mount", "sh", "-c", _ISOLATE, "isolate", self._name, *boot],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            self._systemd = wait_until(self._find_systemd, _START_SECONDS, "systemd to be started")
            wait_until(self._is_running, _START_SECONDS, "systemd to have booted")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def files(self) -> Path:
        """The machine's root directory, to be read and written from outside."""
        return Path("/proc", str(self._systemd), "root")

    def execute(
        self, command: Sequence[str | Path], *, check: bool = True, timeout: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end inside, as root, in the source tree; return what it wrote, as text.

        :raises OverlaynetError: with ``check``, if its exit status is not 0.
        """
        done = subprocess.run(
            self._inside(command),
            check=False,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        if check and done.returncode != 0:
            said = f"{done.stdout}\n{done.stderr}".strip()
            raise OverlaynetError(
                f"{' '.join(map(str, command))} ended with {done.returncode}: {said}\n{self.journal()}"
            )
        return done

    def popen(self, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
        """Start a command inside, as root. The caller waits for it; with the machine it is killed."""
        return subprocess.Popen(self._inside(command), stdin=subprocess.DEVNULL)

    def systemctl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``systemctl``."""
        return self.execute(["systemctl", "--no-pager", *arguments], check=check)

    def property(self, name: str, unit: str = "overlaynet") -> str:
        """A property of a unit, as ``systemctl show`` tells it."""
        return self.systemctl("show", "--value", "--property", name, unit).stdout.strip()

    def journal(self, unit: str | None = None) -> str:
        """The messages of a unit, and of systemd about it; of all, if none is named."""
        chosen = [] if unit is None else ["--unit", unit]
        return self.execute(["journalctl", "--no-pager", "--output", "cat", *chosen], check=False).stdout

    def close(self) -> None:
        """Kill all that runs in it. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()  # systemd dies with it, and with that, as process 1, all others
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
        wait_until(self._control_group_is_gone, 10, "the end of all processes")

    def _inside(self, command: Sequence[str | Path]) -> list[str]:
        enter = ["nsenter", "--target", str(self._systemd), "--mount", "--pid", "--cgroup", "--net", "--uts", "--ipc"]
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        return [*enter, "env", "-i", f"--chdir={SOURCE_INSIDE}", path, *map(str, command)]

    def _find_systemd(self) -> int | None:
        """The id, outside, of the machine's process 1, once it is systemd."""
        process = self._process
        assert process is not None
        assert process.stderr is not None
        if process.poll() is not None:
            raise OverlaynetError(f"the machine could not be made: {process.stderr.read().decode().strip()}")
        # It may have ended: before the file was opened, or after.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children = Path("/proc", str(process.pid), "task", str(process.pid), "children").read_text().split()
            for child in children:
                if Path("/proc", child, "comm").read_text().strip() == "systemd":
                    return int(child)
        return None

    def _is_running(self) -> bool:
        return self.systemctl("is-system-running", check=False).stdout.strip() == "running"

    def _control_group_is_gone(self) -> bool:
        command = ["unshare", "--mount", "sh", "-c", _REMOVE_CONTROL_GROUP, "remove", self._name]
        return subprocess.run(command, check=False, capture_output=True).returncode == 0
