"""Tokenizers and templates of many habits, and rows that are hard for them."""

from __future__ import annotations

from functools import cache

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.data.rows import say

TEXTS = [
    "The sky is blue, the sky is black and the sun is warm today.",
    "Naïve café in Zürich: 東京は晴れ 👩‍👩‍👧 and 👍🏽 and 🇨🇭, ok?\n\nYes.  Two  spaces.",
    "user\nassistant\nsystem\nYou are a helpful assistant. <think> </think>",
]

TURN = "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
HEADER = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "ends_with_a_header": "{% for m in messages %}" + TURN + "{% endfor %}" + HEADER,
    "header_differs_from_the_turn": "{% for m in messages %}" + TURN + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
    "strips": "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
    "adds_a_system_turn": "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a "
    "helpful assistant."
    "<|im_end|>\n{% endif %}{% for m in messages %}" + TURN + "{% endfor %}" + HEADER,
    "no_header_no_end": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}",
    "tools_and_kwargs": "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% "
    "endif %}"
    "{% for m in messages %}"
    + TURN
    + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think> </think>{% endif %}{% "
    "endif %}",
}


@cache
def trained_on(texts: tuple[str, ...], vocab_size: int) -> str:
    """What a tokenizer is loaded from."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend.to_str()


def make_tokenizer(texts=TEXTS, *, vocab_size=400, adds_bos=False, template="ends_with_a_header"):
    """A byte-level BPE tokenizer with BOS, EOS, PAD and a chat template, trained on the texts."""
    backend = Tokenizer.from_str(trained_on(tuple(texts), vocab_size))
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATES.get(template, template)
    return tokenizer


TEXT_ROWS = {
    "plain": ("The sky is", " blue", " black"),
    "merge_across_the_boundary": ("The sk", "y is", "in"),
    "emoji_across_the_boundary": ("family: 👩‍", "👩‍👧 yes", "👍🏽"),
    "flag_and_combining": ("Zu", "̈rich 🇨", "̈ri 🇨🇭"),
    "one_side_a_prefix_of_the_other": ("The sun", " is", " is warm"),
    "empty_prompt": ("", "The sky", "The sun"),
    "empty_completion": ("The sky is", "", " blue"),
    "eos_already_in_the_text": ("The sky is", " blue</s>", " black</s> </s>"),
    "eos_ends_the_prompt": ("The sky is</s>", "</s>", " blue"),
    "bos_in_the_text": ("<s>The", "<s>", " sky"),
    "spaces": ("  ", "   two", " "),
    "cjk": ("東京", "は晴れ", "は雨"),
}

CONVERSATIONS = [
    ([say("user", "The sky?")], [say("assistant", "blue")], [say("assistant", "black")]),
    ([say("user", " The sky? ")], [say("assistant", " blue ")], [say("assistant", "blue")]),
    (
        [say("system", "Zürich"), say("user", "👩‍")],
        [say("assistant", "👩‍👧")],
        [say("assistant", "👍🏽")],
    ),
    (
        [say("user", "a"), say("assistant", "b"), say("user", "c")],
        [say("assistant", "d")],
        [say("assistant", "</s>")],
    ),
    (
        [say("user", "a"), say("assistant", "begun: ")],
        [say("assistant", "d")],
        [say("assistant", "e")],
    ),
    (
        [say("user", "a")],
        [say("assistant", "b"), say("user", "more"), say("assistant", "c")],
        [say("assistant", "b"), say("user", "less"), say("assistant", "")],
    ),
    ([say("user", "")], [say("assistant", "")], [say("assistant", "<|im_end|>")]),
]
