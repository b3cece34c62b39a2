"""Log-probs for torchtune's DPO recipes, from hidden states in place of logits.

Legend: n sequences, S positions, D hidden size.
"""

from __future__ import annotations

from typing import Any

from fasttr_kernels import from_padded, linear_logprob
from torch import Tensor, nn

from fasttr.integrations.sharded import whole


class BatchLogProbs(nn.Module):
    """`torchtune.rlhf.get_batch_log_probs` of a model that leaves its output layer to the loss.

        logps = BatchLogProbs()
        logps.set_model_output(model)                      # before the recipe's loop
        ...
        chosen_logps = logps(all_outputs[:len_chosen], labels[:len_chosen])

    in `concatenated_forward`, where `all_outputs = model(input_ids)` are then hidden states, not
    logits; the reference has one of its own. The line that logs mean logits has no logits to read.
    """

    def __init__(self) -> None:
        super().__init__()
        self._projection: list[Any] = []  # not a submodule: its weights belong to the model

    def set_model_output(self, model: nn.Module) -> None:
        """Make the model return hidden states, and read its head from here on."""
        model.skip_output_layer = True  # type: ignore[assignment]
        self._projection = [model.output]

    def forward(
        self,
        outputs: Tensor,  # (n, S, D)
        labels: Tensor,  # (n, S) tokens, not shifted
        label_pad_token_id: int = -100,
        return_average_logprobs: bool = False,
    ) -> Tensor:
        """(n,) log-probs of each sequence's labels after the first, fp32, summed or averaged over
        those that are not padding; differentiable. A sequence without any has 0."""
        if not self._projection:
            raise ValueError("got no model; wanted set_model_output(model) before the first call")
        if outputs.shape[:2] != labels.shape:
            raise ValueError(
                f"labels: got shape {tuple(labels.shape)}; wanted {tuple(outputs.shape[:2])}, as "
                "the outputs"
            )
        (projection,) = self._projection
        # A tied head holds the module whose weight it reads, which sharding may have replaced.
        owner = getattr(projection, "tied_module", projection)
        rows = from_padded(outputs[:, :-1], labels[:, 1:], label_pad_token_id)
        bias = whole(getattr(projection, "bias", None))
        logp = linear_logprob(rows.hidden, whole(owner.weight), rows.target, bias).logp
        counts = (labels[:, 1:] != label_pad_token_id).sum(1)
        of_sequence = counts.new_tensor(range(len(counts))).repeat_interleave(
            counts, output_size=len(logp)
        )
        sums = logp.new_zeros(len(counts)).index_add(0, of_sequence, logp)
        return sums / counts.clamp(min=1) if return_average_logprobs else sums
