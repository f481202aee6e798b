"""Charts as SVG: round ticks, spikes that stay, gaps, single points, well-formed XML."""

import math
import re
from xml.etree import ElementTree

import pytest

from weft.dashboard.plots import Chart, Line, figure, thinned
from weft.dashboard.scales import SIDE, labels_of, log_ticks, nice_ticks


def drawn(*lines: Line, **options) -> ElementTree.Element:
    """The figure, parsed: what is not well-formed fails here."""
    return ElementTree.fromstring(figure(Chart(title="a < b & c", lines=lines, **options), 1))


def paths(tree: ElementTree.Element, look: str) -> list[str]:
    """The d of each path of a look within the drawing area."""
    area = next(node for node in tree.iter("svg") if node.get("viewBox"))
    return [node.get("d", "") for node in area.iter("path") if look in node.get("class", "").split()]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 1.0, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)),
        (0.13, 0.47, (0.1, 0.2, 0.3, 0.4, 0.5)),
        (1, 100_000, (0, 20_000, 40_000, 60_000, 80_000, 100_000)),
        (-3e-5, 4e-5, (-4e-5, -2e-5, 0.0, 2e-5, 4e-5)),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, ticks: tuple[float, ...]):
    assert nice_ticks(low, high, 5) == pytest.approx(ticks)


def test_a_log_scale_has_powers_of_ten_and_2_and_5_between_few_of_them():
    assert log_ticks(0.02, 30_000) == pytest.approx((0.01, 0.1, 1, 10, 100, 1000, 10_000, 100_000))
    assert log_ticks(0.3, 6) == pytest.approx((0.2, 0.5, 1, 2, 5, 10))
    assert log_ticks(1, 1) == pytest.approx((1,))


def test_labels_are_short_and_tell_the_ticks_apart():
    assert labels_of((0, 20_000, 40_000)) == ("0", "20k", "40k")
    assert labels_of((0.0, 0.05, 0.1)) == ("0.00", "0.05", "0.10")
    assert labels_of((0.0, 5e-5, 1e-4)) == ("0", "5e-5", "1e-4")
    assert labels_of((0.01, 1, 100_000), alone=True) == ("0.01", "1", "1e5")


def test_a_spike_among_100_000_points_stays_at_its_height():
    values = [1.0] * 100_000
    values[61_234] = 50.0
    tree = drawn(Line(name="loss", steps=range(100_000), values=values), scale="linear")
    (path,) = paths(tree, "strong")
    heights = [float(point.split()[1]) for point in re.split("[ML]", path) if point]
    assert min(heights) == pytest.approx(0.0) and len(heights) < 1_300
    assert (61_234, 50.0) in thinned(list(enumerate(values)), 1_200)


def test_a_gap_breaks_the_line_and_is_kept_when_thinned():
    values = [1.0, 2.0, None, 3.0, math.nan, 4.0, 5.0]
    (path,) = paths(drawn(Line(name="loss", steps=range(7), values=values)), "strong")
    assert path.count("M") == 2
    (lonely,) = paths(drawn(Line(name="loss", steps=range(7), values=values)), "dots")
    assert lonely.count("M") == 1  # the 3 between two gaps
    kept = thinned([(i, None if i == 500 else 1.0) for i in range(1000)], 30)
    assert (500, None) in kept


def test_a_single_point_is_a_dot_in_the_middle():
    tree = drawn(Line(name="loss", steps=[7], values=[0.25]))
    assert paths(tree, "dots") == [f"M{SIDE / 2:.1f} {SIDE / 2:.1f}h0"]


def test_a_chart_without_values_says_so():
    tree = drawn(Line(name="loss", steps=[1, 2], values=[None, math.inf]))
    assert "No values." in "".join(tree.itertext()) and not list(tree.iter("svg"))


def test_a_few_values_that_dwarf_the_rest_make_the_scale_logarithmic():
    steps, values = range(1000), [0.1] * 999 + [80.0]
    assert "log scale" in "".join(drawn(Line(name="norm", steps=steps, values=values)).itertext())
    flat = drawn(Line(name="norm", steps=steps, values=[0.1] * 999 + [0.2]))
    assert "log scale" not in "".join(flat.itertext())


def test_the_description_tells_the_first_the_last_and_the_extremes():
    text = drawn(Line(name="loss", steps=[1, 2, 3], values=[2.0, 0.5, 1.0])).findtext(".//desc")
    assert text == "loss: 2 at step 1, 1 at 3; between 0.5 and 2."


def test_a_band_lies_around_its_line_and_within_the_drawing():
    line = Line(name="gain", steps=[0, 10], values=[1.0, 2.0], band=[(0.5, 1.5), (1.0, 3.0)], look="points")
    (band,) = paths(drawn(line), "band")
    heights = [float(number) for number in re.findall(r" (-?[\d.]+)", band)]
    assert band.endswith("Z") and min(heights) >= 0 and max(heights) <= SIDE


def test_every_line_of_several_stands_in_the_legend_with_its_own_colour():
    tree = drawn(*(Line(name=f"run <{i}>", steps=[0, 1], values=[0, i], colour=i) for i in (1, 2, 9)))
    assert ["".join(item.itertext()) for item in tree.iter("li")] == ["run <1>", "run <2>", "run <9>"]
    assert [item.find(".//path").get("class") for item in tree.iter("li")] == ["strong s1", "strong s2", "strong s1"]
