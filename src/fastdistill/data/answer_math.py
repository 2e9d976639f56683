"""Takes the final answer out of a text, and compares it with gold's where both are plain. Pure, exact, no algebra.

Plain are numbers (`1,200`, `-3.5`, `2/3`, `1\\frac{1}{2}`, `0.\\overline{3}`, `1.5 \\times 10^{6}`) with or without a
unit, lists, tuples and sets of them, choice letters, and words. All else is for `execution.math_worker`.
"""

import re
import unicodedata
from collections.abc import Callable
from enum import StrEnum
from fractions import Fraction
from itertools import accumulate

from msgspec import Struct

LONGEST = 300
"""Characters of an answer that is looked at."""
_TAIL = 100_000  # characters of a text, counted from its end, that may hold its final answer
_AT_THE_END = 300  # characters, likewise, that may hold "the answer is"
_MOST = 16  # answers of one kind, the last ones, that are looked at


class Equality(StrEnum):
    EQUAL = "match"
    DIFFERENT = "mismatch"
    UNIT_UNCLEAR = "unit_unclear"  # it can't be told whether the units are equal
    NOT_PLAIN = "not_plain"


class Extracted(Struct, frozen=True):
    """Final answers as they stand in a text, cleaned; several only where the text itself leaves it open."""

    answers: tuple[str, ...]
    method: str


def extract(text: str, *, last_number: bool = False) -> Extracted | None:
    """The final answer of a text, or None if it gives none. What it thinks in `<think>` is not looked at.

    The last complete `\\boxed{}` counts, else the last `####`, else "the answer is" or a heading at the end, else (if
    wanted) the last number. Different boxes in one paragraph leave open which is final.
    """
    text = text.rpartition("</think>")[2].partition("<think>")[0][-_TAIL:]
    if boxes := [box for box in map(clean, _boxes(text)[-_MOST:]) if box]:
        return Extracted(tuple(dict.fromkeys(boxes)), "boxed")
    lines = [clean(line) for line in _HASHES.findall(text)[-_MOST:]]
    # Four hashes are a heading in Markdown too.
    if plain := [line for line in lines if _parsed(line) is not None] or lines:
        return Extracted((plain[-1],), "hashes")
    if sentences := _SENTENCE.findall(text[-_AT_THE_END:]):
        return Extracted((clean(_SENTENCE_END.split(sentences[-1])[0]),), "sentence")
    if last_number and (numbers := _LAST_NUMBER.findall(text)):
        return Extracted((clean(numbers[-1]),), "last_number")
    return None


def compare(gold: str, candidate: str, close: Callable[[Fraction, Fraction], bool]) -> Equality:
    """Compares two cleaned answers; `close` says whether two numbers count as equal."""
    if gold == candidate:
        return Equality.EQUAL
    chosen = [found for text in (gold, candidate) if (found := _CHOSEN.fullmatch(text))]
    if len({found[1] for found in chosen}) == 2:
        return Equality.DIFFERENT
    if len(chosen) == 2 and not all(found[2] for found in chosen):
        return Equality.EQUAL
    wanted, given = (_parsed(_LABEL.sub("", text)) for text in (gold, candidate))
    if wanted is None or given is None:
        return Equality.NOT_PLAIN
    if isinstance(wanted, str) and isinstance(given, str) and sorted(wanted) == sorted(given) and wanted != given:
        return Equality.NOT_PLAIN  # `ab` and `ba` are products
    if isinstance(wanted, str) or isinstance(given, str):
        return Equality.EQUAL if wanted == given else Equality.DIFFERENT
    if wanted.brackets != given.brackets and min(len(wanted.items), len(given.items)) > 1:
        return Equality.NOT_PLAIN if "{}" in (wanted.brackets, given.brackets) else Equality.DIFFERENT
    if len(wanted.items) != len(given.items):
        return Equality.DIFFERENT
    pairs = {_compare_quantities(*pair, close) for pair in zip(wanted.items, given.items, strict=True)}
    worst_first = (Equality.NOT_PLAIN, Equality.DIFFERENT, Equality.UNIT_UNCLEAR, Equality.EQUAL)
    return next(worst for worst in worst_first if worst in pairs)


def canonical(answer: str) -> str:
    """One spelling for equal plain answers, so that they can be counted; of all others the text without space.

    Units are left out, for of several answers to one question some have them and some do not.
    """
    plain = _parsed(answer)
    if plain is None:
        return "".join(answer.split())
    if isinstance(plain, str):
        return plain
    numbers = ", ".join(str(item.number) for item in plain.items)
    return numbers if len(plain.items) == 1 else f"{plain.brackets[0]}{numbers}{plain.brackets[1]}"


