"""Declarations of config keys: default, meaning, accepted values, and whether a resumed run may change the key.

configs/base.py declares every key; checks, help, completion and resuming read the declarations.
"""

import argparse
import ast
import contextlib
import functools
import importlib
import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def refusal(name: str, value: Any, accepted: str) -> str:
    """The sentence on a bad value of a config key or an option, in one line: NAME = VALUE: must be ACCEPTED."""
    shown = repr(value)
    shown = shown if len(shown) < 500 else f"{shown[:500]}..."
    return " ".join(f"{name} = {shown}: must be {accepted}".split("\n"))  # accepted may repeat a part of the value


class ConfigError(ValueError):
    """An invalid config value, in one line. Fields: `key` without "config.", `value`, and the `accepted` values."""

    def __init__(self, key: str, value: Any, accepted: str):
        self.key, self.value, self.accepted = key, value, accepted
        super().__init__(refusal(f"config.{key}", value, accepted))


class Accepted(NamedTuple):
    """The accepted values of a type. text() completes "must be ..."; allows(value) checks a value of the type.

    names() lists the values as texts if they are few. of: the type of the numbers in a tuple. An Accepted also serves
    as the `type` of an argparse option.
    """

    kind: type
    text: Callable[[], str]
    allows: Callable[[Any], bool] = lambda value: True
    names: Callable[[], list[str]] = lambda: []
    of: type | None = None

    def wanted(self, value: Any) -> str:
        """text(), with a suggestion if `value` is close to an accepted name."""
        return self.text() + (named("optim.options:nearest")(value, self.names()) if isinstance(value, str) else "")

    def read(self, *texts: str) -> Any:
        """Converts command-line text to a value of the type, without checking that it is allowed.

        A tuple may take several texts. Each is a Python tuple, a single item, or names separated by commas; a tuple of
        numbers is numbers separated by commas. Raises ValueError for a text that cannot be converted.
        """
        if self.of is not None:
            return tuple(dict.fromkeys(self.of(item) for text in texts for item in text.split(",")))
        if self.kind is tuple:
            items = tuple(item for text in texts for item in _items(text))
            cut = [word.strip() for item in items for word in item.split(",")]
            return tuple(cut) if set(cut) <= set(self.names()) else items
        (text,) = texts
        if self.kind is bool:
            if text.lower() not in _TRUTHS:
                raise ValueError
            return _TRUTHS[text.lower()]
        return self.kind(text)

    def __call__(self, text: str) -> Any:
        """Converts and checks the text of an option. Raises argparse.ArgumentTypeError."""
        with contextlib.suppress(ValueError):
            if self.allows(value := self.read(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text or 'nothing'}: must be {self.wanted(text)}")


_TRUTHS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def _items(text: str) -> tuple[str, ...]:
    """The items of a Python tuple or list written as text; any other text is one item. Raises ValueError."""
    try:
        value = ast.literal_eval(text)
    except SyntaxError:  # a path or a regex; one with a comma or a space is a malformed tuple
        if "," in text or " " in text:
            raise ValueError from None
        value = text
    except ValueError:  # a bare word
        value = text
    except (TypeError, MemoryError, RecursionError):
        raise ValueError from None
    items = value if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(item, str) for item in items):
        raise ValueError
    return tuple(items)


class Key(NamedTuple):
    """One key. meaning: its help text, with the unit. free: a resumed run may change it, because results do not depend
    on it beyond the order of sums. former(flat config) -> the value that matches runs made before the key existed,
    where that is not the default."""

    default: Any
    meaning: str
    accepted: Accepted
    free: bool = False
    former: Callable[[Mapping[str, Any]], Any] | None = None

    def check(self, name: str, value: Any) -> None:
        """Raises ConfigError for a value that is not accepted. None is accepted if it is the default."""
        if (value is None and self.default is None) or (self.is_typed(value) and self.accepted.allows(value)):
            return
        if isinstance(value, tuple):  # name the first bad item
            value = next((item for item in value if not self.accepted.allows((item,))), value)
        raise ConfigError(name, value, self.accepted.wanted(value))

    def is_typed(self, value: Any) -> bool:
        """Whether a value from a config or from JSON has the key's type."""
        kind = self.accepted.kind
        if kind is tuple:
            return isinstance(value, (tuple, list)) and all(isinstance(item, str) for item in value)
        if kind in (int, float) and isinstance(value, int) and not isinstance(value, bool):
            return abs(value) <= LARGEST
        return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


LARGEST = 2**53  # integers up to here are exact in a float64


def integer(least: int = 0, most: int | None = None, *, bound: int = LARGEST) -> Accepted:
    """Integers >= `least`, and <= `most` if given. bound: the limit without `most`."""
    text = f"an integer >= {least}" if most is None else f"an integer from {least} to {most}"
    return Accepted(int, lambda: text, lambda value: least <= value <= (bound if most is None else most))


# for options of commands: array indices are int32
count = functools.partial(integer, bound=2**31 - 1)


