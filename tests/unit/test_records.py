"""Leases as flannel writes them: its keys and values byte for byte, and strictness towards everything else."""

import json
import tracemalloc
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from overlaynet.errors import RecordError
from overlaynet.model import JSON, Lease, LeaseData, Malformed, Reservation, Subnets
from overlaynet.records import (
    decode_lease,
    decode_reservation,
    encode_lease,
    encode_reservation,
    is_placeholder,
    lease_key,
    parse_lease_key,
    placeholder,
    reservation_key,
)

IPV4 = IPv4Network("10.5.52.0/24")
IPV6 = IPv6Network("fd00:10:244:3::/64")
KEY = "subnets/10.5.52.0-24"
ADDRESS = IPv4Address("192.168.64.3")

vxlan: JSON = {"VNI": 1, "VtepMAC": "c6:d2:32:6f:8f:44"}
wireguard: JSON = {"PublicKey": "8h3fYBd0pNuVb7P0CVHbVZ8jJ8nZ1OBmLXRmKsqTgxQ=", "Port": 51820}

KEYS = [
    (Subnets(IPV4), "subnets/10.5.52.0-24"),
    (Subnets(IPv4Network("10.42.7.0/24"), IPV6), "subnets/10.42.7.0-24&fd00:10:244:3::-64"),
    (Subnets(ipv6=IPV6), "subnets/0.0.0.0-0&fd00:10:244:3::-64"),
]

# What flannel's backends write, with their fields set as flannel sets them.
VALUES = [
    pytest.param(
        Lease(Subnets(IPV4), ADDRESS),
        b'{"PublicIP":"192.168.64.3","PublicIPv6":null}',
        id="udp",
    ),
    pytest.param(
        Lease(Subnets(IPV4), ADDRESS, data=LeaseData("host-gw")),
        b'{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"host-gw"}',
        id="host-gw",
    ),
    pytest.param(
        Lease(Subnets(ipv6=IPV6), None, IPv6Address("2001:db8::3"), LeaseData("host-gw")),
        b'{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::3","BackendType":"host-gw"}',
        id="host-gw of IPv6 alone",
    ),
    pytest.param(
        Lease(Subnets(IPV4), ADDRESS, data=LeaseData("vxlan", vxlan)),
        b'{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan",'
        b'"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}',
        id="vxlan",
    ),
    pytest.param(
        Lease(Subnets(IPV4, IPV6), ADDRESS, IPv6Address("2001:db8::3"), LeaseData("vxlan", vxlan, vxlan)),
        b'{"PublicIP":"192.168.64.3","PublicIPv6":"2001:db8::3","BackendType":"vxlan",'
        b'"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},'
        b'"BackendV6Data":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}',
        id="vxlan of both families",
    ),
    pytest.param(
        Lease(Subnets(IPV4), ADDRESS, data=LeaseData("wireguard", wireguard)),
        b'{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"wireguard",'
        b'"BackendData":{"PublicKey":"8h3fYBd0pNuVb7P0CVHbVZ8jJ8nZ1OBmLXRmKsqTgxQ=","Port":51820}}',
        id="wireguard",
    ),
    pytest.param(
        Lease(Subnets(IPV4), ADDRESS, data=LeaseData("extension", "line one\nline two")),
        b'{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"extension","BackendData":"line one\\nline two"}',
        id="extension",
    ),
]


@pytest.mark.parametrize(("subnets", "key"), KEYS)
def test_keys_are_flannels(subnets: Subnets, key: str) -> None:
    assert lease_key(subnets) == key
    assert parse_lease_key(key) == subnets


@pytest.mark.parametrize(("lease", "value"), VALUES)
def test_values_are_flannels_byte_for_byte(lease: Lease, value: bytes) -> None:
    assert encode_lease(lease) == value
    assert decode_lease(lease_key(lease.subnets), value) == lease


def test_our_own_members_come_last() -> None:
    lease = Lease(Subnets(IPV4), ADDRESS, data=LeaseData("vxlan", vxlan), node="host-a", run="5f0c")
    assert encode_lease(lease) == (
        b'{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan",'
        b'"BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"},"Overlaynet":{"Node":"host-a","Run":"5f0c"}}'
    )


