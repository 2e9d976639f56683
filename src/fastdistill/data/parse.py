"""Takes the SQL out of an answer, and accounts for all the rest. Knows SQL's tokens, not its grammar.

`clean_sql` narrows an answer from both ends until nothing more can go, so the SQL it leaves is one piece of the
answer, untouched. It never repairs: what is not SQL stays as it is, for the gates to fail.
"""

import re
from collections.abc import Sequence
from typing import ClassVar

from msgspec import Struct

from fastdistill.core.step import Context, SampleStep, rewritten
from fastdistill.core.types import Candidate, Cut, Sample

LONGEST = 200_000
"""Characters. A longer answer is not a query; it is left alone, for a length rule to fail."""


class CleanSqlOutput(SampleStep):
    """Reduces each candidate's answer to its first query; what was around it is kept in `cuts`, in order.

    Thinking, code fences, labels, prose, further statements, quotes around the whole and the final semicolon go.
    Cleaning a clean answer changes nothing.
    """

    version: ClassVar[int] = 2

    async def run(self, sample: Sample, ctx: Context) -> Sample:
        return await rewritten(sample, _cleaned)


def _cleaned(candidate: Candidate) -> Candidate:
    answer, cuts = clean_sql(candidate.answer)
    return candidate if answer == candidate.answer else candidate.parsed(answer, cuts)


def clean_sql(text: str) -> tuple[str, tuple[Cut, ...]]:
    """The first query in `text`, and the pieces around it that are not blank, in the order of the text.

    Where there is no query, `text` without what surely is none (thinking, a fence's marks ...).
    """
    if len(text) > LONGEST:
        return text, ()
    body = text.strip()
    before: list[tuple[str, str]] = []
    after: list[tuple[str, str]] = []
    while (plain := _plain(body)) is None:
        if _STATEMENT.match(body):
            narrowed = _statements(body)
        else:
            narrowed = ("<" in body and _thinking(body)) or _fence(body) or _introduction(body) or _quotes(body)
        if narrowed is None:
            break
        body = narrowed.body.strip()
        before += narrowed.before
        after[:0] = narrowed.after
    if plain is not None and plain != body:
        body = plain
        after.insert(0, ("semicolon", ";"))
    return body, tuple([Cut(kind, whole) for kind, piece in before + after if (whole := piece.strip())])


def _plain(text: str) -> str | None:
    """`text` without a final semicolon, if it surely is one query and nothing else: most are, and no rule has to read
    them token by token.
    """
    found = _PLAIN.match(text)
    if found is None:
        return None
    if not found[1]:
        return text
    return None if _OPENS.search(text) or text.count("'") % 2 else text[:-1].rstrip()


class _Narrowed(Struct):
    """What a rule leaves of a text, and what it cuts on either side: kinds and pieces."""

    body: str
    before: Sequence[tuple[str, str]] = ()
    after: Sequence[tuple[str, str]] = ()


# Each rule sees a text without space around it, and returns less of it or None. A rule that cuts in front of a query
# sees no text that begins like SQL, so that no string literal or comment of a plain query is ever mistaken.


def _thinking(text: str) -> _Narrowed | None:
    """`<think>...</think>` in front, also unclosed, also with its opening tag in the prompt."""
    closing = _THINK_CLOSES.search(text)
    if closing is None and not _THINK_OPENS.match(text):
        return None
    end = closing.end() if closing else len(text)
    return _Narrowed(text[end:], [("thinking", text[:end])])


def _fence(text: str) -> _Narrowed | None:
    """The first fenced block that begins like a query; else the first, opened on its own line, that has one."""
    for block in _FENCED.finditer(text):
        if _QUERY.match(text, *block.span("code")):
            break
    else:
        for block in _FENCED.finditer(text):
            opened = not text[: block.start()].rpartition("\n")[2].strip(" \t>")
            if opened and _query_start(block["code"]) is not None:
                break
        else:
            return None
    opens, code, closes = block.groups()
    before, after = text[: block.start()], text[block.end() :]
    return _Narrowed(code, [("prose", before), ("fence", opens)], [("fence", closes), ("prose", after)])


