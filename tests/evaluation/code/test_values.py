"""Values on their way to the judge: what goes round, what becomes opaque, and bytes that are no values."""

from __future__ import annotations

import collections
import contextlib
import enum
import fractions
import math
import random
import time

import pytest

from renio_megatron.evaluation.code.values import (
    LONG_TEXT,
    BadValueError,
    Large,
    Opaque,
    build,
    checked_set,
    encode,
    parse,
)

Point = collections.namedtuple("Point", "x y")


class Color(enum.IntEnum):
    RED = 3


class OddInt(int):
    def __eq__(self, other):
        return True

    def __index__(self):
        return 7

    __hash__ = int.__hash__
    __int__ = __repr__ = __str__ = __format__ = __index__


class OddStr(str):
    def __str__(self):
        return "right"

    __repr__ = __str__

    def encode(self, *_):
        return b"right"

    def isascii(self):
        return True


class OddList(list):
    def __iter__(self):
        return iter(["right"])

    def __len__(self):
        return 0


class OddDict(dict):
    def items(self):
        return [("right", 1)]


class Disguised:
    """Says that it is an integer, and equals everything."""

    @property
    def __class__(self):
        return int

    def __eq__(self, other):
        return True

    __hash__ = None


class Raising:
    def __getattribute__(self, name):
        raise KeyError(name)


class HidingMeta(type):
    __mro__ = property(lambda cls: (cls, int, object))
    __name__ = property(lambda cls: 1 / 0)


class Hiding(metaclass=HidingMeta):
    pass


ROUND = [
    None,
    True,
    False,
    0,
    -1,
    2**63 - 1,
    2**63,
    -(2**63),
    10**40,
    -(10**5000),
    0.0,
    0.1,
    -1.5e300,
    5e-324,
    float("inf"),
    float("-inf"),
    1j,
    complex(-0.0, float("inf")),
    "",
    'a"\\\n\0\x7f',
    "äß漢🙂",
    "\ud800",
    "\ud83d\ude42",  # two surrogates, which are not one character
    "[1]",
    "l",
    b"",
    b"\0\xff",
    [],
    [1, [2, [3]]],
    (),
    (1,),
    ((1, 2), [3, (4,)]),
    set(),
    {1, "a", (2, 3)},
    frozenset({1, frozenset({2})}),
    {},
    {1: "a", "b": [2], (3, None): {4}, None: {5: {}}},
    {True: 1.0, 2.5: 3},
    range(0),
    range(5, -10, -3),
    range(10**30),
    ["l", 1],
    ["o", "x"],
    list(range(100)),
    tuple(x / 7 for x in range(100)),
    [2**70] * 60,
    [float("inf")] * 60,
    [True] * 60,
]


@pytest.mark.parametrize("value", ROUND, ids=[f"{number} {type(one).__name__}" for number, one in enumerate(ROUND)])
def test_values_go_round(value):
    text = encode(value)
    arrived = build(parse(text))
    assert arrived == value
    assert type(arrived) is type(value)
    assert text.isascii()
    assert "\n" not in text
    assert encode(arrived) == text or isinstance(value, set | frozenset)


def test_floats_keep_their_signs_and_kinds():
    assert math.isnan(build(parse(encode(float("nan")))))
    assert math.copysign(1, build(parse(encode(-0.0)))) == -1
    assert [type(x) for x in build(parse(encode([1, 1.0, True])))] == [int, float, bool]


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Point(1, 2), (1, 2)),
        (Color.RED, 3),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (collections.OrderedDict(a=1), {"a": 1}),
        (collections.defaultdict(list, {1: [2]}), {1: [2]}),
        (bytearray(b"ab"), b"ab"),
        (OddInt(5), 5),
        (OddStr("wrong"), "wrong"),
        (OddList([1, 2]), [1, 2]),
        (OddDict(a=2), {"a": 2}),
    ],
    ids=range(10),
)
def test_subclasses_are_what_they_hold(value, plain):
    arrived = build(parse(encode(value)))
    assert type(arrived) is type(plain)
    assert repr(arrived) == repr(plain)


def test_scalars_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    values = [numpy.int64(3), numpy.float32(0.5), numpy.float64(0.1), numpy.bool_(True), numpy.str_("a")]
    arrived = build(parse(encode(values)))
    assert arrived == [3, 0.5, 0.1, True, "a"]
    assert [type(one) for one in arrived] == [int, float, float, bool, str]
    assert isinstance(build(parse(encode(numpy.arange(3)))), Opaque)
    assert isinstance(build(parse(encode(numpy.longdouble(1)))), Opaque)


