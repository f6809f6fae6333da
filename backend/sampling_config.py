"""What one request chooses about its generation, checked when it is made, and the values that then hold.

    mapping (JSON, request parameters) ──from_mapping──▶ SamplingConfig ──resolve(GenerationDefaults)──▶ ResolvedSampling

Everything that is refused raises RequestError INVALID_ARGUMENT, one line: what, got, expected, remedy.
"""

import difflib
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from backend.errors import refused
from backend.generation_defaults import GenerationDefaults
from backend.grammar import Grammar, checked_grammar
from backend.infill import Part, checked_parts, infill_tokens
from backend.parameters import LOGIT_BIAS, NUMBERS, TOKEN_ID, checked_flag, coerced_flag, shown

MAX_STOPS, MAX_STOP_LENGTH = 64, 1024  # every text is searched for every one, while the others wait
MAX_LOGIT_BIASES = 10_000  # they are set anew for every canvas, while other requests wait
MAX_STOP_TOKEN_IDS = 1024
_FLAGS = ("ignore_eos", "skip_special_tokens", "logprobs")
_NEVER_NONE = (
    "min_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty",
    "top_logprobs",
)  # fmt: skip
_ALIASES = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens", "stop_words": "stop"}

# Parameters of other servers that do nothing here: the values that ask for nothing. None always does.
_NEUTRAL_VALUES = {
    "n": (1,),
    "best_of": (1,),
    "num_beams": (1,),
    "use_beam_search": (False,),
    "early_stopping": (False,),
    "do_sample": (True,),
    "length_penalty": (1,),
    "typical_p": (1,),
    "bad_words": ([],),
    "prompt_logprobs": (),
    "include_stop_str_in_output": (False,),
    "spaces_between_special_tokens": (True,),
    "return_token_ids": (False,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "include_reasoning": (True,),
    "separate_reasoning": (True,),
}


@dataclass(frozen=True, kw_only=True)
class ResolvedSampling:
    """A request's choices with every default filled in; nothing is None."""

    max_tokens: int
    min_tokens: int  # no token ends the answer before; at most max_tokens
    max_denoising_steps: int
    t_min: float  # of the temperature schedule, scaled by the request's temperature
    t_max: float
    greedy: bool  # the denoiser canvas is the argmax canvas: no Gumbel noise
    top_k: int  # tokens; 0 is off, as it is if greedy
    top_p: float  # 1 is off, as it is if greedy
    min_p: float  # 0 is off, as it is if greedy
    logit_bias: tuple[tuple[int, float], ...]  # token ids, each once, and what is added to their logits
    repetition_penalty: float  # 1 is off
    frequency_penalty: float  # taken from a token's logit for each time that the answer has it before the canvas
    presence_penalty: float  # … once, if it has it
    entropy_bound: float  # nats
    stability_threshold: int  # steps
    confidence_threshold: float  # nats
    seed: int
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    eos_token_ids: tuple[int, ...]  # empty with ignore_eos
    skip_special_tokens: bool
    logprobs: bool
    top_logprobs: int
    repeated: tuple[int, ...] = ()  # token ids, each once, that the repetition penalty is for: of one canvas, empty if off
    infill: tuple[int, ...] = ()  # the answer's first tokens, BLANK where the model fills them
    grammar: Grammar | None = None  # None: the answer is free


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """A request's choices. None leaves a choice to the checkpoint's generation_config.json."""

    max_tokens: int | None = None
    min_tokens: int = 0  # end-of-sequence and stop tokens are impossible before
    temperature: float = 1.0  # scales the temperature schedule: 1 leaves it, 0 and less than 0.01 is greedy
    t_min: float | None = None  # temperature that the schedule falls to; must not exceed t_max
    t_max: float | None = None
    top_k: int = 0  # the denoiser canvas takes only the k most likely tokens; 0 and -1 are off
    top_p: float = 1.0  # … only the fewest most likely tokens that have this probability together; 1 is off
    min_p: float = 0.0  # … only tokens at least this probable, relative to the most likely one; 0 is off
    # The soft-capped logit of a token that the prompt or the canvases before have is divided by it, a negative one multiplied
    # with it; 1 is off.
    repetition_penalty: float = 1.0
    # Token id → number added to its logit then, before the temperature; a mapping is accepted.
    logit_bias: tuple[tuple[int, float], ...] = ()
    # Subtracted there from the logit of a token that the canvases before have, for each time and once; 0 is off.
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None  # None draws one
    stop: tuple[str, ...] = ()  # a string or a list of strings is accepted
    stop_token_ids: tuple[int, ...] = ()  # as eos tokens, and in force under ignore_eos
    ignore_eos: bool = False
    max_denoising_steps: int | None = None
    entropy_bound: float | None = None  # nats; 0 accepts one token a step
    stability_threshold: int | None = None  # steps; 0 is always stable
    confidence_threshold: float | None = None  # nats; 0 never stops early
    skip_special_tokens: bool = True  # in the text; token ids always have them
    logprobs: bool = False  # log probabilities of the tokens of the result, at the last step of their canvas
    top_logprobs: int = 0  # with logprobs: and of this many most likely tokens in each place
    infill: tuple[Part, ...] = ()  # what the answer begins with: texts, numbers of free tokens, token ids; a list is accepted
    structured_outputs: Grammar | None = None  # what the answer is a text of; a mapping is accepted: `grammar.py`

    def __post_init__(self):
        try:
            for name, number in NUMBERS.items():
                value = getattr(self, name)
                if value is not None or name in _NEVER_NONE:
                    object.__setattr__(self, name, number.checked(name, value))
            for name in _FLAGS:
                checked_flag(name, getattr(self, name))
            object.__setattr__(self, "stop", _checked_stop(self.stop))
            object.__setattr__(self, "stop_token_ids", _checked_token_ids(self.stop_token_ids))
            object.__setattr__(self, "logit_bias", _checked_logit_bias(self.logit_bias))
            object.__setattr__(self, "infill", checked_parts(self.infill))
            object.__setattr__(self, "structured_outputs", checked_grammar(self.structured_outputs))
            if self.infill and self.structured_outputs:
                raise ValueError("infill and structured_outputs: both given, but each says what the answer is; remove one")
            for name in ("stop", "infill", "structured_outputs"):
                if self.min_tokens and getattr(self, name):
                    raise ValueError(f"min_tokens and {name}: both given, but {name} may end the answer sooner; remove one")
            if self.top_logprobs and not self.logprobs:
                raise ValueError(f"top_logprobs: got {self.top_logprobs} without logprobs; set logprobs to true")
        except ValueError as error:
            raise refused(str(error)) from None

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object]) -> "SamplingConfig":
        """From a client's parameters.

        1. Unknown names are refused, all at once.
        2. Parameters of other servers are accepted with a value that asks for nothing, else refused, all at once.
        3. Aliases become our names; giving both is refused. None is as if not given. A number as logprobs, which is how
           completions ask, stands for true and that many top_logprobs.
        4. Numbers and flags that arrive as strings are coerced, as are the keys of logit_bias.
        """
        if not isinstance(mapping, Mapping):
            raise refused(f"sampling parameters: got {shown(mapping)}, expected a JSON object")
        known = [field.name for field in fields(cls)]
        unknown = [name for name in mapping if name not in known and name not in _ALIASES and name not in _NEUTRAL_VALUES]
        if unknown:  # 1.
            named = ", ".join(_with_closest(name, [*known, *_ALIASES]) for name in unknown)
            raise refused(f"unknown sampling parameter {named}; expected {', '.join(known)}")
        asking = [name for name, value in mapping.items() if name in _NEUTRAL_VALUES and not _is_neutral(name, value)]
        if asking:  # 2.
            named = ", ".join(f"{name}={shown(mapping[name])}" for name in asking)
            raise refused(f"{named}: not supported by this server; remove it")
        values = {name: value for name, value in canonical(mapping).items() if name not in _NEUTRAL_VALUES}  # 3.
        return cls(**{name: _coerced(name, value) for name, value in values.items()})  # 4.

    def resolve(self, defaults: GenerationDefaults, tokenize: Callable[[str], list[int]] | None = None) -> ResolvedSampling:
        """Fills in the checkpoint's defaults and scales the temperature schedule.

        tokenize: a text inside of an answer → its token ids; needed where infill has texts.


        Greedy (temperature 0) takes the argmax as the sampled token but divides the logits by the unscaled schedule.
        Acceptance, convergence and self-conditioning read softmax(logits / temperature); as the temperature goes to 0 every
        entropy does, so the first step would accept the whole canvas and count as confident, and the model would be fed
        one-hot predictions that it was not trained on. Greedy is to choose otherwise, not to be surer.
        top_k 1, top_p 0 and min_p 1 leave nothing but the most likely token to choose, so they are greedy too.
        """

        def chosen(name: str):
            value = getattr(self, name)
            return getattr(defaults, name) if value is None else value

        t_min, t_max = chosen("t_min"), chosen("t_max")
        if t_min > t_max:
            of_defaults = [name for name in ("t_min", "t_max") if getattr(self, name) is None]
            remedy = f"set {of_defaults[0]} too, it is the checkpoint's" if of_defaults else "swap them"
            raise refused(f"t_min: got {t_min:g}, expected at most t_max, {t_max:g}; {remedy}")
        greedy = self.temperature == 0 or self.top_k == 1 or self.top_p == 0 or self.min_p == 1
        scale = self.temperature or 1.0
        max_tokens = chosen("max_tokens")
        if self.min_tokens > max_tokens:
            raise refused(f"min_tokens: got {self.min_tokens}, expected at most max_tokens, {max_tokens}; raise that")
        return ResolvedSampling(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            max_denoising_steps=chosen("max_denoising_steps"),
            t_min=t_min * scale,
            t_max=t_max * scale,
            greedy=greedy,
            top_k=0 if greedy else max(self.top_k, 0),
            top_p=1.0 if greedy else self.top_p,
            min_p=0.0 if greedy else self.min_p,
            logit_bias=self.logit_bias,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            presence_penalty=self.presence_penalty,
            entropy_bound=chosen("entropy_bound"),
            stability_threshold=chosen("stability_threshold"),
            confidence_threshold=chosen("confidence_threshold"),
            seed=secrets.randbits(64) if self.seed is None else self.seed,
            stop=self.stop,
            stop_token_ids=self.stop_token_ids,
            eos_token_ids=() if self.ignore_eos else defaults.eos_token_ids,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=self.logprobs,
            top_logprobs=self.top_logprobs,
            infill=infill_tokens(self.infill, tokenize, max_tokens),
            grammar=self.structured_outputs,
        )


