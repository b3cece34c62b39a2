"""The examples of the READMEs run as they stand and are right."""

import re
import runpy
import shlex
from pathlib import Path

import torch

from docs.step_picture import positions, trees
from fasttr.cli import main
from fasttr.packing.layout import pack
from tests.tiny import alone_logps, gradients, perturb, random_trees, tiny_model

ROOT = Path(__file__).parents[2]


def example(page: str, holding: str) -> str:
    """The Python block of a page that holds some text."""
    (block,) = [
        b
        for b in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
        if holding in b
    ]
    return block


def pairs_in_a_model():
    """What both examples assume is there: one row of pairs in a model that needs no packing (one
    pair a call)."""
    (tree,) = random_trees([(5, 4, 4)])
    policy, reference = tiny_model("llama", seed=0), tiny_model("llama", seed=0)
    perturb(reference, 0.05)
    return tree, policy, reference


def test_the_dpo_step_with_the_ops_alone_equals_a_plain_one():
    tree, model, reference = pairs_in_a_model()
    with torch.no_grad():
        ref_logp = alone_logps(reference, [tree])
    ids = [
        torch.cat([torch.from_numpy(tree.prompt_ids), torch.from_numpy(c)]).long()
        for c in tree.completions
    ]
    rows = torch.arange(4, 8)
    names = {
        "model": model,
        "input_ids": torch.stack(ids),
        "ref_logp": ref_logp,
        "scored": (torch.tensor([0] * 4 + [1] * 4), torch.cat([rows, rows])),
        "target": torch.cat([i[5:] for i in ids]),
        "cu_completions": torch.tensor([0, 4, 8]),
    }
    exec(example("kernels/README.md", "def dpo"), names)
    got = gradients(model)
    model.zero_grad()
    logp = alone_logps(model, [tree])
    plain = -torch.nn.functional.logsigmoid(
        0.1 * ((logp[0] - logp[1]) - (ref_logp[0] - ref_logp[1]))
    )
    plain.backward()
    assert abs(float(names["out"].loss.detach() - plain.detach())) < 1e-6
    for name, want in gradients(model).items():
        assert (got[name] - want).abs().max() <= 1e-5 * want.abs().max() + 1e-7, name


def test_the_adamw_example_trains_and_gives_back_its_masters():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.LayerNorm(16)).bfloat16().float()
    start = [p.detach().clone() for p in model.parameters()]

    def loss_of(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(batch).float().square().mean()

    names = {"model": model, "loss_of": loss_of, "batches": torch.randn(3, 4, 8)}
    exec(example("kernels/README.md", "SplitAdamW.from_fp32"), names)
    (matrix,), (master,) = names["matrices"], names["masters"]
    assert (matrix.dtype, master.dtype) == (torch.bfloat16, torch.float32)
    assert {p.dtype for p in names["others"]} == {torch.float32}
    way = master - start[0]
    assert 0 < way.abs().max() <= 3.1e-6, "three steps of 1e-6"
    assert way.abs().max() < matrix.detach().float().abs().max() * 2**-9, "below half an ulp"


def test_the_first_page_s_op_example_runs_and_moves_the_reference():
    tree, policy, reference = pairs_in_a_model()
    batch = pack([tree])
    before = [p.detach().clone() for p in reference.parameters()]
    hidden = torch.randn(len(batch.target), 32, requires_grad=True)
    names = {
        "hidden": hidden,
        "lm_head": policy.lm_head,
        "target": batch.target,
        "cu_completions": batch.cu_completions,
        "cu_groups": batch.cu_groups,
        "tokens": batch.token_counts,
        "pairs": 1,
        "ref_logp": torch.tensor([-20.0, -21.0]),
        "reference": reference,
        "policy": policy,
    }
    exec(example("README.md", "multi_tensor_lerp_"), names)
    assert hidden.grad.abs().max() > 0
    for old, new, target in zip(before, reference.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(new, old.lerp(target, 0.6))


def test_the_first_page_s_picture_shows_the_numbers_beside_it():
    count = positions(trees())
    caption = re.search(r"!\[(.*?)\]\(docs/site/step\.png\)", (ROOT / "README.md").read_text())[1]
    assert f"{count.padded:,} positions padded, {count.packed:,} as packed trees" in caption
    # Counted again, from the lengths alone.
    lengths = [(len(t.prompt_ids), *map(len, t.completions)) for t in trees()]
    assert count.packed == sum(map(sum, lengths))
    assert count.padded == 16 * max(prompt + max(sides) for prompt, *sides in lengths)


def without_numbers(line: str) -> str:
    return re.sub(r"[\d.,+<>-]+[a-zA-Z]?", "#", line).strip()


def test_the_first_page_s_commands_print_what_stands_below_them(tmp_path, monkeypatch, capsys):
    """Numbers that a machine or a clock sets are left out; those of the data are held."""
    monkeypatch.chdir(tmp_path)
    tutorial = (ROOT / "docs/site/tutorial.md").read_text()
    Path("make_pairs.py").write_text(re.findall(r"^```python\n(.*?)^```", tutorial, re.S | re.M)[0])
    runpy.run_path("make_pairs.py")
    (shown,) = [
        b for b in re.findall(r"^```\n(.*?)^```", page("README.md"), re.S | re.M) if "$" in b
    ]
    shown = shown.replace("\\\n", "")
    for line in shown.splitlines():
        if line.startswith("$ fasttr"):
            main(shlex.split(line.split("  #")[0])[2:])
    said = capsys.readouterr().out.splitlines()
    printed = {without_numbers(line) for line in said}
    wanted = [line for line in shown.splitlines() if not line.startswith("$")]
    assert len(wanted) >= 5
    for line in wanted:
        assert without_numbers(line) in printed, line
        if line.startswith(("read", "wrote", "tokens per step", "reference")):
            assert line in said


def page(name: str) -> str:
    return (ROOT / name).read_text()
