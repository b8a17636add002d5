"""Settings: every change a version, all of it or nothing, and back again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sagecp.core.errors import ErrorReason, InvalidRequestError, SettingsVersionError, UnknownNameError
from sagecp.core.parameters import Parameter, ParameterTable
from sagecp.core.policies.registry import SCHEDULING_POLICIES
from sagecp.core.settings import HISTORY_LIMIT, PARAMETERS, SettingsChange, SettingsHistory

TABLE = ParameterTable(
    [
        Parameter("b.two", 2.0, 0.0, 10.0, "Second."),
        Parameter("a.one", 1.0, -1.0, 1.0, "First."),
        Parameter("c.each.*", 1.0, 1.0, 4.0, "One per name."),
    ]
)
DEFAULTS = PARAMETERS.resolve({})


def history(**parameters: float) -> SettingsHistory:
    return SettingsHistory("fifo", "load_balanced", "least_connections", parameters)


def test_a_table_gives_every_value_and_lists_declarations_by_name() -> None:
    assert TABLE.resolve({"a.one": 0.5}) == {"a.one": 0.5, "b.two": 2.0}
    assert TABLE.resolve({"c.each.x": 3.0})["c.each.x"] == 3.0
    assert [each.name for each in TABLE.__iter__()] == ["a.one", "b.two", "c.each.*"]
    with pytest.raises(ValueError, match="declared twice"):
        ParameterTable([Parameter("a", 1, 0, 1, ""), Parameter("a", 1, 0, 1, "")])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"a.one": 1}, {}),
        ({"a.one": -1.0, "b.two": 10.0}, {}),
        ({"a.one": 1.001}, {"a.one": "must be -1 to 1"}),
        ({"b.two": -0.001}, {"b.two": "must be 0 to 10"}),
        ({"b.two": float("nan")}, {"b.two": "must be 0 to 10"}),
        ({"b.two": float("inf")}, {"b.two": "must be 0 to 10"}),
        ({"b.two": "3"}, {"b.two": "must be a number"}),
        ({"b.two": True}, {"b.two": "must be a number"}),
        ({"b.two": None}, {"b.two": "must be a number"}),
        ({"b.tow": 1.0}, {"b.tow": "known are b.two"}),
        ({"c.each.x": 1.0, "c.each.y.z": 4.0}, {}),
        (
            {"c.each.x": 5.0, "c.each.": 1.0, "c.each": 1.0},
            {"c.each.x": "1 to 4", "c.each.": "not", "c.each": "not"},
        ),
        ({"c.each.*": 1.0}, {"c.each.*": "is not a parameter"}),
        (
            {"zzzzzz": 1.0, "a.one": 5},
            {"zzzzzz": "known are a.one, b.two, c.each.*", "a.one": "must be -1 to 1"},
        ),
    ],
)
def test_a_table_names_everything_wrong(overrides: dict[str, object], says: dict[str, str]) -> None:
    found = {each.field: each.description for each in TABLE.violations(overrides)}
    assert found.keys() == {f"parameters[{name!r}]" for name in says}
    for name, text in says.items():
        assert text in found[f"parameters[{name!r}]"]


def test_every_parameter_of_every_component_is_sensible() -> None:
    names = [each.name for each in PARAMETERS.__iter__()]
    assert len(names) == len(set(names)) >= 10
    for each in PARAMETERS.__iter__():
        component, dot, what = each.name.partition(".")
        assert component, each
        assert dot, each
        assert what, each
        assert each.minimum <= each.default <= each.maximum, each
        assert each.description.endswith("."), each


def test_the_first_version_has_what_was_configured() -> None:
    first = history(**{"dispatch.patience": 1}).current
    assert (first.version, first.scheduling_policy, first.comment) == (1, "fifo", "configured at start")
    assert dict(first.parameters) == {"dispatch.patience": 1.0}
    assert dict(first.values) == {**DEFAULTS, "dispatch.patience": 1.0}
    with pytest.raises(TypeError):
        first.values["dispatch.patience"] = 2.0  # type: ignore[index]  # nobody may


def test_what_cannot_be_the_first_version() -> None:
    with pytest.raises(UnknownNameError, match="choose one of"):
        SettingsHistory("alphabetical", "load_balanced", "least_connections", {})
    with pytest.raises(InvalidRequestError) as caught:
        history(**{"dispatch.patience": -1, "nonsense": 1})
    assert len(caught.value.violations) == 2


def test_what_is_not_named_stays_as_it_is() -> None:
    settings = history(**{"dispatch.patience": 0.2})
    second = settings.apply(SettingsChange(scheduling_policy="priority", comment="ann"), 5.0)
    assert (second.version, second.scheduling_policy, second.routing_strategy) == (
        2,
        "priority",
        "load_balanced",
    )
    assert (second.update_s, second.comment) == (5.0, "ann")
    third = settings.apply(SettingsChange(parameters={"priority.boost_high_s": 60}), 6.0)
    assert dict(third.parameters) == {"dispatch.patience": 0.2, "priority.boost_high_s": 60.0}
    assert third.comment == ""
    fourth = settings.apply(SettingsChange(parameters={"dispatch.patience": 1}, reset_parameters=True), 7.0)
    assert dict(fourth.parameters) == {"dispatch.patience": 1.0}
    assert settings.current is fourth
    assert [each.version for each in settings.versions()] == [1, 2, 3, 4]


def test_a_preview_changes_nothing() -> None:
    settings = history()
    change = SettingsChange(scheduling_policy="priority", parameters={"dispatch.patience": 1})
    preview = settings.preview(change, 3.0)
    assert (settings.current.version, len(settings.versions())) == (1, 1)
    assert settings.apply(change, 3.0) == preview


@pytest.mark.parametrize(
    "change",
    [
        SettingsChange(scheduling_policy="alphabetical"),
        SettingsChange(routing_strategy="crow"),
        SettingsChange(load_balancer="scales"),
        SettingsChange(scheduling_policy="priority", parameters={"dispatch.patience": -1}),
        SettingsChange(comment="x" * 257),
        SettingsChange(scheduling_policy="priority", expected_version=2),
        SettingsChange(revert_to_version=2),
    ],
)
def test_a_refused_change_changes_nothing(change: SettingsChange) -> None:
    settings = history()
    before = settings.current
    for attempt in (settings.preview, settings.apply):
        with pytest.raises((UnknownNameError, InvalidRequestError, SettingsVersionError)):
            attempt(change, 1.0)
    assert settings.current is before
    assert settings.versions() == (before,)


def test_another_version_than_expected_says_which_is_in_force() -> None:
    settings = history()
    settings.apply(SettingsChange(scheduling_policy="priority", expected_version=1), 1.0)
    with pytest.raises(SettingsVersionError, match="version 2 is in force, not 1") as caught:
        settings.apply(SettingsChange(scheduling_policy="fifo", expected_version=1), 2.0)
    assert caught.value.reason is ErrorReason.SETTINGS_VERSION_CONFLICT
    assert (caught.value.version, caught.value.metadata) == (2, {"version": "2"})


def test_going_back_restores_names_and_parameters_as_a_new_version() -> None:
    settings = history(**{"dispatch.patience": 0.2})
    first = settings.current
    settings.apply(SettingsChange(load_balancer="power_of_two", reset_parameters=True), 1.0)
    back = settings.apply(SettingsChange(revert_to_version=1), 2.0)
    assert (back.version, back.update_s, back.comment) == (3, 2.0, "back to version 1")
    assert (back.load_balancer, back.parameters, back.values) == (
        first.load_balancer,
        first.parameters,
        first.values,
    )
    assert settings.apply(SettingsChange(revert_to_version=2, comment="ann"), 3.0).comment == "ann"


def test_only_so_many_versions_are_kept() -> None:
    settings = history()
    for number in range(HISTORY_LIMIT + 5):
        settings.apply(SettingsChange(parameters={"dispatch.patience": number / 100}), float(number))
    kept = [each.version for each in settings.versions()]
    assert kept == list(range(7, HISTORY_LIMIT + 7))
    with pytest.raises(SettingsVersionError, match=f"those from 7 to {HISTORY_LIMIT + 6} are"):
        settings.apply(SettingsChange(revert_to_version=6), 99.0)
    assert settings.apply(SettingsChange(revert_to_version=7), 99.0).version == HISTORY_LIMIT + 7


CHANGES = st.builds(
    SettingsChange,
    scheduling_policy=st.sampled_from(["", "nonsense", *SCHEDULING_POLICIES.names]),
    parameters=st.dictionaries(
        st.sampled_from([*sorted(DEFAULTS), "nonsense"]), st.floats(-10.0, 10.0), max_size=3
    ),
    reset_parameters=st.booleans(),
    expected_version=st.integers(0, 4),
    revert_to_version=st.integers(0, 4),
)


@given(st.lists(CHANGES, max_size=20))
def test_whatever_is_asked_the_settings_stay_usable_and_versions_grow_by_one(
    changes: list[SettingsChange],
) -> None:
    settings = history()
    for change in changes:
        before = settings.current
        try:
            settings.apply(change, 1.0)
        except (UnknownNameError, InvalidRequestError, SettingsVersionError):
            assert settings.current is before
        else:
            assert settings.current.version == before.version + 1
        current = settings.current
        assert settings.versions()[-1] is current
        assert not PARAMETERS.violations(current.values)
        assert dict(current.values) == {**DEFAULTS, **current.parameters}
        assert current.scheduling_policy in SCHEDULING_POLICIES.names