def number(above: float = -math.inf, least: float = -math.inf, below: float = math.inf, most: float = math.inf):
    """Finite numbers with above < value < below and least <= value <= most."""
    parts = [f"> {above:g}" * (above > -math.inf), f">= {least:g}" * (least > -math.inf)]
    parts += [f"< {below:g}" * (below < math.inf), f"<= {most:g}" * (most < math.inf)]
    bounds = " and ".join(filter(None, parts))
    text = f"{'a finite number' if min(below, most) == math.inf else 'a number'} {bounds}".strip()
    if least > -math.inf and most < math.inf:
        text = f"a number from {least:g} to {most:g}"

    def allows(value: float) -> bool:
        return above < value < below and least <= value <= most and math.isfinite(value)

    return Accepted(float, lambda: text, allows)


def listed(each: Accepted, least: int = 1) -> Accepted:
    """At least `least` of these numbers, each once, in the order given."""
    text = lambda: f"{least} or more with commas between them, each {each.text()}"  # noqa: E731
    return Accepted(tuple, text, lambda value: len(value) >= least and all(map(each.allows, value)), of=each.kind)


def one_of(*names: str) -> Accepted:
    """One of these texts. "module:NAME" stands for the texts in that collection, which is imported on demand."""

    def known() -> list[str]:
        return [each for name in names for each in (named(name) if ":" in name else [name])]

    return Accepted(str, lambda: "one of " + ", ".join(known()), lambda value: value in known(), known)


def or_reference(accepted: Accepted) -> Accepted:
    """These texts, or a reference to an optimizer from outside (see steppe.optim.references). Does not run its file."""
    outside = functools.partial(named, "optim.references:is_reference")
    text = lambda: f"{accepted.text()}, or {named('optim.references:ACCEPTED')}"  # noqa: E731
    return accepted._replace(text=text, allows=lambda value: accepted.allows(value) or outside()(value))


def several_of(*names: str) -> Accepted:
    """A tuple of these texts without repeats; `names` as in one_of."""
    single = one_of(*names)

    def allows(value: tuple) -> bool:
        return len(set(value)) == len(value) and all(map(single.allows, value))

    return Accepted(tuple, lambda: f"some of {', '.join(single.names())}, each at most once", allows, single.names)


@functools.cache
def named(reference: str) -> Any:
    """Imports "module:NAME" from steppe; the module's name leaves out "steppe."."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(f"steppe.{module}"), name)


def _as_option(kind: type, name: str) -> Accepted:
    """What NAME of optim/options.py accepts."""
    accepted = functools.partial(named, f"optim.options:{name}")
    return Accepted(kind, lambda: accepted()[0], lambda value: accepted()[1](value))


PATTERN = _as_option(str, "PATTERN")
FACTORS = _as_option(tuple, "FACTORS")


def patterns(of: str = r".+", what: str = "regular expressions over parameter paths") -> Accepted:
    """A tuple of regular expressions that each match the regex `of`. `what` names them in errors."""

    def allows(value: tuple) -> bool:
        return all(PATTERN.allows(each) and re.fullmatch(of, each) for each in value)

    return Accepted(tuple, lambda: what, allows)


FLAG = Accepted(bool, lambda: "true or false", names=lambda: ["true", "false"])


def _are_steps(text: str) -> bool:
    first, _, last = text.removeprefix("steps ").partition("-")
    return not text or (bool(re.fullmatch(r"steps [1-9]\d{0,8}-[1-9]\d{0,8}", text)) and int(first) <= int(last))


STEPS = Accepted(str, lambda: 'like "steps 20-25", or empty', _are_steps)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


TEXT = Accepted(str, lambda: "a text, without lone surrogates and null characters", _encodable)
TEXTS = Accepted(tuple, lambda: 'a tuple of texts, such as ("a", "b"), or one text per flag')
# The meaning of a duration depends on the run, so lm.parts.check checks it.
DURATION = Accepted(str, lambda: 'a duration such as "2000 steps", "3.2M tokens", "1.5 epochs" or "5%"')


def config_of(keys: Mapping[str, Key], values: Mapping[str, Any] = MappingProxyType({})) -> ConfigDict:
    """A ConfigDict of `keys`, each at its value or else its default. None becomes a placeholder of the key's type."""
    config = ConfigDict()
    for name, key in keys.items():
        section: Any = config
        *sections, last = name.split(".")
        for each in sections:
            if each not in section:
                section[each] = ConfigDict()
            section = section[each]
        section[last] = placeholder(key.accepted.kind) if key.default is None else key.default
        if name in values:
            section[last] = values[name]
    return config


def value_of(config: Any, key: str) -> Any:
    """The value of a key such as "optim.rho" of a nested config."""
    return functools.reduce(lambda section, each: section[each], key.split("."), config)


def flatten(config: Mapping | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"optim.rho": 0.1, ...} from a nested config. Tuples become lists, as in JSON; a nested {} stays a value."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict) and (value or not prefix):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
