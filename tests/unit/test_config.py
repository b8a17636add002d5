"""Configuration: read from TOML, checked as a whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from sagecp.config import (
    ConfigError,
    EngineConfig,
    JournalConfig,
    RuntimeConfig,
    ServerConfig,
    TlsConfig,
    is_loopback,
    load_config,
    split_address,
)
from sagecp.core.config import SchedulerConfig


def write(folder: Path, text: str) -> Path:
    path = folder / "sagecp.toml"
    path.write_text(text, encoding="utf-8")
    return path


def bad_settings(error: ConfigError) -> dict[str, str]:
    return {violation.field: violation.description for violation in error.violations}


def test_the_defaults_are_valid_and_keep_to_loopback() -> None:
    config = ServerConfig()
    assert config.validate() is config
    assert is_loopback(split_address(config.listen)[0])


def test_every_table_is_read(tmp_path: Path) -> None:
    config = load_config(
        write(
            tmp_path,
            """
            listen = "[::1]:6000"
            log_level = "debug"
            max_connections = 7
            [scheduler]
            scheduling_policy = "fifo"
            lease_duration_s = 3
            max_queued_request_count = 5
            [runtime]
            drain_timeout_s = 0
            token_coalescing_window_s = 0.05
            [engine]
            token_ids = false
            connect_timeout_s = 1.5
            [tls]
            certificate_file = "a.pem"
            """,
        )
    )
    assert config == ServerConfig(
        listen="[::1]:6000",
        log_level="debug",
        max_connections=7,
        scheduler=SchedulerConfig(scheduling_policy="fifo", lease_duration_s=3.0, max_queued_request_count=5),
        runtime=RuntimeConfig(drain_timeout_s=0.0, token_coalescing_window_s=0.05),
        engine=EngineConfig(token_ids=False, connect_timeout_s=1.5),
        tls=TlsConfig(certificate_file="a.pem"),
    )
    # A whole number where a fraction may stand is a fraction.
    assert isinstance(config.scheduler.lease_duration_s, float)


@pytest.mark.parametrize(
    "lines",
    [
        """
        [scheduler.parameters]
        "priority.boost_high_s" = 60
        "dispatch.patience" = 0.2
        """,
        """
        [scheduler.parameters]
        priority.boost_high_s = 60
        dispatch.patience = 0.2
        """,
        """
        [scheduler.parameters.priority]
        boost_high_s = 60
        [scheduler.parameters.dispatch]
        patience = 0.2
        """,
        """
        [scheduler]
        parameters = { "priority.boost_high_s" = 60, dispatch = { patience = 0.2 } }
        """,
    ],
    ids=["quoted", "dotted", "tables", "inline"],
)
def test_parameters_are_named_in_quotes_or_as_tables(tmp_path: Path, lines: str) -> None:
    config = load_config(write(tmp_path, lines)).validate()
    assert config.scheduler.parameters == {"priority.boost_high_s": 60.0, "dispatch.patience": 0.2}
    assert all(isinstance(value, float) for value in config.scheduler.parameters.values())


def test_every_parameter_that_is_no_number_or_given_twice_is_named(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        [scheduler.parameters]
        "priority.boost_high_s" = 60
        priority.boost_high_s = 60
        priority.boost_low_s = "much"
        "dispatch.patience" = true
        dispatch.prefill_window_s = [1]
        """,
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    found = bad_settings(caught.value)
    assert found.keys() == {
        f"scheduler.parameters['{name}']"
        for name in (
            "priority.boost_high_s",
            "priority.boost_low_s",
            "dispatch.patience",
            "dispatch.prefill_window_s",
        )
    }
    assert "given twice" in found["scheduler.parameters['priority.boost_high_s']"]
    assert "must be a number, and is str 'much'" in found["scheduler.parameters['priority.boost_low_s']"]
    with pytest.raises(ConfigError, match="must be a table"):
        load_config(write(tmp_path, "[scheduler]\nparameters = 5"))