def _introduction(text: str) -> _Narrowed | None:
    """Words in front of the query: `SQL:`, `Here is the query:`, a paragraph."""
    start = None if _opening_quote(text) else _query_start(text)
    if not start:
        return None
    kind = "prefix" if _LABEL.fullmatch(text[:start]) else "prose"
    return _Narrowed(text[start:], [(kind, text[:start])])


def _quotes(text: str) -> _Narrowed | None:
    """Quotes or backticks around the whole query, and what follows the closing ones."""
    mark = _opening_quote(text)
    if mark is None:
        return None
    end = _statement_end(text, len(mark), closing=mark)
    if end == len(text):
        # A literal's quote before the closing one ('... x = 'a'') reads as an escape: pair them up instead.
        last = text.rfind(mark)
        if not text[last + len(mark) :].strip("; .") and text.count(mark, len(mark), last) % 2 == 0:
            end = max(last, len(mark))
    elif inside := re.compile(rf";\s*+(?={mark})").match(text, end):
        end = inside.end()
    closes = mark if text.startswith(mark, end) else ""
    rest = _after_statement(text[end + len(closes) :].lstrip())
    return _Narrowed(text[len(mark) : end], [("quote", mark)], [("quote", closes), *rest])


def _statements(text: str) -> _Narrowed | None:
    """The first statement that is a query, or the first of all if none is; what follows it goes."""
    first_end = end = _statement_end(text, 0)
    start = 0
    while not _QUERY.match(text, start):
        following = _STATEMENT.match(text, end + 1) if text.startswith(";", end) else None
        if following is None:
            start, end = 0, first_end
            break
        start, end = end + 1, _statement_end(text, end + 1)
    tail = text[end:]
    if closing := _THINK_CLOSES.match(tail):
        # What came before was a draft, if an answer follows.
        draft = end + closing.end()
        if text[draft:].strip():
            return _Narrowed(text[draft:], [("thinking", text[:draft])])
    if not start and not tail:
        return None
    return _Narrowed(text[start:end], [("statement", text[:start])], _after_statement(tail))


def _after_statement(tail: str) -> list[tuple[str, str]]:
    rest = tail.removeprefix(";").strip()
    if _STATEMENT.match(rest):
        kind = "statement"
    elif _THINK.match(rest):
        kind = "thinking"
    else:
        kind = "markup" if _MARKUP.fullmatch(rest) else "prose"
    return [("semicolon", ";" if tail.startswith(";") else ""), (kind, rest)]


def _opening_quote(text: str) -> str | None:
    mark = _QUOTE.match(text)
    return mark[0] if mark and _STATEMENT.match(text, mark.end()) else None


def _query_start(text: str) -> int | None:
    """Where a query most likely begins: at a line's beginning in capitals, so in any case, anywhere in capitals."""
    for pattern in (_QUERY_LINE_CAPITALS, _QUERY_LINE, _QUERY_CAPITALS):
        if found := pattern.search(text):
            start = found.start("query")
            quoted = _QUOTED_BEFORE.search(text, max(start - 3, 0), start)
            return quoted.start() if quoted else start
    return None


def _statement_end(text: str, start: int, closing: str = "") -> int:
    """Where the statement that begins at `start` ends: at a semicolon, a mark that SQL has not, prose, the end.

    With `closing`, also where that quote follows a token that a query could end with.
    """
    position = start
    depth = 0
    complete = False  # the tokens so far could be a whole query
    bold = text.find("**", len(text.rstrip("* \t\r\n")))  # what closes it at the end, however often
    while token := _TOKEN.match(text, position):
        kind = token.lastgroup
        whole = complete and depth == 0
        if kind in ("end", "semicolon") or position == bold:
            return position
        if whole and closing and text.startswith(closing, position):
            return position
        if kind == "space":
            if whole and "\n" in token[0] and _is_prose(text, token.end()):
                return position
        elif kind == "open":
            depth += 1
            complete = False
        elif kind == "close":
            depth -= 1
            complete = True
        elif kind == "word":
            word = token[0].lower()
            complete = word not in KEYWORDS or word in _FINAL_KEYWORDS
        elif kind != "comment":
            # A star is all columns where an operand is due, and a product otherwise.
            complete = kind == "quoted" or (token[0] == "*" and not complete)
        position = token.end()
    return position


