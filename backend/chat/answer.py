"""The model's text, as it comes → answer, thought and tool calls.

text with tags ──markup──▶ segments ──reasoning──▶ thought
                               └─────tools──▶ text, tool calls
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace

from backend.chat.markup import TagSet, TagSplitter
from backend.chat.reasoning import ReasoningParser
from backend.chat.tools import ToolCall, ToolCallParser
from backend.errors import refused
from backend.grammar import Grammar
from backend.sampling_config import SamplingConfig
from backend.text_stream import EVERYWHERE, StopScope


@dataclass(frozen=True, kw_only=True)
class AnswerDelta:
    """What more text adds to each part of an answer."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AnswerFormat:
    """How one answer is to be read.

    tags: the tokenizer's special tokens and the markup. prefill: what the prompt already has of the answer. in_thought: the
    prompt ends inside a thought. with_tools: tool calls are expected; otherwise a call is text. keep_special_tokens: those that
    are no markup stay in the text. stop_scope: where in the answer stop strings are looked for, and whether it ends behind a
    call. of_call: the grammar of a call that must be made, or of text and calls of strict tools. before_answer: see
    `answer_place`.
    """

    tags: TagSet
    prefill: str = ""
    in_thought: bool = False
    with_tools: bool = False
    keep_special_tokens: bool = False
    stop_scope: StopScope = EVERYWHERE
    of_call: Grammar | None = None
    before_answer: str = ""

    def sampling(self, config: SamplingConfig) -> SamplingConfig:
        """The choices of a request whose answer is read so: tags are special tokens, which must not be skipped; a grammar is
        that of the answer alone, of which there is none where a call must be made; and such a call is one, unless the request
        itself gives parts of it.

        Raises RequestError INVALID_ARGUMENT for min_tokens where calls are held to a grammar, or the first one ends the
        answer."""
        grammar = None if self.prefill else config.structured_outputs
        within = replace(grammar, before=self.before_answer) if grammar else None if config.infill else self.of_call
        if config.min_tokens and within and not grammar:
            got = f"got {config.min_tokens}, but a call that must be made, or is of a strict tool, may end the answer sooner"
            raise refused(f"min_tokens: {got}; remove it, or tool_choice and strict")
        if config.min_tokens and self.stop_scope.last:
            got = f"got {config.min_tokens}, but with parallel_tool_calls false the first call may end the answer sooner"
            raise refused(f"min_tokens: {got}; remove one")
        return replace(config, skip_special_tokens=False, structured_outputs=within)


class AnswerParser:
    """One answer's parser. The parts are the same however the text is split into pieces."""

    def __init__(self, form: AnswerFormat):
        self._splitter = TagSplitter(form.tags)
        self._reasoning = ReasoningParser(in_thought=form.in_thought, with_tools=form.with_tools)
        self._tools = ToolCallParser(with_calls=form.with_tools, keep_tags=form.keep_special_tokens)
        self._num_calls = 0
        self.push(form.prefill)

    def finish_reason(self, reason: str | None) -> str | None:
        """The reason that generation ended with, or "tool_calls" if it stopped after at least one."""
        return "tool_calls" if reason == "stop" and self._num_calls else reason

    def push(self, text: str, *, last: bool = False) -> AnswerDelta:
        """Takes more text, special tokens included; `last` says that there will be no more."""
        thought, rest = self._reasoning.push(self._splitter.push(text, last=last))
        answer, calls = self._tools.push(rest, last=last)
        self._num_calls += len(calls)
        return AnswerDelta(text=answer, reasoning=thought, tool_calls=tuple(calls))

    def preview(self, text: str) -> AnswerDelta:
        """What `push(text, last=True)` would add; the parser stays as it is."""
        other = copy.copy(self)
        other._splitter, other._reasoning, other._tools = map(copy.copy, (self._splitter, self._reasoning, self._tools))
        return other.push(text, last=True)


def parse_answer(text: str, form: AnswerFormat) -> AnswerDelta:
    """A whole answer at once."""
    return AnswerParser(form).push(text, last=True)


def joined(deltas: Iterable[AnswerDelta]) -> AnswerDelta:
    """Several deltas as one."""
    listed = list(deltas)
    return AnswerDelta(
        text="".join(delta.text for delta in listed),
        reasoning="".join(delta.reasoning for delta in listed),
        tool_calls=tuple(call for delta in listed for call in delta.tool_calls),
    )