def test_unknown_parameters_and_values_out_of_range_are_named_with_everything_else(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        max_connections = -1
        [scheduler.parameters]
        priority.boost_hihg_s = 60
        dispatch.patience = -1
        dispatch.prefill_window_s = nan
        """,
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path).validate()
    found = bad_settings(caught.value)
    assert found.keys() == {
        "max_connections",
        "scheduler.parameters['priority.boost_hihg_s']",
        "scheduler.parameters['dispatch.patience']",
        "scheduler.parameters['dispatch.prefill_window_s']",
    }
    assert "priority.boost_high_s" in found["scheduler.parameters['priority.boost_hihg_s']"]
    assert "must be 0 to 10" in found["scheduler.parameters['dispatch.patience']"]


def test_an_empty_file_means_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == ServerConfig()


def test_every_unknown_or_mistyped_setting_is_named_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        listne = "127.0.0.1:1"
        max_connections = "many"
        insecure_listen = 1
        engine = 5
        [runtime]
        drain_timeout_s = true
        retained_bytes = 1.5
        nonsense = 1
        [scheduler]
        seed = "x"
        """,
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    found = bad_settings(caught.value)
    assert found.keys() == {
        "listne",
        "max_connections",
        "insecure_listen",
        "engine",
        "runtime.drain_timeout_s",
        "runtime.retained_bytes",
        "runtime.nonsense",
        "scheduler.seed",
    }
    assert "known here: console, engine, insecure_listen, journal, listen" in found["listne"]
    assert "must be int, and is str 'many'" in found["max_connections"]
    assert "table [engine]" in found["engine"]


@pytest.mark.parametrize(
    ("content", "hint"),
    [(b"listen = ", "TOML"), (b"\xff\xfe", "TOML"), (None, "No such file")],
    ids=["bad TOML", "not UTF-8", "missing"],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, hint: str) -> None:
    path = tmp_path / "sagecp.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=hint) as caught:
        load_config(path)
    assert list(bad_settings(caught.value)) == [str(path)]


def test_shares_of_the_queue_are_read_and_must_grow_with_importance(tmp_path: Path) -> None:
    path = write(tmp_path, "[scheduler.queue_shares]\nlow = 0.95\nbackground = 0\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path).validate()
    found = bad_settings(caught.value)
    assert found.keys() == {"scheduler.queue_shares.low", "scheduler.queue_shares.background"}
    assert "more than the 0.8 of normal" in found["scheduler.queue_shares.low"]


def test_settings_of_the_journal_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    config = ServerConfig(
        max_message_bytes=5000,
        journal=JournalConfig(
            path=str(tmp_path), retention_s=10.0, output_retention_s=11.0, max_pending_bytes=4999
        ),
    )
    with pytest.raises(ConfigError) as caught:
        config.validate()
    found = bad_settings(caught.value)
    assert found.keys() == {"journal.path", "journal.output_retention_s", "journal.max_pending_bytes"}
    assert "name a file in it" in found["journal.path"]
    assert "max_message_bytes (5000)" in found["journal.max_pending_bytes"]


def numeric_settings() -> list[tuple[str, str]]:
    sections: dict[str, Any] = {
        "": ServerConfig(),
        "runtime": RuntimeConfig(),
        "engine": EngineConfig(),
        "scheduler": SchedulerConfig(),
        "journal": JournalConfig(),
    }
    return [
        (section, field.name)
        for section, values in sections.items()
        for field in dataclasses.fields(values)
        if type(getattr(values, field.name)) in {int, float}
    ]


def with_setting(section: str, name: str, value: float) -> ServerConfig:
    base = ServerConfig()
    if not section:
        return dataclasses.replace(base, **{name: value})  # type: ignore[arg-type]
    changed = dataclasses.replace(getattr(base, section), **{name: value})
    return dataclasses.replace(base, **{section: changed})


@pytest.mark.parametrize(("section", "name"), numeric_settings())
@pytest.mark.parametrize("value", [-1, float("nan")])
def test_no_number_may_be_negative_or_undefined(section: str, name: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        with_setting(section, name, value).validate()
    assert list(bad_settings(caught.value)) == [f"{section}.{name}" if section else name]


@pytest.mark.parametrize(("section", "name"), numeric_settings())
def test_zero_is_for_settings_where_it_means_something(section: str, name: str) -> None:
    zero_is_fine = name in {
        "drain_timeout_s",
        "token_coalescing_window_s",
        "seed",
        "retained_request_count",
        "retained_bytes",
        "output_retention_s",
        "max_output_bytes",
        "ballast_bytes",
    }
    config = with_setting(section, name, 0)
    if zero_is_fine:
        config.validate()
    else:
        with pytest.raises(ConfigError, match="must be above 0"):
            config.validate()


@pytest.mark.parametrize(
    "listen",
    ["127.0.0.1:0", "localhost:1", "[::1]:65535", "127.8.9.10:50051", "ip6-localhost:1"],
)
def test_loopback_needs_no_tls(listen: str) -> None:
    ServerConfig(listen=listen).validate()


@pytest.mark.parametrize("listen", ["0.0.0.0:1", "[::]:1", "10.0.0.1:1", "example.org:1", "192.168.0.1:1"])
def test_an_address_that_others_reach_needs_tls_or_a_decision(listen: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--insecure-listen") as caught:
        ServerConfig(listen=listen).validate()
    assert list(bad_settings(caught.value)) == ["listen"]
    ServerConfig(listen=listen, insecure_listen=True).validate()
    pem = tmp_path / "x.pem"
    pem.touch()
    ServerConfig(
        listen=listen, tls=TlsConfig(certificate_file=str(pem), private_key_file=str(pem))
    ).validate()


@pytest.mark.parametrize(
    "address",
    ["", "localhost", ":1", "h:", "h:x", "h:65536", "h:-1", "::1:5", "[::1:5", "::1]:5", "h:1:2", "h:\uff11"],
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ValueError, match=r"127\.0\.0\.1|brackets"):
        split_address(address)
    with pytest.raises(ConfigError) as caught:
        ServerConfig(listen=address, metrics_listen=address or "x").validate()
    assert bad_settings(caught.value).keys() == {"listen", "metrics_listen"}


@pytest.mark.parametrize(
    ("address", "parts"),
    [("h:0", ("h", 0)), ("[::1]:5", ("::1", 5)), ("127.0.0.1:65535", ("127.0.0.1", 65535))],
)
def test_what_is_an_address(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts


def test_metrics_are_plain_http_and_keep_to_loopback_too(tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.touch()
    tls = TlsConfig(certificate_file=str(pem), private_key_file=str(pem))
    with pytest.raises(ConfigError, match="plain HTTP") as caught:
        ServerConfig(tls=tls, metrics_listen="0.0.0.0:9464").validate()
    assert list(bad_settings(caught.value)) == ["metrics_listen"]
    ServerConfig(tls=tls, metrics_listen="0.0.0.0:9464", insecure_listen=True).validate()
    ServerConfig(metrics_listen="[::1]:9464").validate()


def test_tls_settings_must_fit_together_and_exist(tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.touch()
    with pytest.raises(ConfigError, match="give both"):
        ServerConfig(tls=TlsConfig(certificate_file=str(pem))).validate()
    with pytest.raises(ConfigError, match="give both"):
        ServerConfig(tls=TlsConfig(private_key_file=str(pem))).validate()
    with pytest.raises(ConfigError) as caught:
        ServerConfig(tls=TlsConfig(client_ca_file=str(pem))).validate()
    assert list(bad_settings(caught.value)) == ["tls.client_ca_file"]
    missing = str(tmp_path / "missing.pem")
    with pytest.raises(ConfigError) as caught:
        ServerConfig(
            tls=TlsConfig(certificate_file=missing, private_key_file=str(tmp_path), client_ca_file=missing)
        ).validate()
    assert bad_settings(caught.value).keys() == {
        "tls.certificate_file",
        "tls.private_key_file",
        "tls.client_ca_file",
    }


@pytest.mark.parametrize(("name", "value"), [("log_level", "loud"), ("log_format", "xml")])
def test_choices_are_listed(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"'{value}'; choose") as caught:
        ServerConfig(**{name: value}).validate()  # type: ignore[arg-type]
    assert list(bad_settings(caught.value)) == [name]


def test_everything_wrong_is_told_at_once() -> None:
    config = ServerConfig(
        listen="0.0.0.0:1",
        metrics_listen="nowhere",
        log_level="loud",
        log_format="xml",
        max_connections=0,
        runtime=RuntimeConfig(drain_timeout_s=-1.0, retention_s=0.0),
        engine=EngineConfig(connect_timeout_s=float("nan")),
        scheduler=SchedulerConfig(max_attempt_count=0),
        tls=TlsConfig(client_ca_file="missing"),
    )
    with pytest.raises(ConfigError) as caught:
        config.validate()
    assert bad_settings(caught.value).keys() == {
        "listen",
        "metrics_listen",
        "log_level",
        "log_format",
        "max_connections",
        "runtime.drain_timeout_s",
        "runtime.retention_s",
        "engine.connect_timeout_s",
        "scheduler.max_attempt_count",
        "tls.client_ca_file",
    }
