"""Progress of a measurement where there is no terminal."""

from steppe.scripts.measure import shown


def test_each_thing_is_named_before_it_is_done_and_timed_after(capsys, monkeypatch):
    said = lambda: capsys.readouterr().out  # noqa: E731
    with shown.Progress("looking") as progress:
        assert said() == "looking\n"
        progress.expect(2)
        progress.begin("a", stages=2)
        assert said() == "[1/2] a\n"
        progress.tick("noise")
        assert said() == ""  # a line was just printed
        monkeypatch.setattr(shown, "EVERY", -1.0)
        progress.tick("bits")
        assert said() == "[1/2] a  bits, after 0 s\n"
        progress.end("file")
        assert said() == "[1/2] file  0.0 s\n"
        progress.begin("b")
        assert said() == "[2/2] b\n"
