"""Readers of the kinds of sources.

A reader has check(source, reading, log), records(source, reading, shard, shards) and fingerprint(source, reading).
"""

import codecs
from collections.abc import Iterator

from steppe.data.readers import built_in, hub, plain, tasks
from steppe.data.sources import BUILT_IN, FILES, PREPARED, Reading, Source

_BLANK = b" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f"  # the ASCII characters that str.strip removes
_PART = 1 << 20  # bytes to decode at a time

READERS = {
    **dict.fromkeys(BUILT_IN, built_in),
    **dict.fromkeys(FILES, plain),
    **dict.fromkeys(PREPARED, tasks),
    "hf": hub,
}


def fault_of(text: bytes) -> str:
    """The fault of a text: "encoding" if it is not UTF-8, "empty" if it is blank, else ""."""
    if text.isascii():
        return "" if text.strip(_BLANK) else "empty"
    decoder, blank = codecs.getincrementaldecoder("utf-8")(), True
    try:
        for start in range(0, len(text), _PART):
            part = decoder.decode(text[start : start + _PART], start + _PART >= len(text))
            blank = blank and not part.strip()
    except UnicodeDecodeError:
        return "encoding"
    return "empty" if blank else ""


def texts(sources: tuple[Source, ...], reading: Reading) -> Iterator[str]:
    """The valid documents of a task. Alternates between sources by weight until one of them ends."""

    def good(source: Source) -> Iterator[str]:
        for record in READERS[source.kind].records(source, reading):
            if not record.fault and not fault_of(record.text):
                yield record.text.decode("utf-8")

    streams, given = [good(source) for source in sources], [0.0] * len(sources)
    while True:
        turn = given.index(min(given))
        given[turn] += 1 / sources[turn].weight
        text = next(streams[turn], None)
        if text is None:
            return
        yield text
