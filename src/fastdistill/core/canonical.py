"""Canonical JSON and the ids made of it. Never falls back to `str(obj)`: what can't be canonical is an error.

Two values have the same canonical form exactly when they are the same JSON value: keys sorted by code point, no
insignificant space, strings in NFC, numbers in their shortest round-trip form, and whole ones as integers (`1.0` is
`1`, `-0.0` is `0`, `1e16` is `10000000000000000`; integers stay exact at any size, unlike RFC 8785, which this
otherwise follows in spirit).
"""

import hashlib
import json
import math
import unicodedata
from collections.abc import Mapping
from typing import TypeAlias

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
        return _encode(_normal(value, ())).encode()
    except UnicodeEncodeError as error:
        raise NotCanonical("$: holds a lone surrogate, which UTF-8 can't encode") from error
    except RecursionError as error:
        raise NotCanonical("$: nested too deeply") from error


def digest(value: object) -> str:
    """sha256 of the canonical JSON, 64 hex digits. A list as `value` gives its parts an unambiguous joint."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def sample_id(task_id: str, canonical_input: Mapping[str, object]) -> str:
    """`sha256(task_id + canonical_input)`, joined as a JSON array so that no two pairs collide."""
    return digest([task_id, canonical_input])


def joined_digest(*parts: str) -> str:
    """sha256 of parts of which none holds a line break: cheaper than `digest`, and as unambiguous."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":")).encode

_Path: TypeAlias = "tuple[_Path, str | int] | tuple[()]"
"""Where in a value we are, the last step last: put into words only for an error."""


def _normal(value: object, path: _Path) -> object:
    if isinstance(value, str):
        return value if value.isascii() else unicodedata.normalize("NFC", value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        if value.bit_length() > _LONGEST_INTEGER:
            raise NotCanonical(f"{_words(path)}: an integer of more than 4,200 digits; write it as a string")
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise NotCanonical(f"{_words(path)}: {value} is not a JSON number")
        return int(value) if value.is_integer() else float(value)
    if isinstance(value, dict | Mapping):
        normal: dict[str, object] = {}
        for key, inner in value.items():
            if not isinstance(key, str):
                raise NotCanonical(f"{_words(path)}: key {key!r} is not a string")
            name = key if key.isascii() else unicodedata.normalize("NFC", key)
            if name in normal:
                raise NotCanonical(f"{_words(path)}: key {name!r} appears twice after Unicode normalisation")
            normal[name] = _normal(inner, (path, key))
        return normal
    if isinstance(value, list | tuple):
        return [_normal(inner, (path, index)) for index, inner in enumerate(value)]
    kind = type(value).__name__
    raise NotCanonical(f"{_words(path)}: {kind} has no JSON form; convert it to a string or a number")


def _words(path: _Path) -> str:
    words = ""
    while path:
        path, part = path
        words = (f"[{part}]" if isinstance(part, int) else f".{part}") + words
    return "$" + words
