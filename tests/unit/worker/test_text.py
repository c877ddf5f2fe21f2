"""Text work takes turns by team, beside the main loop, and is refused by length before it is done."""

import threading
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from selfloop.types.errors import BadRequest
from selfloop.types.model_tokenizer import MAX_CHARS, ModelTokenizer
from selfloop.worker.protocol import Detokenize, RenderChat, RenderedChat, Tokenize
from selfloop.worker.text.calls import TextQueue
from selfloop.worker.text.image_places import Written


class SlowTokens:
    """A token a character; each text waits until it may go on."""

    def __init__(self) -> None:
        self.may_go_on = threading.Semaphore(0)
        self.begun: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        self.begun.append(text)
        assert self.may_go_on.acquire(timeout=20)
        if text == "bad":
            raise ValueError("cannot be read")
        return list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token])

    def check_length(self, text: str, max_tokens: int, field: str) -> None:
        if len(text) > max_tokens:
            raise BadRequest(field, f"at most {max_tokens}")


class Template:
    def write(self, command: RenderChat) -> Written:
        if command.messages == b"bad":
            raise BadRequest("messages", "no")
        return Written(command.messages.decode())


class Replies:
    def __init__(self) -> None:
        self.answers: list[tuple[int, object]] = []

    def reply(self, ticket: int, result: object) -> None:
        self.answers.append((ticket, result))

    def refuse(self, ticket: int, error: Exception) -> None:
        self.answers.append((ticket, str(error)))


class House:
    def __init__(self) -> None:
        self.tokens, self.replies = SlowTokens(), Replies()
        self.queue = TextQueue(self.tokens, Template(), self.replies)

    def answers(self, number: int) -> list[tuple[int, object]]:
        deadline = time.monotonic() + 20
        while len(self.replies.answers) < number:
            assert time.monotonic() < deadline, self.replies.answers
            self.queue.send_finished()
            time.sleep(0.002)
        return self.replies.answers

    def begun(self, number: int) -> list[str]:
        deadline = time.monotonic() + 20
        while len(self.tokens.begun) < number:
            assert time.monotonic() < deadline, self.tokens.begun
            time.sleep(0.002)
        return self.tokens.begun


def test_a_team_that_asks_for_much_does_not_hold_up_another() -> None:
    house = House()
    for ticket in range(8):
        house.queue.take(ticket, Tokenize([f"a{ticket}", f"A{ticket}"], team_id="a"))
    house.begun(1)
    house.queue.take(100, Tokenize(["b"], team_id="b"))
    house.queue.take(101, Detokenize([65, 66]))
    assert house.answers(1) == [(101, [b"A", b"B"])], "short answers wait for no text"
    house.tokens.may_go_on.release()
    assert house.begun(2) == ["a0", "b"], "and a list of texts takes a turn for each of them"
    house.tokens.may_go_on.release(20)
    answers = house.answers(10)
    assert answers[1] == (100, [[98]])
    assert [ticket for ticket, _ in answers[2:]] == list(range(8))


def test_conversations_are_written_and_tokenized_beside_the_main_loop_in_turns() -> None:
    house = House()
    for ticket in range(4):
        house.queue.take(ticket, RenderChat(b"a", team_id="a"))
    house.begun(1)
    house.queue.take(50, RenderChat(b"bad", team_id="b"))
    house.queue.take(51, RenderChat(b"b" * 20, team_id="b", max_tokens=19))
    house.queue.take(52, RenderChat(b"b", team_id="b", max_tokens=19))
    house.queue.take(100, Detokenize([65]))
    assert house.answers(1) == [(100, [b"A"])], "the main loop goes on while a conversation is at work"
    house.tokens.may_go_on.release(20)
    answers = house.answers(8)
    assert [ticket for ticket, _ in answers].index(52) < 7, "all of the other team's before the last of the first's"
    refused = {50: "messages: no", 51: "messages: at most 19"}
    assert dict(answers) == refused | {100: [b"A"], 52: RenderedChat([98])} | {
        ticket: RenderedChat([97]) for ticket in range(4)
    }
    assert house.tokens.begun.count("b" * 20) == 0


def test_what_cannot_be_read_is_answered_and_the_next_goes_on() -> None:
    house = House()
    house.tokens.may_go_on.release(5)
    house.queue.take(1, Tokenize(["good", "bad", "never"], team_id="a"))
    house.queue.take(2, Tokenize(["x"], team_id="a"))
    house.queue.take(3, Tokenize([], team_id="a"))
    assert house.answers(3) == [(1, "cannot be read"), (2, [[120]]), (3, [])]
    with pytest.raises(BadRequest, match="characters"):
        house.queue.take(4, Tokenize(["x" * (MAX_CHARS + 1)]))
    with pytest.raises(BadRequest, match=r"prompt\[1\]"):
        house.queue.take(4, Tokenize(["x", "yy"], max_tokens=1))


def byte_level(*, normalizer: object = None) -> Tokenizer:
    letters = pre_tokenizers.ByteLevel.alphabet()
    vocab = {letter: at for at, letter in enumerate(sorted(letters))} | {"ab": 256, "abab": 257}
    tokenizer = Tokenizer(models.BPE(vocab, [("a", "b"), ("ab", "ab")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


def model_tokenizer(tokenizer: Tokenizer, folder: Path) -> ModelTokenizer:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return ModelTokenizer.load(folder)


def test_a_text_that_must_be_too_long_is_refused_with_the_numbers(tmp_path: Path) -> None:
    tokenizer = model_tokenizer(byte_level(), tmp_path)
    tokenizer.check_length("abab" * 30, 10, "prompt")
    with pytest.raises(
        BadRequest, match=r"at most 10 tokens; 400 bytes .* at least 34, .* more than 4 bytes"
    ) as refused:
        tokenizer.check_length("abab" * 100, 10, "prompt[3]")
    assert refused.value.field == "prompt[3]"
    for text in ("abab" * 500, "é" * 1000, "x"):
        num_tokens = len(tokenizer.encode(text, add_special_tokens=False))
        tokenizer.check_length(text, num_tokens, "prompt")


def test_where_a_token_may_stand_for_any_length_nothing_is_refused_unread(tmp_path: Path) -> None:
    model_tokenizer(byte_level(normalizer=normalizers.Strip()), tmp_path).check_length("abab" * 100, 10, "prompt")
    model_tokenizer(byte_level(normalizer=normalizers.NFKC()), tmp_path).check_length("abab" * 100, 10, "prompt")
    with pytest.raises(BadRequest):
        model_tokenizer(byte_level(normalizer=normalizers.NFC()), tmp_path).check_length("abab" * 100, 10, "prompt")
