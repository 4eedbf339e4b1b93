r"""One spelling for an answer's LaTeX: fonts, spacing, fractions, signs."""

from __future__ import annotations

import re

_UNICODE = {
    "\N{MINUS SIGN}": "-",
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "\N{MULTIPLICATION SIGN}": r"\times ",
    "\N{DOT OPERATOR}": r"\cdot ",
    "\N{MIDDLE DOT}": r"\cdot ",
    "\N{DIVISION SIGN}": "/",
    "\N{GREEK SMALL LETTER PI}": r"\pi ",
    "\N{INFINITY}": r"\infty ",
    "\N{UNION}": r"\cup ",
    "\N{ELEMENT OF}": r"\in ",
    "\N{LESS-THAN OR EQUAL TO}": r"\le ",
    "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
    "\N{NOT EQUAL TO}": r"\ne ",
    "\N{PLUS-MINUS SIGN}": r"\pm ",
    "\N{EMPTY SET}": r"\emptyset ",
    "\N{DOUBLE-STRUCK CAPITAL R}": r"\mathbb{R}",
    "\N{DEGREE SIGN}": r"^\circ ",
    "\N{SUPERSCRIPT TWO}": "^2",
    "\N{SUPERSCRIPT THREE}": "^3",
    "\N{VULGAR FRACTION ONE HALF}": r"\frac{1}{2}",
    "\N{VULGAR FRACTION ONE QUARTER}": r"\frac{1}{4}",
    "\N{VULGAR FRACTION THREE QUARTERS}": r"\frac{3}{4}",
    "\N{LEFT SINGLE QUOTATION MARK}": "'",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{NO-BREAK SPACE}": " ",
    "\N{THIN SPACE}": "",
    "\N{NARROW NO-BREAK SPACE}": "",
}
_TRANSLATION = str.maketrans(_UNICODE)
_ROOT = re.compile(r"\N{SQUARE ROOT}\s*(?:\(([^()]*)\)|(\d+|[a-zA-Z]))")