def _is_prose(text: str, position: int) -> bool:
    """Whether what begins a line here can't go on with a query that could end before it.

    So it is for two words of which the second can't follow an alias ("This query"), and a word with a colon. A few
    keywords begin sentences too ("In this case"), and then the third word tells.
    """
    if _HEADING.match(text, position):
        return True
    words = _WORDS.match(text, position)
    if words is None:
        return False
    first, second, third = ((words[name] or "").lower() for name in ("first", "second", "third"))
    if first in _SENTENCE_OPENERS:
        return third not in _AFTER_ALIAS and second not in KEYWORDS
    if first in KEYWORDS:
        return False
    return words["colon"] is not None or second not in _AFTER_ALIAS


# SQLite's keywords, and those of its neighbours that may stand where an alias could.
_KEYWORD_LIST = """
abort action add after all alter always analyze and any as asc at attach autoincrement before begin between by
cascade case cast check collate column commit conflict constraint create cross current current_date current_time
current_timestamp database default deferrable deferred delete desc detach distinct div do drop each else end escape
except exclude exclusive exists explain fail false fetch filter first following for foreign from full generated glob
group groups having if ignore ilike immediate in index indexed initially inner insert instead intersect into is
isnull join key last lateral left like limit match materialized mod natural no not nothing notnull null nulls of
offset on only or order others outer over partition pivot plan pragma preceding primary qualify query raise range
recursive references regexp reindex release rename replace restrict returning right rlike rollback row rows
savepoint select set similar some straight_join table tablesample temp temporary then ties to top transaction
trigger true unbounded union unique unnest update using vacuum values view virtual when where window with within
without xor
"""
_FINAL_KEYWORD_LIST = """
action asc column current_date current_time current_timestamp database desc end false first index isnull key last
notnull null only plan query row rows table true view
"""
_AFTER_ALIAS_LIST = """
as cross except fetch for from full group having indexed inner intersect join lateral left limit natural not offset on
order outer pivot qualify right set straight_join tablesample union using where window
"""
KEYWORDS = frozenset(_KEYWORD_LIST.split())
_FINAL_KEYWORDS = frozenset(_FINAL_KEYWORD_LIST.split())  # a query can end with these
_SENTENCE_OPENERS = frozenset(["as", "by", "for", "if", "in", "no", "to", "with"])
_AFTER_ALIAS = frozenset(["", *_AFTER_ALIAS_LIST.split()])  # the empty word: the line ends

# A comment's length is bounded, for one that nothing closes would be read to the end of the text at each keyword.
_GAP = r"(?:\s|--[^\n]*+\n|/\*(?:[^*]|\*(?!/)){0,2000}+\*/)"
_QUERY_TEXT = rf"""(?:
    (?i:select)(?=[\s*('"`\[/+~-])
  | (?i:with){_GAP}++ (?:(?i:recursive){_GAP}++)? (?:\w++|"[^"\n]*"|`[^`\n]*`|\[[^]\n]*\]) {_GAP}*+
    (?:\([^()]*+\){_GAP}*+)? (?i:as){_GAP}*+ (?:(?i:(?:not{_GAP}++)?materialized){_GAP}*+)? \(
  | (?i:values){_GAP}*+\(
)"""
_STATEMENT_TEXT = rf"""(?:{_QUERY_TEXT}
  | (?i:insert|replace){_GAP}++(?i:or|into)\b | (?i:delete){_GAP}++(?i:from)\b
  | (?i:update){_GAP}++\S++{_GAP}++(?i:set)\b | (?i:pragma){_GAP}++\w
  | (?i:create|drop|alter){_GAP}++(?i:temp|temporary|unique|virtual|table|view|index|trigger)\b
  | (?i:explain){_GAP}++(?:(?i:query){_GAP}++(?i:plan){_GAP}++)?(?i:select|with)\b
  | (?i:begin|commit|rollback){_GAP}*+(?:(?i:transaction){_GAP}*+)?(?=;|\Z) | (?i:attach|detach){_GAP}++(?i:database)\b
)"""
_LEAD = rf"(?:{_GAP}|\()*+"
_CAPITALS = r"(?:SELECT|WITH|VALUES)\b"
_QUERY = re.compile(_LEAD + _QUERY_TEXT, re.VERBOSE)
_STATEMENT = re.compile(_LEAD + _STATEMENT_TEXT, re.VERBOSE)
_FOUND = rf"(?P<query>(?:\([ \t]*+)*+{_QUERY_TEXT})"
_FOUND_CAPITALS = rf"(?P<query>(?:\([ \t]*+)*+(?={_CAPITALS}){_QUERY_TEXT})"
_LINE = r"(?:^[ \t]*+|[:：>*`'\"]\s*+)"
_QUERY_LINE_CAPITALS = re.compile(_LINE + _FOUND_CAPITALS, re.VERBOSE | re.MULTILINE)
_QUERY_LINE = re.compile(_LINE + _FOUND, re.VERBOSE | re.MULTILINE)
_QUERY_CAPITALS = re.compile(r"\b" + _FOUND_CAPITALS, re.VERBOSE)
_QUOTE = re.compile(r"(['\"`])\1{0,2}")

