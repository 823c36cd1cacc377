"""The word tokenizer: an entry per word and punctuation mark, and a ChatML template."""

import re
from collections.abc import Iterator
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.recall.harbour import HARBOUR
from benchmarks.recall.world import CHAT_WORDS, PUNCTUATION, World

END_OF_TEXT, UNKNOWN, START, END = "<|endoftext|>", "<|unk|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, UNKNOWN, START, END)
END_ID = SPECIAL_TOKENS.index(END)
VOCABULARY_MULTIPLE = 64

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def _texts(world: World) -> Iterator[str]:
    """Every piece of text a document can be made of."""
    yield from world.first_names
    yield from world.surnames
    for attribute in world.attributes:
        yield from (attribute.answer, *attribute.statements, *attribute.questions)
        yield from attribute.values
    yield from world.offices
    yield from (*world.vote_statements, *world.vote_questions, world.vote_answer, *world.voters)
    yield from (*world.restate_prefixes, *world.asked, *world.fillers)
    for options in world.slots.values():
        yield from options


@cache
def vocabulary(world: World = HARBOUR) -> dict[str, int]:
    """Word to id: special tokens, chat roles, punctuation, then the words; padded to a multiple."""
    words = dict.fromkeys((*SPECIAL_TOKENS, *CHAT_WORDS, *PUNCTUATION))
    for text in _texts(world):
        parts = re.sub(r"\{[A-Za-z]+\}", " ", text).split()
        words.update(dict.fromkeys(parts))
        if parts:
            words.setdefault(parts[0][0].upper() + parts[0][1:])
    for i in range(-len(words) % VOCABULARY_MULTIPLE):
        words.setdefault(f"<|unused_{i}|>")
    return {word: i for i, word in enumerate(words)}


def build_tokenizer(world: World = HARBOUR) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers and vLLM load it."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary(world), unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    # The WordPiece decoder puts spaces between words and removes them before most punctuation.
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.WordPiece(cleanup=True),
            decoders.Replace(" :", ":"),
            decoders.Replace(" ;", ";"),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        unk_token=UNKNOWN,
        additional_special_tokens=[START],
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
