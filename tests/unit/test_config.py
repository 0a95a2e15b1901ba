"""Settings: flags over environment over file over defaults, and what is said of bad ones."""

import argparse
import inspect
from pathlib import Path

import attrs
import pytest

from overlaynet import config
from overlaynet.config import Resolved
from overlaynet.errors import ConfigError
from overlaynet.plugins import Plugins
from overlaynet.settings import Settings


def resolve(*flags: str, **environment: str) -> Resolved:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    config.add_flags(parser)
    return config.resolve(parser.parse_args(flags), environment)


def test_defaults_are_flannels() -> None:
    settings = resolve().settings
    assert settings.etcd_prefix == "/coreos.com/network"
    assert settings.etcd_endpoints == ("http://127.0.0.1:4001", "http://127.0.0.1:2379")
    assert settings.subnet_file == "/run/flannel/subnet.env"
    assert settings.subnet_lease_renew_margin == 60


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "overlaynet.toml"
    file.write_text('store = "file"\nstore-path = "/from/file"\netcd-prefix = "/from/file"\n')
    resolved = resolve(
        "--config",
        str(file),
        "--store-path",
        "/from/flag",
        OVERLAYNET_STORE_PATH="/from/env",
        OVERLAYNET_ETCD_PREFIX="/from/env",
    )
    assert resolved.settings.store == "file"
    assert resolved.settings.etcd_prefix == "/from/env"
    assert resolved.settings.store_path == "/from/flag"
    assert resolved.sources["store"] == f"file {file}"
    assert resolved.sources["etcd_prefix"] == "environment OVERLAYNET_ETCD_PREFIX"
    assert resolved.sources["store_path"] == "flag"
    assert resolved.sources["iface"] == "default"


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "overlaynet.toml"
    file.write_text("release-on-stop = true\niface = ['eth0', 'eth1']\n")
    settings = resolve(OVERLAYNET_CONFIG=str(file)).settings
    assert settings.release_on_stop is True
    assert settings.iface == ("eth0", "eth1")


def test_lists_are_repeated_or_separated_by_commas_but_not_inside_a_regular_expression() -> None:
    settings = resolve(
        "--etcd-endpoints",
        "http://a:1,http://b:2",
        "--iface",
        "eth0",
        "--iface",
        "eth1",
        "--iface-regex",
        "eth[0-9]{1,2}",
    ).settings
    assert settings.etcd_endpoints == ("http://a:1", "http://b:2")
    assert settings.iface == ("eth0", "eth1")
    assert settings.iface_regex == ("eth[0-9]{1,2}",)


def test_every_setting_can_be_given_in_each_way(tmp_path: Path) -> None:
    samples = {str: "sample", int: "7", bool: "true"}
    special = {
        "iface_can_reach": "192.0.2.1",
        "public_ip": "192.0.2.1",
        "public_ipv6": "2001:db8::1",
        "on_lease_lost": "reacquire",
        "udp_engine": "python",
        "udp_offload": "off",
        "udp_threads": "2",
        "privileges": "keep",
        "log_level": "debug",
        "log_format": "json",
    }
    hints = inspect.get_annotations(Settings, eval_str=True)
    for field in attrs.fields(Settings):
        hint = hints[field.name]
        text = special.get(field.name, samples.get(hint, "sample"))
        flags = [config.flag_name(field)] if hint is bool else [config.flag_name(field), text]
        by_flag = getattr(resolve(*flags).settings, field.name)
        by_environment = getattr(resolve(**{config.environment_name(field): text}).settings, field.name)
        file = tmp_path / "overlaynet.toml"
        quoted = text if hint in (int, bool) else f'["{text}"]' if isinstance(by_flag, tuple) else f'"{text}"'
        file.write_text(f"{config.flag_name(field)[2:]} = {quoted}\n")
        by_file = getattr(resolve("--config", str(file)).settings, field.name)
        assert by_flag == by_environment == by_file, field.name


