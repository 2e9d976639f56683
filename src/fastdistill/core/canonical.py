"""Canonical JSON and the ids made of it. Never falls back to `str(obj)`: what can't be canonical is an error.

Two values have the same canonical form exactly when they are the same JSON value: keys sorted by code point, no
insignificant space, strings in NFC, numbers in their shortest round-trip form, and whole ones as integers (`1.0` is
`1`, `-0.0` is `0`, `1e16` is `10000000000000000`; integers stay exact at any size, unlike RFC 8785, which this
otherwise follows in spirit).
"""

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from hashlib import sha256
from itertools import chain
from typing import Any, TypeAlias

import msgspec

_LONGEST_INTEGER = 14_000  # bits; Python itself refuses to write or read more than 4,300 digits


class NotCanonical(ValueError):
    """A value has no canonical JSON form; the message names the path to it."""


def canonical_json(value: object) -> bytes:
    """The canonical JSON of `value`, UTF-8.

    Raises:
        NotCanonical: NaN, infinity, a lone surrogate, a key that is not a string, two keys that are equal
            after NFC, or any type that JSON has not (bytes, dates, sets ...).
    """
    try:
        return _form(value, ())
    except UnicodeEncodeError as error:
        raise NotCanonical("$: holds a lone surrogate, which UTF-8 can't encode") from error
    except RecursionError as error:
        raise NotCanonical("$: nested too deeply") from error


def has_lone_surrogate(text: bytes) -> bool:
    """Whether what keeps a text from being read as JSON is the escape of half a surrogate pair."""
    try:
        json.dumps(json.loads(text), ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        return isinstance(error, UnicodeEncodeError)
    return False


def with_characters(text: bytes) -> bytes:
    """A JSON text with U+FFFD, as decoders write it, for what is no character: bytes that are no UTF-8, and escapes of
    half a surrogate pair, which a text has that was cut in UTF-16.
    """
    return _ESCAPE.sub(lambda found: rb"\ufffd" if found["half"] else found[0], text.decode(errors="replace").encode())


_ESCAPE = re.compile(
    rb"\\(?:u[dD][89aAbB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)"
)


def digest(value: object) -> str:
    """sha256 of the canonical JSON, 64 hex digits. A list as `value` gives its parts an unambiguous joint."""
    return sha256(canonical_json(value)).hexdigest()


def pair_digest(text: str, canonical: bytes) -> str:
    """`digest` of the list of a text and of a value whose canonical JSON is there already."""
    return sha256(b"[%b,%b]" % (canonical_json(text), canonical)).hexdigest()


sample_id = pair_digest
"""`sha256(task_id + canonical_input)`, joined as a JSON array so that no two pairs collide."""


def joined_digest(*parts: str) -> str:
    """sha256 of parts of which none holds a line break: cheaper than `digest`, and as unambiguous."""
    return sha256("\n".join(parts).encode()).hexdigest()


_quote = msgspec.json.Encoder().encode  # of a string: UTF-8, escaped as little as JSON allows
_encode = msgspec.json.Encoder(order="sorted").encode

# The usual one first: to ask an abstract class takes long, and to make an union each time, too.
_OBJECT = (dict, Mapping)
_ARRAY = (list, tuple)

_Path: TypeAlias = "tuple[_Path, str | int] | tuple[()]"
"""Where in a value we are, the last step last: put into words only for an error."""


def _form(value: object, path: _Path) -> bytes:
    if isinstance(value, str):
        return _quote(value if value.isascii() else unicodedata.normalize("NFC", value))
    # What most are, a record or the messages of a prompt: text in ASCII, of which msgspec's form is the canonical one.
    kind = type(value)
    if (kind is dict or kind is tuple) and _all_text(value) and (form := _encode(value)).isascii():
        return form
    if isinstance(value, _OBJECT):
        members: dict[str, bytes] = {}
        for key, inner in value.items():
            if not isinstance(key, str):
                raise NotCanonical(f"{_words(path)}: key {key!r} is not a string")
            name = key if key.isascii() else unicodedata.normalize("NFC", key)
            if name in members:
                raise NotCanonical(f"{_words(path)}: key {name!r} appears twice after Unicode normalisation")
            members[name] = _form(inner, (path, key))
        return b"{" + b",".join([_quote(name) + b":" + members[name] for name in sorted(members)]) + b"}"
    if isinstance(value, _ARRAY):
        return b"[" + b",".join([_form(inner, (path, index)) for index, inner in enumerate(value)]) + b"]"
    if value is None or isinstance(value, bool):
        return _encode(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise NotCanonical(f"{_words(path)}: {value} is not a JSON number")
        return (str(int(value)) if value.is_integer() else float.__repr__(value)).encode()
    if isinstance(value, int):
        if value.bit_length() > _LONGEST_INTEGER:
            raise NotCanonical(f"{_words(path)}: an integer of more than 4,200 digits; write it as a string")
        return int.__repr__(value).encode()
    raise NotCanonical(f"{_words(path)}: {kind.__name__} has no JSON form; convert it to a string or a number")


def _all_text(value: Any) -> bool:
    """Of a dict, or a tuple of dicts."""
    dicts = (value,) if type(value) is dict else value
    return _DICT.issuperset(map(type, dicts)) and _TEXT.issuperset(
        map(type, chain.from_iterable(chain(dicts, map(dict.values, dicts))))
    )


_DICT, _TEXT = frozenset({dict}), frozenset({str})


def _words(path: _Path) -> str:
    words = ""
    while path:
        path, part = path
        words = (f"[{part}]" if isinstance(part, int) else f".{part}") + words
    return "$" + words
