"""Options of methods, declared as annotated parameters of the functions that make a method's parts.

    def adaptive(offset: Annotated[float, Option("added to |theta|", *NOT_NEGATIVE)] = 0.01) -> Ascent

A parameter annotated with an Option is a key of every config. The caller supplies every other parameter, such as the
number of data shards or the frequency of tokens.
"""

import difflib
import inspect
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, NamedTuple


class Option(NamedTuple):
    """Meaning and accepted values of an option: `accepted` completes "must be ..."; allows(value) decides.

    names: all values, if they are few. former: (value, option): the default value before `option` existed.
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
# read by optim.masks.factors
FACTORS = (
    "rules REGEX=FACTOR over parameter paths, FACTOR >= 0",
    lambda value: _all_compile(value) and all(re.fullmatch(r".+=\d+(\.\d+)?(e[+-]?\d+)?", rule) for rule in value),
)
PATTERN = ("a regular expression", lambda value: _compiles(value))
NATURAL = ("an integer >= 0", lambda value: value >= 0)


def nearest(word: str, names: Iterable[str]) -> str:
    """ "; did you mean NAME?" for the closest name, or "" if none is close. Ignores case and takes - for _.

    names: a mapping says by its values how a name is shown. All suggestions of the program come from here.
    """
    plain = {_plain(name): names[name] if isinstance(names, Mapping) else name for name in names}
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
    """The declaration of one option."""

    kind: type
    default: Any
    option: Option


def options(part: Callable) -> dict[str, Declared]:
    """{name: Declared} of the options of a function that makes a part."""
    parameters, declared = inspect.signature(part).parameters, {}
    try:
        hints = typing.get_type_hints(part, include_extras=True)
    except NameError:  # a library's function with names for type checkers only; it has no Option
        hints = {name: parameter.annotation for name, parameter in parameters.items()}
    for name, parameter in parameters.items():
        if typing.get_origin(hints.get(name)) is Annotated:
            kind, option = typing.get_args(hints[name])
            declared[name] = Declared(kind, parameter.default, option)
    return declared


def needs(part: Callable) -> dict[str, bool]:
    """{parameter: whether it is required} of the parameters of `part` that are not options."""
    own, parameters = options(part), inspect.signature(part).parameters.items()
    return {name: p.default is p.empty for name, p in parameters if name not in own}


def make(part: Callable, values: dict[str, Any]) -> Any:
    """Calls `part` with those of `values` that it has parameters for."""
    return part(**{name: values[name] for name in inspect.signature(part).parameters if name in values})
