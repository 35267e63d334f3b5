"""Alphabets: the presets of the field, and the text that an evaluation compares."""

from __future__ import annotations

import string
import unicodedata
from pathlib import Path

PRESETS = {
    "36": string.digits + string.ascii_lowercase,
    "62": string.digits + string.ascii_letters,
    "94": string.digits + string.ascii_letters + string.punctuation,
}

EASYOCR_ENGLISH = string.digits + string.punctuation + " €" + string.ascii_uppercase + string.ascii_lowercase
"""the characters of EasyOCR's english_g2, in its order"""


def resolve_charset(charset: str) -> str:
    """The characters of a preset ("36", "62", "94"), of your own alphabet, or of a text file.

    Args:
        charset: a name that ends in .txt is a UTF-8 file; line breaks in it do not count, spaces do.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an empty alphabet, or a repeated character.
    """
    characters = PRESETS.get(charset, charset)
    if characters.endswith(".txt"):
        characters = "".join(Path(charset).read_text(encoding="utf-8-sig").splitlines())
    if not characters:
        raise ValueError(f"charset: expected one of {', '.join(PRESETS)} or characters, got an empty string")
    repeated = sorted({character for character in characters if characters.count(character) > 1})
    if repeated:
        raise ValueError(
            f"charset: expected each character once, got {repeated[0]!r} {characters.count(repeated[0])} times"
        )
    return characters


def normalise(text: str, test_charset: str = "36") -> str:
    """A text in the form that is compared: without characters outside the test alphabet.

    It is lower-cased first if the alphabet has no upper case (the paper's protocol: 36 characters).
    """
    characters = resolve_charset(test_charset)
    text = text if any(character.isupper() for character in characters) else text.lower()
    return "".join(character for character in text if character in characters)


def compatible(text: str, characters: str) -> str:
    """A text whose characters outside the alphabet are decomposed (NFKD) and lose their marks: é to e, ² to 2, ﬁ to fi.

    Characters of the alphabet are kept, for example é or й.
    """
    parts = (char if char in characters else unicodedata.normalize("NFKD", char) for char in text)
    return "".join(char for part in parts for char in part if char in characters or not unicodedata.combining(char))
