"""Draws docs/rulegraph.svg, the rules of the main job and what they depend on, from `snakemake --rulegraph`.

An edge that others imply is left out. --check: only say whether the drawing has the edges that the rules have now.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

OUTPUT = Path(__file__).parents[1] / "docs" / "rulegraph.svg"
Edges = set[tuple[str, str]]


def read_edges() -> Edges:
    """(rule, rule that needs it), without those that follow from others."""
    command = ["snakemake", "--rulegraph", "dot", "all"]
    text = subprocess.run(command, cwd=OUTPUT.parents[1], capture_output=True, text=True, check=True).stdout
    names = dict(re.findall(r'(\d+)\[label = "(\w+)"', text))
    edges = {(names[a], names[b]) for a, b in re.findall(r"(\d+) -> (\d+)", text)}

    def leads(start: str, end: str) -> bool:
        return any(b == end or leads(b, end) for a, b in edges if a == start)

    return {(a, b) for a, b in edges if not any(c != b and leads(c, b) for other, c in edges if other == a)}


def place(edges: Edges) -> dict[str, tuple[float, float]]:
    """A place for each rule: what needs nothing on top, each below all that it needs, near the middle of those."""
    names = sorted({name for edge in edges for name in edge})

    def depth(name: str) -> int:
        return max((depth(a) + 1 for a, b in edges if b == name), default=0)

    layers: dict[int, list[str]] = {}
    for name in names:
        # A rule that needs nothing stands just above the first that needs it.
        below = [depth(b) for a, b in edges if a == name]
        own = depth(name) or min(below) - 1
        layers.setdefault(own, []).append(name)
    places: dict[str, tuple[float, float]] = {}
    for level in sorted(layers):

        def middle(name: str) -> float:
            xs = [places[a][0] for a, b in edges if b == name and a in places]
            return sum(xs) / len(xs) if xs else 0.0

        row = sorted(layers[level], key=lambda name: (middle(name), name))
        for number, name in enumerate(row):
            places[name] = (number - (len(row) - 1) / 2, -level)
    return places


def draw(edges: Edges) -> None:
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "rules", "font.family": "sans-serif"})
    places = place(edges)
    width = 2 + 1.7 * (max(x for x, _ in places.values()) - min(x for x, _ in places.values()))
    figure = Figure((width, 1 + 0.75 * (1 - min(y for _, y in places.values()))), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    box = {"boxstyle": "round", "facecolor": "white", "edgecolor": "#2166ac"}
    texts = {name: axes.text(*at, name, ha="center", va="center", bbox=box) for name, at in places.items()}
    for a, b in sorted(edges):
        arrow = {
            "arrowstyle": "->",
            "color": "0.4",
            "patchA": texts[a].get_bbox_patch(),
            "patchB": texts[b].get_bbox_patch(),
        }
        axes.annotate("", places[b], places[a], arrowprops={**arrow, "shrinkA": 0, "shrinkB": 0})
    xs, ys = zip(*places.values(), strict=True)
    axes.set(xlim=(min(xs) - 0.6, max(xs) + 0.6), ylim=(min(ys) - 0.4, 0.4))
    figure.savefig(OUTPUT, metadata={"Date": None, "Description": told(edges)})
    OUTPUT.write_text("".join(f"{line.rstrip()}\n" for line in OUTPUT.read_text().splitlines()))


def told(edges: Edges) -> str:
    return ", ".join(f"{a} to {b}" for a, b in sorted(edges))


def main() -> None:
    edges = read_edges()
    if "--check" not in sys.argv[1:]:
        draw(edges)
    elif told(edges) not in OUTPUT.read_text(encoding="utf-8"):
        sys.exit(f"{OUTPUT}: not the rules as they are; draw it again: make rulegraph")


main()
