r"""Numbers in answers, read exactly, with their units.

A unit that one side leaves out is no mistake; units that both sides have and that are known to differ are. A percent
sign is read as a unit, too: 50 and 50% are the same answer. A right answer without the sign also accepts the value of a
percentage (0.5 and 50%), but a right answer in percent does not accept a bare 0.5, which would be half a percent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from renio_megatron.evaluation.graders.latex import clean

_MAX_DIGITS = 200  # longer digit strings are not answers, and Python refuses to convert very long ones
_MAX_LENGTH = 1000  # characters of a number with its unit
_MAX_EXPONENT = 300
_ROUNDED_DIGITS = 6
"""Decimals from which a decimal number also stands for a number that it is the rounding of, as in math-verify."""

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|{_DIGITS}\.(?![0-9])|\.[0-9]+)"
_SIGNED = rf"[-+]?\s*{_DECIMAL}"
_LATEX_FRACTION = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<whole>[0-9]+)?\s*\\frac\{{\s*(?P<above>{_SIGNED})\s*\}}\{{\s*(?P<below>{_SIGNED})\s*\}}"
)
_PLAIN_FRACTION = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?P<whole>[0-9]+)(?:\s+and\s+|\s+))?(?P<above>{_DECIMAL})\s*/\s*(?P<below>{_DECIMAL})"
)
_POWER_OF_TEN = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?P<number>{_DECIMAL})\s*(?:\\times|\\cdot|\*|x)\s*)?10\s*(?:\^|\*\*)\s*"
    r"(?:\{\s*(?P<braced>[-+]?[0-9]+)\s*\}|(?P<bare>[-+]?[0-9]+))"
)
_SCIENTIFIC = re.compile(rf"(?P<sign>[-+]?)\s*(?P<number>{_DECIMAL})[eE](?P<exponent>[-+]?[0-9]+)(?![0-9])")
_REPEATING = re.compile(r"(?P<sign>[-+]?)\s*(?P<whole>[0-9]*)\.(?P<fixed>[0-9]*)\\overline\{(?P<again>[0-9]+)\}")
_PLAIN = re.compile(rf"(?P<sign>[-+]?)\s*(?P<number>{_DECIMAL})")

_CURRENCIES = {r"\$": "dollar", "\N{EURO SIGN}": "euro", "\N{POUND SIGN}": "pound", "\N{YEN SIGN}": "yen"}
_CURRENCY = re.compile(r"(?P<minus>-?)\s*(?P<mark>\\\$|\N{EURO SIGN}|\N{POUND SIGN}|\N{YEN SIGN})\s*")
_SQUARED = re.compile(r"\^\s*\{?\s*([23])\s*\}?|\b(squared|cubed)\b|\b(square|sq|cubic)\.?\s")
_POWERS = {"2": "2", "3": "3", "squared": "2", "cubed": "3", "square": "2", "sq": "2", "cubic": "3"}
# Its alternatives begin with different characters, so that there is one way to match a text, however long it is.
_UNIT_TEXT = re.compile(
    r"(?:\\text\s*\{[^{}]*\}|\\circ|\\%|%|\\\$|\\cdot|[^\W\d_]|[.{}\s/\-]"
    r"|\^(?=\s*\{?\s*(?:[23](?![0-9])|\\circ))|(?<=[\^{])[23](?![0-9]))+"
)
_NO_UNITS = frozenset(
    [
        "mod",
        "pi",
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "ln",
        "exp",
        "sqrt",
        "frac",
        "max",
        "min",
        "gcd",
        "lcm",
        "i",
        "e",
        "x",
        "y",
        "z",
        "n",
        "k",
        "a",
        "b",
        "c",
        "p",
        "q",
        "r",
        "t",
    ]
)
_CONJUNCTIONS = frozenset(("and", "or"))
_SAYS_NOTHING = frozenset(("unit", "number", "total", "each", "the", "of"))
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}

_UNITS = {
    "percent": "% percent percentage pct",
    "degree": "degree deg degrees circ",
    "radian": "radian rad",
    "dollar": "dollar usd buck",
    "cent": "cent ct",
    "euro": "euro eur",
    "pound": "pound gbp lb lbs",
    "yen": "yen jpy",
    "mm": "mm millimeter millimetre",
    "cm": "cm centimeter centimetre",
    "m": "m meter metre",
    "km": "km kilometer kilometre",
    "inch": "in inch inche",
    "foot": "ft foot feet",
    "yard": "yd yard",
    "mile": "mi mile",
    "mg": "mg milligram",
    "g": "g gram",
    "kg": "kg kilogram kilo",
    "ounce": "oz ounce",
    "ml": "ml milliliter millilitre",
    "l": "l liter litre",
    "gallon": "gal gallon",
    "second": "s sec second",
    "minute": "min minute",
    "hour": "h hr hour",
    "day": "day",
    "week": "week wk",
    "month": "month",
    "year": "yr year",
    "mph": "mph",
}
_CANONICAL = {word: unit for unit, words in _UNITS.items() for word in words.split()}
_MULTIPLES = {
    "cent": (Fraction(1, 100), "dollar"),
    "mm": (Fraction(1, 1000), "m"),
    "cm": (Fraction(1, 100), "m"),
    "km": (Fraction(1000), "m"),
    "inch": (Fraction(1, 12), "foot"),
    "yard": (Fraction(3), "foot"),
    "mile": (Fraction(5280), "foot"),
    "mg": (Fraction(1, 1000), "g"),
    "kg": (Fraction(1000), "g"),
    "ml": (Fraction(1, 1000), "l"),
    "minute": (Fraction(60), "second"),
    "hour": (Fraction(3600), "second"),
    "day": (Fraction(86400), "second"),
    "week": (Fraction(604800), "second"),
}
"""Unit -> how many of another unit it is."""


@dataclass(frozen=True)
class Quantity:
    """A number and its unit.

    Attributes:
        value: the exact number; without the percent sign, where it has one.
        unit: its unit in one spelling; empty where there is none.
        decimals: digits behind the point, where it was written with one.
    """

    value: Fraction
    unit: str = ""
    decimals: int | None = None


def parse_quantity(text: str) -> Quantity | None:
    r"""The quantity that a cleaned answer consists of; None where it holds anything else, or is longer than any number.

    >>> parse_quantity(r"1\frac{4}{5}").value, parse_quantity("2 1/2").value, parse_quantity("-1,234.50").value
    (Fraction(9, 5), Fraction(5, 2), Fraction(-2469, 2))
    >>> parse_quantity(r"\$18.90").unit, parse_quantity("12 sq. cm").unit, parse_quantity("2x"), parse_quantity("1e3")
    ('dollar', 'cm^2', None, Quantity(value=Fraction(1000, 1), unit='', decimals=None))
    """
    if len(text) > _MAX_LENGTH:
        return None
    text, unit = text.strip(), ""
    if currency := _CURRENCY.match(text):
        unit, text = _CURRENCIES[currency["mark"]], currency["minus"] + text[currency.end() :]
    read = _read_number(text)
    if read is None:
        return None
    number, rest = read
    scale, rest = _read_scale(rest)
    if rest.strip():
        if (other := parse_unit(rest)) is None:
            return None
        unit = unit or other
    return Quantity(number.value * scale, unit, number.decimals if scale == 1 else None)


def _read_scale(text: str) -> tuple[int, str]:
    """The factor of a word such as million at the start of a text, and what follows it."""
    match = re.match(r"\s*(?:\\text\s*\{\s*)?([a-z]+)\s*\}?", text)
    if match is None or match[1] not in _SCALES:
        return 1, text
    rest = text[match.end() :]
    return _SCALES[match[1]], rest if match[0].count("{") == match[0].count("}") else rf"\text{{{rest}"


def _read_number(text: str) -> tuple[Quantity, str] | None:
    """The number at the start of a text, without a unit, and what follows it."""
    for pattern in (_LATEX_FRACTION, _PLAIN_FRACTION, _POWER_OF_TEN, _SCIENTIFIC, _REPEATING, _PLAIN):
        if (match := pattern.match(text)) and (value := _value(match)) is not None:
            decimals = None
            if pattern is _PLAIN and "." in match["number"]:
                decimals = len(match["number"].rpartition(".")[2])
            return Quantity(-value if match["sign"] == "-" else value, decimals=decimals), text[match.end() :]
    return None


def _value(match: re.Match[str]) -> Fraction | None:
    """The number without its sign; None where it is too long, or divides by zero."""
    parts = {name: text.replace(",", "").replace(" ", "") for name, text in match.groupdict().items() if text}
    if any(len(part) > _MAX_DIGITS for part in parts.values()):
        return None
    whole = Fraction(parts.get("whole", "0"))
    if "below" in parts:
        below = Fraction(parts["below"])
        return whole + Fraction(parts["above"]) / below if below else None
    if "again" in parts:
        fixed, again = parts.get("fixed", ""), parts["again"]
        tail = Fraction(int(again), 10 ** len(again) - 1) / 10 ** len(fixed)
        return whole + Fraction(int(fixed or "0"), 10 ** len(fixed)) + tail
    exponent = int(parts.get("exponent") or parts.get("braced") or parts.get("bare") or 0)
    if abs(exponent) > _MAX_EXPONENT:
        return None
    return Fraction(parts.get("number", "1").rstrip(".") or "0") * Fraction(10) ** exponent


def parse_unit(text: str) -> str | None:
    r"""A unit in one spelling, empty where it says nothing; None where the text is no unit.

    >>> parse_unit(r"\text{ inches}^2"), parse_unit("^\\circ"), parse_unit(" apples"), parse_unit(r"\sqrt{2}")
    ('inch^2', 'degree', 'apple', None)
    """
    if re.search(r"\\(?!text|circ|%|\$|cdot)", text) or not _UNIT_TEXT.fullmatch(text):
        return None
    is_text = "\\text" in text or text.lstrip()[:1] in ("%", "^") or "\\%" in text
    text = (
        re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text).replace(r"\circ", " degrees ").replace("^ degrees", " degrees")
    )
    text = re.sub(r"\^\s*\{?\s*degrees\s*\}?", " degrees ", text).replace("\\%", " % ").replace("\\$", " dollars ")
    powers = [_POWERS[next(part for part in match.groups() if part)] for match in _SQUARED.finditer(text)]
    words = [word.lower() for word in re.findall(r"[^\W\d_]+|%", _SQUARED.sub(" ", text))]
    if not words:
        return None if text.strip() else ""
    if _CONJUNCTIONS.intersection(words):
        return None
    if not is_text and any(word in _NO_UNITS or (len(word) == 1 and word != "%") for word in words):
        return None
    names = [_canonical(word) for word in words]
    names = [name for name in names if name not in _SAYS_NOTHING]
    return " ".join(names) + "".join(f"^{power}" for power in powers[:1] if names)


def _canonical(word: str) -> str:
    singular = word[:-1] if len(word) > 2 and word.endswith("s") else word
    return _CANONICAL.get(word) or _CANONICAL.get(singular) or singular


def _in_base_unit(quantity: Quantity) -> Quantity:
    """The same quantity in the unit that its own is a multiple of."""
    name, _, power = quantity.unit.partition("^")
    if name not in _MULTIPLES:
        return quantity
    factor, base = _MULTIPLES[name]
    return Quantity(quantity.value * factor ** int(power or 1), base + f"^{power}" * bool(power))


def _same_with_units(expected: Quantity, given: Quantity) -> bool | None:
    """Whether two quantities are the same in one unit; None where a unit is missing, or not known."""
    if not all(one.unit.partition("^")[0] in _UNITS for one in (expected, given)) or expected.unit == given.unit:
        return None
    one, other = _in_base_unit(expected), _in_base_unit(given)
    return one.unit == other.unit and one.value == other.value


def same_quantity(expected: Quantity, given: Quantity) -> bool:
    r"""Whether a given number is the expected one.

    A decimal number of at least 6 digits behind the point also stands for what it is the rounding of.

    >>> read = lambda text: parse_quantity(clean(text))
    >>> same_quantity(read("50%"), read("50")), same_quantity(read("50%"), read("0.5"))
    (True, False)
    >>> same_quantity(read("0.5"), read("50%")), same_quantity(read("2 km"), read("2000 meters"))
    (True, True)
    >>> same_quantity(read("1/3"), read("0.333333")), same_quantity(read("1/3"), read("0.3333"))
    (True, False)
    """
    if (verdict := _same_with_units(expected, given)) is not None:
        return verdict
    if _same_value(expected, given):
        return True
    is_percentage = given.unit == "percent" and expected.unit != "percent"
    return is_percentage and given.value / 100 == expected.value


def _same_value(one: Quantity, other: Quantity) -> bool:
    if one.value == other.value:
        return True
    for rounded, exact in ((one, other), (other, one)):
        is_precise = rounded.decimals is not None and rounded.decimals >= _ROUNDED_DIGITS
        if is_precise and abs(rounded.value - exact.value) <= Fraction(1, 2 * 10 ** (rounded.decimals or 0)):
            return True
    return False


def parse_number(text: str) -> Fraction | None:
    """The number that an answer consists of, whatever its unit; None where it holds anything else.

    >>> parse_number("$1,200.50"), parse_number("50%"), parse_number("3/0"), parse_number("x + 1")
    (Fraction(2401, 2), Fraction(50, 1), None, None)
    """
    quantity = parse_quantity(clean(text)) if len(text) <= _MAX_LENGTH else None
    return None if quantity is None else quantity.value
