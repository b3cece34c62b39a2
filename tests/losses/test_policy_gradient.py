"""Policy losses on given completions against TRL's own GRPOTrainer and RLOOTrainer: loss, every
gradient, and their metrics."""

import numpy as np
import pytest
import torch
from fasttr_kernels import linear_policy_loss

from fasttr.batch import Tree
from fasttr.losses.policy_gradient import PolicyLoss, TokenInputs, clipping
from fasttr.models import attention
from fasttr.models.policy import policy_loss, token_logps
from fasttr.packing.layout import pack
from tests.tiny import gradients, packed, random_trees, tiny_model
from tests.trl_trainers import trl_online

# Three prompts of four completions each, from one token to twelve.
SHAPES = [(5, 3, 12, 1, 7), (2, 4, 4, 9, 2), (8, 1, 6, 5, 11)]
LONGEST = 12
CASES = {
    "grpo": {"loss_type": "grpo"},
    "dapo": {"loss_type": "dapo"},
    "bnpo": {"loss_type": "bnpo"},
    "dr_grpo": {"loss_type": "dr_grpo"},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.02},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.1},
    "sequence": {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02},
    "clip higher": {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.28},
    "two-sided": {"loss_type": "grpo", "delta": 1.15},
    "kl": {"loss_type": "dapo", "beta": 0.1},
    "kl without correction": {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
    "cispo kl": {"loss_type": "cispo", "epsilon_high": 1.1, "beta": 0.1},
    "temperature": {"loss_type": "dapo", "temperature": 0.7, "beta": 0.05},
}


class Rollouts:
    """Completions with advantages, and old and reference log-probs that differ from the policy's;
    in our form and in TRL's."""

    def __init__(self, temperature):
        self.trees = random_trees(SHAPES)
        self.batch = pack(self.trees)
        self.temperature = temperature
        generator = torch.Generator().manual_seed(3)
        model = packed(tiny_model(implementation=attention.register()))
        logp = token_logps(model, self.batch, temperature)
        noise = 0.25 * torch.randn(2, len(logp), generator=generator)
        self.old_logp, self.ref_logp = logp + noise[0], logp + noise[1]
        self.lengths = self.batch.token_counts
        self.advantage = torch.randn(len(self.lengths), generator=generator)
        self.logp = logp

    def ours(self, logp, rows, completions, beta):
        return TokenInputs(
            logp=logp,
            old_logp=self.old_logp[rows],
            ref_logp=self.ref_logp[rows] if beta else None,
            advantage=self.advantage[completions],
            lengths=self.lengths[completions],
            keep=torch.ones_like(self.advantage[completions]),
        )

    def trls(self):
        N = len(self.lengths)
        longest = max(len(tree.prompt_ids) for tree in self.trees)
        found = {
            "prompt_ids": torch.zeros(N, longest, dtype=torch.long),
            "prompt_mask": torch.zeros(N, longest, dtype=torch.long),
            "completion_ids": torch.zeros(N, LONGEST, dtype=torch.long),
            "completion_mask": torch.zeros(N, LONGEST, dtype=torch.long),
            "old_per_token_logps": torch.zeros(N, LONGEST),
            "ref_per_token_logps": torch.zeros(N, LONGEST),
        }
        old, ref = (x.split(self.lengths.tolist()) for x in (self.old_logp, self.ref_logp))
        pairs = [(tree, ids) for tree in self.trees for ids in tree.completions]
        for n, (tree, ids) in enumerate(pairs):
            prompt = torch.from_numpy(tree.prompt_ids).long()
            found["prompt_ids"][n, longest - len(prompt) :] = prompt
            found["prompt_mask"][n, longest - len(prompt) :] = 1
            found["completion_ids"][n, : len(ids)] = torch.from_numpy(ids).long()
            found["completion_mask"][n, : len(ids)] = 1
            found["old_per_token_logps"][n, : len(ids)] = old[n]
            found["ref_per_token_logps"][n, : len(ids)] = ref[n]
        found["advantages"] = self.advantage
        found["num_items_in_batch"] = found["completion_mask"].sum()
        found["old_logps"] = torch.stack([x.sum() for x in old])
        return found


