"""A conversation in the terminal: lines in, text as it is sampled out.

Text of the model never reaches the terminal with control codes. Not here: prompts (`rlhf.serving.chat`), many at once
(`rlhf.serving.batch`).
"""

from __future__ import annotations

import signal
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlhf.rollout import Request
from rlhf.serving.bodies import ChatBody, Message
from rlhf.serving.chat import chat_prompt
from rlhf.serving.errors import ApiError, as_api_error
from rlhf.serving.generation import new_request, sampling_params
from rlhf.serving.model import Served, load_served, sample_seeds
from rlhf.serving.settings import EngineSettings, NotStarted
from rlhf.serving.text import SampleText

_HELP = """\
/reset         forget the conversation
/system TEXT   begin again with this message of the system; without TEXT with none
/adapter NAME  go on with this adapter; without NAME with the model itself
/help          this
/exit          the end; Ctrl-D too
Ctrl-C stops an answer."""


def talk(settings: EngineSettings, *, system: str | None, wishes: dict[str, Any]) -> None:
    """Until /exit or the end of the input. `wishes` are fields of a chat's body. Raises ValueError before the first
    line for a model that cannot talk."""
    _body([Message(role="user", content="-")], wishes)
    served = load_served(settings, settings.model, cache_responses=True)
    if not served.tokenizer.chat_template:
        raise NotStarted(f"{settings.model} has no chat template; use rlhf generate")
    _edit_lines()
    print(f"{settings.model}; /help for commands, Ctrl-D ends it")
    Conversation(served, system, wishes).run()


class Conversation:
    """Its messages, and who says what next."""

    def __init__(self, served: Served, system: str | None, wishes: dict[str, Any]) -> None:
        self._served, self._wishes, self._turn = served, wishes, 0
        self._adapter = next(iter(served.engine.adapters), "")
        self._begin(system)

    def run(self) -> None:
        while True:
            try:
                line = input("> ")
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\nCtrl-D or /exit ends it")
                continue
            if line.startswith("/"):
                if not self._command(line):
                    return
            elif line.strip():
                self._say(line)

    def _begin(self, system: str | None) -> None:
        self._system = system
        self._messages = [] if not system else [Message(role="system", content=system)]

    def _command(self, line: str) -> bool:
        """Whether the conversation goes on."""
        name, _, rest = line.partition(" ")
        if name == "/exit":
            return False
        if name == "/reset":
            self._begin(self._system)
        elif name == "/system":
            self._begin(rest.strip() or None)
        elif name == "/adapter":
            self._choose(rest.strip())
        else:
            print(_HELP if name == "/help" else f"{name} is no command\n{_HELP}")
        return True

    def _choose(self, adapter: str) -> None:
        known = self._served.engine.adapters
        if adapter and adapter not in known:
            print(f"there is no adapter {adapter}; there are: {', '.join(known) or 'none'}")
            return
        self._adapter = adapter

    def _say(self, line: str) -> None:
        messages = [*self._messages, Message(role="user", content=line)]
        try:
            request = self._request(messages)
            text = self._answer(request)
        except (ApiError, ValueError) as error:
            found = as_api_error(error)
            print(f"{error if found is None else found.message}; /reset forgets the conversation", file=sys.stderr)  # fmt: skip
            return
        self._messages = [*messages, Message(role="assistant", content=text)]

    def _request(self, messages: list[Message]) -> Request:
        body, served = _body(messages, self._wishes), self._served
        prompt = chat_prompt(served.tokenizer, messages)
        params = sampling_params(
            body, served, num_prompt=len(prompt), max_tokens=body.max_tokens, top_logprobs=0, grammar=None
        )
        self._turn += 1
        seed = None if body.seed is None else body.seed + self._turn - 1
        return new_request(body, prompt, params, sample_seeds(seed, 1), self._adapter)

    def _answer(self, request: Request) -> str:
        """Print it as it comes; Ctrl-C ends it where it is."""
        engine, params = self._served.engine, request.params
        sample = SampleText(self._served.tokenizer, stop_ids=params.stop_ids, stops=params.stop)
        whole = ""
        engine.add([request])
        with _interrupts() as was_interrupted:
            while engine.has_work:
                for update in engine.step():
                    for delta in update.deltas:
                        text = sample.push(delta.token_ids, delta.finish_reason)
                        whole += text
                        sys.stdout.write(printable(text))
                sys.stdout.flush()
                if was_interrupted() and engine.has_work:
                    engine.abort(request.id)
                    sys.stdout.write(" [stopped]")
        print()
        return whole


def printable(text: str) -> str:
    """Without control codes, which could change the terminal or what it seems to say."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn") or c == "\u200d" else "\N{REPLACEMENT CHARACTER}"
        for c in text
    )  # fmt: skip


def _body(messages: list[Message], wishes: dict[str, Any]) -> ChatBody:
    return ChatBody.model_validate({**wishes, "messages": [m.model_dump(exclude_none=True) for m in messages]})  # fmt: skip


def _edit_lines() -> None:
    """Arrows and history, where Python has them."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return


@contextmanager
def _interrupts() -> Iterator[Any]:
    """Ctrl-C is noted instead of raised; yields what says whether it came."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGINT, before)
