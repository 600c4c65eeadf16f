"""Charts of the results' pages as SVG, of Python's standard library alone."""

import math


def svg_bars(title, rows):
    """A bar chart: rows of (label, value, half range). Colours suit light and dark pages."""
    rows = [row for row in rows if row[1] == row[1]]
    left, right, height, gap = 300, 70, 18, 8
    width = 720
    top = 30
    most = max(value for _, value, _ in rows)
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {top + len(rows) * (height + gap) + 6}" '
             'font-family="system-ui, sans-serif" font-size="13">',
             f'<text x="0" y="16" font-weight="600" fill="#808890">{escape(title)}</text>']
    scale = (width - left - right) / most
    for i, (label, value, half) in enumerate(rows):
        y = top + i * (height + gap)
        parts.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end" fill="#808890">{escape(label)}</text>')
        parts.append(f'<rect x="{left}" y="{y}" width="{value * scale:.1f}" height="{height}" rx="2" fill="#3b82c4"/>')
        if half:
            a, b = left + (value - half) * scale, left + (value + half) * scale
            parts.append(f'<path d="M{a:.1f} {y + height / 2} H{b:.1f}" stroke="#d6604d" stroke-width="2"/>')
        parts.append(f'<text x="{left + value * scale + 6:.1f}" y="{y + 13}" fill="#808890">{value:.2f}</text>')
    return "\n".join(parts) + "\n</svg>\n"


def ticks_between(low, high):
    """Round numbers in a logarithmic range, three at least."""
    ticks = [tick for tick in (t * 10 ** p for p in range(0, 5) for t in (1, 1.5, 2, 3, 4, 5, 7)) if low <= tick <= high]
    power = math.floor(math.log10(high))
    while len(ticks) < 3:
        for step in (5 * 10.0 ** power, 2 * 10.0 ** power, 10.0 ** power):
            if len(ticks) < 3:
                ticks = [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
        power -= 1
    return ticks


def svg_lines(title, x_label, series):
    """Lines over x; series: {name: [(x, y)]}. y is logarithmic."""
    colours = ["#3b82c4", "#d6604d", "#2e9a4b", "#9970ab"]
    points = [p for line in series.values() for p in line]
    left, right, top, bottom, width, height = 60, 20, 34, 60, 720, 340
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x0, x1 = min(xs), max(max(xs), min(xs) + 1e-9)
    y0, y1 = math.log(min(ys) * 0.95), math.log(max(ys) * 1.05)

    def place(x, y):
        return (left + (x - x0) / (x1 - x0) * (width - left - right),
                height - bottom - (math.log(y) - y0) / (y1 - y0) * (height - top - bottom))

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
             'font-family="system-ui, sans-serif" font-size="13">',
             f'<text x="0" y="16" font-weight="600" fill="#808890">{escape(title)}</text>']
    for tick in ticks_between(math.exp(y0), math.exp(y1)):
        _, y = place(x0, tick)
        parts.append(f'<path d="M{left} {y:.1f} H{width - right}" stroke="#808890" stroke-opacity="0.3"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#808890">{tick:g}</text>')
    for x in sorted(set(xs)):
        at, _ = place(x, math.exp(y0))
        parts.append(f'<text x="{at:.1f}" y="{height - bottom + 18}" text-anchor="middle" fill="#808890">{x:g}</text>')
    parts.append(f'<text x="{(left + width) / 2}" y="{height - bottom + 36}" text-anchor="middle" '
                 f'fill="#808890">{escape(x_label)}</text>')
    for i, (name, line) in enumerate(series.items()):
        colour = colours[i % len(colours)]
        where = [place(x, y) for x, y in sorted(line)]
        path = " L".join(f"{x:.1f} {y:.1f}" for x, y in where)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in where]
        at = left + i * (width - left) / max(1, len(series))
        parts.append(f'<rect x="{at:.0f}" y="{height - 14}" width="14" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{at + 20:.0f}" y="{height - 8}" fill="#808890">{escape(name)}</text>')
    return "\n".join(parts) + "\n</svg>\n"


def escape(text):
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
