"""The page of plans: whole by itself, and readable: no name lies on another."""

from __future__ import annotations

import itertools
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from sagecp.cli.main import main
from sagecp.cli.plan.label_places import LabelPlace, place_labels

HEIGHT = 13.0


class _Reader(HTMLParser):
    """Finds what a page would fetch, and whether its elements are closed."""

    EMPTY = frozenset({"meta", "br", "i"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [str(value) for name, value in attrs if name in {"src", "href"}]
        if tag == "script":
            self.fetched.append(tag)
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def plot(path: Path, *arguments: str) -> str:
    with pytest.raises(SystemExit) as exited:
        main(["plan", "--workload", "chat", "--slo", "ttft=1s,tpot=50ms", "--plot", str(path), *arguments])
    assert not exited.value.code
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("rate", ["0", "6"])
def test_a_page_is_whole_and_fetches_nothing(
    rate: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = plot(
        tmp_path / "plans.html",
        "--model",
        "Llama-3.1-70B",
        "--gpus",
        "8xH100",
        "--gpus",
        "8xA100",
        "--rate",
        rate,
    )
    assert "plot: " in capsys.readouterr().err
    reader = _Reader()
    reader.feed(text)
    assert not reader.open
    assert not reader.fetched
    for title in ("First token and throughput", "Further tokens and price", "What more load does", "Memory",
                  "All figures", "Start it", "What was asked"):  # fmt: skip
        assert title in text
    assert "vllm serve meta-llama/Llama-3.1-70B" in text
    dots = re.findall(r'<circle class="dot ([^"]*)"[^>]*><title>([^<]*)</title>', text)
    assert len(dots) > 10
    assert all("requests/s at $" in title for _, title in dots)
    # Those of the front have the colour of their GPU and a name, the others are pale.
    assert {style for style, _ in dots} >= {"b3 h4", "c0"}
    assert '<text class="label c0"' in text


def test_a_drawing_is_a_picture_of_its_own(tmp_path: Path) -> None:
    text = plot(tmp_path / "plans.svg", "--model", "Qwen3-30B-A3B", "--gpus", "8xH100")
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    charts = root.findall("{http://www.w3.org/2000/svg}svg")
    assert len(charts) == 2
    assert all(chart.find("{http://www.w3.org/2000/svg}circle") is not None for chart in charts)


def test_a_model_with_markup_for_a_name_stays_text(tmp_path: Path) -> None:
    from tests.support.plan_models import LLAMA_8B, write_checkpoint

    folder = write_checkpoint(tmp_path / "<b>model&", LLAMA_8B)
    text = plot(tmp_path / "plans.html", "--model", str(folder), "--gpus", "1xH100")
    assert "<b>model" not in text
    assert "&lt;b&gt;model&amp;" in text


def test_where_nothing_meets_the_objectives_the_page_says_so(tmp_path: Path) -> None:
    text = plot(tmp_path / "plans.html", "--model", "Llama-3.1-70B", "--gpus", "8xL4", "--slo", "tpot=1ms")
    assert "No plan" in text


def test_no_server_is_needed_and_a_folder_that_is_not_there_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exited:
        main(
            ["plan", "--model", "Llama-3.1-8B", "--gpus", "1xH100", "--workload", "chat", "--plot",
             str(tmp_path / "nowhere" / "plans.html")]
        )  # fmt: skip
    assert exited.value.code == 2
    assert "cannot write" in capsys.readouterr().err


# -- names ---------------------------------------------------------------------------------------


def box_of(place: LabelPlace, width: float) -> tuple[float, float, float, float]:
    return place.x, place.y - HEIGHT * 0.75, place.x + width, place.y + HEIGHT * 0.2


def overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


@pytest.mark.parametrize("seed", range(30))
def test_names_lie_on_no_name_and_on_no_point(seed: int) -> None:
    draw = random.Random(seed)
    # Some of them close together, as plans are.
    middle = draw.uniform(100, 300), draw.uniform(60, 200)
    points = [
        (draw.gauss(middle[0], 40), draw.gauss(middle[1], 30)) if number % 2 else
        (draw.uniform(60, 440), draw.uniform(40, 240))
        for number in range(12)
    ]  # fmt: skip
    widths = [draw.uniform(30, 110) for _ in points]
    bounds = (50.0, 26.0, 460.0, 260.0)
    places = place_labels(points, widths, bounds)
    boxes = [box_of(place, width) for place, width in zip(places, widths, strict=True) if place is not None]
    assert len(boxes) >= 6
    assert not any(overlap(one, other) for one, other in itertools.combinations(boxes, 2))
    for box in boxes:
        assert box[0] >= bounds[0]
        assert box[2] <= bounds[2]
        assert not any(overlap(box, (x - 3.0, y - 3.0, x + 3.0, y + 3.0)) for x, y in points)


def test_a_name_alone_is_right_beside_its_point() -> None:
    (place,) = place_labels([(100.0, 100.0)], [50.0], (0.0, 0.0, 400.0, 300.0))
    assert place is not None
    assert not place.needs_leader
    assert 100.0 < place.x < 120.0


def test_no_room_is_no_name() -> None:
    assert place_labels([(10.0, 10.0)], [500.0], (0.0, 0.0, 100.0, 100.0)) == [None]
