"""How many elements a PromQL query gives, and of what: enough of the language to tell, and no more.

Takes a query's text; `read` gives a Shape, or None for what it does not understand, of which nothing is said then.
Precedence is left out: whether an expression has labels depends on its operands alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

AGGREGATORS = frozenset(
    "sum avg min max count stddev stdvar group quantile topk bottomk limitk limit_ratio count_values".split()
)
SCALARS = frozenset("scalar vector time absent absent_over_time pi".split())
RATES = frozenset("rate irate increase delta idelta deriv".split())
MATCHING = frozenset("on ignoring group_left group_right".split())
_TOKEN = re.compile(
    r"""\s+|\#[^\n]*|(?P<string>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|`[^`]*`)
    |(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?(?:ms|[smhdwy])?(?:\d+(?:ms|[smhdwy]))*)
    |(?P<word>[A-Za-z_:][A-Za-z0-9_:]*)|(?P<sign>=~|!~|!=|==|>=|<=|[-+*/%^=<>(){}\[\],@])""",
    re.VERBOSE,
)
_OPERATORS = frozenset("+ - * / % ^ == != > < >= <= and or unless atan2".split())


@dataclass(frozen=True, slots=True)
class Shape:
    """`labels` tell the elements apart: none for one element, None for all that the series have. `outer` is the
    outermost aggregator or function, `factor` by how much the metric's value was multiplied (None: not known).

    `counted` are metrics inside `rate` or the like, `plain` the others. `pinned` labels have one value each. `switch`
    is a comparison with `bool`, which gives 0 or 1.
    """

    labels: frozenset[str] | None
    outer: str = ""
    factor: float | None = 1.0
    scalar: bool = False
    switch: bool = False
    plain: frozenset[str] = frozenset()
    counted: frozenset[str] = frozenset()
    pinned: frozenset[str] = frozenset()

    @property
    def apart(self) -> frozenset[str] | None:
        """The labels whose values make several elements; empty for one element."""
        return None if self.labels is None else self.labels - self.pinned


def read(query: str) -> Shape | None:
    """The query's shape, None where it is not understood."""
    try:
        parser = _Parser(_tokens(query))
        shape = parser.expression()
        return shape if parser.at_end() else None
    except (_Unknown, RecursionError):
        return None


class _Unknown(Exception):
    """Not understood."""


def _tokens(query: str) -> list[str]:
    found, at = [], 0
    while at < len(query):
        match = _TOKEN.match(query, at)
        if match is None:
            raise _Unknown
        if match.lastgroup:
            found.append(match.group())
        at = match.end()
    return found