def canonical(mapping: Mapping[str, object]) -> dict[str, object]:
    """3. of `from_mapping`, for one source of parameters: sources can then be laid over each other.

    Raises RequestError INVALID_ARGUMENT for a parameter given under both of its names, or with two numbers.
    """
    values = {name: value for name, value in mapping.items() if value is not None}
    for alias, name in _ALIASES.items():
        if alias in values:
            if name in values:
                raise refused(f"{name} and {alias}: both given, but mean the same; remove one")
            values[name] = values.pop(alias)
    return _with_flag_for_logprobs(values)


def _checked_stop(stop: object) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, list | tuple) or not all(isinstance(string, str) and string for string in strings):
        raise ValueError(f"stop: got {shown(stop)}, expected a non-empty string or a list of them")
    if len(strings) > MAX_STOPS:
        raise ValueError(f"stop: got {len(strings)} strings, expected at most {MAX_STOPS}")
    if (longest := max(map(len, strings), default=0)) > MAX_STOP_LENGTH:
        raise ValueError(f"stop: got a string of {longest} characters, expected at most {MAX_STOP_LENGTH}")
    return tuple(strings)


def _checked_token_ids(token_ids: object) -> tuple[int, ...]:
    if not isinstance(token_ids, list | tuple):
        raise ValueError(f"stop_token_ids: got {shown(token_ids)}, expected a list of token ids")
    if len(token_ids) > MAX_STOP_TOKEN_IDS:
        raise ValueError(f"stop_token_ids: got {len(token_ids)} token ids, expected at most {MAX_STOP_TOKEN_IDS}")
    return tuple(TOKEN_ID.checked("stop_token_ids", token_id) for token_id in token_ids)


