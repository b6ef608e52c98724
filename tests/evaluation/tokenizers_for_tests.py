"""Two small tokenizers beside the embedded decoder's: words with a start token, and bytes without offsets."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(40)]
BOS, EOS = 1, 2


def word_tokenizer(*, adds_bos: bool) -> PreTrainedTokenizerFast:
    """One token per word w0..w39 (ids 3..42); <s> is 1, </s> is 2; <s> goes first where `adds_bos`."""
    vocabulary = {"<pad>": 0, "<s>": BOS, "</s>": EOS, **{word: i + 3 for i, word in enumerate(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )


class ByteTokenizer:
    """Bytes as ids, without offsets and without special tokens: what a slow tokenizer offers."""

    is_fast = False
    bos_token_id = None
    eos_token = None

    def __call__(self, text: str, **_: Any) -> Any:
        return BatchEncoding({"input_ids": list(text.encode())})

    def get_added_vocab(self) -> dict[str, int]:
        return {}


def words(n: int, start: int = 0) -> str:
    """n words, none like its neighbour."""
    return " ".join(WORDS[(start + 7 * i) % len(WORDS)] for i in range(n))