@pytest.mark.parametrize(
    ("margin", "written", "read"),
    [
        (3600.0, b'"RenewalMargin":3600', 3600),
        (40 * 2 / 3, b'"RenewalMargin":26', 26),
        (None, b"", None),
        (0.6, b"", None),
    ],
)
def test_when_it_will_be_renewed_is_said_in_whole_seconds(
    margin: float | None, written: bytes, read: float | None
) -> None:
    value = encode_lease(Lease(Subnets(IPV4), ADDRESS, renewal_margin=margin))
    assert value.partition(b'"Overlaynet":{')[2] == (written + b"}}" if written else b"")
    assert decode_lease(KEY, value).renewal_margin == read


@pytest.mark.parametrize("value", [b"0", b"-1", b"true", b'"60"', b"60.5", b"1" + b"0" * 400, b"[]"])
def test_an_odd_time_of_renewal_is_as_good_as_none(value: bytes) -> None:
    assert decode_lease(KEY, b'{"Overlaynet":{"RenewalMargin":' + value + b"}}").renewal_margin is None


def test_names_are_matched_without_regard_to_case() -> None:
    value = b'{"publicip":"192.168.64.3","PUBLICIPV6":"2001:db8::3","backendtype":"vxlan","backendData":1,"BackendV6data":2}'
    assert decode_lease(KEY, value) == Lease(
        Subnets(IPV4), ADDRESS, IPv6Address("2001:db8::3"), LeaseData("vxlan", 1, 2)
    )


def test_unknown_members_are_ignored() -> None:
    value = b'{"PublicIP":"192.168.64.3","Later":[1],"Overlaynet":{"Node":"a","Later":{}}}'
    assert decode_lease(KEY, value) == Lease(Subnets(IPV4), ADDRESS, node="a")


@pytest.mark.parametrize("value", [b"{}", b'{"PublicIP":"0.0.0.0"}', b'{"PublicIP":"0.0.0.0","PublicIPv6":null}'])
def test_a_lease_without_an_address_has_none(value: bytes) -> None:
    assert decode_lease(KEY, value) == Lease(Subnets(IPV4))


