"""The node's identity: what it is made from, and whose one is that is kept in the state directory."""

import json
import os
import re
from pathlib import Path
from typing import Any

import attrs
import pytest

from overlaynet import identity
from overlaynet.identity import Circumstances, IdentityFiles, circumstances, node_identity
from overlaynet.model import Underlay

MACHINE = "0123456789abcdef0123456789abcdef\n"
HARDWARE = "52:54:00:12:34:56"


def test_the_identity_is_what_it_always_was() -> None:
    """A change of the recipe would make every node of a running network a stranger to its own lease."""
    assert node_identity(HARDWARE, MACHINE, "alpha") == "a53036156129"
    assert node_identity(HARDWARE, "", "alpha") == "79a06809122a"
    assert node_identity("", "", "alpha") == "ed8508f28160"


def test_the_identity_does_not_show_the_machines() -> None:
    identity = node_identity(HARDWARE, MACHINE, "alpha")
    assert re.fullmatch("[0-9a-f]{12}", identity)
    assert identity not in MACHINE


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ((HARDWARE, MACHINE, "a"), (HARDWARE, MACHINE, "b"), True),  # a renamed host
        ((HARDWARE, MACHINE, "a"), (HARDWARE.upper(), MACHINE.upper().strip(), "a"), True),
        ((HARDWARE, MACHINE, "a"), ("52:54:00:12:34:57", MACHINE, "a"), False),  # two namespaces, or two clones
        (
            (HARDWARE, MACHINE, "a"),
            (HARDWARE, MACHINE.replace("0", "f"), "a"),
            False,
        ),  # two hosts with one hardware address
        ((HARDWARE, "", "a"), (HARDWARE, "", "b"), True),
        ((HARDWARE, "", "a"), ("52:54:00:12:34:57", "", "a"), False),
        (("", MACHINE, "a"), ("", MACHINE, "b"), True),
        (("", "", "a"), ("", "", "b"), False),
        ((HARDWARE, "uninitialized\n", "a"), (HARDWARE, "", "a"), True),
        ((HARDWARE, "0" * 32, "a"), (HARDWARE, "", "a"), True),
        (("00:00:00:00:00:00", MACHINE, "a"), ("", MACHINE, "a"), True),
        (("00:00:00:00:00:00", "", "a"), ("", "", "a"), True),
    ],
)
def test_what_makes_two_nodes(one: tuple[str, str, str], other: tuple[str, str, str], same: bool) -> None:
    assert (node_identity(*one) == node_identity(*other)) is same


# -- what is kept

COMPUTED = "a53036156129"
ANOTHER = "79a06809122a"
NOW = Circumstances(
    machine="hash of the machine's",
    boot="first",
    namespace="1",
    initial=True,
    product="hash of the product's",
    hardware_addresses=frozenset({HARDWARE, "52:54:00:00:00:01"}),
)
OTHER_INTERFACES = frozenset({"52:54:00:99:99:99"})
IN_A_NAMESPACE = attrs.evolve(NOW, initial=False, namespace="7", product="")


@pytest.mark.parametrize(
    ("then", "changes", "same"),
    [
        (NOW, {}, True),
        (
            NOW,
            {"hardware_addresses": OTHER_INTERFACES},
            True,
        ),  # replaced under a daemon that was down, or --iface changed
        (NOW, {"hardware_addresses": OTHER_INTERFACES, "boot": "second"}, True),  # as random ones are in each boot
        (
            NOW,
            {"hardware_addresses": OTHER_INTERFACES, "boot": "second", "product": ""},
            False,
        ),  # nothing tells them apart
        (NOW, {"hardware_addresses": frozenset({HARDWARE}), "boot": "second", "product": ""}, True),
        (NOW, {"hardware_addresses": frozenset({HARDWARE}), "boot": "second", "namespace": "3"}, True),
        (NOW, {"hardware_addresses": frozenset(), "product": "another"}, True),  # the boot says enough
        # A copy of the disk.
        (NOW, {"hardware_addresses": OTHER_INTERFACES, "boot": "second", "product": "another"}, False),
        (NOW, {"machine": "another"}, False),
        (
            attrs.evolve(NOW, product=""),
            {"hardware_addresses": OTHER_INTERFACES, "boot": "second", "product": ""},
            False,
        ),
        # Other network namespaces of the host.
        (NOW, {"hardware_addresses": OTHER_INTERFACES, "initial": False, "namespace": "7"}, False),
        (NOW, {"initial": False, "namespace": "7"}, False),
        (IN_A_NAMESPACE, {"hardware_addresses": OTHER_INTERFACES}, True),
        (IN_A_NAMESPACE, {"hardware_addresses": OTHER_INTERFACES, "namespace": "8"}, False),
        (IN_A_NAMESPACE, {"hardware_addresses": OTHER_INTERFACES, "boot": "second"}, False),
        (IN_A_NAMESPACE, {"namespace": "8"}, True),  # a container that was started anew
        (IN_A_NAMESPACE, {"namespace": "8", "boot": "second"}, True),
        (
            attrs.evolve(IN_A_NAMESPACE, product="hash of the product's"),
            {"hardware_addresses": OTHER_INTERFACES, "namespace": "8", "boot": "second"},
            False,
        ),
    ],
)
def test_whose_a_kept_identity_is(tmp_path: Path, then: Circumstances, changes: dict[str, Any], same: bool) -> None:
    assert IdentityFiles(tmp_path).recall(COMPUTED, then) == COMPUTED
    now = attrs.evolve(then, **changes)
    assert IdentityFiles(tmp_path).recall(ANOTHER, now) == (COMPUTED if same else ANOTHER)
    assert IdentityFiles(tmp_path).recall(ANOTHER, now) == (COMPUTED if same else ANOTHER)


