"""Makes the matcher of a grammar as an engine's worker would, in a process of its own: `grammar_check` starts it, as a script.

Standard input: {"grammar": what a matcher is made of, "max_readings": number}. Standard output: what is wrong with it, "" for
nothing. Time and memory are limited; what exceeds them ends the process.
"""

import json
import re
import resource
import sys

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

_CPU_SECONDS, _MEMORY_BYTES = 1, 2 << 30


class _Bytes:
    """A token for each byte, and those that the grammar names: what takes long in a grammar does not depend on tokens."""

    eos_token_id, bos_token_id = 256, None

    def __init__(self, grammar: str):
        names = ["<eos>", *sorted(set(re.findall(r"<[^\s<>]+>", grammar)) - {"<eos>"})]
        self.tokens = [bytes([byte]) for byte in range(256)] + [b"\xff" + name.encode() for name in names]
        self.special_token_ids = list(range(256, len(self.tokens)))

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    asked = json.load(sys.stdin)
    rules = " ".join(each.get("lark_grammar") or "" for each in json.loads(asked["grammar"])["grammars"])
    problem = LLMatcher.validate_grammar(asked["grammar"])
    if not problem:
        limits = LLParserLimits(max_items_in_row=asked["max_readings"], verbose_errors=False)
        matcher = LLMatcher(LLTokenizer(TokenizerWrapper(_Bytes(rules))), asked["grammar"], log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        problem = matcher.get_error()
    sys.stdout.write(problem)


if __name__ == "__main__":
    main()