@pytest.mark.parametrize("own", [b"null", b"[]", b'"x"', b"7"])
def test_a_strange_overlaynet_member_is_no_identity(own: bytes) -> None:
    assert decode_lease(KEY, b'{"PublicIP":"192.168.64.3","Overlaynet":' + own + b"}").node == ""


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("config", "'config' is not the key of a lease, such as 'subnets/10.244.1.0-24'"),
        ("10.5.52.0-24", "'10.5.52.0-24' is not the key of a lease, such as 'subnets/10.244.1.0-24'"),
        ("subnets/", "'subnets/' is not the key of a lease, such as 'subnets/10.244.1.0-24'"),
        ("subnets/10.5.52.0/24", "'subnets/10.5.52.0/24' is not the key of a lease, such as 'subnets/10.244.1.0-24'"),
        ("subnets/10.5.52.0-24x", "'subnets/10.5.52.0-24x' is not the key of a lease, such as 'subnets/10.244.1.0-24'"),
        (
            "subnets/10.5.52.0-24\n",
            "'subnets/10.5.52.0-24\\n' is not the key of a lease, such as 'subnets/10.244.1.0-24'",
        ),
        ("subnets/10.5.52.0-24&", "'subnets/10.5.52.0-24&' is not the key of a lease, such as 'subnets/10.244.1.0-24'"),
        (
            "subnets/10.5.52.0-24&FD00::-64",
            "'subnets/10.5.52.0-24&FD00::-64' is not the key of a lease, such as 'subnets/10.244.1.0-24'",
        ),
        ("subnets/0.0.0.0-0", "the key 'subnets/0.0.0.0-0' claims the whole address space"),
        ("subnets/0.0.0.0-0&::-0", "the key 'subnets/0.0.0.0-0&::-0' claims the whole address space"),
        ("subnets/10.5.52.0-24&::-0", "the key 'subnets/10.5.52.0-24&::-0' claims the whole address space"),
        ("subnets/10.5.52.7-24", "the key 'subnets/10.5.52.7-24' names no subnet: "),
        ("subnets/10.5.52.0-33", "the key 'subnets/10.5.52.0-33' names no subnet: "),
        (
            "subnets/10.5.256.0-24",
            "the key 'subnets/10.5.256.0-24' names no subnet: ",
        ),
        (
            "subnets/10.5.52.0-24&:::-64",
            "the key 'subnets/10.5.52.0-24&:::-64' names no subnet: ",
        ),
    ],
)
def test_a_key_that_names_no_subnet_says_why(key: str, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse_lease_key(key)
    assert says(caught.value, reason)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"", "its value is not JSON: "),
        (
            b'{"PublicIP":"192',
            "its value is not JSON: ",
        ),
        (b"\xff\xfe\xfd", "its value is not JSON: "),
        (b"[" * 60_000, "its value is not JSON: "),
        (b"9" * 10_000, "its value is not JSON: "),
        (b'{"BackendData":"\\ud800"}', "its value holds what cannot be written again: "),
        (b'{"BackendV6Data":{"a":[{"\\uDFFF":1}]}}', "its value holds what cannot be written again: "),
        (b'{"Unknown":"\\ud83d, and not its other half"}', "its value holds what cannot be written again: "),
        (b'{"BackendData":"\xed\xa0\x80"}', "its value is not JSON: "),
        ('{"BackendData":1}'.encode("utf-16"), "its value is not JSON: "),
        (b'{"BackendData":-1e999}', "its value holds what cannot be written again: "),
        (b'{"BackendData":"' + b"x" * 65536 + b'"}', "its value has 65554 bytes, more than 65536"),
        (b"null", "its value is not a JSON object"),
        (b"[]", "its value is not a JSON object"),
        (b'{"PublicIP":null}', "PublicIP is None, not an IPv4 address"),
        (b'{"PublicIP":7}', "PublicIP is 7, not an IPv4 address"),
        (b'{"PublicIP":"host-a"}', "PublicIP is 'host-a', not an IPv4 address"),
        (b'{"PublicIP":"2001:db8::3"}', "PublicIP is '2001:db8::3', not an IPv4 address"),
        (b'{"PublicIP":"1.2.3.4","PublicIPv6":"1.2.3.4"}', "PublicIPv6 is '1.2.3.4', not an IPv6 address"),
        (b'{"PublicIP":"1.2.3.4","PublicIPv6":"fe80::1%eth0"}', "PublicIPv6 is 'fe80::1%eth0', not an IPv6 address"),
        (b'{"BackendType":7}', "BackendType is not a printable string of at most 1024 characters"),
        (b'{"BackendType":"a\\u001b[2J"}', "BackendType is not a printable string of at most 1024 characters"),
        (b'{"Overlaynet":{"Node":["a"]}}', "Overlaynet.Node is not a printable string of at most 1024 characters"),
        (b'{"Overlaynet":{"Run":"a\\n"}}', "Overlaynet.Run is not a printable string of at most 1024 characters"),
        (
            b'{"Overlaynet":{"Node":"' + b"a" * 1025 + b'"}}',
            "Overlaynet.Node is not a printable string of at most 1024 characters",
        ),
        (b'{"Overlaynet":{"Node":"\\ud800"}}', "its value holds what cannot be written again: "),
    ],
)
def test_a_value_that_cannot_be_read_says_why(value: bytes, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        decode_lease(KEY, value)
    assert says(caught.value, reason)


def says(error: Exception, text: str) -> bool:
    """True if the message is this text; one that ends in a colon is followed by what Python's libraries have to say."""
    return str(error) == text or (text.endswith(": ") and str(error).startswith(text) and str(error) != text)


def ipv4_networks() -> st.SearchStrategy[IPv4Network]:
    return st.builds(
        lambda address, length: IPv4Network((address, length), strict=False),
        st.integers(0, 2**32 - 1),
        st.integers(1, 32),
    )


def ipv6_networks() -> st.SearchStrategy[IPv6Network]:
    return st.builds(
        lambda address, length: IPv6Network((address, length), strict=False),
        st.integers(0, 2**128 - 1),
        st.integers(1, 128),
    )


def subnets() -> st.SearchStrategy[Subnets]:
    return st.one_of(
        st.builds(Subnets, ipv4_networks()),
        st.builds(lambda ipv6: Subnets(ipv6=ipv6), ipv6_networks()),
        st.builds(Subnets, ipv4_networks(), ipv6_networks()),
    )


names = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=40)
documents = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner),
    max_leaves=10,
)
leases = st.builds(
    Lease,
    subnets(),
    st.none() | st.ip_addresses(v=4).filter(int),
    st.none() | st.ip_addresses(v=6),
    data=st.builds(LeaseData, names, documents, documents),
    node=names,
    run=names,
)


