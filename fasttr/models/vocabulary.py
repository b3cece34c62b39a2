"""A tokenizer beside a model: a row of the embedding for each token, and the same token for each
id of policy and reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fasttr.errors import FasttrError


def rows_wanted(tokenizer: Any) -> int:
    """Rows that an embedding needs for every token of a text.

    Padding is never embedded, and the token of unknown text, which a tokenizer's class may add by
    itself, only where a row holds it: `checks.check_ids` looks there.
    """
    ids = set(tokenizer.get_vocab().values())
    kept = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    return max(ids - ({tokenizer.pad_token_id, tokenizer.unk_token_id} - kept)) + 1


def check_rows(hf_config: Any, tokenizer: Any, key: str, name: str) -> None:
    """Raise FasttrError, under the setting `key`, where tokens have no row in the embedding.

    `hf_config` is the model's; one of a model's own code may not say how many rows there are.
    """
    rows = getattr(hf_config.get_text_config(), "vocab_size", None)
    wanted = rows_wanted(tokenizer)
    if rows is not None and wanted > rows:
        raise FasttrError(
            f"{key}: the tokenizer knows ids up to {wanted - 1}, and the embedding of {name} has "
            f"{rows} rows; wanted one for every token: resize_embeddings true adds them, or use "
            "the tokenizer that belongs to it"
        )


def check_same_tokens(own: Any, other: Any, key: str, name: str) -> None:
    """Raise FasttrError where two tokenizers split a text into other ids.

    Either may have added tokens of its own (of a chat template, say), at ids that are free in the
    other.
    """
    if own.get_vocab() == other.get_vocab():
        return
    token = _token_of_one(own, other) or _token_of_one(other, own)
    if token is not None:
        ours, theirs = own.get_vocab(), other.get_vocab()
        raise FasttrError(
            f"{key}: {name} has another vocabulary ({token!r} is {ours.get(token, 'absent')} here "
            f"and {theirs.get(token, 'absent')} there), so its log-probs are of other tokens; "
            "wanted a model with the same tokenizer"
        )


def _token_of_one(own: Any, other: Any) -> str | None:
    """A token whose id the other one does not share, but for added tokens at ids that it has
    free."""
    theirs = other.get_vocab()
    taken, added = set(theirs.values()), own.get_added_vocab()
    for token, number in own.get_vocab().items() - theirs.items():
        if token not in added or token in theirs or number in taken:
            return str(token)
    return None


@torch.no_grad()
def add_rows(model: Any, rows: int) -> bool:
    """Give the embedding, and an untied head, `rows` rows; False where they have as many already.

    A new row is the mean of the old ones, in fp32, so that policy and reference get the same ones
    and a new token is as likely as a typical one.
    """
    old = model.get_input_embeddings().weight.shape[0]
    if rows <= old:
        return False
    model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is not None:
            _fill_with_mean(layer.weight, old)
            _fill_with_mean(getattr(layer, "bias", None), old)
    return True


def _fill_with_mean(parameter: nn.Parameter | None, old: int) -> None:
    """Rows from `old` on become the mean of those before."""
    if parameter is not None and parameter.shape[0] > old:
        parameter[old:] = parameter[:old].mean(0)
