"""What a plan chooses on cards that are pretended: the stated order, and no more than there is."""

from __future__ import annotations

import pytest

from fasttr.memory.choose import USABLE, Wishes, choose
from fasttr.memory.plan import GIB, Reference, Setup
from fasttr.memory.shapes import SHAPES
from fasttr.memory.sizes import sizes_of
from fasttr.models.packed import head_rows

H200, H100 = 143771 * 2**20, 81559 * 2**20
LONG = Wishes(longest=2048, step_tokens=64 * 2048)  # steps of 64 pairs: several packs
SOFT = Reference(is_soft=True)


def setup(name, memory=H200, **changes):
    sizes = sizes_of(SHAPES[name].config(), bf16=True)
    rows = head_rows(sizes.vocabulary, memory)
    return Setup(sizes, bf16=True, chunk_rows=rows, compiled=True, **changes)


def chosen(name, memory, wishes=LONG, **changes):
    plan = choose(setup(name, memory, **changes), wishes, USABLE * memory)
    assert plan.fits == (plan.bytes.peak <= USABLE * memory)
    return plan


def test_a_small_model_keeps_everything_and_moments_are_exact():
    plan = chosen("llama-3.2-1b", H200)
    assert plan.fits
    assert (plan.choices.moments, plan.choices.recompute.budget) == ("fp32", 1.0)
    assert plan.choices.tokens == 65536


def test_the_order_of_what_is_given_up():
    """The same model on smaller and smaller cards: moments first, then products, then 8 bits."""
    found = []
    for gib in range(140, 20, -2):
        plan = chosen("pythia-2.8b", gib * GIB)
        if plan.fits:
            choices = plan.choices
            found.append((choices.moments, choices.recompute.budget, choices.tokens))
    moments = [one[0] for one in found]
    order = ["fp32", "bf16", "int8"]
    assert set(moments) == set(order)
    assert moments == sorted(moments, key=order.index)
    exact = [budget for moments, budget, _ in found if moments == "fp32"]
    assert set(exact) == {1.0, 0.8}
    assert all(tokens >= 16384 for moments, _, tokens in found if moments == "fp32")
    in_bf16 = [budget for moments, budget, _ in found if moments == "bf16"]
    assert in_bf16 == sorted(in_bf16, reverse=True)
    assert min(in_bf16) == 0.0
    assert all(tokens >= 8192 for moments, _, tokens in found if moments != "int8")


def test_a_soft_reference_goes_to_the_host_before_moments_are_rounded():
    beside = chosen("pythia-2.8b", H200, reference=SOFT)
    assert not beside.choices.rests_on_host
    assert beside.bytes.still["reference"] == 4 * beside.setup.sizes.parameters.all
    for gib in range(130, 70, -1):
        plan = chosen("pythia-2.8b", gib * GIB, reference=SOFT)
        if plan.choices.rests_on_host:
            break
    assert plan.choices.moments == "fp32"
    assert plan.bytes.still["reference"] == 0
    assert plan.bytes.on_host == 4 * plan.setup.sizes.parameters.all
    follows = chosen("pythia-2.8b", 60 * GIB, reference=SOFT._replace(follows=True))
    assert not follows.choices.rests_on_host


def test_8b_with_a_moving_reference_fits_a_card_of_141_gb_and_not_one_of_80_with_masters():
    """12 bytes a weight and bf16 moments; on 80 GB weights without the other 16 bits."""
    large = chosen("llama-3-8b", H200, reference=SOFT)
    assert large.fits
    assert (large.choices.moments, large.choices.recompute.budget) == ("bf16", 0.8)
    by_hand = 12 * 8.03e9
    still = sum(large.bytes.still.values()) + large.bytes.gradients
    assert still == pytest.approx(by_hand, rel=0.01)
    assert not chosen("llama-3-8b", H100, reference=SOFT).fits
    small = chosen("llama-3-8b", H100, reference=SOFT, keeps_masters=False)
    assert small.fits
    assert small.choices.moments == "int8"


def test_one_pack_a_step_needs_no_gradients_in_fp32():
    """8 pairs of at most 1,000 tokens fit into a pack: masters and 8-bit moments on 80 GB."""
    plan = chosen("llama-3-8b", H100, Wishes(longest=1000, step_tokens=8000), reference=SOFT)
    assert plan.fits
    assert not plan.choices.adds_packs
    assert plan.choices.tokens >= 8000
    in_fp32 = 2 * 525e6  # the embedding, and the head as its product makes it
    assert plan.bytes.gradients == pytest.approx(2 * 8.03e9 + 2 * in_fp32, rel=0.01)


def test_what_is_asked_for_is_kept():
    wishes = LONG._replace(moments="fp32", budget=0.4, tokens=4096)
    plan = chosen("llama-3-8b", H200, wishes)
    assert (plan.choices.moments, plan.choices.recompute.budget) == ("fp32", 0.4)
    assert plan.choices.tokens == 4096
    whole = chosen("llama-3-8b", H200, LONG._replace(gradient_checkpointing=True))
    assert whole.choices.recompute.whole_layers
    kept = chosen("llama-3-8b", H200, LONG._replace(gradient_checkpointing=False))
    assert kept.choices.recompute.budget == 1.0
    assert not kept.choices.recompute.whole_layers


def test_layers_that_are_not_compiled_are_kept_or_made_again_whole():
    roomy = chosen("llama-3.2-1b", H200)
    eager = setup("llama-3.2-1b")._replace(compiled=False)
    kept = choose(eager, LONG, USABLE * H200)
    assert not kept.choices.recompute.whole_layers
    assert kept.bytes.activations > roomy.bytes.activations * 0.9
    tight = choose(eager, LONG, 30 * GIB)
    assert tight.fits
    assert tight.choices.recompute.whole_layers


def test_no_larger_pack_would_fit():
    plan = chosen("llama-3-8b", H200)
    more = LONG._replace(tokens=plan.choices.tokens + 128, moments="bf16", budget=0.8)
    assert not choose(plan.setup, more, USABLE * H200).fits


def test_shards_divide_what_lies_still():
    wishes = LONG._replace(tokens=8192, budget=0.8, moments="bf16")
    alone = chosen("llama-3-8b", H200, wishes).bytes
    shared = chosen("llama-3-8b", H200, wishes, world=8, shard=8).bytes
    assert shared.still["weights"] == alone.still["weights"] / 8
    assert shared.activations == alone.activations
    # Two layers are there whole in bf16, and the head with its gradient in fp32.
    gathered = 2 * 2 * 218.1e6 + (2 + 4) * 525.3e6
    assert alone.peak - shared.peak == pytest.approx(12 * 8.03e9 * 7 / 8 - gathered, rel=1e-3)