def trainer(kind, workspace, tmp_path, **options):
    """TRL's own, around our model."""
    tiny_model(implementation="eager").save_pretrained(tmp_path / "model")
    return trl_online(
        kind,
        tmp_path / "model",
        workspace / "model",
        tmp_path / "trl",
        max_completion_length=LONGEST,
        **options,
    )


def assert_same_gradients(ours, theirs, bound):
    theirs, ours = gradients(theirs), gradients(ours)
    assert theirs.keys() == ours.keys()
    for name, grad in theirs.items():
        allowed = bound * float(grad.abs().max()) + 1e-7
        assert float((ours[name] - grad).abs().max()) < allowed, name


@pytest.mark.parametrize("case", CASES)
def test_the_grpo_family_is_trls(workspace, tmp_path, case):
    settings = dict(CASES[case])
    temperature = settings.pop("temperature", 1.0)
    theirs = trainer("GRPO", workspace, tmp_path, temperature=temperature, **settings)
    rollouts = Rollouts(temperature)
    wanted = theirs._compute_loss(theirs.model, rollouts.trls())
    wanted.backward()
    metrics = {name: values[-1] for name, values in theirs._metrics["train"].items()}

    loss = PolicyLoss(**settings, max_completion_length=LONGEST)
    model = packed(tiny_model(implementation=attention.register()))
    out = policy_loss(
        model,
        rollouts.batch,
        lambda logp, rows, completions: loss(rollouts.ours(logp, rows, completions, loss.beta)),
        temperature=temperature,
        normalizer=loss.normalizer(12, int(rollouts.lengths.sum())),
        stats=True,
    )
    out.loss.backward()
    assert float(out.loss.detach()) == pytest.approx(wanted.item(), rel=1e-5, abs=1e-6)
    assert_same_gradients(model.model, theirs.model, 1e-5)

    inputs = rollouts.ours(out.token_logp, slice(None), slice(None), loss.beta)
    found = clipping(loss, inputs)
    if loss.loss_type == "cispo":
        assert float(found.high / found.kept) == pytest.approx(metrics["cispo_clip_ratio"])
        assert metrics["cispo_clip_ratio"] > 0
    else:
        assert float(found.low / found.kept) == pytest.approx(metrics["clip_ratio/low_mean"])
        assert float(found.high / found.kept) == pytest.approx(metrics["clip_ratio/high_mean"])
        assert float(found.low_min) == pytest.approx(metrics["clip_ratio/low_min"])
        assert float(found.high_max) == pytest.approx(metrics["clip_ratio/high_max"])
        assert metrics["clip_ratio/region_mean"] > 0
    if loss.beta:
        log_ratio = inputs.logp - inputs.old_logp
        kl = loss.kl(inputs, loss.ratios(inputs, log_ratio).ratio)
        assert float(kl.mean()) == pytest.approx(metrics["kl"], rel=1e-4)
    assert float(out.entropy.mean()) == pytest.approx(metrics["entropy"], rel=1e-4)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "dr_grpo", "luspo", "cispo"])
def test_steps_of_one_rollout_are_divided_as_trls(workspace, tmp_path, loss_type):
    """The second step of a rollout whose first one had more tokens."""
    theirs = trainer("GRPO", workspace, tmp_path, loss_type=loss_type, steps_per_generation=2)
    rollouts = Rollouts(1.0)
    inputs = rollouts.trls()
    own = int(rollouts.lengths.sum())
    inputs["num_items_in_batch"] = torch.tensor(own + 100)
    wanted = float(theirs._compute_loss(theirs.model, inputs).detach())

    loss = PolicyLoss(loss_type, max_completion_length=LONGEST)
    summed = loss(rollouts.ours(rollouts.logp, slice(None), slice(None), 0.0))
    tokens = (own + 100) / 2 if loss.counts_rollout else own
    assert float(summed) / loss.normalizer(12, tokens) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"epsilon": 0.05, "temperature": 0.7}])
