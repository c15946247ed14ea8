"""The text that Python carries along: its content, and that its splits are complementary."""

from steppe.data.readers import built_in
from steppe.data.sources import Reading, parse


def texts(task):
    (source,) = parse(task)
    return [record.text.decode() for record in built_in.records(source, Reading(held_out_fraction=0.2))]


def test_embedded_corpus_is_real_text_of_this_python():
    documents = built_in.embedded_documents()
    names = [name for name, _ in documents]
    assert names == sorted(set(names))
    assert {"argparse.py", "asyncio/events.py", "pydoc_data/topics/for"} <= set(names)
    assert not any(name.startswith(("test/", "idlelib/idle_test/", "site-packages/")) for name in names)
    assert sum(len(text) for _, text in documents) > 5_000_000
    train, held_out = texts("embedded"), texts("embedded@held_out")
    assert len(train) + len(held_out) == len(documents)
    assert len(held_out) > 20


def test_topics_are_the_prose_of_the_embedded_corpus_split_as_there():
    documents = dict(built_in.topic_documents())
    embedded = dict(built_in.embedded_documents())
    assert documents == {name: text for name, text in embedded.items() if name.startswith("pydoc_data/topics/")}
    assert b"statement" in documents["pydoc_data/topics/for"]
    assert 300_000 < sum(map(len, documents.values())) < 1_500_000
    held_out = set(texts("topics@held_out"))
    assert 0 < len(held_out) < len(documents)
    assert held_out == set(texts("embedded@held_out")) & {text.decode() for text in documents.values()}
    prose, code = (built_in.fingerprint(*parse(task), Reading()) for task in ("topics", "embedded"))
    assert prose != code
