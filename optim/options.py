"""How the parts of a method declare their options: as parameters of the function that makes the part.

    def adaptive(offset: Annotated[float, Option("added to |theta|", *NOT_NEGATIVE)] = 0.01) -> Ascent

A parameter so annotated is an option, a key of every config; any other is a need, which the surroundings meet (the
number of data shards, the frequency of tokens). So an option that no part takes cannot be declared.
"""

import difflib
import inspect
import math
import re
import typing
from collections.abc import Callable, Iterable
from typing import Annotated, Any, NamedTuple


class Option(NamedTuple):
    """What an option means, and its accepted values: `accepted` completes "must be ...", allows(value) decides.

    names: the values, where they are few. former: (value, option): the value before the other option existed.
    """

    meaning: str
    accepted: str
    allows: Callable[[Any], bool]
    names: tuple[str, ...] = ()
    former: tuple[Any, str] | None = None


FINITE = ("a finite number", math.isfinite)
NOT_NEGATIVE = ("a finite number >= 0", lambda value: 0 <= value < math.inf)
POSITIVE = ("a finite number > 0", lambda value: 0 < value < math.inf)
PART = ("a number > 0 and <= 1", lambda value: 0 < value <= 1)
SHARE = ("a number >= 0 and < 1", lambda value: 0 <= value < 1)
AT_LEAST_ONE = ("an integer >= 1", lambda value: value >= 1)
PATTERNS = ("at least 1 of regular expressions over parameter paths", lambda value: bool(value) and _all_compile(value))
# as optim.masks.factors reads them
FACTORS = (
    "rules REGEX=FACTOR over parameter paths, FACTOR >= 0",
    lambda value: _all_compile(value) and all(re.fullmatch(r".+=\d+(\.\d+)?(e[+-]?\d+)?", rule) for rule in value),
)
PATTERN = ("a regular expression", lambda value: _compiles(value))
NATURAL = ("an integer >= 0", lambda value: value >= 0)


def nearest(word: str, names: Iterable[str]) -> str:
    """ "; did you mean NAME?" of the name that a word comes close to, in whatever case and with - for _; or ""."""
    plain = {_plain(name): name for name in names}
    close = difflib.get_close_matches(_plain(word), plain, n=1)
    return f"; did you mean {plain[close[0]]}?" if close else ""


def _plain(word: str) -> str:
    return re.sub(r"[\W_]+", "_", word.lower())


def _compiles(pattern: str) -> bool:
    try:
        return re.compile(pattern) is not None
    except (re.error, OverflowError, RecursionError):
        return False


def _all_compile(patterns: Iterable[str]) -> bool:
    return all(map(_compiles, patterns))


def one_of(*names: str) -> tuple[str, Callable, tuple[str, ...]]:
    """One of these texts."""
    return f"one of {', '.join(names)}", names.__contains__, names


class Declared(NamedTuple):
    """An option as a part declares it."""

    kind: type
    default: Any
    option: Option


def options(part: Callable) -> dict[str, Declared]:
    """{name: Declared} of the options of a part's maker."""
    parameters, found = inspect.signature(part).parameters, {}
    try:
        hints = typing.get_type_hints(part, include_extras=True)
    except NameError:  # of a library's function, whose names only type checkers know; none of them is an Option
        hints = {name: parameter.annotation for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        if typing.get_origin(hints.get(name)) is Annotated:
            kind, option = typing.get_args(hints[name])
            found[name] = Declared(kind, parameter.default, option)
    return found


def needs(part: Callable) -> dict[str, bool]:
    """{parameter: whether it must be given} of what a part's maker takes from its surroundings."""
    own, parameters = options(part), inspect.signature(part).parameters.items()
    return {name: p.default is p.empty for name, p in parameters if name not in own}


def make(part: Callable, values: dict[str, Any]) -> Any:
    """The part, with what it takes of `values`."""
    return part(**{name: values[name] for name in inspect.signature(part).parameters if name in values})