def clean(text: str) -> str:
    """The text in one form, whatever Unicode, LaTeX or Markdown it was dressed in."""
    if len(text) > 2 * LONGEST:  # too long whatever it is dressed in; a part of it might be right by chance
        return text[: 2 * LONGEST]
    text = _SUPERSCRIPT.sub(lambda found: f"^{{{unicodedata.normalize('NFKC', found[0])}}}", text)
    text = unicodedata.normalize("NFKC", _VULGAR.sub(r" \g<0>", text)).translate(_SYMBOLS)
    for pattern, plain in _DRESS:
        text = pattern.sub(plain, text)
    while (bare := _WRAPPED.sub(r"\1", text.strip(" \t\r\n*`").removesuffix(".").strip())) != text:
        text = bare
    return text


def without_unit(text: str) -> tuple[str, str]:
    """An expression, and the unit after it in one spelling, or the base of a numeral."""
    if based := re.fullmatch(r"(\d+)_\{?(?:\\text\{)?(\w+)\}*", text):
        return based[1], f"_{based[2]}"
    text = _LABEL.sub("", text)
    found = re.fullmatch(rf"((?!.*{_ANGLED}).*\S)\s+([^\W\d_]{{2,}}|[mgslh])(\^\{{?[23]\}}?)?", text)
    unit = _unit(f" {found[2]}", "") if found else None
    # Of what is not known, `abc` may be a product and has no square.
    if found and unit and (unit in _UNITS or (len(unit) > 3 and not found[3])):
        return found[1], unit + re.sub(r"[{}]", "", found[3] or "")
    return text, ""


def is_prose(text: str) -> bool:
    """Whether an answer holds words that are neither LaTeX nor functions, so that it is no expression."""
    words = re.findall(r"[^\W\d_]{2,}", re.sub(r"\\(?!text|mbox)[A-Za-z]+(?:\{[a-z]*matrix\})?", " ", text))
    return any((len(word) > 3 or _SMALL_WORD.fullmatch(word)) and not _FUNCTION.fullmatch(word) for word in words)


def is_costly(text: str) -> bool:
    """Whether an expression is known beforehand to take too long: towers of powers, large factorials, deep nesting."""
    depths = accumulate((character in "{([") - (character in "})]") for character in text)
    factorials = [int(number) > 200 for number in re.findall(r"(\d+)[\s)}]*!", text)]
    return len(text) > LONGEST or max(depths, default=0) > 20 or any(factorials) or _COSTLY.search(text) is not None


class _Quantity(Struct, frozen=True):
    number: Fraction
    unit: str = ""
    name: str = ""  # of what it is the value, as in `x = 3`


class _Group(Struct, frozen=True):
    brackets: str  # `{}` for what has no order, or is one number alone
    items: tuple[_Quantity, ...]


def _parsed(text: str) -> _Group | str | None:
    """What a cleaned answer is, if it is plain. A choice is its letter; words are themselves, in lower case."""
    if len(text) > LONGEST:
        return None
    if quantity := _quantity(text):
        return _Group("{}", (quantity,))
    if choice := re.fullmatch(r"\(?([A-J])\)?", text):
        return choice[1]
    if re.fullmatch(r"[^\W\d_]{2,}(?:[ '-]+[^\W\d_]+)*", text):
        return None if _NUMERAL.search(text) or _FUNCTION.fullmatch(text) else text.lower()
    brackets, inner = "{}", text
    if bracketed := re.fullmatch(r"(\\\{|[(\[])([^()\[\]]*)(\\\}|[)\]])", text):
        opens, inner, closes = bracketed.groups()
        brackets = f"{opens[-1]}{closes[-1]}"
        if re.fullmatch(_THOUSANDS, inner):  # (1,200) may be a pair
            return None
    parts = re.split(r"[,;]\s+|,(?!\d{3}(?!\d))|\s+(?:and|or)\s+" if brackets == "{}" else r"[,;]", inner)
    items = [item for part in parts if (item := _quantity(part.strip())) and not item.name]
    if len(items) < len(parts) or (len(parts) < 2 and not bracketed):
        return None
    units = {item.unit for item in items}
    if len(units) > len({_UNITS.get(unit, (unit,))[0] for unit in units}):  # 3 hours and 20 minutes are one quantity
        return None
    return _Group(brackets, tuple(sorted(items, key=lambda item: item.number) if brackets == "{}" else items))


def _quantity(text: str) -> _Quantity | None:
    found = _QUANTITY.fullmatch(text)
    if found is None or (unit := _unit(found["unit"], found["currency"])) is None:
        return None
    try:
        if found["number"]:
            digits = re.sub(r"[, ]", "", found["number"])
            number = Fraction(digits.rstrip(".") or "0")
            if repeats := found["repeats"]:
                shift = 10 ** len(digits.partition(".")[2])
                number += Fraction(int(repeats), shift * (10 ** len(repeats) - 1))
            number *= Fraction(10) ** int(found["exponent"] or 0)
            number /= int(found["below"] or 1)
        else:
            over, below = (int(found[a] or found[b] or found[c]) for a, b, c in (("n", "n1", "n2"), ("d", "d1", "d2")))
            number = int(found["whole"] or found["whole2"] or 0) + Fraction(over, below)
    except ZeroDivisionError:
        return None
    return _Quantity(-number if found["sign"] + found["inner_sign"] == "-" else number, unit, found["name"] or "")