def test_interfaces_can_be_replaced_one_after_the_other(tmp_path: Path) -> None:
    IdentityFiles(tmp_path).recall(COMPUTED, attrs.evolve(NOW, product=""))
    for boot in range(5):
        addresses = frozenset({f"52:54:00:00:00:{boot:02}", f"52:54:00:00:00:{boot + 1:02}"})
        now = attrs.evolve(
            NOW, product="", boot=str(boot), hardware_addresses=addresses | ({HARDWARE} if boot == 0 else set())
        )
        assert IdentityFiles(tmp_path).recall(ANOTHER, now) == COMPUTED


def test_an_interface_that_is_given_to_another_namespace_does_not_take_the_identity_along(tmp_path: Path) -> None:
    """The node that it was made for lives on with another interface."""
    IdentityFiles(tmp_path).recall(COMPUTED, IN_A_NAMESPACE)
    moved = attrs.evolve(IN_A_NAMESPACE, hardware_addresses=OTHER_INTERFACES)
    assert IdentityFiles(tmp_path).recall(ANOTHER, moved) == COMPUTED
    second = attrs.evolve(IN_A_NAMESPACE, namespace="8")
    given = IdentityFiles(tmp_path).recall(COMPUTED, second)
    assert given not in (COMPUTED, ANOTHER)
    assert re.fullmatch("[0-9a-f]{12}", given)
    assert IdentityFiles(tmp_path).recall(COMPUTED, second) == given
    assert IdentityFiles(tmp_path).recall(ANOTHER, moved) == COMPUTED


def test_only_what_is_needed_is_written_and_for_the_owner_only(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "state"
    before = os.umask(0)
    try:
        IdentityFiles(directory).recall(COMPUTED, NOW)
    finally:
        os.umask(before)
    (file,) = directory.iterdir()
    assert [path.stat().st_mode & 0o777 for path in (directory, file)] == [0o700, 0o600]
    written = file.stat()
    IdentityFiles(directory).recall(ANOTHER, NOW)
    assert file.stat() == written
    IdentityFiles(directory).recall(ANOTHER, attrs.evolve(NOW, boot="second"))
    assert [path.name for path in directory.iterdir()] == [file.name]
    assert json.loads(file.read_text())["Boot"] == "second"


def test_nodes_that_never_come_back_are_forgotten(tmp_path: Path) -> None:
    for number in range(20):
        identity = f"{number:012x}"
        now = attrs.evolve(IN_A_NAMESPACE, namespace=f"10{number}", hardware_addresses=frozenset({f"a{number}"}))
        assert IdentityFiles(tmp_path).recall(identity, now) == identity
    IdentityFiles(tmp_path).recall(COMPUTED, NOW)
    assert len(list(tmp_path.iterdir())) == 21
    again = attrs.evolve(IN_A_NAMESPACE, boot="second", namespace="105", hardware_addresses=frozenset({"a5"}))
    assert IdentityFiles(tmp_path).recall(ANOTHER, again) == f"{5:012x}"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "identity-000000000005.json",
        f"identity-{COMPUTED}.json",
    ]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "Expecting value"),
        (b'{"Identity":"\xff"}', "can't decode byte"),
        (b"[]", "it holds no JSON object"),
        (b"[" * 100_000, "recursion"),
        (b'{"Identity":"a53036156129"}', "its HardwareAddresses is missing"),
        (b'{"Identity":7}', "its Identity is missing, or of the wrong kind"),
        (b'{"Identity":"../../etc/passwd"}', "its Identity is not 12 hexadecimal digits"),
        (b'{"Identity":"a53036156129","HardwareAddresses":[7]}', "its HardwareAddresses are not all text"),
    ],
)
def test_a_damaged_file_is_reported_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes, reason: str
) -> None:
    IdentityFiles(tmp_path).recall(COMPUTED, NOW)
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    file.write_bytes(content)
    files = IdentityFiles(tmp_path)
    assert files.recall(COMPUTED, NOW) == COMPUTED
    assert files.recall(COMPUTED, NOW) == COMPUTED
    assert file.read_bytes() == good
    (record,) = caplog.records
    assert (record.levelname, record.getMessage()) == ("WARNING", "damaged identity file removed")
    assert reason in str(record.__dict__)


def test_where_nothing_can_be_kept_it_goes_on_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state").write_text("no directory")
    files = IdentityFiles(tmp_path / "state")
    assert files.recall(COMPUTED, NOW) == COMPUTED
    assert files.recall(ANOTHER, NOW) == ANOTHER
    (record,) = caplog.records
    assert (record.levelname, record.getMessage()) == ("WARNING", "identity not kept")
    assert "let --state-directory be writable, or give --node" in str(record.__dict__)


class NoLinks:
    def links(self) -> list[Any]:
        return []


def test_the_products_uuid_is_the_same_read_by_root_and_from_the_copy_for_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a node would not know itself any more whose unit is changed from one to the other."""
    machine, uuid, copy = (tmp_path / name for name in ("machine-id", "product_uuid", "copy"))
    machine.write_text(MACHINE)
    monkeypatch.setattr(identity, "MACHINE_ID", machine)
    monkeypatch.setattr(identity, "PRODUCT_UUID", uuid)
    monkeypatch.setattr(identity, "PRODUCT_UUID_COPY", copy)

    def product() -> str:
        kernel: Any = NoLinks()
        return circumstances(kernel, Underlay("eth0", 1500)).product

    assert product() == ""
    copy.write_text("4C4C4544-0042-3510-8052-B4C04F564433\n")
    from_copy = product()
    uuid.write_text("4c4c4544-0042-3510-8052-b4c04f564433\n")
    copy.unlink()
    assert re.fullmatch("[0-9a-f]{64}", from_copy)
    assert product() == from_copy
