"""Pieces of a page that needs nothing but itself: escaped text, tables, facts, what is private, the page around."""

import base64
import hashlib
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

STYLE = Path(__file__).parent / "static" / "report.css"
HOMES = re.compile(r"(?:/home/|/Users/|[A-Za-z]:\\+Users\\+)[^/\\\s'\",:;]+|(?<![\w./~-])/root(?=/|\b)")
UNITS = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))

# Plays all videos of the page in step. Without it the page lacks that one button and nothing else.
SCRIPT = """
const button = document.getElementById("play");
const videos = [...document.querySelectorAll("video")];
const calm = matchMedia("(prefers-reduced-motion: reduce)");
if (button && videos.length) {
  button.hidden = false;
  button.addEventListener("click", () => {
    const playing = videos.some((video) => !video.paused);
    for (const video of videos) {
      if (playing) { video.pause(); } else { video.currentTime = 0; video.play(); }
    }
    button.textContent = playing ? "Play all" : "Pause all";
  });
}
if (calm.matches) { for (const video of videos) { video.loop = false; } }
"""


class Html(str):
    """Text that is HTML already; every other text is escaped where it enters the page."""


@dataclass(frozen=True)
class Privacy:
    """What must not leave with the page: the user's home folder and, unless told otherwise, the machine's name."""

    home: str
    host: str | None = None  # None: may be told

    def __call__(self, text: str) -> str:
        if len(self.home) > 1:
            text = re.sub(rf"{re.escape(self.home)}(?=/|\b)", "~", text)
        text = HOMES.sub("~", text)
        return re.sub(rf"(?<![\w-]){re.escape(self.host)}(?![\w-])", "(host)", text) if self.host else text

    def tree(self, value: Any) -> Any:
        """The same for every text in lists and mappings."""
        if isinstance(value, str):
            return self(value)
        if isinstance(value, Mapping):
            return {key: self.tree(inner) for key, inner in value.items()}
        return [self.tree(inner) for inner in value] if isinstance(value, list | tuple) else value


# ---- Elements -----------------------------------------------------------------------------------------------------


def safe(value: object) -> Html:
    return value if isinstance(value, Html) else Html(escape(str(value)))


def section(title: str, *parts: str) -> Html:
    """A part of the page under its heading; nothing when it holds nothing."""
    body = "\n".join(part for part in parts if part)
    return Html(f"<section>\n<h2>{safe(title)}</h2>\n{body}\n</section>") if body else Html("")


def paragraph(text: str, kind: str = "") -> Html:
    return Html(f"<p{f' class={kind!r}' if kind else ''}>{safe(text)}</p>")


def facts(pairs: Iterable[tuple[str, object]]) -> Html:
    """Names and values; those without a value are left out."""
    rows = [
        f"<div><dt>{safe(name)}</dt><dd>{safe(value)}</dd></div>" for name, value in pairs if value not in (None, "")
    ]
    return Html(f'<dl class="facts">{"".join(rows)}</dl>') if rows else Html("")


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> Html:
    """A table that scrolls by itself where it is too wide; the first cell of a row is its heading."""
    columns = "".join(f'<th scope="col">{safe(name)}</th>' for name in head)
    lines = (
        f'<tr><th scope="row">{safe(row[0])}</th>{"".join(f"<td>{safe(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return Html(
        f'<div class="scroll" role="region" tabindex="0" aria-label="{safe(caption)}"><table>'
        f"<caption>{safe(caption)}</caption><thead><tr>{columns}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def folded(title: str, body: str, shown: bool = False) -> Html:
    return Html(f"<details{' open' if shown else ''}><summary>{safe(title)}</summary>\n{body}\n</details>")


def code(text: str, label: str) -> Html:
    return Html(f'<pre role="region" tabindex="0" aria-label="{safe(label)}"><code>{safe(text)}</code></pre>')


def page(title: str, *parts: str) -> str:
    """The whole document. Its policy forbids every request, and every script and style but its own two."""
    style = STYLE.read_text("utf-8")
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; script-src '{_digest(SCRIPT)}'; "
        "img-src data:; media-src data:; base-uri 'none'; form-action 'none'"
    )
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="referrer" content="no-referrer">\n'
        f"<title>{safe(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ---- Words --------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 4) -> str:
    """A measured value in few signs, a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits += 0 < abs(value) < 1e-2
        return f"{value:,.{digits}f}" if abs(value) < 100 else f"{value:,.1f}"
    mantissa, _, power = f"{value:.3e}".partition("e")
    return f"{float(mantissa):g}e{int(power)}"


def duration(seconds: float | None) -> str:
    """31 s, 12 min 4 s, 5 h 12 min, 2 d 3 h."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    for name, small, long, short in (("min", "s", 60, 1), ("h", "min", 3600, 60), ("d", "h", 86400, 3600)):
        if whole < long * {"min": 60, "h": 24, "d": math.inf}[name]:
            first, rest = divmod(whole, long)
            return f"{first} {name}" + (f" {rest // short} {small}" if rest // short else "")
    raise AssertionError("a day has no upper end")


def moment(seconds: float | None) -> str:
    """A time since 1970 as a date of this machine's clock."""
    return "–" if seconds is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def size(count: float) -> str:
    return next((f"{count / unit:.1f} {name}" for name, unit in UNITS if count >= unit), f"{count:g} bytes")


def counted(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"