def _unit(text: str, currency: str) -> str | None:
    """The unit in one spelling, or None if it can't be one: a variable, a function, a word that changes the number."""
    words = [re.sub(r"(?<=\w\w)s$", "", word) for word in text.lower().strip(" .").replace("percent", "%").split()]
    if not words:
        return _CURRENCIES[currency]
    known = " ".join(words) in _UNITS and (len(text) > 1 or text == "%") and text.strip() != "M"  # a million
    apart = text.startswith(" ") and all(re.search(r"/|\^|..[aeiou]|[aeiou]..|.[aeiou].", word) for word in words)
    changing = any(_FUNCTION.fullmatch(word) or _SMALL_WORD.fullmatch(word) for word in words)
    return " ".join(words) if known or (apart and not changing and len(words) < 5) else None


def _compare_quantities(gold: _Quantity, candidate: _Quantity, close: Callable[[Fraction, Fraction], bool]) -> Equality:
    if gold.name and candidate.name and gold.name != candidate.name:
        return Equality.NOT_PLAIN
    same_figure = close(gold.number, candidate.number)
    wanted, given = _UNITS.get(gold.unit), _UNITS.get(candidate.unit)
    if gold.unit == candidate.unit:
        equal = same_figure
    elif wanted and given and wanted[0] == given[0]:
        equal = close(gold.number * wanted[1], candidate.number * given[1])
        if same_figure and not equal and "%" in (gold.unit, candidate.unit):  # 18 for 18% is how it was asked
            return Equality.EQUAL if gold.unit else Equality.UNIT_UNCLEAR
    elif not gold.unit or not candidate.unit:
        if same_figure and len(gold.unit) == 1:
            return Equality.UNIT_UNCLEAR  # a metre may be a variable
        equal = same_figure
    elif wanted and given:
        equal = False
    else:
        return Equality.UNIT_UNCLEAR
    return Equality.EQUAL if equal else Equality.DIFFERENT


_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def _boxes(text: str) -> list[str]:
    """What stands in the complete boxes of the last paragraph that has one; of nested ones the innermost."""
    opened: list[int | None] = []
    found: list[tuple[int, int]] = []
    for token in _BOX.finditer(text):
        if token[0] == "}" and opened:
            start = opened.pop()
            if start is not None and not (found and found[-1][0] > start):
                found.append((start, token.start()))
        elif token[0].endswith("{") and token[0] != "\\{":
            opened.append(None if token[0] == "{" else token.end())
    paragraph = max((gap.end() for gap in re.finditer(r"\n\s*\n", text[: found[-1][0]])), default=0) if found else 0
    return [text[start:end] for start, end in found if start >= paragraph]


_THOUSANDS = r"\d{1,3}(?:[, ]\d{3})+(?!\d)"
NUMBER = rf"(?:{_THOUSANDS}|\d+)(?:\.\d*)?|\.\d+"
_LAST_NUMBER = re.compile(
    rf"(?:(?<!\d)[-−])?[$€£]?(?:\\[dt]?frac\{{\d+\}}\{{\d+\}}|(?<![/\d])\d+/\d+(?!\d*[/.]\d)|{NUMBER})"
)
_QUANTITY = re.compile(
    rf"""(?:(?P<name>[a-zA-Z]\w?)\s*=\s*)? (?P<sign>[-+]?)\s*(?P<currency>[$€£¥]?)\s*(?P<inner_sign>[-+]?)
    (?: (?P<number>{NUMBER}) (?:\\overline\{{(?P<repeats>\d+)\}})?
        (?: (?:[eE]|\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^) \{{?(?P<exponent>[-+]?\d{{1,3}})\}}? )?
        (?: \s*/\s*(?P<below>\d+) )?
      | (?: (?P<whole>\d+)\s* )? \\frac\s*
        (?: \{{(?P<n>-?\d+)\}}\s*\{{(?P<d>\d+)\}} | (?P<n1>\d)\s*(?P<d1>\d) )
      | (?P<whole2>\d+)\s+(?P<n2>\d+)/(?P<d2>\d+)
    )
    (?P<unit> \s*% | (?:[\s./'-]|[^\W\d_])* (?:\^\{{?[23]\}}?)? )""",
    re.VERBOSE,
)
_CHOSEN = re.compile(r"\(?([A-J])(?:\)?|[).:]+(?!.*(?:\([A-J]\)|\b(?:and|or)\b))(.*))")
_LABEL = re.compile(r"\A\(?[A-J][):]+\s*(?=\S)")
_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*(\S[^\n]*)")
_SENTENCE = re.compile(
    r"(?im)(?:\banswers?\b[^\n.:=]{0,40}?(?:\b(?:is|are)\b|:|=)|^\W*(?:final )?answer\W*\n)[\s:*]*"
    r"(?=(\S[^\n]*))[^\n.!?]*"
)
_SENTENCE_END = re.compile(r"(?<=.)[.!?;](?:\s|$)|, (?:so|because|since|which)\b")
_COSTLY = re.compile(r"\^\{[^{}]*\^\{[^{}]*\^|\^\s*\{?\s*-?\d{5}|!\s*\)*\s*!")