def test_rloo_is_trls(workspace, tmp_path, options):
    """exp of a sum of twelve log-ratios: its gradients are held to 2e-5."""
    temperature = options.get("temperature", 1.0)
    theirs = trainer("RLOO", workspace, tmp_path, beta=0.0, **options)
    rollouts = Rollouts(temperature)
    wanted = theirs._compute_loss(theirs.model, rollouts.trls())
    wanted.backward()
    metrics = {name: values[-1] for name, values in theirs._metrics["train"].items()}

    loss = PolicyLoss("rloo", epsilon=options.get("epsilon", 0.2))
    model = packed(tiny_model(implementation=attention.register()))
    out = policy_loss(
        model,
        rollouts.batch,
        lambda logp, rows, completions: loss(rollouts.ours(logp, rows, completions, 0.0)),
        temperature=temperature,
        normalizer=loss.normalizer(12, int(rollouts.lengths.sum())),
    )
    out.loss.backward()
    assert float(out.loss.detach()) == pytest.approx(wanted.item(), rel=2e-5)
    assert_same_gradients(model.model, theirs.model, 2e-5)
    found = clipping(loss, rollouts.ours(out.token_logp, slice(None), slice(None), 0.0))
    assert float(found.low / found.kept) == pytest.approx(metrics["clip_ratio/low_mean"])
    assert float(found.high / found.kept) == pytest.approx(metrics["clip_ratio/high_mean"])
    assert 0 < metrics["clip_ratio/region_mean"] < 1


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "rloo"])
def test_a_completion_that_is_left_out_gives_no_gradient(loss_type):
    lengths = torch.tensor([3, 2])
    logp = torch.randn(5, dtype=torch.float64, requires_grad=True)
    inputs = TokenInputs(
        logp,
        logp.detach() - 0.01,
        None,
        torch.tensor([1.0, 2.0]),
        lengths,
        torch.tensor([1.0, 0.0]),
    )
    PolicyLoss(loss_type)(inputs).backward()
    assert float(logp.grad[:3].abs().min()) > 0
    assert float(logp.grad[3:].abs().max()) == 0


def test_on_policy_every_loss_has_the_gradient_of_reinforce():
    """At the policy that drew them the ratio is 1 and unclipped: minus advantage times the gradient
    of the log-prob."""
    lengths, advantage = torch.tensor([3, 2]), torch.tensor([0.7, -1.3])
    for loss_type in ("dapo", "rloo", "luspo", "cispo"):
        logp = torch.randn(5, dtype=torch.float64, requires_grad=True)
        inputs = TokenInputs(logp, None, None, advantage, lengths, torch.ones(2))
        high = 5.0 if loss_type == "cispo" else None
        PolicyLoss(loss_type, epsilon_high=high)(inputs).backward()
        np.testing.assert_allclose(logp.grad, -advantage.repeat_interleave(lengths), rtol=1e-6)


def test_the_temperature_and_the_soft_cap_commute_with_the_head():
    """softcap(z) / T is a soft cap of its own: the log-probs are those of the model's logits over
    T."""
    model = packed(tiny_model("gemma2", implementation=attention.register()))
    tree = Tree(0, np.array([5, 6], dtype=np.int32), (np.array([7, 8, 9], dtype=np.int32),))
    batch = pack([tree])
    logits = model.model(**model.rows.inputs(batch)).logits[0, 1:-1].float() / 0.7
    wanted = logits.log_softmax(-1).gather(1, torch.tensor([[7], [8], [9]]))[:, 0]
    torch.testing.assert_close(token_logps(model, batch, 0.7), wanted, rtol=1e-4, atol=1e-4)
    assert linear_policy_loss is not None
