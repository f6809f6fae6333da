"""The checkpoint's chat template: a chat → the prompt that the model goes on from.

Rendering is transformers' own (`rendering`), in its sandbox, without PyTorch.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jinja2
from jinja2 import meta
from tokenizers import Tokenizer

from backend.chat.answer import AnswerFormat
from backend.chat.answer_place import rules_before_answer, thought_before
from backend.chat.call_grammar import call_grammar, strict_calls_grammar
from backend.chat.markup import TagSet
from backend.chat.messages import ChatRequest
from backend.chat.reasoning import CHANNEL_CLOSE, CHANNEL_OPEN, REASONING_TAGS
from backend.chat.stop_scope import AnswerText
from backend.chat.tools import CALL_OPEN, TOOL_TAGS
from backend.errors import refused
from backend.json_text import json_object
from backend.parameters import shown
from contract.regular_file import regular

_OURS = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "conversations", "chat_template")
_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
_OPEN_THOUGHT = re.compile(re.escape(CHANNEL_OPEN) + r"thought\s*\Z")


@dataclass(frozen=True, kw_only=True)
class ChatPrompt:
    """text: begins with the tokenizer's <bos>, if the template writes one. form: how the answer is to be read."""

    text: str
    form: AnswerFormat


class ChatTemplate:
    """The template of one engine directory, and what its tokenizer says about tags. May be used from any thread."""

    def __init__(self, template: str | None, names: Mapping[str, str], tokenizer: Tokenizer):
        """names: variables that every template sees, `bos_token` for one. template None: every chat is refused."""
        self._template, self._names = template, dict(names)
        self._special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
        self._tags = TagSet({*self._special, *REASONING_TAGS, *TOOL_TAGS})
        self._answer_text = AnswerText(tokenizer)

    @classmethod
    def load(cls, directory: Path, tokenizer: Tokenizer) -> "ChatTemplate":
        """From chat_template.jinja, else the chat_template of tokenizer_config.json; the latter also has the names.

        Raises ValueError, one line, for a tokenizer_config.json that is not a JSON object, and a file that cannot be read.
        """
        file, path = directory / "chat_template.jinja", directory / "tokenizer_config.json"
        config = json_object(_read(path), path) if path.exists() else {}
        template = _read(file) if file.exists() else config.get("chat_template")
        tokens = {name: value for name, value in config.items() if name.endswith("_token")}
        names = {name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()}
        return cls(template, {name: value for name, value in names.items() if isinstance(value, str)}, tokenizer)

    def prompt(self, chat: ChatRequest, *, keep_special_tokens: bool = False) -> ChatPrompt:
        """1. Render the chat, with the model's turn open.
        2. A tool that must be called: begin the call. The model, which goes on from what the prompt has, can then only finish
           it, held to the grammar of calls (it does not think first; a call that it does not finish is text). Else calls of
           strict tools are held to theirs.
        3. Say how to read the answer: whether the prompt leaves a thought open, what it has of the answer already, where
           stop strings count, whether it ends behind a call, and what may come before an answer that a grammar describes.

        Raises RequestError INVALID_ARGUMENT for what the template refuses.
        """
        text = self._rendered(chat)  # 1.
        in_thought = _OPEN_THOUGHT.search(text) is not None
        place = {"in_thought": in_thought, "after_thought": text.rstrip().endswith(CHANNEL_CLOSE)}
        prefill = ""
        if chat.required_tool:  # 2.
            name = "" if chat.required_tool == "*" else chat.required_tool
            prefill = f"{CHANNEL_CLOSE if in_thought else ''}{CALL_OPEN}call:{name}{'{' if name else ''}"
            of_call = call_grammar(chat.tools, self._special, begun=name)
        else:
            thought, rules = thought_before(self._special, **place)
            of_call = strict_calls_grammar(chat.tools, self._special, thought=thought, thought_rules=rules)
        choices = {"with_tools": bool(chat.tools), "keep_special_tokens": keep_special_tokens}
        form = AnswerFormat(  # 3.
            tags=self._tags,
            prefill=prefill,
            in_thought=in_thought,
            stop_scope=self._answer_text.scope(in_thought=in_thought, in_call=bool(prefill), one_call=chat.one_call, **choices),
            of_call=of_call,
            before_answer=rules_before_answer(self._special, **place, tools=[tool["function"]["name"] for tool in chat.tools]),
            **choices,
        )
        return ChatPrompt(text=text + prefill, form=form)

    def _rendered(self, chat: ChatRequest) -> str:
        if self._template is None:
            raise refused(
                "messages: this engine has no chat template; send text_input or input_ids, or add chat_template.jinja"
            )
        ours = sorted(set(_OURS) & set(chat.template_kwargs))
        if ours:
            raise refused(f"chat_template_kwargs: got {', '.join(ours)}, which the server sets; remove it")
        try:
            self._check_names(chat.template_kwargs)
            [text], _ = rendering().render_jinja_template(
                conversations=[list(chat.messages)],
                tools=list(chat.tools) or None,
                chat_template=self._template,
                add_generation_prompt=True,
                **{**self._names, **chat.template_kwargs},
            )
        except _REFUSALS as error:
            raise refused(f"messages: the chat template refuses them: {' '.join(str(error).split())}") from None
        return text

    def _check_names(self, kwargs: Mapping[str, Any]) -> None:
        """A name that the template does not use would change nothing, and who misspells one would not notice."""
        used = _variables(self._template) - set(_OURS)
        unknown = [name for name in kwargs if name not in used]
        if unknown:
            expected = ", ".join(sorted(used - set(self._names))) or "none"
            raise refused(f"chat_template_kwargs: got {shown(unknown[0])}, expected variables of the chat template: {expected}")


def rendering() -> ModuleType:
    """transformers' module for chat templates. The first import takes two seconds, which who has other things to wait for can
    spend beside them."""
    from transformers.utils import chat_template_utils

    return chat_template_utils


def _read(path: Path) -> str:
    """Raises ValueError, one line, for a file that is no text or may not be read."""
    try:
        return regular(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); give access to it, or copy it from the checkpoint again") from None


@cache
def _variables(template: str) -> frozenset[str]:
    """What a template leaves for others to set. Raises jinja2.TemplateError if it is none."""
    # Compiled as for rendering: transformers adds statements and functions of its own.
    environment = rendering()._compile_jinja_template(template).environment
    return frozenset(meta.find_undeclared_variables(environment.parse(template))) - set(environment.globals)
