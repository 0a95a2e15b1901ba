"""The results of one mode as a chart: bars in a plain SVG file, for light and dark pages, without scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

from bench.measures import MEASURES, Measure
from bench.results import Results, Rounds, summarise
from bench.site import MODES
from bench.table import figure

_SHOWN = ("tcp1", "tcp4", "udp1400", "udp64", "rtt", "cpu")
_COLUMNS = 2
_MARGIN, _GAP = 24, 32
_PANEL, _TITLES, _VALUES = 420, 150, 56
"""Widths in pixels: of a panel, and in it of the paths' titles and of the figures behind the bars."""
_ROW, _BAR, _HEAD, _TOP = 22, 14, 30, 74

_STYLE = """
  text { font: 12px system-ui, sans-serif; fill: #1f2328 }
  .page { fill: #ffffff } .heading { font-size: 16px; font-weight: 600 } .title { font-weight: 600 }
  .quiet { fill: #59636e } .bar { fill: #8c959f } .base { fill: #57606a } .own { fill: #0969da } .range { stroke: #1f2328 }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f6fc } .page { fill: #0d1117 } .quiet { fill: #9198a1 }
    .bar { fill: #656c76 } .base { fill: #9198a1 } .own { fill: #4493f8 } .range { stroke: #f0f6fc }
  }
"""


def render(results: Results, mode: str, titles: Mapping[str, str]) -> str:
    """The chart's text. Bars are medians, and the thin line on a bar goes from the lowest round to the highest.

    :param titles: of the paths, by name. Those of overlaynet stand out by their colour.
    :raises KeyError: if nothing was measured in this mode.
    """
    paths = results.paths[mode]
    measures = [measure for measure in MEASURES if measure.name in _SHOWN]
    panel_height = _HEAD + _ROW * len(paths) + 12
    rows = -(-len(measures) // _COLUMNS)
    width = 2 * _MARGIN + _COLUMNS * _PANEL + (_COLUMNS - 1) * _GAP
    height = _TOP + rows * panel_height + _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(_heading(mode))}</title>",
        f"<style>{_STYLE}</style>",
        f'<rect class="page" width="{width}" height="{height}" rx="6"/>',
        _text(_MARGIN, 32, _heading(mode), "heading"),
        _text(_MARGIN, 52, str(results.machine), "quiet"),
    ]
    for place, measure in enumerate(measures):
        row, column = divmod(place, _COLUMNS)
        x, y = _MARGIN + column * (_PANEL + _GAP), _TOP + row * panel_height
        parts += _panel(measure, paths, titles, x, y)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _heading(mode: str) -> str:
    return f"Two hosts on one machine, {MODES[mode].partition(':')[0]}"


def _panel(measure: Measure, paths: Mapping[str, Rounds], titles: Mapping[str, str], x: int, y: int) -> list[str]:
    better = "more is better" if measure.more_is_better else "less is better"
    parts = [_text(x, y + 16, f"{measure.title} ({measure.unit}), {better}", "title")]
    summaries = {name: summarise(rounds[measure.name]) for name, rounds in paths.items() if rounds.get(measure.name)}
    most = max((each.highest for each in summaries.values()), default=0) or 1
    scale = (_PANEL - _TITLES - _VALUES) / most
    left = x + _TITLES
    for place, name in enumerate(paths):
        top = y + _HEAD + place * _ROW
        parts.append(_text(x, top + 11, titles.get(name, name)))
        if name not in summaries:
            parts.append(_text(left, top + 11, "-", "quiet"))
            continue
        each = summaries[name]
        parts.append(
            f'<rect class="{_kind(name)}" x="{left}" y="{top}" width="{each.median * scale:.1f}" height="{_BAR}" rx="2"/>'
        )
        low, high, middle = left + each.lowest * scale, left + each.highest * scale, top + _BAR / 2
        parts.append(f'<line class="range" x1="{low:.1f}" x2="{high:.1f}" y1="{middle:g}" y2="{middle:g}"/>')
        parts.append(_text(round(high) + 6, top + 11, figure(each.median)))
    return parts


def _kind(name: str) -> str:
    """The bar's colour: what others are compared with, overlaynet's own, and the rest."""
    kinds: Mapping[str, Sequence[str]] = {"base": ("host", "vxlan"), "own": ("native", "single", "python")}
    return next((kind for kind, names in kinds.items() if name in names), "bar")


def _text(x: int, y: int, text: str, kind: str = "") -> str:
    marked = f' class="{kind}"' if kind else ""
    return f'<text{marked} x="{x}" y="{y}">{escape(text)}</text>'
