"""The HTML page of a run: its manifest and reports, to look at. One file, no script, nothing fetched."""

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fastdistill.control.terminal import clock, dollars, percent

_SIZES = ("B", "kB", "MB", "GB", "TB")


def render_html(manifest: Mapping[str, Any], quality: Mapping[str, Any], timing: Mapping[str, Any]) -> str:
    """The page as one string. Every value is escaped: names, answers and error messages may hold anything."""
    environment = Environment(
        loader=PackageLoader("fastdistill", "control"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "n": lambda count: f"{count:,}",
        "interval": percent,
        "duration": duration,
        "dollars": dollars,
        "file_size": file_size,
        # A place on a bar of full width, for CSS.
        "place": lambda share: f"{100 * min(max(share, 0), 1):.2f}%",
    }
    return environment.get_template("report.html.j2").render(manifest=manifest, quality=quality, timing=timing)


def duration(seconds: float) -> str:
    """`85 µs`, `4.2 ms`, `1.73 s`, `2:10`: three digits at most are told."""
    if seconds == 0:
        return "0"
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 99.5 else clock(seconds)


def file_size(count: int | None) -> str:
    """`512 B`, `1.5 kB`, `20.3 MB`: powers of 1000, as disks are sold; a dash for a file that has gone."""
    if count is None:
        return "–"
    size, unit = float(count), 0
    while size >= 999.95 and unit < len(_SIZES) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:.1f} {_SIZES[unit]}" if unit else f"{count} B"
