"""Steps as folders: made once, shared by key, taken up where they were left."""

import json

import pytest

from fasttr.errors import FasttrError
from fasttr.training.stages import DONE, Store, key_of, model_digest, seed_of


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "steps")
    yield store
    store.close()


def test_a_step_is_made_once_and_gives_its_facts_again(store):
    made = []

    def make(folder):
        made.append(folder)
        (folder / "x.txt").write_text("x")
        return {"size": 7}

    first = store.step("a", {"lr": 0.1}, make)
    again = store.step("a", {"lr": 0.1}, make)
    assert len(made) == 1
    assert first == again
    assert again.facts == {"size": 7}
    assert (again.folder / "x.txt").read_text() == "x"


def test_a_changed_setting_makes_anew_what_depends_on_it_and_nothing_else(store):
    made = []

    def run(rate, other):
        a = store.step("a", {"rate": rate}, lambda folder: made.append("a"))
        b = store.step("b", {"a": a}, lambda folder: made.append("b"))
        c = store.step("c", {"other": other}, lambda folder: made.append("c"))
        store.step("d", {"b": b, "c": c}, lambda folder: made.append("d"))
        found = list(made)
        made.clear()
        return found

    assert run(1, 1) == ["a", "b", "c", "d"]
    assert run(1, 1) == []
    assert run(1, 2) == ["c", "d"]
    assert run(2, 2) == ["a", "b", "d"]
    assert run(1, 1) == []


def test_a_step_that_died_is_taken_up_in_its_own_folder(store):
    def dies(folder):
        (folder / "half").write_text("half")
        raise MemoryError

    with pytest.raises(MemoryError):
        store.step("a", {}, dies)
    found = store.step("a", {}, lambda folder: {"half": (folder / "half").read_text()})
    assert found.facts == {"half": "half"}


def test_a_torn_mark_is_no_mark(store):
    """The mark is renamed into its place, so only a key of other inputs can stand in it."""
    step = store.step("a", {}, lambda folder: {"n": 1})
    told = json.loads((step.folder / DONE).read_text())
    (step.folder / DONE).write_text(json.dumps({**told, "key": "other"}))
    assert store.step("a", {}, lambda folder: {"n": 2}).facts == {"n": 2}


def test_one_process_at_a_time(store):
    with pytest.raises(FasttrError, match="another process is working in"):
        Store(store.root)


def test_keys_and_seeds_depend_on_the_name():
    assert key_of("a", {"x": 1}) != key_of("b", {"x": 1})
    assert key_of("a", {"x": 1, "y": 2}) == key_of("a", {"y": 2, "x": 1})
    assert len({seed_of(0, "a"), seed_of(0, "b"), seed_of(1, "a")}) == 3
    assert seed_of(3, "a") == seed_of(3, "a") < 2**32


def test_the_digest_of_a_model_is_of_its_content(workspace, tmp_path):
    import shutil

    shutil.copytree(workspace / "model", tmp_path / "copy")
    assert model_digest(str(tmp_path / "copy")) == model_digest(str(workspace / "model"))
    assert model_digest(str(workspace / "reference")) != model_digest(str(workspace / "model"))
