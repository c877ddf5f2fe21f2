"""Calls about text: the worker holds the model's tokenizer and chat template.

A thread has the template write conversations (in a process of their own) and tokenizes, which lets the main loop go on.
Teams take turns by the time they used; a turn is one conversation to write, or one text to tokenize.
"""

import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeVar

from selfloop.types.errors import BadRequest
from selfloop.types.model_tokenizer import MAX_CHARS, BeyondVocabulary
from selfloop.worker.protocol import Detokenize, RenderChat, Tokenize
from selfloop.worker.serving.fair_share import FairShare
from selfloop.worker.serving.replies import attempt
from selfloop.worker.text.chat import field_with
from selfloop.worker.text.image_places import Written

T = TypeVar("T")


class Replies(Protocol):
    """Where answers go; see :class:`selfloop.worker.serving.replies.Replies`."""

    def reply(self, ticket: int, result: object) -> None: ...
    def refuse(self, ticket: int, error: Exception) -> None: ...


class Tokens(Protocol):
    """See :class:`selfloop.types.model_tokenizer.ModelTokenizer`."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...
    def token_bytes(self, token: int) -> bytes: ...
    def check_length(self, text: str, max_tokens: int, field: str) -> None: ...


class Template(Protocol):
    """See :class:`selfloop.worker.text.chat.ChatTemplate`."""

    def write(self, command: RenderChat) -> Written: ...


class TeamQueues(Generic[T]):
    """What waits, by team: the team that has used least goes next, and in it who came first."""

    def __init__(self) -> None:
        self._waiting: dict[str, deque[T]] = {}
        self._shares: FairShare[str] = FairShare()

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def put(self, team_id: str, job: T) -> None:
        self._shares.join(team_id)
        self._waiting.setdefault(team_id, deque()).append(job)

    def next(self) -> tuple[str, T]:
        """The one whose turn it is, which stays in the queue until it is :meth:`charge`d. There must be one."""
        team_id = self._shares.in_turn()[0]
        return team_id, self._waiting[team_id][0]

    def charge(self, team_id: str, seconds: float, *, is_done: bool) -> None:
        """The first of ``team_id`` had a turn of ``seconds``, and perhaps its last."""
        self._shares.charge(team_id, seconds)
        if is_done:
            self._waiting[team_id].popleft()
            if not self._waiting[team_id]:
                del self._waiting[team_id]
                self._shares.leave(team_id)


@dataclass(slots=True)
class _Job:
    """Texts to tokenize; ``shape`` makes the answer of their tokens.

    ``field_with`` names what was sent of the text with this index that has this token. A ``conversation`` is yet to be
    written, which makes it the only text.
    """

    ticket: int
    texts: list[str]
    add_special_tokens: bool
    shape: Callable[[list[list[int]]], object]
    field_with: Callable[[int, str], str]
    conversation: RenderChat | None = None
    done: list[list[int]] = field(default_factory=list)


class TextQueue:
    """Takes calls at any time; all methods are for the main loop."""

    def __init__(self, tokenizer: Tokens, chat: Template, replies: Replies) -> None:
        self._tokenizer = tokenizer
        self._chat = chat
        self._replies = replies
        self._texts: TeamQueues[_Job] = TeamQueues()
        self._changed = threading.Condition()
        self._finished: queue.SimpleQueue[tuple[int, object]] = queue.SimpleQueue()
        self.finished_file = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        """Readable while there is something to :meth:`send_finished`."""
        threading.Thread(target=self._tokenize, name="tokenize", daemon=True).start()

    def take(self, ticket: int, command: Tokenize | Detokenize | RenderChat) -> None:
        """Queue a call, or answer it at once where that is short."""
        match command:
            case Tokenize(texts, add_special_tokens, team_id, max_tokens):
                if sum(map(len, texts)) > MAX_CHARS:
                    raise BadRequest("prompt", f"at most {MAX_CHARS} characters")
                for at, text in enumerate(texts if max_tokens is not None else []):
                    self._tokenizer.check_length(
                        text, max_tokens or 0, "prompt" if len(texts) == 1 else f"prompt[{at}]"
                    )
                names = ["prompt"] if len(texts) == 1 else [f"prompt[{at}]" for at in range(len(texts))]
                self._put(
                    team_id, _Job(ticket, texts, add_special_tokens, lambda tokens: tokens, lambda at, _: names[at])
                )
            case Detokenize(tokens):
                self._replies.reply(ticket, [self._tokenizer.token_bytes(token) for token in tokens])
            case RenderChat(team_id=team_id):
                self._put(
                    team_id, _Job(ticket, [], False, _unwritten, lambda _, token: field_with(token, command), command)
                )

    def send_finished(self) -> None:
        """Answer what the thread has finished since."""
        try:
            os.eventfd_read(self.finished_file)
        except BlockingIOError:
            return
        while not self._finished.empty():
            ticket, result = self._finished.get()
            if isinstance(result, Exception):
                self._replies.refuse(ticket, result)
            else:
                self._replies.reply(ticket, result)

    def _put(self, team_id: str, job: _Job) -> None:
        with self._changed:
            self._texts.put(team_id, job)
            self._changed.notify()

    def _tokenize(self) -> None:
        """The thread: a conversation or a text a turn."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._texts))
                team_id, job = self._texts.next()
            started = time.monotonic()
            result = attempt(partial(self._turn, job))
            with self._changed:
                self._texts.charge(team_id, time.monotonic() - started, is_done=result is not None)
            if result is not None:
                self._finished.put((job.ticket, result))
                os.eventfd_write(self.finished_file, 1)

    def _turn(self, job: _Job) -> object:
        """Write or tokenize one text; the answer of the job once it has all of them, None before."""
        if job.conversation is not None:
            written, job.conversation = self._written(job.conversation), None
            job.texts, job.shape = [written.text], lambda tokens: written.rendered(tokens[0])
        elif len(job.done) < len(job.texts):
            text = job.texts[len(job.done)]
            try:
                job.done.append(self._tokenizer.encode(text, add_special_tokens=job.add_special_tokens))
            except BeyondVocabulary as error:
                raise BadRequest(job.field_with(len(job.done), error.token), str(error)) from None
        return job.shape(job.done) if len(job.done) == len(job.texts) else None

    def _written(self, command: RenderChat) -> Written:
        """A conversation as the template writes it. Raises :class:`BadRequest` for one that is too long."""
        written = self._chat.write(command)
        text = written.text
        if len(text) > MAX_CHARS:
            raise BadRequest("messages", f"at most {MAX_CHARS} characters once the template has written them")
        if command.max_tokens is not None:
            self._tokenizer.check_length(text, command.max_tokens, "messages")
        return written


def _unwritten(tokens: list[list[int]]) -> object:
    raise AssertionError("a conversation is written before it is tokenized")