_SIZES = re.compile(r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?(?=[\s()\[\]|{}\\]|$)")
_STYLES = re.compile(r"\\(?:displaystyle|textstyle|scriptstyle|limits|nolimits|rm|bf|it)(?![a-zA-Z])")
_THIN_SPACES = re.compile(r"\\[,!;:>]|\\hspace\s*\{[^{}]*\}|\\h?phantom\s*\{[^{}]*\}")
_SPACES = re.compile(r"\\q?quad(?![a-zA-Z])|\\ |~")
_TEXT = re.compile(r"\\(?:textbf|textit|textrm|textsf|texttt|emph|mbox|hbox|mathrm|operatorname)\s*(?=\{)")
_FONT = re.compile(r"\\(?:mathbf|boldsymbol|bm|mathit|mathsf)\s*\{([^{}]*)\}")
_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_ARGUMENT = r"(?:\{([^{}]*)\}|([0-9a-zA-Z])|(\\pi(?![a-zA-Z])))"
_FRACTION_OF_BARE = re.compile(rf"\\frac\s*{_ARGUMENT}\s*{_ARGUMENT}")
_ROOT_OF_BARE = re.compile(r"\\sqrt\s*([0-9a-zA-Z])")
_GROUPED_DIGITS = re.compile(r"(?<=\d)(?:\{,\}|,\\!)\s*(?=\d{3}(?!\d))")
_SPACED_DIGITS = re.compile(r"(?<![\d.,])(\d{1,3})((?:(?:\\[,;:]|\\ | )\d{3})+)(?![\d,]|\.\d{3})")
_MARKDOWN = re.compile(r"^(\*\*|__|`+)(.*)\1$", re.DOTALL)
_DOLLARS = re.compile(r"(?<!\\)\$")
_WHOLE_BOX = re.compile(r"\\(?:f?boxed|fbox)\s*(?=\{)")
_SAME = (
    (r"\leqslant", r"\le "),
    (r"\geqslant", r"\ge "),
    (r"\leq", r"\le "),
    (r"\geq", r"\ge "),
    (r"\neq", r"\ne "),
    (r"\lt", "<"),
    (r"\gt", ">"),
    (r"\varnothing", r"\emptyset "),
    (r"\infin", r"\infty "),
    (r"\langle", "("),
    (r"\rangle", ")"),
    (r"\lbrace", r"\{"),
    (r"\rbrace", r"\}"),
    (r"\lbrack", "["),
    (r"\rbrack", "]"),
    (r"\degree", r"^\circ "),
    (r"\colon", ":"),
)
_SAME_COMMANDS = [(re.compile(re.escape(old) + r"(?![a-zA-Z])"), new) for old, new in _SAME]


def clean(text: str) -> str:
    r"""An answer in one spelling, still LaTeX; texts stay inside \text{}.

    >>> clean(r"$\dfrac12$."), clean(r"\textbf{(B)}"), clean(r"10,\!080"), clean(r"\left[0, \tfrac{\pi}{2}\right)")
    ('\\frac{1}{2}', '\\text{(B)}', '10,080', '[0, \\frac{\\pi}{2})')
    """
    text = _MARKDOWN.sub(r"\2", text.strip())
    text = _ROOT.sub(lambda match: rf"\sqrt{{{match[1] or match[2]}}}", text.translate(_TRANSLATION))
    text = _without_dollars(text)
    text = re.sub(r"^\\[(\[](.*)\\[)\]]$", r"\1", text.strip(), flags=re.DOTALL)
    text = _WHOLE_BOX.sub("", text)
    text = _SIZES.sub("", text)
    text = _GROUPED_DIGITS.sub(",", text)
    text = _SPACED_DIGITS.sub(lambda match: match[1] + re.sub(r"\D", "", match[2]), text)
    text = _STYLES.sub("", _SPACES.sub(" ", _THIN_SPACES.sub("", text)))
    text = _FONT.sub(r"\1", _TEXT.sub(r"\\text", text))
    for command, same in _SAME_COMMANDS:
        text = command.sub(lambda _, same=same: same, text)  # type: ignore[misc]
    text = _with_braces(_FRACTION.sub(r"\\frac", text))
    text = re.sub(r"\s+", " ", text).strip()
    return _without_outer_braces(re.sub(r"(?:\s*[.,;:]|\\\\)+$", "", text).strip())


def _without_dollars(text: str) -> str:
    r"""Without the marks of mathematics; a dollar that is no such mark becomes ``\$``."""
    marks = _DOLLARS.findall(text)
    if len(marks) % 2:  # $5, which is money
        return _DOLLARS.sub(r"\\$", text)
    return _DOLLARS.sub(" ", text)


def _with_braces(text: str) -> str:
    r"""``\frac12``, ``\frac1{72}`` and ``\sqrt2`` with braces."""

    def fraction(match: re.Match[str]) -> str:
        above = next(part for part in match.groups()[:3] if part is not None)
        below = next(part for part in match.groups()[3:] if part is not None)
        return rf"\frac{{{above.strip()}}}{{{below.strip()}}}"

    return _FRACTION_OF_BARE.sub(fraction, _ROOT_OF_BARE.sub(r"\\sqrt{\1}", text))


def _without_outer_braces(text: str) -> str:
    """Without braces around the whole."""
    while text.startswith("{") and text.endswith("}") and _closes_at_end(text):
        text = text[1:-1].strip()
    return text


def _closes_at_end(text: str) -> bool:
    depth = 0
    for position, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return position == len(text) - 1
    return False


def compact(text: str) -> str:
    r"""A cleaned answer for comparison as text: without spaces, braces around single characters, and ``\cdot``.

    >>> compact("x^{2} + 1") == compact("x^2+1"), compact(r"2 \cdot x") == compact("2x")
    (True, True)
    """
    text = re.sub(r"\\(?:cdot|times)(?![a-zA-Z])(?=\s*[a-zA-Z\\(])", "", text)
    text = re.sub(r"([_^])\{([0-9a-zA-Z])\}", r"\1\2", text)
    return re.sub(r"\s+", "", text)


def is_balanced(text: str) -> bool:
    r"""Whether braces are closed; escaped ones count as text.

    >>> is_balanced(r"\frac{1}{2}"), is_balanced(r"\frac{1}{2"), is_balanced(r"\{1")
    (True, False, True)
    """
    depth = 0
    for character in re.sub(r"\\.", "", text, flags=re.DOTALL):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth < 0:
            return False
    return depth == 0


def split_top(text: str, separator: str) -> list[str]:
    r"""The parts of a text between separators outside brackets and braces.

    Args:
        text: cleaned text.
        separator: regular expression.

    >>> split_top(r"(1,2), \frac{1,2}{3}, [4,5)", ",")
    ['(1,2)', '\\frac{1,2}{3}', '[4,5)']
    """
    parts, depth, start, position = [], 0, 0, 0
    pattern = re.compile(separator)
    while position < len(text):
        character = text[position]
        if depth == 0 and (match := pattern.match(text, position)) and match.end() > position:
            parts.append(text[start:position])
            start = position = match.end()
            continue
        if character == "\\" and text[position + 1 : position + 2] in tuple("{}"):
            depth += 1 if text[position + 1] == "{" else -1
            position += 2
            continue
        depth += 1 if character in "([{" else -1 if character in ")]}" else 0
        position += 1
    return [part.strip() for part in (*parts, text[start:])]