@pytest.mark.parametrize(
    ("flags", "environment", "message"),
    [
        (
            ["--subnet-lease-renew-margin", "0"],
            {},
            "--subnet-lease-renew-margin must be between 1 and 1439, not 0",
        ),
        (
            [],
            {"OVERLAYNET_SUBNET_LEASE_RENEW_MARGIN": "soon"},
            "the environment variable OVERLAYNET_SUBNET_LEASE_RENEW_MARGIN must be a whole number, not 'soon'",
        ),
        (["--public-ip", "1.2.3"], {}, "--public-ip must be an IPv4 address, not '1.2.3'"),
        (["--iface-can-reach", "x"], {}, "--iface-can-reach must be an IP address, not 'x'"),
        *(
            (
                ["--udp-threads", number],
                {},
                f"--udp-threads must be auto, or a whole number from 1 to 64, not '{number}'",
            )
            for number in ("0", "65", "-1", "1.5", "two", "", "²")
        ),
        (["--log-format", "xml"], {}, "--log-format must be one of text, json, not 'xml'"),
        ([], {"OVERLAYNET_RELEASE_ON_STOP": "maybe"}, "OVERLAYNET_RELEASE_ON_STOP must be true or false, not 'maybe'"),
        (
            ["--config", "/nonexistent"],
            {},
            "the configuration file /nonexistent cannot be read: No such file or directory",
        ),
        (["--node", ""], {}, "--node must be a printable name"),
    ],
)
def test_bad_settings_are_named_with_where_they_come_from(
    flags: list[str], environment: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(*flags, **environment)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stoer = 'file'", "has an unknown setting 'stoer'; did you mean 'store'?"),
        ("store = 5", "store in FILE must be a string, not 5"),
        ("iface = 'eth0'", "iface in FILE must be a list of strings, not 'eth0'"),
        ("subnet-lease-renew-margin = '60'", "subnet-lease-renew-margin in FILE must be a whole number, not '60'"),
        ("store = ", "is not TOML"),
    ],
)
def test_bad_files_are_named_with_the_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "overlaynet.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        resolve("--config", str(file))
    assert message.replace("FILE", str(file)) in str(caught.value)


def test_a_misspelt_variable_is_warned_of_and_a_strangers_is_not() -> None:
    resolved = resolve(OVERLAYNET_ETCD_ENDPONTS="x", OVERLAYNET_SERVICE_HOST="10.0.0.1")
    assert resolved.warnings == (
        "the environment variable OVERLAYNET_ETCD_ENDPONTS is not a setting and is ignored; "
        "did you mean OVERLAYNET_ETCD_ENDPOINTS?",
    )


def test_print_config_shows_values_and_sources_and_masks_secrets() -> None:
    lines = resolve("--store", "file", OVERLAYNET_ETCD_PASSWORD="hunter2").lines()
    assert 'store = "file"  # flag' in lines
    assert 'etcd-password = "********"  # environment OVERLAYNET_ETCD_PASSWORD' in lines
    assert "# backend is not set" in lines
    assert not any("hunter2" in line for line in lines)
    assert "hunter2" not in repr(resolve(OVERLAYNET_ETCD_PASSWORD="hunter2"))


def test_what_print_config_prints_is_a_configuration_file(tmp_path: Path) -> None:
    first = resolve("--iface", "eth0", "--store-path", 'odd "path\\', "--release-on-stop")
    file = tmp_path / "overlaynet.toml"
    file.write_text("\n".join(first.lines()))
    assert resolve("--config", str(file)).settings == first.settings


def test_store_settings_reach_the_selected_driver_only() -> None:
    settings = resolve("--store", "file", "--store-path", "/x", "--etcd-prefix", "/y").settings
    assert config.store_options(settings) == {"path": "/x"}


def test_the_settings_of_a_backend_are_its_arguments() -> None:
    settings = resolve("--udp-engine", "native", "--udp-offload", "off", "--udp-threads", "2").settings
    assert config.backend_arguments(settings, "udp") == {"engine": "native", "offload": "off", "threads": "2"}
    assert config.backend_arguments(settings, "vxlan") == {}


def test_key_values() -> None:
    assert config.key_values(["a=1", "b=x=y", "c="], "--store-option") == {"a": "1", "b": "x=y", "c": ""}
    with pytest.raises(ConfigError, match="--store-option 'oops' is not of the form KEY=VALUE"):
        config.key_values(["oops"], "--store-option")


def test_settings_made_for_a_driver_have_its_defaults() -> None:
    plugins = Plugins()
    for field in attrs.fields(Settings):
        if field.metadata["driver_option"] is not None:
            driver, name = field.metadata["driver_option"]
            assert field.default == getattr(attrs.fields(plugins.driver("store", driver).Options), name).default, (
                field.name
            )