@settings(deadline=None)
@given(leases)
def test_what_is_written_is_read_back(lease: Lease) -> None:
    assert decode_lease(lease_key(lease.subnets), encode_lease(lease)) == lease


@settings(deadline=None)
@given(subnets())
def test_keys_survive_the_round_trip(covered: Subnets) -> None:
    assert parse_lease_key(lease_key(covered)) == covered


any_text = st.text(st.characters(), max_size=5) | st.text(st.characters(categories=["Cs"]), max_size=2)
"""Lone halves of characters, too: JSON can say them, and UTF-8 cannot."""
any_documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner) | st.dictionaries(any_text, inner),
    max_leaves=10,
)


def members(*known: str) -> st.SearchStrategy[dict[str, object]]:
    """JSON objects that have some of the known members, with any content."""
    return st.dictionaries(st.sampled_from(known) | any_text, any_documents, max_size=6)


keys = st.one_of(
    st.text(),
    st.from_regex(r"subnets/[0-9.]{0,16}-[0-9]{0,3}(&[0-9a-f:]{0,20}-[0-9]{0,4})?"),
    st.from_regex(r"\d+\.\d+\.\d+\.\d+-\d+(?:&[a-f\d:]+-\d+)?").map(lambda text: f"subnets/{text}"),
)
values = st.one_of(
    st.binary(),
    any_documents.map(lambda content: json.dumps(content).encode()),
    members("PublicIP", "publicip", "PublicIPv6", "BackendType", "BackendData", "BackendV6Data", "Overlaynet").map(
        lambda content: json.dumps(content).encode()
    ),
    members("Node", "Run").map(lambda own: json.dumps({"Overlaynet": own}).encode()),
    # Beside an address, so that nothing else is wrong with it.
    any_documents.map(lambda data: json.dumps({"PublicIP": "192.0.2.1", "BackendData": data}).encode()),
    any_documents.map(
        lambda data: json.dumps({"PublicIP": "192.0.2.1", "BackendData": data}, ensure_ascii=False).encode(
            errors="surrogatepass"
        )
    ),
)


@settings(deadline=None, max_examples=300)
@given(keys)
def test_no_key_does_worse_than_a_record_error(key: str) -> None:
    try:
        covered = parse_lease_key(key)
    except RecordError:
        return
    assert parse_lease_key(lease_key(covered)) == covered


@settings(deadline=None, max_examples=300)
@given(values)
def test_no_value_does_worse_than_a_record_error(value: bytes) -> None:
    try:
        lease = decode_lease(KEY, value)
    except RecordError:
        return
    assert lease.subnets == Subnets(IPV4)
    assert decode_lease(KEY, encode_lease(lease)) == lease, "whatever is read can be written"
    json.dumps(attrs.asdict(lease.data), ensure_ascii=False, allow_nan=False).encode()
    assert "\n" not in f"{lease.node}{lease.run}{lease.data.backend_type}{lease.public_ipv6}"


# What hands and strangers write


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_are_no_json_are_refused(number: str) -> None:
    with pytest.raises(RecordError, match=f"its value is not JSON: {number} is no JSON number"):
        decode_lease(KEY, f'{{"PublicIP":"192.0.2.1","BackendData":{number}}}'.encode())


@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_values_nested_too_deep_to_be_compared_are_refused(opening: str, closing: str) -> None:
    def value(levels: int) -> bytes:
        return f'{{"PublicIP":"192.0.2.1","BackendData":{opening * levels}1{closing * levels}}}'.encode()

    assert decode_lease(KEY, value(31)) == decode_lease(KEY, value(31))
    for levels in (32, 900, 950, 980, 10_000):
        with pytest.raises(RecordError, match="nested more than 32 levels deep|its value is not JSON"):
            decode_lease(KEY, value(levels))


@pytest.mark.parametrize(
    "value",
    [
        json.dumps({"PublicIP": "x" * 100_000}).encode(),
        json.dumps({"PublicIP": ["x"] * 100_000}).encode(),
        json.dumps({"PublicIPv6": "\x1b[31m\n" * 1000}).encode(),
    ],
)
def test_the_reason_is_short_and_on_one_line_whatever_the_value(value: bytes) -> None:
    with pytest.raises(RecordError) as caught:
        decode_lease(KEY, value)
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