_VULGAR = re.compile(r"(?<=\d)[¼-¾⅐-⅞]")
_SUPERSCRIPT = re.compile(r"[⁰¹²³⁴-⁹⁻]+")
_SYMBOLS = str.maketrans(
    dict(zip("−–⁄÷\0", ("-", "-", "/", "/", ""), strict=True))
    | {"×": r"\times ", "·": r"\cdot ", "π": r"\pi ", "√": r"\sqrt", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge "}
    | {"≠": r"\ne ", "∪": r"\cup ", "∈": r"\in ", "°": " degree"}
)
_DRESS = [
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\[dt]frac(?![a-z])", r"\\frac"),
        (r"\\(?:left|right|displaystyle|!)(?![a-z])", ""),
        (r"\\[,;: ]|~|\\quad", " "),
        (r"(?<=\d)\s*(?:\.{3}|\\[lc]?dots)", r" \\ldots"),
        (r"\{,\}", ","),
        (r"\\([$%])", r"\1"),
        (r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})", " degree"),
        (r"\\(?:textbf|textit|textrm|mathbf|boldsymbol|operatorname)\b", r"\\text"),
        (r"(?i)\A((?:\s|\$|\\text\{)*)(?:option|choice)\s+(?=\(?[A-J]\b)", r"\1"),
        (r"(?:^|(?<=[\s(]))\*\*(?=\S)|(?<=\S)\*\*(?=[\s.,;:)]|$)", ""),
    )
]
_WRAPPED = re.compile(
    r"(?:\$\$?|\\\(|\\\[|\\text\{|\\mathrm\{)([^${}]*(?:\{[^$]*\}[^${}]*)?)(?:\$\$?|\\\)|\\\]|\})", re.DOTALL
)
_CURRENCIES = {"": "", "$": "dollar", "€": "euro", "£": "pound", "¥": "yen"}
_ANGLED = r"\\(?:sin|cos|tan|cot|sec|csc)"  # what follows is a part of it, degrees too
_FUNCTION = re.compile(
    r"sqrt|pi|sin|cos|tan|cot|sec|csc|log|ln|exp|infty|oo|arc(?:sin|cos|tan)|(?:sin|cos|tan)h|max|min|gcd|lcm|e|i"
)
_SMALL_WORD = re.compile(
    r"the|is|are|of|for|not|and|or|to|in|it|per|as|by|we|he|an|on|no|mod|one|two|six|ten|hundred|thousand|\w*illion"
    r"|dozen|half|halve|third|fifth|ninth|twelfth|(?:four|six|seven|eigh|ten|hundred|thousand|\w+illion)th|factorial"
    r"|plus|minus|over|below|times?|squared|cubed|divided",
    re.IGNORECASE,
)
CLOCK = re.compile(r"\d:\d\d(?!\d)")
_NUMERAL = re.compile(r"(?i)\b(?:zero|one|two|twelve|three|four|five|six|seven|eight|nine|ten|\w+(?:teen|ty))\b")
_UNIT_TABLE = """number 1/100 %; length 1/1000 mm millimeter millimetre; length 1/100 cm centimeter centimetre;
    length 1 m meter metre; length 1000 km kilometer kilometre; length 0.0254 inch inche; length 0.3048 ft foot feet;
    length 0.9144 yd yard; length 1609.344 mi mile; mass 1/1000 mg milligram; mass 1 g gram; mass 1000 kg kilogram;
    mass 453.59237 lb; mass 28.349523125 oz ounce; volume 1/1000 ml milliliter millilitre; volume 1 l liter litre;
    time 1 s sec second; time 60 min minute; time 3600 h hr hour; money 1/100 cent; money 1 dollar usd;
    angle 1 degree; am 1 am a.m; pm 1 pm p.m"""
_UNITS = {"": ("number", Fraction(1))} | {
    word: (kind, Fraction(scale)) for kind, scale, *words in map(str.split, _UNIT_TABLE.split(";")) for word in words
}
"""What a unit measures, and its size; without a final s."""
