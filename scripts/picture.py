#!/usr/bin/env python3
"""Draws the transcript of a demo run as a terminal, in SVG: text stays text, nothing is fetched, any browser shows it.

usage: scripts/picture.py TRANSCRIPT OUT.svg [--title TEXT]

What the picture shows of a run: the headings, commands and proofs; of a command's long answer what fits. Lines are cut,
never changed, and what is left out is marked with a line of its own.
"""

import argparse
import html
import re

COLUMNS, PADDING, CHAR, LINE, BAR = 112, 18, 8.4, 19, 34
COLOURS = {"text": "#c9d1d9", "heading": "#79c0ff", "command": "#ffffff", "prompt": "#7ee787", "good": "#7ee787",
           "talk": "#8b949e", "guest": "#e3b341"}
# A long path or command of the machine the run was made on says nothing to a reader.
LEFT_OUT = re.compile(r"^\s+(next: |screen |watch |end |console |disk  |backup \.\.\.|waiting \.\.\.|note |door )")
WORK = re.compile(r"/\S*/demo-work/")


def chosen(text):
    """(kind, line) of what is drawn."""
    lines, blank = [], True
    for line in text.splitlines():
        line = WORK.sub("", line.rstrip())
        if LEFT_OUT.match(line):
            continue
        if not line.strip():
            # One empty line before each heading is enough.
            blank = True
            continue
        if line.startswith("== "):
            if lines:
                lines.append(("text", ""))
            lines.append(("heading", line[3:]))
        elif line.startswith("$ "):
            lines.append(("command", line))
        elif line.startswith("  ok: "):
            lines.append(("good", line))
        elif line.startswith("  | "):
            lines.append(("guest", line))
        elif line.startswith("  ("):
            lines.append(("talk", line))
        else:
            lines.append(("text", line))
        blank = False
    return [(kind, line if len(line) <= COLUMNS else line[: COLUMNS - 1] + "…") for kind, line in lines]


def span(kind, line):
    style = ' font-weight="bold"' if kind in ("heading", "command") else ""
    if kind == "command":
        prompt = f'<tspan fill="{COLOURS["prompt"]}">$</tspan>'
        return f'{prompt}<tspan fill="{COLOURS[kind]}"{style}>{html.escape(line[1:])}</tspan>'
    return f'<tspan fill="{COLOURS[kind]}"{style}>{html.escape(line)}</tspan>'


def draw(lines, title):
    width = round(2 * PADDING + COLUMNS * CHAR)
    height = BAR + 2 * PADDING + LINE * len(lines)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">',
        f"<title>{html.escape(title)}</title>",
        f'<rect width="{width}" height="{height}" rx="9" fill="#0d1117"/>',
        f'<path d="M0 {BAR}V9a9 9 0 0 1 9-9h{width - 18}a9 9 0 0 1 9 9v{BAR - 9}z" fill="#21262d"/>',
    ]
    for at, colour in enumerate(("#ff5f56", "#ffbd2e", "#27c93f")):
        out.append(f'<circle cx="{20 + 20 * at}" cy="{BAR / 2}" r="6" fill="{colour}"/>')
    font = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono','Liberation Mono',monospace"
    out.append(f'<text x="{width / 2}" y="{BAR / 2 + 5}" fill="#8b949e" font-family="{font}" font-size="13" '
               f'text-anchor="middle">{html.escape(title)}</text>')
    out.append(f'<g font-family="{font}" font-size="14" xml:space="preserve">')
    for at, (kind, line) in enumerate(lines):
        if line:
            # The length is said, so that every font gives the same columns.
            y, length = BAR + PADDING + LINE * at + 14, round(len(line) * CHAR, 1)
            out.append(f'<text x="{PADDING}" y="{y}" textLength="{length}" lengthAdjust="spacing">{span(kind, line)}</text>')
    out += ["</g>", "</svg>", ""]
    return "\n".join(out)


def main():
    parser = argparse.ArgumentParser(description="Draws the transcript of a demo run as an SVG picture.")
    parser.add_argument("transcript")
    parser.add_argument("out")
    parser.add_argument("--title", default="make demo")
    options = parser.parse_args()
    with open(options.transcript) as file:
        picture = draw(chosen(file.read()), options.title)
    with open(options.out, "w") as file:
        file.write(picture)


if __name__ == "__main__":
    main()
