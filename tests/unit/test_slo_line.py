"""The two lanes of the urgent and the hopeless: demotion, credit, and the share that is kept."""

from __future__ import annotations

import itertools
import random

import pytest

from sagecp.core.request import RequestRecord
from sagecp.core.slo_line import SloLine
from tests.support.core_world import make_record

TICKETS = itertools.count(1)


def waiting(
    request_id: str, arrival_s: float = 0.0, *, sequence: int = 1, work_s: float = 1.0, demoted: bool = False
) -> RequestRecord:
    record = make_record(request_id, sequence=sequence, arrival_s=arrival_s)
    record.ttft_objective_s = 1.0
    record.work_s = work_s
    record.demoted = demoted
    record.queue_ticket = next(TICKETS)
    return record


def line_of(*records: RequestRecord, share: float = 0.1) -> SloLine:
    line = SloLine(lambda record: record.arrival_s + record.ttft_objective_s, share)
    for record in records:
        line.push(record)
    return line


def serve(line: SloLine, cost_s: float | None = None) -> RequestRecord:
    """Dispatch the head."""
    record = line.head(0.0)
    assert record is not None
    record.queue_ticket = 0
    line.discard(record)
    line.note_dispatch(record, record.work_s if cost_s is None else cost_s)
    return record


def names(line: SloLine) -> list[str]:
    """Serve everything at no cost; return the order."""
    order = []
    while line.head(0.0) is not None:
        order.append(serve(line, 0.0).request_id)
    return order


def test_an_empty_line() -> None:
    line = line_of()
    assert line.head(0.0) is None
    assert line.rank(0.0) == (float("inf"), 0)
    assert (len(line), line.best_effort_count, list(line)) == (0, 0, [])
    line.step_over()
    line.step_back()


def test_the_feasible_go_first_by_key_and_the_hopeless_by_age() -> None:
    line = line_of(
        waiting("young-hopeless", 2.0, demoted=True),
        waiting("late", 5.0),
        waiting("old-hopeless", 1.0, demoted=True),
        waiting("soon", 3.0),
    )
    assert (len(line), line.best_effort_count) == (4, 2)
    assert names(line) == ["soon", "late", "old-hopeless", "young-hopeless"]


def test_a_demoted_head_goes_behind_and_keeps_its_age() -> None:
    old, young = waiting("old", 0.0), waiting("young", 1.0)
    line = line_of(old, young, waiting("hopeless", 0.5, demoted=True))
    line.demote(old)
    assert old.demoted
    assert old.queued
    assert line.best_effort_count == 2
    assert names(line) == ["young", "old", "hopeless"]


def test_only_the_head_is_demoted_and_only_once() -> None:
    first, second = waiting("first", 0.0), waiting("second", 1.0)
    line = line_of(first, second)
    with pytest.raises(ValueError, match="is not the head"):
        line.demote(second)
    assert not second.demoted
    line.demote(first)
    line.demote(first)
    assert line.best_effort_count == 1
    assert len(line) == 2


def test_a_demoted_request_can_leave_from_its_lane() -> None:
    first, second = waiting("first", 0.0), waiting("second", 1.0)
    line = line_of(first, second)
    line.demote(first)
    first.queue_ticket = 0
    line.discard(first)
    assert (len(line), line.best_effort_count) == (1, 0)
    assert names(line) == ["second"]


def test_rank_is_that_of_the_lane_whose_turn_it_is() -> None:
    line = line_of(waiting("a", 3.0, sequence=7), waiting("b", 1.0, sequence=8, demoted=True))
    assert line.rank(0.0) == (4.0, 7)
    serve(line)
    assert line.rank(0.0) == (1.0, 8)


def test_position_counts_the_whole_first_lane_before_the_second() -> None:
    records = [
        waiting("a", 3.0, sequence=1),
        waiting("b", 1.0, sequence=2),
        waiting("c", 2.0, sequence=3, demoted=True),
        waiting("d", 0.0, sequence=4, demoted=True),
    ]
    line = line_of(*records)
    assert [line.position(record, 0.0) for record in records] == [1, 0, 3, 2]


def test_stepping_over_goes_through_both_lanes_and_back() -> None:
    line = line_of(waiting("a", 0.0), waiting("b", 1.0), waiting("c", 0.5, demoted=True))
    seen = []
    while (record := line.head(0.0)) is not None:
        seen.append(record.request_id)
        line.step_over()
    assert seen == ["a", "b", "c"]
    assert len(line) == 3
    line.step_back()
    assert names(line) == ["a", "b", "c"]


