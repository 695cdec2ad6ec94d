"""The split: no group and no copy on both sides, every label keeps its share, the same every time."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.errors import DataError
from training.prepare.config import PrepareConfig
from training.prepare.splits import Candidate, plan_splits

CONFIG = PrepareConfig()


def clip(name: str, group: str, label: str = "a", frames: int = 100, split: str | None = None) -> Candidate:
    return Candidate(name=name, group=group, frames=frames, condition=(("label", label),), given_split=split)


def sides(candidates: list[Candidate], splits: tuple[str | None, ...]) -> dict[str, set[str | None]]:
    found: dict[str, set[str | None]] = {}
    for candidate, split in zip(candidates, splits, strict=True):
        found.setdefault(candidate.group, set()).add(split)
    return found


@given(
    groups=st.lists(st.tuples(st.integers(0, 12), st.sampled_from("abc"), st.integers(16, 400)), min_size=1),
    copies=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=4),
    seed=st.integers(0, 3),
)
def test_a_drawn_split_never_parts_groups_or_copies(
    groups: list[tuple[int, str, int]], copies: list[tuple[int, int]], seed: int
) -> None:
    candidates = [clip(str(i), f"g{group}", label, frames) for i, (group, label, frames) in enumerate(groups)]
    pairs = [(a, b) for a, b in copies if max(a, b) < len(candidates)]
    pairs = [(a, b) for a, b in pairs if candidates[a].group != candidates[b].group]
    plan = plan_splits(candidates, pairs, dataclasses.replace(CONFIG, seed=seed))
    assert plan.is_drawn
    assert all(len(found) == 1 for found in sides(candidates, plan.splits).values())
    assert all(plan.splits[a] == plan.splits[b] for a, b in pairs)
    # what is tested is trained
    trained = {c.condition for c, split in zip(candidates, plan.splits, strict=True) if split == "train"}
    assert {c.condition for c in candidates} == trained


def test_labels_get_their_share() -> None:
    candidates = [clip(f"{label}{i}", f"{label}{i}", label) for label in "ab" for i in range(20)]
    plan = plan_splits(candidates, [], CONFIG)
    for label in "ab":
        tested = sum(s == "test" for c, s in zip(candidates, plan.splits, strict=True) if c.name[0] == label)
        assert tested == 4
    assert plan_splits(candidates, [], CONFIG) == plan
    assert plan_splits(candidates, [], dataclasses.replace(CONFIG, seed=1)).splits != plan.splits


def test_a_label_of_one_patient_stays_in_train_and_is_named() -> None:
    candidates = [clip(f"a{i}", f"a{i}") for i in range(10)] + [clip("rare", "r", "rare")]
    plan = plan_splits(candidates, [], CONFIG)
    assert plan.splits[-1] == "train"
    assert any("rare" in note for note in plan.notes)


def test_the_sources_split_is_kept_and_its_faults_are_mended_aloud() -> None:
    candidates = [
        clip("1", "p", split="train", frames=300),
        clip("2", "p", split="test"),
        clip("3", "q", split="validation"),
        clip("4", "r", split="test"),
    ]
    plan = plan_splits(candidates, [], CONFIG)
    assert not plan.is_drawn
    assert plan.splits == ("train", "train", "train", "test")
    assert any("group p is on both sides" in note and "300 frames train, 100 test" in note for note in plan.notes)
    assert any("validation split is part of train" in note for note in plan.notes)
    skipping = plan_splits(candidates, [], dataclasses.replace(CONFIG, validation="skip"))
    assert skipping.splits[2] is None
    assert "validation=skip" in skipping.reasons[2]


def test_validation_tests_where_there_is_no_test_split() -> None:
    plan = plan_splits([clip("1", "p", split="train"), clip("2", "q", split="validation")], [], CONFIG)
    assert plan.splits == ("train", "test")


def test_a_half_given_split_is_refused() -> None:
    candidates = [clip("1", "p", split="train"), clip("2", "q")]
    with pytest.raises(DataError, match=r"none for 1 others, e\.g\. 2: complete it, or choose --splits draw"):
        plan_splits(candidates, [], CONFIG)
    with pytest.raises(DataError, match=r"splits=given, but the source says no split for 1 clips, e\.g\. 2"):
        plan_splits(candidates, [], dataclasses.replace(CONFIG, splits="given"))
    assert plan_splits(candidates, [], dataclasses.replace(CONFIG, splits="draw")).is_drawn


@pytest.mark.parametrize(
    ("policy", "expected"),
    [("move", ("train", "train", "test")), ("drop", (None, "test", "test")), ("keep", ("train", "test", "test"))],
)
def test_copies_across_a_given_split(policy: str, expected: tuple[str | None, ...]) -> None:
    candidates = [clip("1", "p", split="train"), clip("2", "q", split="test"), clip("3", "r", split="test")]
    plan = plan_splits(candidates, [(0, 1)], dataclasses.replace(CONFIG, duplicates=policy))
    assert plan.splits == expected
    assert plan.notes or plan.reasons == {0: "shows the same as 2 of the test split"}


def test_copies_may_stop_everything() -> None:
    candidates = [clip("1", "p", split="train"), clip("2", "q", split="test")]
    with pytest.raises(DataError, match=r"1 pairs of near-duplicates are on both sides, e\.g\. 1 and 2"):
        plan_splits(candidates, [(0, 1)], dataclasses.replace(CONFIG, duplicates="fail"))
