"""The text of a sample, piece by piece, against the whole of it."""

import sys
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))

from selfloop.engine.sample.text import SampleText, StopString

# Parts of characters, whole ones, letters that make stop strings, bytes that are never right, nothing.
PIECES = [b"a", b"b", b"ab", b" ", b"\xe6", b"\x97", b"\xa5", b"\xe6\x97\xa5", b"\xf0\x9f", b"\x98\x80"]
PIECES += [b"\xff", b"", b"a\xe6"]


class Pieces:
    def __init__(self, drops_first_space):
        self.drops_first_space = drops_first_space

    def token_bytes(self, token):
        return PIECES[token]

    text_bytes = token_bytes


streams = st.lists(st.integers(0, len(PIECES) - 1), max_size=40)
stop_strings = st.lists(st.text("ab 日😀\ufffd", min_size=1, max_size=5), max_size=3)


def decode(tokens, drops_first_space):
    text = b"".join(PIECES[token] for token in tokens).decode("utf-8", "replace")
    return text.removeprefix(" ") if drops_first_space else text


@given(streams, stop_strings, st.booleans())
def test_pieces_add_up_and_nothing_is_taken_back(tokens, stops, drops):
    text = SampleText(Pieces(drops), [StopString(stop) for stop in stops])
    taken = 0
    for token in tokens:
        taken += 1
        if text.add(token):
            break
        settled = str(text)
        assert decode(tokens, drops).startswith(settled)
        assert not any(stop in settled for stop in stops)
        # Held back is only what may become a stop string, or a character cut short.
        whole = decode(tokens[:taken], drops)
        tail = whole[len(settled) :].rstrip("\ufffd")
        assert not tail or any(stop.startswith(tail) or tail in stop for stop in stops)
    text.finish()
    whole = decode(tokens[:taken], drops)
    cut = min((at for at in map(whole.find, stops) if at >= 0), default=len(whole))
    assert str(text) == whole[:cut]
    assert (text.stopped_by is None) == (cut == len(whole))
    assert text.stopped_by is None or (text.stopped_by in stops and whole[cut:].startswith(text.stopped_by))


@given(st.text("ab", min_size=1, max_size=6), st.text("ab", max_size=30))
def test_a_stop_string_is_found_where_it_first_ends(stop, text):
    automaton = StopString(stop)
    matched = 0
    for end, char in enumerate(text, start=1):
        matched = automaton.step(matched, char)
        assert stop[:matched] == text[end - matched : end]
        assert (matched == len(stop)) == text[:end].endswith(stop)
