"""Byte-level BPE trained here, or an existing tokenizer adopted, with one promise for both.

The promise: text never becomes a special token, even where it spells one, because special tokens
are looked for in no text (`split_special_tokens`, saved with the tokenizer). They enter a sequence
only by their number. A tokenizer trained here also gives every text back exactly: any byte is a
token, digits stand one by one, and nothing is normalised.

Paper: Sennrich et al. 2016, arXiv:1508.07909, algorithm 1, on bytes as in Radford et al. 2019.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from drawplate.core.errors import UserError

END, PAD = "<|end|>", "<|pad|>"
SMALLEST = 256 + 2
"""Every byte, the end of a text, padding."""
_AT_ONCE = 1000


def train(texts: Iterable[str], size: int) -> Any:
    """At most `size` tokens learned from texts; the same texts give the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END, PAD],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END,
        pad_token=PAD,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def adopt(folder: Path) -> Any:
    """The tokenizer of a Hugging Face folder; one without padding pads with its end token.

    Raises:
        UserError: the folder has no `tokenizer.json`, or the tokenizer no end-of-text token.
    """
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        raise UserError(
            f"prepare.tokenizer: {folder} holds no tokenizer.json; "
            "name a folder written by save_pretrained of a fast tokenizer"
        )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, split_special_tokens=True)
    if tokenizer.eos_token is None:
        raise UserError(
            f"prepare.tokenizer: {folder} names no eos_token; set one in tokenizer_config.json"
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def encode(tokenizer: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    """Tokens of each text, no special one among them; never cut, never padded."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    for start in range(0, len(texts), _AT_ONCE):
        some = list(texts[start : start + _AT_ONCE])
        yield from (
            coded.ids for coded in backend.encode_batch_fast(some, add_special_tokens=False)
        )