def test_the_second_lane_earns_its_share_and_goes_first_when_it_can_pay() -> None:
    line = line_of(waiting("hopeless", demoted=True, work_s=1.5), share=0.2)
    order = []
    for number in range(10):
        line.push(waiting(f"r{number}", float(number), work_s=1.0))
        order.append(serve(line).request_id)
        if order[-1] == "hopeless":
            break
    # A second per four: after six of them it has its one and a half.
    assert order == ["r0", "r1", "r2", "r3", "r4", "r5", "hopeless"]


def test_nothing_is_earned_while_nobody_hopeless_waits() -> None:
    line = line_of(*(waiting(f"r{n}", float(n)) for n in range(100)), share=0.5)
    for _ in range(50):
        serve(line)
    line.push(waiting("hopeless", demoted=True, work_s=1.0))
    assert serve(line).request_id == "r50"


def test_credit_is_bounded() -> None:
    """However long the first lane was served, the second takes a minute at most at once."""
    line = line_of(
        *(waiting(f"h{n}", float(n), demoted=True, work_s=20.0) for n in range(9)),
        *(waiting(f"r{n}", float(n), work_s=1000.0) for n in range(2)),
        share=0.5,
    )
    assert [serve(line).request_id for _ in range(5)] == ["r0", "h0", "h1", "h2", "r1"]


def test_a_prompt_longer_than_what_can_be_saved_up_has_its_turn() -> None:
    line = line_of(
        waiting("huge", demoted=True, work_s=1e9),
        *(waiting(f"r{n}", float(n), work_s=10.0) for n in range(50)),
        share=0.5,
    )
    assert [serve(line).request_id for _ in range(7)] == [*(f"r{n}" for n in range(6)), "huge"]
    # It paid what it could: others of its lane wait until the lane has earned again.
    line.push(waiting("next", 1.0, demoted=True, work_s=1.0))
    assert [serve(line).request_id for _ in range(8)] == [*(f"r{n}" for n in range(6, 13)), "next"]


def test_the_time_that_nobody_else_can_use_costs_no_credit_that_is_not_there() -> None:
    line = line_of(*(waiting(f"h{n}", float(n), demoted=True, work_s=5.0) for n in range(4)), share=0.5)
    assert [serve(line).request_id for _ in range(2)] == ["h0", "h1"]
    # It owes nothing for it: the next second earned is its own.
    line.push(waiting("r0", work_s=5.0))
    assert serve(line).request_id == "r0"
    line.push(waiting("r1", work_s=5.0))
    assert serve(line).request_id == "h2"


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("cost_per_work", [1.0, 3.0])
def test_under_permanent_load_the_hopeless_get_about_their_share(share: float, cost_per_work: float) -> None:
    """Both lanes never empty; a request costs its prompt's work, and often its decodes as well."""
    draw = random.Random(1)
    line = line_of(share=share)
    served = {True: 0.0, False: 0.0}
    count = 0

    def push(demoted: bool) -> None:
        nonlocal count
        count += 1
        work_s = draw.choice([2.0, 5.0, 12.0]) if demoted else draw.choice([0.1, 0.5, 1.0])
        line.push(
            waiting(f"r{count}", float(count), sequence=count, work_s=work_s, demoted=demoted),
        )

    for _ in range(5):
        push(True)
        push(False)
    for _ in range(4000):
        head = line.head(0.0)
        assert head is not None
        cost_s = cost_per_work * head.work_s
        record = serve(line, cost_s)
        served[record.demoted] += cost_s
        push(record.demoted)
    assert served[True] / sum(served.values()) == pytest.approx(share, rel=0.1)


def test_nothing_starves_in_the_second_lane() -> None:
    line = line_of(*(waiting(f"h{n}", float(n), demoted=True, work_s=20.0) for n in range(5)), share=0.1)
    order = []
    for number in range(2000):
        line.push(waiting(f"r{number}", 1000.0 + number, work_s=0.5))
        order.append(serve(line).request_id)
    assert [name for name in order if name.startswith("h")] == ["h0", "h1", "h2", "h3", "h4"]


def test_without_a_share_the_hopeless_only_get_what_is_left() -> None:
    line = line_of(waiting("hopeless", demoted=True), share=0.0)
    for number in range(1000):
        line.push(waiting(f"r{number}", float(number)))
        assert serve(line).request_id == f"r{number}"
    assert serve(line).request_id == "hopeless"