ODD = [object(), (x for x in "a"), iter([1]), len, int, Disguised(), Raising(), Hiding(), fractions.Fraction(1, 2)]


@pytest.mark.parametrize("number", range(len(ODD)))  # pytest looks at parameters, which these would not survive
def test_anything_else_is_opaque(number):
    value = ODD[number]
    arrived = build(parse(encode(value)))
    assert isinstance(arrived, Opaque)
    assert arrived is not None
    assert arrived != build(parse(encode(value)))


def test_recursive_and_deep_values_are_opaque():
    loop: list = []
    loop.append(loop)
    deep: list = []
    for _ in range(50_000):
        deep = [deep]
    doubling: list = [0]
    for _ in range(90):
        doubling = [doubling, doubling]
    assert isinstance(build(parse(encode(loop))), Opaque)
    assert isinstance(build(parse(encode(deep))), Opaque)
    assert isinstance(build(parse(encode(doubling, 10_000))), Large)


def test_long_texts_and_large_values_are_digests():
    text = "ä" * (LONG_TEXT + 1)
    arrived = build(parse(encode([text], 1000, LONG_TEXT)))
    assert arrived == [text]
    assert arrived == build(parse(encode([text], 1000, LONG_TEXT)))
    assert arrived != [text[:-1] + "a"]
    assert arrived != [None]
    large = build(parse(encode(list(range(9999)), 1000)))
    assert large == build(parse(encode(list(range(9999)), 1000)))
    assert large not in (
        build(parse(encode(list(range(9998)), 1000))),
        build(parse(encode(tuple(range(9999)), 1000))),
        build(parse(encode([1, *range(1, 9999)], 1000))),
        list(range(9999)),
    )


HOSTILE = [
    b"",
    b"nothing",
    b"[",
    b"[" * 100_000,
    b'["l",' * 100_000,
    b"{}",
    b'{"l": 1}',
    b"[]",
    b"[1]",
    b'["q",1]',
    b'["i",12]',
    b'["i","zz"]',
    b'["f","1e5"]',
    b'["c",1]',
    b'["c",1,2]',
    b'["r",0,1,0]',
    b'["r",0,1]',
    b'["r",0,1,1.5]',
    b'["b","f"]',
    b'["u","ff"]',
    b'["o"]',
    b'["o",1]',
    b'["s",["l"]]',
    b'["d",1]',
    b'["d",["l"],1]',
    b'["l",{}]',
    b"NaN",
    b"Infinity",
    b"1" * 100_000,
    b'["l",' + b"1" * 100_000 + b"]",
    '"ä"'.encode(),
    b"\xff\xfe",
    b"1 2",
    b'["l"' + b',["l"' * 110 + b"]" * 111,
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: repr(text[:20]))
def test_hostile_bytes_are_refused(text):
    with pytest.raises(BadValueError):
        build(parse(text))


def test_random_bytes_are_refused_or_read():
    stream = random.Random(0)
    for _ in range(3000):
        text = bytearray(encode([1, ("a", {2: {3.5}}), b"x", None, 10**30]).encode())
        for _ in range(stream.randrange(1, 4)):
            text[stream.randrange(len(text))] = stream.randrange(256)
        with contextlib.suppress(BadValueError):
            build(parse(bytes(text)))


def test_members_that_collide_are_refused_at_once():
    modulus = 2**61 - 1  # of integers' hashes
    colliding = [n * modulus for n in range(60_000)]
    begin = time.monotonic()
    with pytest.raises(BadValueError, match="collide"):
        build(["s", *(["i", f"{n:x}"] for n in colliding)])
    with pytest.raises(BadValueError, match="collide"):
        build(["d", *(part for n in colliding for part in (["i", f"{n:x}"], 0))])
    with pytest.raises(BadValueError, match="collide"):
        checked_set(colliding)
    assert time.monotonic() - begin < 10
    assert checked_set([1, 1.0, True] * 1000) == {1}


def test_built_values_are_new():
    tree = parse(encode([[1], {"a": [2]}]))
    first = build(tree)
    first[0].append(5)
    first[1]["a"].clear()
    assert build(tree) == [[1], {"a": [2]}]
