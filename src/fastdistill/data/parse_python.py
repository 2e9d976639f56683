"""Takes the Python code out of an answer, and accounts for all the rest. Knows Python's tokens, not its grammar.

It never repairs and never runs anything: what is not code stays as it is, for the gates to fail.
"""

import keyword
import re
from typing import ClassVar

from fastdistill.core.step import Context, SampleStep, rewritten
from fastdistill.core.types import Cut, Sample

LONGEST = 200_000
"""Characters. A longer answer is no solution; it is left alone, for a length rule to fail."""

_DEEPEST = 8
"""Fences and thinking within each other. More are no solution either: a model repeats itself, and each is looked for in
all that follows."""


class CleanPythonOutput(SampleStep):
    """Reduces each candidate's answer to its code; what was around it is kept in `cuts`, in order.

    Thinking, code fences and prose go. Of several fenced blocks the first that defines something stays, or else the
    first. The indentation of the first line is kept, for an answer may continue a prompt. Cleaning a clean answer
    changes nothing.
    """

    version: ClassVar[int] = 3

    async def run(self, sample: Sample, ctx: Context) -> Sample:
        return await rewritten(sample, lambda candidate: candidate.parsed(*clean_python(candidate.answer)))


def clean_python(text: str) -> tuple[str, tuple[Cut, ...]]:
    """The code in `text`, and the pieces around it that are not blank, in the order of the text."""
    if len(text) > LONGEST:
        return text, ()
    before: list[Cut] = []
    after: list[Cut] = []
    body = text
    for _ in range(_DEEPEST):  # a fenced block may have prose in it, for its end is often forgotten
        code, in_front, behind = _narrowed(body)
        before += in_front
        after[:0] = behind
        if code == body:
            return code, tuple([Cut(cut.kind, whole) for cut in before + after if (whole := cut.text.strip())])
        body = code
    return text, ()


def _narrowed(text: str) -> tuple[str, list[Cut], list[Cut]]:
    """`text` without what surely is no code, and the pieces that were before and behind what is left."""
    start, end, indent = 0, len(text), ""
    before: list[Cut] = []
    after: list[Cut] = []
    if thinking := _THINKING.match(text):
        start = thinking.end()
        before.append(Cut("thinking", text[:start]))
    blocks = list(_FENCED.finditer(text, start))
    if blocks:
        block = next((b for b in blocks if _DEFINITION.search(b["code"])), blocks[0])
        before += [Cut("prose", text[start : block.start("opens")]), Cut("fence", block["opens"])]
        after += [Cut("fence", block["closes"]), Cut("prose", text[block.end() :])]
        start, end = block.span("code")
        indent = block["indent"]
    else:
        body = _STRING_OR_COMMENT.sub(lambda found: "#" * len(found[0]), text[start:])
        first = _CODE_LINE.search(body)
        if first and _PROSE_LINE.search(body, 0, first.start()):
            before.append(Cut("prose", text[start : start + first.start()]))
            body, start = body[first.start() :], start + first.start()
        last = _PROSE_LINE.search(body)
        if last and body[: last.start()].strip():
            end = start + last.start()
            after.append(Cut("prose", text[end:]))
    lines = text[start:end].split("\n")
    if indent and all(line.startswith(indent) or not line.strip() for line in lines):  # a block of a list
        lines = [line.removeprefix(indent) for line in lines]
    return _BLANK_LINES.sub("", "\n".join(lines)).rstrip(), before, after


# An end without a beginning ends a line, or stands before a fence: code may speak of `</think>`.
_THINKING = re.compile(
    r"\s*+(?:<(?i:think|thinking)>.*?(?:</(?i:think|thinking)>|\Z)"
    r"|(?:(?!```).)*?</think>(?=[ \t]*(?:\n|```|\Z)))",
    re.DOTALL,
)
_FENCED = re.compile(
    r"^(?P<indent>[ \t]*+)(?:[^\n`]*[:：][ \t*]*+)?(?P<opens>```[ \t]*+[\w+.-]*+[^\n`]*+)\n"
    r"(?P<code>.*?)(?P<closes>^[ \t]*+```|\Z)",
    re.DOTALL | re.MULTILINE,
)
_DEFINITION = re.compile(r"^(?:async[ \t]+def|def|class)\b", re.MULTILINE)
_CODE_LINE = re.compile(
    r"^(?:(?:async[ \t]+def|def|class)[ \t]+\w|import[ \t]+\w|from[ \t]+[\w.]+[ \t]+import\b|@\w)", re.MULTILINE
)
_BLANK_LINES = re.compile(r"\A(?:[ \t]*+\n)++")
# An apostrophe in a word of prose opens no string.
_STRING_OR_COMMENT = re.compile(
    r'"""(?:[^"\\]|\\.|"(?!""))*+(?:"""|\Z)' + r"|'''(?:[^'\\]|\\.|'(?!''))*+(?:'''|\Z)"
    r'|"(?:[^"\\\n]|\\.)*+"?' + r"|(?<!\w)[bfruBFRU]{0,2}'(?:[^'\\\n]|\\.)*+'?|\#[^\n]*+",
    re.DOTALL,
)
# What no line of Python begins with: two words in a row of which none is a keyword, a word on a line that ends with a
# colon, an exclamation mark, a fence that the prompt opened, `[DONE]`. Statements of Python 2 are left for the gates.
_KEYWORD = rf"(?!(?:{'|'.join((*keyword.kwlist, *keyword.softkwlist, 'print', 'exec'))})\b)"
_WORD = rf"{_KEYWORD}[^\W\d]\w*+(?:['’]\w++)?"
_GAP = r"[ \t]++"
_PROSE_LINE = re.compile(
    rf"^(?:{_WORD}{_GAP}{_WORD}|{_WORD}[,:.]{_GAP}{_WORD}{_GAP}{_WORD}|{_WORD}!(?!=)"
    rf"|{_WORD}[^\n=(\[{{:]*+:[ \t]*+$|\*\*[^\W\d]|```|~~~|\[/?[A-Z]{{3,}}\]$)",
    re.MULTILINE,
)