def _checked_logit_bias(bias: object) -> tuple[tuple[int, float], ...]:
    pairs = tuple(bias.items()) if isinstance(bias, Mapping) else bias
    if not isinstance(pairs, tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"logit_bias: got {shown(bias)}, expected an object of token ids and numbers")
    if len(pairs) > MAX_LOGIT_BIASES:
        raise ValueError(f"logit_bias: got {len(pairs)} token ids, expected at most {MAX_LOGIT_BIASES}")
    checked = {}
    for token_id, number in pairs:
        token_id = TOKEN_ID.checked("logit_bias", token_id)
        if token_id in checked:
            raise ValueError(f"logit_bias: got token id {token_id} twice, expected once")
        checked[token_id] = LOGIT_BIAS.checked(f"logit_bias of token id {token_id}", number)
    return tuple(checked.items())


def _coerced(name: str, value: object) -> object:
    """4. of `from_mapping`."""
    if name in NUMBERS:
        return NUMBERS[name].coerced(value)
    if name in _FLAGS:
        return coerced_flag(value)
    if name == "stop_token_ids" and isinstance(value, list | tuple) and len(value) <= MAX_STOP_TOKEN_IDS:
        return [TOKEN_ID.coerced(token_id) for token_id in value]
    if name == "logit_bias" and isinstance(value, Mapping) and len(value) <= MAX_LOGIT_BIASES:
        return tuple((TOKEN_ID.coerced(token_id), LOGIT_BIAS.coerced(number)) for token_id, number in value.items())
    return value


def _with_flag_for_logprobs(values: dict[str, object]) -> dict[str, object]:
    """With what a number as logprobs stands for."""
    coerced = NUMBERS["top_logprobs"].coerced
    logprobs = coerced(coerced_flag(values.get("logprobs")))
    if isinstance(logprobs, bool) or not isinstance(logprobs, int):
        return values
    top_logprobs = values.get("top_logprobs", logprobs)
    if coerced(top_logprobs) != logprobs:
        raise refused(f"logprobs={logprobs} and top_logprobs={shown(top_logprobs)}: differ; give one number")
    return {**values, "logprobs": True, "top_logprobs": logprobs}


def _is_neutral(name: str, value: object) -> bool:
    """Whether the value of a parameter that is not supported asks for nothing. True is not 1 here, but "1" is."""
    if value is None:
        return True
    for neutral in _NEUTRAL_VALUES[name]:
        if isinstance(neutral, bool):
            candidate = coerced_flag(value)
        elif isinstance(neutral, int):
            try:
                candidate = float(value) if isinstance(value, str) else value
            except ValueError:
                return False
        else:
            candidate = value
        if isinstance(candidate, bool) == isinstance(neutral, bool) and candidate == neutral:
            return True
    return False


def _with_closest(name: str, known: list[str]) -> str:
    closest = difflib.get_close_matches(str(name), known, n=1)
    return shown(name) + (f" (closest: {closest[0]!r})" if closest else "")
