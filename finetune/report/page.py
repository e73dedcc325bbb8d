"""The page of a report: its style sheet, and the functions that turn data into HTML.

Everything that comes from a file goes through `show` (or `html.escape` over `readable`): data is text, never markup.
"""

from collections.abc import Iterable, Mapping
from html import escape

from finetune.report import charts

# A page loads and runs nothing. Should markup ever get through, the browser still refuses to fetch or execute it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

LONGEST_CELL = 500  # characters

# C0 controls but tab and newline, delete, C1 controls, halves of surrogate pairs, Unicode's bidirectional overrides.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {127: 0x2421}
_PICTURES |= dict.fromkeys((*range(128, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)), 0xFFFD)
_PICTURES |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)

STYLE = """
:root {
  color-scheme: light;
  --page: #f6f7f9; --panel: #fff; --text: #1d2129; --muted: #667085; --rule: #e4e7ec;
  --series-a: #2f6fde; --series-b: #c8601a; --series-c: #0f8a80; --series-d: #7a4fc9; --series-e: #c2377f;
  --series-f: #6b7280; --good: #18794e; --good-soft: #dff3e8; --bad: #b42318;
  --warn: #93590d; --warn-soft: #fdf3dc; --mark: #fbdfc9;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    color-scheme: dark;
    --page: #14161a; --panel: #1c1f25; --text: #e4e7ec; --muted: #98a2b3; --rule: #2d323b;
    --series-a: #78a9ff; --series-b: #f2a35e; --series-c: #5fd0c5; --series-d: #b79bf5; --series-e: #f28bbb;
    --series-f: #a8b0bd; --good: #6fd3a0; --good-soft: #173527; --bad: #ff8a80;
    --warn: #f0c468; --warn-soft: #352b14; --mark: #5a3419;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3em; font-weight: 650; }
h2 { font-size: 1.1rem; margin: 2.4em 0 .8em; font-weight: 650; }
h1, h2, p, dd, td, figcaption { overflow-wrap: anywhere; }
p { margin: .4em 0; }
.muted, .unit, .remark { color: var(--muted); }
.remark { margin-right: .9em; }
.panel { background: var(--panel); border: 1px solid var(--rule); border-radius: 8px; padding: 14px 16px; margin: 0; }
.status { display: inline-block; padding: 0 .6em; border: 1px solid; border-radius: 1em; font-size: .85em;
  font-weight: 600; color: var(--muted); }
.status.finished, .badge.match { color: var(--good); } .status.failed, .status.interrupted { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 12px; margin: 20px 0; }
.tile .name { color: var(--muted); font-size: .85em; }
.tile .value { font-size: 1.2rem; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.35; }
.tile .more { color: var(--muted); font-size: .85em; }
.notes { background: var(--warn-soft); border-color: transparent; }
.notes strong { color: var(--warn); }
.notes ul { margin: .3em 0 0; padding-left: 1.2em; }
.notes + .notes { margin-top: 12px; }
.notes.missing { background: none; border: 1px dashed var(--rule); }
.notes.missing strong { color: var(--muted); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 14px; }
.charts .panel { padding-bottom: 8px; }
.legends { font-size: .85em; min-height: 1.6em; color: var(--muted); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-bottom: 1px solid var(--rule); }
tr:last-child th, tr:last-child td { border-bottom: 0; }
th { font-weight: 500; color: var(--muted); }
.number { text-align: right; white-space: nowrap; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); gap: 14px; }
.columns .panel > table { margin-top: .3em; }
.scroll { overflow-x: auto; }
pre { margin: 0; font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; tab-size: 4; }
.row { margin-bottom: 14px; }
.row header { display: flex; flex-wrap: wrap; gap: 4px 12px; justify-content: space-between; font-size: .85em;
  color: var(--muted); margin-bottom: 8px; }
.row .asked { display: grid; grid-template-columns: minmax(0, auto) minmax(0, 1fr); gap: 16px; }
.row .asked.bare { grid-template-columns: 1fr; }
.row .images { display: flex; flex-wrap: wrap; gap: 8px; max-width: 300px; align-content: flex-start; }
.row img { display: block; width: auto; height: auto; min-width: min(100%, 240px); max-width: 100%; max-height: 360px;
  object-fit: contain; border-radius: 4px; border: 1px solid var(--rule); }
.row .sides { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; margin-top: 12px; padding-top: 12px;
  border-top: 1px solid var(--rule); }
.row .sides img { margin-bottom: 8px; }
.name { color: var(--muted); font-size: .85em; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; margin: 0 0 .7em; }
.badge { font-size: .85em; font-weight: 600; margin-left: .6em; white-space: nowrap; }
.badge.differs { color: var(--muted); font-weight: 400; } .badge.wrong { color: var(--bad); }
.match .said { background: var(--good-soft); border-radius: 4px; padding: 2px 8px; margin-left: -8px; }
mark { background: var(--mark); color: inherit; border-radius: 3px; padding: 0 2px; }
del { color: var(--muted); }
code.token { font: .85em ui-monospace, monospace; color: var(--muted); border: 1px solid var(--rule);
  border-radius: 4px; padding: 0 3px; }
.note { font-size: .75em; color: var(--warn); margin-left: .3em; }
.spelled { border-bottom: 1px dashed var(--warn); }
.context { border-left: 3px solid var(--warn); padding-left: .4em; }
.context > .note { margin: 0 .5em 0 0; }
.left-out { margin: 0 0 10px; padding-left: 1.2em; font-size: .9em; color: var(--warn); }
.seen { display: flex; flex-wrap: wrap; gap: 10px; margin-bottom: 12px; align-items: flex-start; }
.seen figure { margin: 0; flex: 1 1 140px; max-width: 300px; }
.seen img { min-width: 0; width: 100%; object-fit: contain; object-position: top left; }
.seen figcaption { font-size: .8em; color: var(--muted); overflow-wrap: anywhere; }
.nothing { border: 1px dashed var(--rule); border-radius: 4px; padding: 12px; color: var(--muted); font-size: .85em; }
@media (max-width: 640px) {
  main { padding: 20px 12px 48px; }
  .row .asked, .row .sides { grid-template-columns: 1fr; }
  .row .images { max-width: none; }
}
@media print {
  body { background: none; font-size: 12px; }
  main { max-width: none; padding: 0; }
  .panel, tr { break-inside: avoid; }
  .panel.long { break-inside: auto; }
  h2 { break-after: avoid; }
  * { print-color-adjust: exact; }
}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document. `title` is text, `body` is HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{show(title)}</title>\n<style>{STYLE}{charts.STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def readable(text: object) -> str:
    """Text that can be encoded as UTF-8 and hides nothing: control characters become their pictures (U+2400...);
    lone surrogates and bidirectional overrides become U+FFFD."""
    return str(text).replace("\r\n", "\n").translate(_PICTURES)


def show(text: object) -> str:
    """Data as HTML text, also safe within a quoted attribute."""
    return escape(readable(text), quote=True)


def table(rows: Iterable[Iterable[str]], *, head: Iterable[str] = (), numeric: Iterable[int] = ()) -> str:
    """A `<table>`; the first cell of a row is its heading. Cells are escaped.

    Args:
        rows: cells, as text.
        head: names of the columns; empty for no head.
        numeric: numbers of the columns to align right.
    """
    right = set(numeric)

    def cell(tag: str, column: int, text: str) -> str:
        side = ' class="number"' if column in right else ""
        return f"<{tag}{side}>{show(text)}</{tag}>"

    heading = "".join(cell("th", column, text) for column, text in enumerate(head))
    lines = [f"<tr>{heading}</tr>"] if heading else []
    for row in rows:
        cells = "".join(cell("td" if column else "th", column, text) for column, text in enumerate(row))
        lines.append(f"<tr>{cells}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def tiles(values: Iterable[tuple[str, str, str]]) -> str:
    """Small panels of (name, value, remark, which may be empty); all are escaped."""
    panels = [
        f'<div class="panel tile"><div class="name">{show(name)}</div><div class="value">{show(value)}</div>'
        + (f'<div class="more">{show(more)}</div>' if more else "")
        + "</div>"
        for name, value, more in values
    ]
    return f'<div class="tiles">{"".join(panels)}</div>' if panels else ""


def flatten(value: object, prefix: str = "") -> list[tuple[str, str]]:
    """Nested data as rows of (dotted key, text), for data without a section of its own."""
    if isinstance(value, Mapping):
        return [
            row for key, inner in value.items() for row in flatten(inner, f"{prefix}.{key}" if prefix else str(key))
        ]
    if isinstance(value, list):
        value = ", ".join(map(str, value))
    text = "" if value is None else str(value)
    return [(prefix, text if len(text) <= LONGEST_CELL else f"{text[:LONGEST_CELL]}...")] if text else []