def test_what_cannot_be_read_is_shown_short_and_printable() -> None:
    malformed = Malformed("subnets/\x1b[31m" + "k" * 1000, "reason\n\x00 \u202e" * 1000)
    for text in (malformed.key, malformed.reason):
        assert text.isprintable()
        assert len(text) <= 301
    assert malformed.key.startswith("subnets/\\x1b[31mkkk")
    assert Malformed("k", "short enough").reason == "short enough"


# Reservations

RESERVATIONS = [
    (Reservation(Subnets(IPV4), node="host-b"), b'{"Node":"host-b"}', b"127.0.0.1"),
    (Reservation(Subnets(IPV4), public_ipv4=ADDRESS), b'{"PublicIP":"192.168.64.3"}', b"192.168.64.3"),
    (
        Reservation(Subnets(IPV4, IPV6), public_ipv6=IPv6Address("2001:db8::3")),
        b'{"PublicIPv6":"2001:db8::3"}',
        b"127.0.0.1",
    ),
]


@pytest.mark.parametrize(("reservation", "value", "address"), RESERVATIONS)
def test_reservations_are_kept_where_flannel_does_not_look(
    reservation: Reservation, value: bytes, address: bytes
) -> None:
    key = reservation_key(reservation.subnets)
    assert key.startswith("overlaynet/reservations/10.5.52.0-24")
    assert encode_reservation(reservation) == value
    assert decode_reservation(key, value) == reservation
    kept = placeholder(reservation)
    assert kept.startswith(b'{"PublicIP":"' + address + b'","PublicIPv6":')
    assert is_placeholder(decode_lease(lease_key(reservation.subnets), kept))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"{}", "it names no node: neither Node nor PublicIP nor PublicIPv6"),
        (b'{"Node":7}', "Node is not a printable string of at most 1024 characters"),
        (b'{"PublicIP":"host-a"}', "PublicIP is 'host-a', not an IPv4 address"),
        (b"[]", "its value is not a JSON object"),
    ],
)
def test_a_reservation_that_cannot_be_read_says_why(value: bytes, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        decode_reservation(reservation_key(Subnets(IPV4)), value)
    assert str(caught.value) == reason


def test_a_claim_of_reserved_subnets_is_no_placeholder() -> None:
    lease = Lease(Subnets(IPV4), ADDRESS, node="host-b", run="1", reserved=True)
    value = encode_lease(lease)
    assert value == (
        b'{"PublicIP":"192.168.64.3","PublicIPv6":null,"Overlaynet":{"Node":"host-b","Run":"1","Reserved":true}}'
    )
    assert decode_lease(KEY, value) == lease
    assert not is_placeholder(lease)


# -- what a record may cost


def test_large_values_are_not_remembered() -> None:
    """A record that is written again and again, each time another one, would fill the memory of every node."""
    tracemalloc.start()
    try:
        for number in range(200):
            data = "x" * 60_000
            decode_lease(KEY, encode_lease(Lease(Subnets(IPV4), ADDRESS, data=LeaseData("a", f"{data}{number}"))))
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 2_000_000


def test_what_is_usual_is_read_once() -> None:
    value = encode_lease(Lease(Subnets(IPV4), ADDRESS, data=LeaseData("vxlan", vxlan), node="n" * 253, run="5f0c"))
    assert decode_lease(KEY, value) is decode_lease(KEY, value)


def test_a_key_without_end_is_refused() -> None:
    with pytest.raises(RecordError, match="has more than 1024 characters"):
        parse_lease_key(f"subnets/10.244.1.0-{'0' * 2000}24")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("x" * 65536, "the record of the lease on 10.5.52.0/24 would have"),
        ("\ud800", "the data of the lease on 10.5.52.0/24 cannot be written as JSON: 'utf-8' codec can't encode"),
        (float("nan"), "the data of the lease on 10.5.52.0/24 cannot be written as JSON: Out of range"),
        (object(), "the data of the lease on 10.5.52.0/24 cannot be written as JSON: Object of type object"),
    ],
)
def test_what_no_node_could_read_is_not_written(data: Any, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        encode_lease(Lease(Subnets(IPV4), ADDRESS, data=LeaseData("a", data)))
    assert str(caught.value).startswith(reason)
