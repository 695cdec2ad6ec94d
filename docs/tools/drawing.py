"""A few shapes of SVG: boxes, arrows, paths, words. Coordinates are in pixels, y downwards."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

__all__ = ["ACCENT", "CALM", "INK", "PAPER", "SHADE", "WARM", "Drawing"]

INK, PAPER, SHADE = "#1f2933", "#ffffff", "#eef2f6"
ACCENT, WARM, CALM = "#0b7285", "#c2410c", "#6b7280"
Point = tuple[float, float]


class Drawing:
    """A picture on white paper, readable on dark pages too.

    Args:
        title: What a screen reader says of it.
    """

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._parts: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, lines: Sequence[str], *,
        fill: str = SHADE, stroke: str = CALM, bold: bool = True,
    ) -> None:  # fmt: skip
        """A rounded box with lines of words in its middle, the first in bold."""
        self._parts.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" rx="8" fill="{fill}" '
            f'stroke="{stroke}" stroke-width="1.5"/>'
        )
        first = y + height / 2 - 8.5 * (len(lines) - 1) + 5
        for index, line in enumerate(lines):
            self.words(x + width / 2, first + 17 * index, line, bold=bold and index == 0)

    def words(
        self, x: float, y: float, text: str, *, size: int = 13, anchor: str = "middle", bold: bool = False,
        fill: str = INK,
    ) -> None:  # fmt: skip
        """One line of text on the base line ``y``."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{_n(x)}" y="{_n(y)}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{weight}>'
            f"{escape(text)}</text>"
        )

    def arrow(
        self, *points: Point, text: str = "", stroke: str = INK, dashed: bool = False, above: float = 6,
        both: bool = False,
    ) -> None:  # fmt: skip
        """A line through points with a head at its end; words over the middle of its first part."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        start = ' marker-start="url(#back)"' if both else ""
        self._parts.append(
            f'<polyline points="{_path(points)}" fill="none" stroke="{stroke}" stroke-width="1.5"{dash}{start} '
            'marker-end="url(#head)"/>'
        )
        if text:
            (x0, y0), (x1, y1) = points[:2]
            self.words((x0 + x1) / 2, (y0 + y1) / 2 - above, text, size=12)

    def line(self, *points: Point, stroke: str = CALM, width: float = 1.0, dashed: bool = False) -> None:
        """A line through points."""
        dash = ' stroke-dasharray="4 4"' if dashed else ""
        self._parts.append(
            f'<polyline points="{_path(points)}" fill="none" stroke="{stroke}" stroke-width="{_n(width)}"{dash} '
            'stroke-linejoin="round" stroke-linecap="round"/>'
        )

    def polygon(self, *points: Point, fill: str = SHADE, stroke: str = CALM, opacity: float = 1.0) -> None:
        """A filled area."""
        self._parts.append(
            f'<polygon points="{_path(points)}" fill="{fill}" fill-opacity="{_n(opacity)}" stroke="{stroke}"/>'
        )

    def dot(self, x: float, y: float, radius: float, fill: str) -> None:
        """A filled circle."""
        self._parts.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" fill="{fill}"/>')

    def render(self) -> str:
        """The file's text."""
        head = (
            '<marker id="{id}" viewBox="0 0 10 10" refX="{ref}" refY="5" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="{path}" fill="{ink}"/></marker>'
        )
        markers = head.format(id="head", ref=9, path="M0 0L10 5L0 10z", ink=INK)
        markers += head.format(id="back", ref=1, path="M10 0L0 5L10 10z", ink=INK)
        opening = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(self.width)} {_n(self.height)}" '
            f'width="{_n(self.width)}" height="{_n(self.height)}" role="img" '
            'font-family="system-ui, Helvetica, Arial, sans-serif">'
        )
        title, definitions = f"<title>{escape(self.title)}</title>", f"<defs>{markers}</defs>"
        paper = f'<rect width="100%" height="100%" rx="10" fill="{PAPER}"/>'
        return "\n".join([opening, title, definitions, paper, *self._parts, "</svg>\n"])


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _path(points: Sequence[Point]) -> str:
    return " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
