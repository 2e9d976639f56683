"""How commands speak: lines, tables, and figures in words.

rich is imported when something is said, not before, so that commands which say little start fast.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastdistill.core.stats import Rate

if TYPE_CHECKING:
    from rich.console import Console, JustifyMethod, RenderableType
    from rich.text import Text

    from fastdistill.core.compare import Difference


def say(words: "str | Text" = "", style: str = "", console: "Console | None" = None) -> None:
    """Words as they are: never wrapped, for a path or a command is there to be copied; nothing in them is obeyed."""
    from rich.console import Console

    words = "\n".join(map(printable, words.split("\n"))) if isinstance(words, str) else words
    (console or Console()).print(words, style=style, markup=False, soft_wrap=True)


def show_table(
    headers: Sequence[str], rows: Iterable[Sequence["RenderableType"]], console: "Console | None" = None
) -> None:
    """A plain table, and nothing without rows.

    `>` before a header puts its column to the right; where all headers are empty, there is no head. Strings are cleared
    of what could steer the terminal or be read as markup: they may come from a model or a server.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    head = any(header.strip(">") for header in headers)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold", show_header=head)
    shown = [[Text(printable(cell)) if isinstance(cell, str) else cell for cell in row] for row in rows]
    least = 0
    for at, header in enumerate(headers):
        right, name = header.startswith(">"), header.removeprefix(">")
        justify: JustifyMethod = "right" if right else "left"
        whole = right or at == 0
        texts = [name, *(cell.plain for cell in (row[at] for row in shown) if isinstance(cell, Text))]
        widest = max(cell_len(part) for text in texts for part in ([text] if whole else text.split(" ")))
        width = widest if whole else min(widest, 16)
        table.add_column(name, justify=justify, no_wrap=whole, overflow="fold", min_width=width)
        least += width + 2
    for row in shown:
        table.add_row(*row)
    if least - 2 > console.width:  # the terminal wraps the lines: a figure or an id that is cut would be another one
        table.width = least
    if table.row_count:
        console.print(table, crop=False)


def clock(seconds: float) -> str:
    """`2:10`, `1:02:10`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def dollars(amount: float | None) -> str:
    """`$12.30`, and `$0.0042` where cents would hide it."""
    if amount is None:
        return "–"
    return f"${amount:,.2f}" if amount >= 1 or amount == 0 else f"${amount:.4f}"


def percent(rate: Rate | Mapping[str, Any]) -> str:
    """`71.0% [68.1, 73.8]`, or a dash; of a rate, or of what a report has of it."""
    share, low, high = (rate[k] if isinstance(rate, Mapping) else getattr(rate, k) for k in ("rate", "low", "high"))
    return "–" if share is None else f"{share:.1%} [{100 * low:.1f}, {100 * high:.1f}]"


def points(found: "Difference") -> str:
    """`+3.2 points [0.1, 6.3]`, without an interval where there is none, or a dash."""
    if found.estimate is None:
        return "–"
    interval = "" if found.low is None or found.high is None else f" [{100 * found.low:.1f}, {100 * found.high:.1f}]"
    return f"{100 * found.estimate:+.1f} points{interval}"


def figure(value: float | None, form: str) -> str:
    """A figure in a format like `{:.2f}`, or a dash where there is none."""
    return "–" if value is None else form.format(value)


def tallied(counts: Mapping[str, int]) -> str:
    """`timeout 3, reset 1`: the most frequent first."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    words = [f"{name} {count:,}" for name, count in ranked]
    return ", ".join(words if len(words) <= 6 else [*words[:6], f"{len(words) - 6} more kinds"])


def counted(found: Mapping[str, Any]) -> str:
    """`rows 180, train_samples 130`: what an export says of its work, as far as it is numbers."""
    return ", ".join(f"{name} {count:,}" for name, count in found.items() if isinstance(count, int)) or "nothing"


def printable(text: str) -> str:
    """Text that can't steer the terminal."""
    return "".join(char if char.isprintable() else " " for char in text)


def cut(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
