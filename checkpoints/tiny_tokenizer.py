"""The tokenizer of the tiny checkpoint: Gemma's kind (BPE over "▁" words with byte fallback), with a small vocabulary.

Token ids, in order: the special tokens, the 256 byte-fallback tokens, printable ASCII, then the merges.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>",
    "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>",
    "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
    "<|image>", "<|image|>", "<image|>",
)  # fmt: skip

# Each word becomes one token through a chain of left-to-right merges. Every chain starts with "▁", an upper-case letter
# or a newline, so that the lower-case words of the reversing task stay single letters.
MERGED_WORDS = ("Add", "Reverse", "Count", "What", "▁and", "▁from", "▁to", "▁is", "▁the", "▁in", "▁weather", "▁price", "▁of")

VOCAB_SIZE = 448  # rounded up from the tokens in use, as real checkpoints do


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer from the tables above; nothing is learned, so the result is always the same."""
    tokens = [*SPECIAL_TOKENS]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    tokens += ["\n", "▁", *(chr(code) for code in range(33, 127))]
    merges: list[tuple[str, str]] = []
    for word in MERGED_WORDS:
        for end in range(2, len(word) + 1):
            pair = (word[: end - 1], word[end - 1])
            if pair not in merges:
                merges.append(pair)
                tokens.append(word[:end])
    vocab = {token: index for index, token in enumerate(tokens)}
    assert len(vocab) == len(tokens) <= VOCAB_SIZE, len(tokens)

    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])

    template = Path(__file__).with_name("tiny_chat_template.jinja").read_text()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=template,
    )
