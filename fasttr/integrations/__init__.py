"""The fused ops in other people's training loops, with torch alone:

    from fasttr.integrations import LinearPreferenceLoss

    dpo = LinearPreferenceLoss("sigmoid", beta=0.1)        # any name of fasttr.losses
    ref_logp = dpo.logps(ref_hidden, ref_head.weight, labels)
    loss = dpo(hidden, head.weight, labels, ref_logp).loss

`fasttr.integrations.liger` has Liger's chunked DPO and KTO losses as classes of the same name and
signature, `fasttr.integrations.torchtune` log-probs for its DPO recipes. What needs transformers or
TRL stands apart: `fasttr.integrations.callback` (a reference that moves, in any transformers
`Trainer`) and `fasttr.integrations.trl` (`patch()`, for TRL's DPO and KTO trainers).
"""

from fasttr.integrations.linear_loss import LinearLossOutput, LinearPreferenceLoss
from fasttr.integrations.sharded import whole

__all__ = ["LinearLossOutput", "LinearPreferenceLoss", "whole"]
