"""A chat in the terminal that shows the canvas as it resolves.

On a terminal the answer is redrawn as drafts come: what is decided in the terminal's own colour, the draft of the canvas that
is being denoised dimmed. Elsewhere the lines of standard input are read, commands and questions, and only answers are printed;
what else there is to say goes to a console of its own.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from backend.errors import RequestError
from backend.generation import Generation, Piece
from backend.llm import LLM
from backend.parameters import shown
from backend.sampling_config import SamplingConfig

HELP = "/image PATH: a picture for the next question   /think: think first, or no longer   /new: forget the chat   /quit: leave"
_DRAFT_INTERVAL_S = 0.05


class TerminalChat:
    """One chat. `console` is where answers are shown, `notes` where notes and errors are."""

    def __init__(self, llm: LLM, console: Console, sampling: SamplingConfig, *, thinking: bool = False, notes: Console):
        self._llm, self._console, self._sampling, self._thinking, self._notes = llm, console, sampling, thinking, notes
        self._messages: list[dict[str, Any]] = []
        self._images: list[Path] = []  # of the messages
        self._attached: list[Path] = []  # of the next question

    def run(self, lines: Iterable[str]) -> bool:
        """Answers every line until /quit or the last one; says whether every question has its answer. One that is refused or
        interrupted is not part of the chat."""
        all_answered = True
        for line in lines:
            said = line.strip()
            if said == "/quit":
                break
            if said == "/new":
                for each in (self._messages, self._images, self._attached):
                    each.clear()
            elif said.startswith("/image "):
                path = os.path.expanduser(said.partition(" ")[2].strip())  # pathlib's raises where nobody has that name
                self._attached.append(Path(path))
                self._note(
                    f"{len(self._attached)} {'picture' if len(self._attached) == 1 else 'pictures'} for the next question"
                )
            elif said == "/think":
                self._thinking = not self._thinking
                self._note(f"thinking {'on' if self._thinking else 'off'}")
            elif said.startswith("/"):
                self._note(f"error: got {shown(said)}, which is no command; {HELP}")
                all_answered = False
            elif said:
                all_answered &= self._ask(said)
        return all_answered

    def _ask(self, question: str) -> bool:
        """Whether it has an answer."""
        messages = [*self._messages, user_turn(question, len(self._attached))]
        images, self._attached = [*self._images, *self._attached], []
        try:
            answer = self._answered(messages, images)
        except RequestError as error:
            self._note(f"error: {error}")
            return False
        except KeyboardInterrupt:
            self._note("interrupted")
            return False
        self._messages, self._images = [*messages, {"role": "assistant", "content": answer.text}], images
        return True

    def _answered(self, messages: list[dict[str, Any]], images: list[Path]) -> Generation:
        is_terminal = self._console.is_terminal
        result = Generation()
        pieces = self._llm.stream_chat(
            messages,
            self._sampling,
            chat_template_kwargs={"enable_thinking": True} if self._thinking else {},  # a template may have no such variable
            images=images,
            draft_interval_s=_DRAFT_INTERVAL_S if is_terminal else None,
        )
        if not is_terminal:
            for piece in pieces:
                result.add(piece)
            self._console.file.write(f"{drawn(result)}\n")  # printing would make spaces of tabs
            self._console.file.flush()
            return result
        with Live(console=self._console, auto_refresh=False, vertical_overflow="visible") as live:
            for piece in pieces:
                if not piece.is_draft:
                    result.add(piece)
                live.update(drawn(result, piece if piece.is_draft else None), refresh=True)
        self._note(f"{len(result.token_ids)} tokens, denoising steps a canvas: {' '.join(map(str, result.num_steps))}")
        return result

    def _note(self, line: str) -> None:
        self._notes.print(Text(line, style="dim"), highlight=False, soft_wrap=True)  # a line stays one line in a file


def user_turn(text: str, num_images: int) -> dict[str, Any]:
    """A message with the places of so many images before its text."""
    if not num_images:
        return {"role": "user", "content": text}
    return {"role": "user", "content": [*[{"type": "image"}] * num_images, {"type": "text", "text": text}]}


def drawn(result: Generation, draft: Piece | None = None) -> Text:
    """The answer so far, its thought first and in italics, the draft dimmed."""
    text = Text().append(result.reasoning, style="italic")  # the style of a Text itself is that of all of it
    if draft:
        text.append(draft.reasoning, style="italic dim")
    if text and (result.text or (draft and draft.text)):
        text.append("\n")
    text.append(Text(result.text))
    return text.append(Text(draft.text, style="dim")) if draft else text
