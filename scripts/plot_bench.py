#!/usr/bin/env python3
"""Draws decode and prefill speed against context length and batch, from lines of `arle bench step|prefill --json`.

    scripts/plot_bench.py docs/data/gpu-h100.jsonl docs/gpu-h100.svg

Solid: measured. Dashed: the floor, bytes that must move over the read ceiling of the same run (median_us * of_ceiling).
"""
import json
import math
import sys

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 330, 270, 62, 34, 14, 48
COLOURS = ["#1b6ca8", "#c4561b", "#3b7d3b", "#7a4a9e"]


def ticks(lo, hi):
    """1-2-5 values inside [lo, hi]; from 0 in equal steps on a linear axis."""
    if lo == 0:
        step = next(m * 10.0 ** e for e in range(-3, 9) for m in (1, 2, 5) if hi / (m * 10.0 ** e) <= 6)
        return [i * step for i in range(int(hi / step) + 1)]
    out = []
    for e in range(math.floor(math.log10(lo)), math.ceil(math.log10(hi)) + 1):
        out += [m * 10.0 ** e for m in (1, 2, 5) if lo <= m * 10.0 ** e <= hi * 1.001]
    return out


def number(v):
    return f"{v:,.0f}" if v >= 10 else f"{v:g}"


class Panel:
    """One diagram; x is logarithmic, y when log is set, else it begins at 0."""

    def __init__(self, title, x_name, y_name, series, log=False):
        self.title, self.x_name, self.y_name = title, x_name, y_name
        self.series = [(name, dashed, colour, sorted(points)) for name, dashed, colour, points in series if points]
        xs = [x for s in self.series for x, _ in s[3]]
        ys = [y for s in self.series for _, y in s[3]]
        self.x, self.y = (min(xs) / 1.3, max(xs) * 1.3), (min(ys) / 1.4, max(ys) * 1.4) if log else (0, max(ys) * 1.3)
        self.legend_y = HEIGHT - BOTTOM - 14 * len(self.series) - 8 if log else TOP

    def at(self, x, y):
        def share(v, lo_hi):
            lo, hi = lo_hi
            return v / hi if lo == 0 else math.log(v / lo) / math.log(hi / lo)
        return (LEFT + share(x, self.x) * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - share(y, self.y) * (HEIGHT - TOP - BOTTOM))

    def svg(self, x0):
        out = [f'<g transform="translate({x0},0)">',
               f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="18" text-anchor="middle" font-weight="bold">{self.title}</text>']
        for y in ticks(*self.y):
            _, py = self.at(self.x[0], y)
            out.append(f'<line x1="{LEFT}" y1="{py:.1f}" x2="{WIDTH - RIGHT}" y2="{py:.1f}" stroke="#ddd"/>'
                       f'<text x="{LEFT - 5}" y="{py + 4:.1f}" text-anchor="end">{number(y)}</text>')
        for x in sorted({x for s in self.series for x, _ in s[3]}):
            px, _ = self.at(x, self.y[0])
            out.append(f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{number(x)}</text>')
        out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}" text-anchor="middle">{self.x_name}</text>')
        out.append(f'<text transform="translate(13,{(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)" text-anchor="middle">{self.y_name}</text>')
        out.append(f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" height="{HEIGHT - TOP - BOTTOM}" fill="none" stroke="#888"/>')
        for row, (name, dashed, colour, points) in enumerate(self.series):
            line = " ".join("%.1f,%.1f" % self.at(*p) for p in points)
            dash = ' stroke-dasharray="5 4"' if dashed else ""
            out.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
            if not dashed:
                out += ['<circle cx="%.1f" cy="%.1f" r="3" fill="%s"/>' % (*self.at(*p), colour) for p in points]
            x, y = (LEFT + 8 if self.legend_y == TOP else WIDTH - RIGHT - 165), self.legend_y + 13 + 14 * row
            out.append(f'<line x1="{x}" y1="{y}" x2="{x + 20}" y2="{y}" stroke="{colour}" stroke-width="2"{dash}/>'
                       f'<text x="{x + 25}" y="{y + 4}">{name}</text>')
        return out + ["</g>"]


def panels(rows):
    shapes = sorted({r["shape"] for r in rows}, key=lambda s: (len(s), s))
    steps = [r for r in rows if r["bench"] == "step"]
    by_context, by_batch, prefill = [], [], []
    for shape, colour in zip(shapes, COLOURS):
        mine = [r for r in steps if r["shape"] == shape]
        one = [r for r in mine if r["batch"] == 1]
        if len(one) > 1:
            by_context += [(shape, False, colour, [(r["context"], r["median_us"] / 1000) for r in one]),
                           (shape + ", floor", True, colour, [(r["context"], r["median_us"] * r["of_ceiling"] / 1000) for r in one])]
        rate = {}
        for r in mine:      # of one batch, the shortest context
            if r["batch"] not in rate or r.get("context", 0) < rate[r["batch"]].get("context", 0):
                rate[r["batch"]] = r
        by_batch += [(shape, False, colour, [(b, b * 1e6 / r["median_us"]) for b, r in rate.items()]),
                     (shape + ", floor", True, colour, [(b, b * 1e6 / r["median_us"] / r["of_ceiling"]) for b, r in rate.items()])]
        prefill.append((shape, False, colour, [(r["prompt"], r["prompt"] * 1e6 / r["median_us"]) for r in rows
                                               if r["bench"] == "prefill" and r["shape"] == shape]))
    return [Panel("Decode, one row", "context, tokens", "ms per token", by_context),
            Panel("Decode by batch", "rows", "tokens/s", by_batch, log=True),
            Panel("Prefill", "prompt, tokens", "tokens/s", prefill)]


def main():
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with open(sys.argv[1], encoding="utf-8") as f:
        rows = [json.loads(line) for line in f if line.strip()]
    drawn = panels(rows)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * len(drawn)}" height="{HEIGHT}" '
           'font-family="sans-serif" font-size="11">', '<rect width="100%" height="100%" fill="white"/>']
    for i, p in enumerate(drawn):
        out += p.svg(i * WIDTH)
    with open(sys.argv[2], "w", encoding="utf-8") as f:
        f.write("\n".join(out + ["</svg>"]) + "\n")


if __name__ == "__main__":
    main()
