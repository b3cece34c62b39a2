"""The plan of a run's memory as a person reads it."""

from __future__ import annotations

from fasttr.memory.choose import Plan
from fasttr.memory.plan import GIB, Bytes

_PHASES = {
    "head": "the head",
    "layers": "one layer and the head",
    "embedding": "the embedding's gradient",
    "update": "the update",
    "scoring": "scoring",
    "loading": "loading",
}


def table(plan: Plan, device: str, total: float | None) -> list[str]:
    """Lines: what holds how much, and the most at once."""
    found, choices = plan.bytes, plan.choices
    assert plan.room is not None
    of_all = "" if total is None else f"{_gib(total)} of memory, "
    lines = [f"{device}: {of_all}{_gib(plan.room)} to plan with; planned, not measured:"]
    rows = [
        ("weights", found.still["weights"], _weights(plan)),
        ("gradients", found.gradients, _gradients(plan)),
        ("moments", found.still["moments"], _moments(plan)),
        ("reference", found.still["reference"], _reference(plan)),
        ("critic", found.still["critic"], "with its gradients and moments"),
        (
            "activations",
            found.activations,
            f"packs of {choices.tokens:,} tokens, {choices.recompute}{_offloaded(found)}",
        ),
        ("buffers", buffers(found), f"of {_PHASES[found.peak_phase]}"),
        ("at once", found.peak, "" if plan.fits else "which does not fit"),
    ]
    for name, size, note in rows:
        if name == "critic" and not size:
            continue
        lines.append(f"  {name:<12}{_gib(size):>11}  {note}".rstrip())
    return lines


def sentence(plan: Plan) -> str:
    """The same in short, for a device that nothing is chosen for."""
    found = plan.bytes
    sizes = {
        "weights": found.still["weights"],
        "gradients": found.gradients,
        "moments": found.still["moments"],
        "reference": found.still["reference"],
        f"a pack of {plan.choices.tokens:,} tokens": found.activations,
    }
    # What a small model holds is nothing beside the rest of the process.
    shown = [f"{name} {size / 2**30:.2f}" for name, size in sizes.items() if size >= 0.005 * 2**30]
    of_which = f"\n  of it {', '.join(shown)}" if shown else ""
    return f"memory, planned: {_gib(found.peak)} at once{of_which}"


def buffers(found: Bytes) -> float:
    """What the largest phase holds beside the other rows. Of one pack a step, gradients come while
    activations go: then only one of them is there."""
    others = sum(found.still.values()) + found.activations + found.gradients
    return max(0.0, found.peak - others)


def _offloaded(found: Bytes) -> str:
    return f" ({_gib(found.offloaded)})" if found.offloaded else ""


def _weights(plan: Plan) -> str:
    setup = plan.setup
    if not setup.bf16:
        return "float32"
    if setup.sizes.parameters.split == 0:
        return "what is frozen in bfloat16"
    if not setup.is_adamw:
        return "float32, computing in bfloat16"
    return "bfloat16, with 16 more bits" if setup.keeps_masters else "bfloat16"


def _gradients(plan: Plan) -> str:
    setup = plan.setup
    if not (setup.bf16 and setup.is_adamw) or setup.sizes.parameters.split == 0:
        return "float32"
    if plan.choices.adds_packs:
        return "float32: those of several packs are added up"
    return "bfloat16: a step is one pack, and they come while activations go"


def _moments(plan: Plan) -> str:
    return "of the optimizer" if plan.setup.state_bytes is not None else plan.choices.moments


def _reference(plan: Plan) -> str:
    reference = plan.setup.reference
    if plan.choices.rests_on_host:
        return f"{_gib(plan.bytes.on_host)} of it rest in pinned memory of the host"
    if reference.is_soft:
        return "an average, on the device"
    if reference.is_resident:
        return "a model of its own, in float32"
    return "log-probs in a table: no weights"


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f} GiB" if size < 10 * GIB else f"{size / GIB:,.1f} GiB"