class _Parser:
    def __init__(self, tokens: list[str]) -> None:
        self._tokens, self._at = tokens, 0

    def at_end(self) -> bool:
        return self._at == len(self._tokens)

    def expression(self) -> Shape:
        left = self._operand()
        while self._peek() in _OPERATORS:
            operator = self._next()
            switch = self._peek() == "bool" and bool(self._next())
            many = ""
            while self._peek() in MATCHING:
                many = self._next()
                if self._peek() == "(":
                    self._labels()
            left_number, right_number = self._number(-2 - switch), self._number(0)
            right = self._operand()
            left = _joined(left, operator, right, many, left_number, right_number)
            left = replace(left, switch=left.switch or switch)
        return left

    def _operand(self) -> Shape:
        while self._peek() in ("+", "-"):
            self._next()
        shape = self._primary()
        while self._peek() in ("[", "offset", "@"):
            if self._next() == "[":
                while self._next() != "]":
                    pass
            else:
                if self._peek() == "-":
                    self._next()
                self._next()
        return shape

    def _primary(self) -> Shape:
        word = self._peek()
        if word == "(":
            return self._arguments()[0]
        if word == "{":
            return self._selector("")
        word = self._next()
        if word[0].isdigit() or word[0] in ".\"'`":
            return Shape(frozenset(), scalar=True)
        if not (word[0].isalpha() or word[0] in "_:"):
            raise _Unknown
        if word in AGGREGATORS and self._peek() in ("(", "by", "without"):
            return self._aggregated(word)
        if self._peek() == "(":
            return _called(word, self._arguments(allow_none=True))
        return self._selector(word)

    def _aggregated(self, name: str) -> Shape:
        by = self._grouping()
        argument = self._arguments()[-1]
        by = by or self._grouping()
        labels: frozenset[str] | None = frozenset()
        if name in ("topk", "bottomk", "limitk", "limit_ratio"):
            labels = argument.labels
        elif by is not None:
            labels = by[1] if by[0] == "by" else None
        if name == "count_values":
            labels = None
        known = name in ("sum", "avg", "min", "max", "quantile", "topk", "bottomk")
        return replace(argument, labels=labels, outer=name, factor=argument.factor if known else None)

    def _grouping(self) -> tuple[str, frozenset[str]] | None:
        if self._peek() not in ("by", "without"):
            return None
        return self._next(), self._labels()

    def _labels(self) -> frozenset[str]:
        self._expect("(")
        found = set()
        while (word := self._next()) != ")":
            if word != ",":
                found.add(word)
        return frozenset(found)

    def _arguments(self, *, allow_none: bool = False) -> list[Shape]:
        self._expect("(")
        found: list[Shape] = []
        while self._peek() != ")":
            found.append(self.expression())
            if self._peek() == ",":
                self._next()
        self._expect(")")
        if not found and not allow_none:
            raise _Unknown
        return found

    def _selector(self, name: str) -> Shape:
        pinned = set()
        if self._peek() == "{":
            self._next()
            while (word := self._next()) != "}":
                if word == ",":
                    continue
                operator, value = self._next(), self._next()
                if word == "__name__" and operator == "=":
                    name = value[1:-1]
                elif operator == "=":
                    pinned.add(word)
        metrics = frozenset([name] if name else [])
        return Shape(None, "", 1.0, plain=metrics, pinned=frozenset(pinned))

    def _number(self, offset: int) -> float | None:
        """The number that stands there alone as an operand, seen from the next word."""
        at = self._at + offset
        try:
            return float(self._tokens[at]) if at >= 0 else None
        except (IndexError, ValueError):
            return None

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _next(self) -> str:
        word = self._peek()
        if not word:
            raise _Unknown
        self._at += 1
        return word

    def _expect(self, word: str) -> None:
        if self._next() != word:
            raise _Unknown


def _called(name: str, arguments: list[Shape]) -> Shape:
    if name in SCALARS:
        inner = arguments[0] if arguments else Shape(frozenset())
        return replace(inner, labels=frozenset(), outer=name, scalar=name != "vector", factor=None)
    vectors = [argument for argument in arguments if not argument.scalar]
    if not vectors:
        raise _Unknown
    inner = vectors[-1]
    if name in RATES:
        return replace(inner, outer=name, factor=None, plain=frozenset(), counted=inner.plain | inner.counted)
    if name == "histogram_quantile":
        labels = inner.labels - {"le"} if inner.labels is not None else None
        return replace(inner, labels=labels, outer=name, factor=None)
    same = name in ("avg_over_time", "max_over_time", "min_over_time", "last_over_time", "quantile_over_time")
    outer = inner.outer if same or name in ("clamp_min", "clamp_max", "clamp", "ceil", "floor", "round") else name
    return replace(inner, outer=outer or name, factor=inner.factor if same else None)


def _joined(
    left: Shape, operator: str, right: Shape, many: str, left_number: float | None, right_number: float | None
) -> Shape:
    if left.scalar != right.scalar:
        kept, number = (left, right_number) if right.scalar else (right, left_number)
        factor = kept.factor
        if operator in ("==", "!=", ">", "<", ">=", "<="):
            return kept
        if number is None or factor is None or operator not in ("*", "/") or (operator == "/" and left.scalar):
            return replace(kept, factor=None)
        return replace(kept, factor=factor * number if operator == "*" else factor / number if number else None)
    if operator in ("and", "unless"):
        return left
    labels = None if left.labels is None or right.labels is None else left.labels | right.labels
    if operator == "or" and right.outer == "vector":  # a value for when there is none
        return left
    if many == "group_left":
        labels = left.labels
    elif many == "group_right":
        labels = right.labels
    return Shape(
        labels,
        "",
        None,
        scalar=left.scalar and right.scalar,
        switch=left.switch or right.switch,
        plain=left.plain | right.plain,
        counted=left.counted | right.counted,
        pinned=left.pinned & right.pinned,
    )
