"""Statistics, tables and charts of the bench."""

from xml.etree import ElementTree

import pytest

from bench import chart, results, table
from bench.cpu import Machine
from bench.results import Results

MACHINE = Machine("6.18", "Some <Processor>", 2, "3.11.7")
TITLES = {"host": "bare", "vxlan": "VXLAN", "native": "native & fast"}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def found() -> Results:
    """Three rounds on three paths; in the last round the whole machine was at half its speed."""
    made = Results(MACHINE, {"rounds": 3})
    for pace in (1.0, 1.0, 0.5):
        for path, speed in (("host", 20.0), ("vxlan", 10.0), ("native", 5.0)):
            figures = {"tcp1": speed * pace, "rtt": 1 / speed / pace}
            results.add(made.paths, "wire", path, figures | ({"cpu_daemons": 2.0} if path == "native" else {}))
        results.add(made.peers, "native", "2", {"tcp1": 8.0 * pace})
        results.add(made.peers, "native", "10000", {"tcp1": 6.0 * pace})
    return made


def test_a_summary_is_the_median_and_the_extremes() -> None:
    assert results.summarise([3.0, 1.0, 8.0]) == results.Summary(3.0, 1.0, 8.0)


def test_ratios_are_taken_within_each_round() -> None:
    # The medians' ratio would be 2.0; but in two of three rounds, at its pace, it was 3.0.
    assert results.ratio([3.0, 6.0, 60.0], [1.0, 3.0, 20.0]) == 3.0
    assert results.ratio([3.0], [1.0, 100.0]) == 3.0


def test_without_a_round_in_common_there_is_no_ratio() -> None:
    assert results.ratio([1.0], []) is None
    assert results.ratio([1.0], [0.0]) is None


def test_results_survive_json(found: Results) -> None:
    assert Results.from_json(found.to_json()) == found


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"machine": {}}', '{"machine": 1}', '{"machine": null, "x": 1}'])
def test_other_documents_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^"):
        Results.from_json(text)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0004, "0.000"), (0.0512, "0.051"), (0.76, "0.760"), (4.949, "4.95"), (9.999, "10.0"), (118.4, "118")],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert table.figure(value) == text


def test_the_table_has_medians_ranges_and_ratios(found: Results) -> None:
    text = table.render(found, TITLES)
    assert "Linux 6.18, 2 cores of Some <Processor>" in text
    assert "at most 1500 bytes" in text
    lines = [line.split() for line in text.splitlines()]
    native = next(number for number, line in enumerate(lines) if line[:3] == ["native", "&", "fast"])
    assert lines[native][3:5] == ["median", "5.00"]
    assert lines[native][-1] == "2.00"
    assert lines[native + 1][:2] == ["range", "2.50-5.00"]
    assert lines[native + 2] == ["to", "VXLAN", "0.50", "2.00"]
    assert lines[native + 3] == ["to", "bare", "0.25", "4.00"]


def test_the_table_compares_peers_with_the_fewest(found: Results) -> None:
    lines = [line.split() for line in table.render(found, TITLES).splitlines()]
    many = next(number for number, line in enumerate(lines) if line[:1] == ["10,000"])
    assert lines[many][1:3] == ["median", "6.00"]
    assert lines[many + 2] == ["to", "2", "0.75"]


def test_the_columns_are_aligned(found: Results) -> None:
    lines = table.render(found, TITLES).splitlines()
    ends = {
        line.index(word) + len(word) for line in lines for word in ("1 TCP", "2.50-5.00", "5.00-10.0") if word in line
    }
    assert len(ends) <= 2  # one for each table
    assert not [line for line in lines if line != line.rstrip()]


def test_bars_are_as_long_as_their_medians(found: Results) -> None:
    root = ElementTree.fromstring(chart.render(found, "wire", TITLES))  # noqa: S314 - our own
    bars = [bar for bar in root.iter(f"{SVG}rect") if bar.get("class") != "page"]
    host, vxlan, native = (float(bar.attrib["width"]) for bar in bars[:3])
    assert host == pytest.approx(2 * vxlan, rel=0.01)
    assert vxlan == pytest.approx(2 * native, rel=0.01)
    assert [bar.get("class") for bar in bars[:3]] == ["base", "base", "own"]
    # And the lines go from the lowest to the highest: here, all end where the bar ends and begin in its middle.
    line = next(root.iter(f"{SVG}line"))
    assert float(line.attrib["x2"]) - float(line.attrib["x1"]) == pytest.approx(host / 2, abs=0.2)


def test_the_chart_stays_inside_of_its_page(found: Results) -> None:
    root = ElementTree.fromstring(chart.render(found, "wire", TITLES))  # noqa: S314 - our own
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for shape in root.iter():
        assert float(shape.get("x", 0)) + float(shape.get("width", 0)) <= width
        assert float(shape.get("y", 0)) <= height


def test_the_chart_needs_no_script_and_has_colours_for_both_pages(found: Results) -> None:
    text = chart.render(found, "wire", TITLES)
    assert "<script" not in text
    assert "prefers-color-scheme: dark" in text
    assert "native &amp; fast" in text
    assert "Some &lt;Processor&gt;" in text


def test_a_measure_that_a_path_lacks_has_no_bar(found: Results) -> None:
    del found.paths["wire"]["host"]["rtt"]
    before = chart.render(found, "wire", TITLES)
    root = ElementTree.fromstring(before)  # noqa: S314 - our own
    bars = [bar for bar in root.iter(f"{SVG}rect") if bar.get("class") != "page"]
    assert len(bars) == 5