_THINK_NAME = r"(?i:think|thinking|thought|reasoning)"
_THINK_OPENS = re.compile(rf"<{_THINK_NAME}>")
_THINK_CLOSES = re.compile(rf"</{_THINK_NAME}>")
_THINK = re.compile(rf"</?{_THINK_NAME}>")

_FENCED = re.compile(
    r"""(?P<opens>```[ \t]*+(?:
            (?i:sql(?:ite3?)?|mysql|postgres(?:ql)?)\b | (?!(?i:select|with|values)\b)[\w+-]++(?=[ \t]*+\n)
        )?)
        (?P<code>[^`]*+(?:`(?!``)[^`]*+)*+) (?P<closes>```|\Z)""",
    re.VERBOSE,
)
_LABEL = re.compile(r"[#*\s]*+[^\n:：]{0,60}(?:[:：][*\s]*+)?\s*+")
_QUOTED_BEFORE = re.compile(r"['\"`]++\Z")

# None of these can stand in SQL outside of a string or a comment.
_MARK = rf"```|</?{_THINK_NAME}>|</\w+>|<\||\[/\w+\]|(?<=[A-Za-z)\]'\"`])\.(?=\s*+\Z)"
# With none of what may begin such a mark, even in a string, a text that begins like a query ends like one. A line may
# go on with a keyword that no sentence begins with; the commonest are looked for first.
_GOES_ON = "|".join(["from", "where", "and", "group", "order", "limit", *sorted(KEYWORDS - _SENTENCE_OPENERS)])
_PLAIN = re.compile(
    rf"""(?={_LEAD}{_QUERY_TEXT})
    (?:[^;`<\[*.\n]++ | <(?!/|\||{_THINK_NAME}>) | \[(?!/) | \*(?!\*) | \.(?!\s*+;?\Z)
      | \n\s*+(?=(?ai:{_GOES_ON})\b))*+ (;?)\Z""",
    re.VERBOSE,
)
_OPENS = re.compile(r'"|\[|--|/\*')  # what might not be closed before the end
_MARKUP = re.compile(r"(?:```|</?\w+>|<\|\w+\|>|\[/\w+\]|\*\*|[.\s])++")
_TOKEN = re.compile(
    rf"""(?P<end>{_MARK}) | (?P<semicolon>;) | (?P<space>\s++)
    | (?P<comment>--[^\n]*+ | /\*(?:[^*]|\*(?!/))*+(?:\*/|\Z))
    | (?P<quoted>'(?:[^']|'')*+(?:'|\Z) | "(?:[^"]|"")*+(?:"|\Z) | `(?:[^`]|``)*+(?:`|\Z) | \[[^]\n]{{0,200}}+\])
    | (?P<word>[\w$]++) | (?P<open>\() | (?P<close>\)) | (?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)

# What a new line after a whole query can't begin with: a heading, a numbered point, a tag.
_HEADING = re.compile(r"\*\*\S|#++\s|\d++[.)]\s|<\w++>")
_WORDS = re.compile(
    r"""(?P<first>[^\W\d]\w*+)(?:['’]\w++)? (?:
        (?P<colon>[ \t]*+(?::(?!:)|[：，。！、]))
      | [ \t]++(?P<second>[^\W\d]\w*+)(?:[ \t]++(?P<third>[^\W\d]\w*+))?
    )?""",
    re.VERBOSE,
)
