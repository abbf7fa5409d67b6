"""A byte tokenizer with or without a chat template, real enough for ``generate``'s and the templates' own code."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<end>"
CHAT = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] + '<end>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
SPECIAL = ["<pad>", END, "<system>", "<user>", "<assistant>"]


def byte_tokenizer(template: str | None = CHAT) -> PreTrainedTokenizerFast:
    """Printable ASCII as ids from 5 on: a vocabulary of 100; ``<end>`` is the end token, 1."""
    vocabulary = {name: index for index, name in enumerate([*SPECIAL, *map(chr, range(32, 127))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token="<pad>", unk_token="?")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    fast.chat_template = template
    return fast
