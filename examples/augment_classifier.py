"""Do generated clips help a classifier that has few labelled ones? Measured on real patients it never saw.

pip install httpx numpy, and the medsora package; a server runs:
python examples/augment_classifier.py --data clips/clips.csv --where probe=convex \
    --classes regular=regular-convex covid=covid-convex --output augmentation

Patients are divided at random, again and again: from one side come a few labelled clips of each class, the other side
is for testing only; patients of the table's test split are never trained on. Three classifiers learn alike: from the
labelled clips, from these and generated ones, and from generated ones alone. Intervals are 95 % by bootstrap, which
draws patients and divisions anew. The test split is told apart: its patients the generator has not seen either.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import time
import zipfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from medsora.video_io import read_video

ARMS = ("labelled", "labelled and generated", "generated")
GRID = 8
WINDOWS = 3  # of one real clip
RIDGE = 0.01
ENDED = ("completed", "failed", "cancelled")


@dataclass(frozen=True)
class Clip:
    """A clip as the classifier sees it.

    Attributes:
        features: Of its windows, as :func:`describe` gives them.
        label: Index of its class.
        patient: Whose it is; empty for a generated one.
        is_test: Of the table's test split: neither the classifier nor the generator is trained on this patient.
    """

    features: np.ndarray
    label: int
    patient: str = ""
    is_test: bool = False


@dataclass(frozen=True)
class Outcome:
    """The share of windows of one test patient and class that was told right, after one division of the patients."""

    labelled: int
    draw: int
    arm: str
    label: int
    patient: str
    accuracy: float


def main() -> None:
    options = parse_options()
    pairs = [pair.split("=", 1) for pair in options.classes]
    classes = [name for name, _ in pairs]
    options.output.mkdir(parents=True, exist_ok=True)
    archive = options.output / "generated.zip"
    order = {
        "name": "augmentation of a classifier",
        "labels": {label: options.generated for _, label in pairs},
        "seed": options.seed,
        "deterministic": options.deterministic,
        **({"model": options.model} if options.model else {}),
        **({"num_inference_steps": options.inference_steps} if options.inference_steps else {}),
    }
    dataset = fetch_dataset(options.url, options.key, order, archive, timeout_s=options.timeout)
    generated = list(read_generated(archive, {label: index for index, (_, label) in enumerate(pairs)}))
    real = list(read_real(options.data, classes, dict(pair.split("=", 1) for pair in options.where)))
    check_clips(real, classes, options.labelled)
    outcomes = compare(real, generated, options.labelled, options.draws, options.seed)
    report = summarise(outcomes, real, classes, resamples=2000, seed=options.seed)
    report |= {"model": dataset["model"], "generated_clips": len(generated), "draws": options.draws}
    (options.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(as_table(report))


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="clips.csv: file, label, group (patient), split, fps")
    parser.add_argument("--classes", nargs="+", required=True, help="label of the table = label of the model")
    parser.add_argument("--where", nargs="*", default=[], help="column=value: rows to keep, such as probe=convex")
    parser.add_argument("--labelled", nargs="+", type=int, default=[1, 2], help="labelled clips of each class")
    parser.add_argument("--generated", type=int, default=32, help="generated clips of each class")
    parser.add_argument("--inference-steps", type=int, help="of the sampler (default: the model's)")
    parser.add_argument("--deterministic", action="store_true", help="sample each clip alone: slower on a GPU")
    parser.add_argument("--draws", type=int, default=50, help="divisions of the patients")
    parser.add_argument("--seed", type=int, default=1, help="of the dataset and of everything drawn")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server")
    parser.add_argument("--key", default="unused", help="key of the server, where it wants one")
    parser.add_argument("--model", help="a checkpoint that the server has (default: its first)")
    parser.add_argument("--timeout", type=float, default=86400.0, help="seconds to wait for the generated clips")
    parser.add_argument("--output", type=Path, default=Path("augmentation"), help="folder for archive and report")
    return parser.parse_args()


def fetch_dataset(url: str, key: str, order: dict[str, Any], archive: Path, *, timeout_s: float) -> dict[str, Any]:
    """Ask for the generated clips and download them. Run again, it finds the dataset of the same order."""
    once = hashlib.sha256(json.dumps(order, sort_keys=True).encode()).hexdigest()
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60.0) as http:

        def call(method: str, path: str, **arguments: Any) -> dict[str, Any]:
            response = http.request(method, path, **arguments)
            if response.is_error:
                raise SystemExit(f"the server answered {response.status_code}: {response.text}")
            answer: dict[str, Any] = response.json()
            return answer

        dataset = call("POST", "/v1/datasets", json=order, headers={"Idempotency-Key": once})
        deadline = time.monotonic() + timeout_s
        while dataset["status"] not in ENDED:
            if time.monotonic() > deadline:
                raise SystemExit(f"dataset {dataset['id']} was not done after {timeout_s:g} s")
            print(f"dataset {dataset['id']}: {dataset['progress']} %", flush=True)
            time.sleep(min(5.0, timeout_s / 10))
            dataset = call("GET", f"/v1/datasets/{dataset['id']}")
        if dataset["status"] != "completed":
            raise SystemExit(f"dataset {dataset['id']} {dataset['status']}")
        with http.stream("GET", f"/v1/datasets/{dataset['id']}/content") as response, archive.open("wb") as file:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                file.write(chunk)
    return dataset


def read_generated(archive: Path, labels: dict[str, int]) -> Iterator[Clip]:
    """Clips of a videofolder archive."""
    with zipfile.ZipFile(archive) as files:
        video = archive.with_suffix(".mp4")
        for line in io.TextIOWrapper(files.open("manifest.jsonl"), encoding="utf-8"):
            row = json.loads(line)
            video.write_bytes(files.read(row["files"][0]["path"]))
            frames, _ = read_video(video)
            yield Clip(describe(frames, len(frames), 1), labels[row["label"]])
        video.unlink(missing_ok=True)


def read_real(table: Path, classes: Sequence[str], where: dict[str, str]) -> Iterator[Clip]:
    """Clips of a table, in windows of two seconds, evenly spaced."""
    with table.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["label"] not in classes or any(row[name] != value for name, value in where.items()):
                continue
            frames, fps = read_video(table.parent / row["file"])
            features = describe(frames, min(len(frames), round(2 * fps)), WINDOWS)
            yield Clip(features, classes.index(row["label"]), row["group"], row["split"] == "test")


def describe(frames: np.ndarray, length: int, count: int) -> np.ndarray:
    """What the classifier sees of windows of ``length`` frames, as many as ``count``, from first to last frame.

    On a grid of 8x8: brightness, its change over time, and edges both ways. Brightness and contrast of the whole window
    do not count: they tell devices apart.

    Returns:
        ``(count, 4, 8, 8)``, about -2 to 2.
    """
    grey = frames.astype(np.float32).mean(-1)
    windows = []
    for start in np.linspace(0, len(grey) - length, count).round().astype(int):
        window = grey[start + np.linspace(0, length - 1, min(length, 16)).round().astype(int)]
        window = (window - window.mean()) / (window.std() + 1e-3)
        mean = window.mean(0)
        maps = (mean, np.abs(np.diff(window, axis=0)).mean(0), *(np.abs(edge) for edge in np.gradient(mean)))
        windows.append(np.stack([maps[0] / 2, *(np.log1p(8 * one) / 2 for one in maps[1:])]))
    full = np.stack(windows)
    height, width = (size // GRID * GRID for size in full.shape[2:])
    cells = full[:, :, :height, :width].reshape(count, 4, GRID, height // GRID, GRID, width // GRID)
    grid: np.ndarray = cells.mean((3, 5))
    return grid


def check_clips(clips: list[Clip], classes: Sequence[str], labelled: Sequence[int]) -> None:
    """Refuse a table from which no patients can be held out."""
    for index, name in enumerate(classes):
        patients = {clip.patient for clip in clips if clip.label == index}
        if len(patients) < 2:
            raise SystemExit(f"class {name!r} has {len(patients)} patients; 2 at least, one of them to be held out")
    if min(labelled) < 1 or not can_divide(clips, len(classes), max(labelled)):
        raise SystemExit(f"--labelled: no division of the patients leaves {max(labelled)} clips of each class to train")


def can_divide(clips: list[Clip], classes: int, labelled: int) -> bool:
    rng = np.random.default_rng(0)
    return any(is_usable(*divide(clips, rng), classes, labelled) for _ in range(1000))


def divide(clips: list[Clip], rng: np.random.Generator) -> tuple[list[Clip], list[Clip]]:
    """Patients to either side by a coin each; those of the test split always to the second."""
    heads = {patient: rng.random() < 0.5 for patient in sorted({clip.patient for clip in clips})}
    tested = {clip.patient for clip in clips if clip.is_test}
    to_train = [clip for clip in clips if heads[clip.patient] and clip.patient not in tested]
    return to_train, [clip for clip in clips if not heads[clip.patient] or clip.patient in tested]


def is_usable(train: list[Clip], test: list[Clip], classes: int, labelled: int) -> bool:
    counts = [sum(clip.label == label for clip in train) for label in range(classes)]
    return min(counts) >= labelled and {clip.label for clip in test} == set(range(classes))


def compare(real: list[Clip], generated: list[Clip], labelled: Sequence[int], draws: int, seed: int) -> list[Outcome]:
    """Train and test every arm after every division; arms of one division share its clips and patients."""
    classes, outcomes = 1 + max(clip.label for clip in real), []
    for count in labelled:
        rng = np.random.default_rng([seed, count])
        for draw in range(draws):
            train, test = divide(real, rng)
            while not is_usable(train, test, classes, count):
                train, test = divide(real, rng)
            few: list[Clip] = []
            for label in range(classes):
                of_label = [clip for clip in train if clip.label == label]
                few += [of_label[index] for index in rng.permutation(len(of_label))[:count]]
            for arm, sources in zip(ARMS, ([few], [few, generated], [generated]), strict=True):
                outcomes += judge(fit(sources, classes), test, count, draw, arm)
    return outcomes


def fit(sources: list[list[Clip]], classes: int) -> np.ndarray:
    """Weights of a linear classifier, one column a class, by ridge regression on the classes.

    All sources count alike and, within each, all classes: 48 generated clips don't outvote two labelled ones.
    """
    features, targets, importance = [], [], []
    for source in sources:
        for label in range(classes):
            chosen = np.concatenate([clip.features for clip in source if clip.label == label])
            chosen = np.concatenate([chosen, chosen[..., ::-1]])  # mirrored left to right
            features.append(with_constant(chosen))
            targets += [label] * len(chosen)
            importance += [1 / len(chosen)] * len(chosen)
    inputs, weight = np.concatenate(features), np.array(importance)[:, None] / len(features)
    outputs = np.eye(classes)[targets]
    square = inputs.T @ (weight * inputs) + RIDGE * np.eye(inputs.shape[1])
    solution: np.ndarray = np.linalg.solve(square, inputs.T @ (weight * outputs))
    return solution


def with_constant(features: np.ndarray) -> np.ndarray:
    return np.concatenate([features.reshape(len(features), -1), np.ones((len(features), 1))], axis=1)


def judge(weights: np.ndarray, test: list[Clip], labelled: int, draw: int, arm: str) -> Iterator[Outcome]:
    """One outcome for each test patient and class."""
    for label, patient in sorted({(clip.label, clip.patient) for clip in test}):
        features = np.concatenate([clip.features for clip in test if (clip.label, clip.patient) == (label, patient)])
        told = (with_constant(features) @ weights).argmax(-1)
        yield Outcome(labelled, draw, arm, label, patient, float((told == label).mean()))


def summarise(
    outcomes: list[Outcome], real: list[Clip], classes: Sequence[str], *, resamples: int, seed: int
) -> dict[str, Any]:
    """Balanced accuracy (mean over classes of the mean over patients) with intervals, and the gain by generated clips.

    A resample draws the patients of each class, and the divisions, with replacement; arms are compared within it.
    """
    figures = []
    tested = {clip.patient for clip in real if clip.is_test}
    for whose in ("all held-out patients", "test split alone"):
        for count in sorted({outcome.labelled for outcome in outcomes}):
            chosen = [o for o in outcomes if o.labelled == count and (whose[0] == "a" or o.patient in tested)]
            if not chosen:
                continue
            patients = sorted({(o.label, o.patient) for o in chosen})
            values = tabulate(chosen, patients)
            rng = np.random.default_rng([seed, 7])
            samples = np.stack(
                [statistics(values, patients, *weights(values, patients, rng)) for _ in range(resamples)]
            )
            estimate = statistics(values, patients, np.ones(len(patients)), np.ones(values.shape[1]))
            for index, name in enumerate((*ARMS, "gain by generated clips")):
                low, high = np.nanpercentile(samples[:, index], (2.5, 97.5))
                numbers = {"value": float(estimate[index]), "low": float(low), "high": float(high)}
                numbers["least_patients"] = min(Counter(label for label, _ in patients).values())
                figures.append({"patients": whose, "labelled": count, "figure": name, **numbers})
    counts = {
        name: {
            "clips": sum(clip.label == index for clip in real),
            "patients": len({clip.patient for clip in real if clip.label == index}),
            "patients_of_test_split": len({clip.patient for clip in real if clip.label == index and clip.is_test}),
        }
        for index, name in enumerate(classes)
    }
    return {"classes": counts, "figures": figures}


def tabulate(outcomes: list[Outcome], patients: list[tuple[int, str]]) -> np.ndarray:
    """Accuracies as (arm, draw, patient of a class); NaN where a patient was on the training side."""
    values = np.full((len(ARMS), 1 + max(o.draw for o in outcomes), len(patients)), np.nan)
    for o in outcomes:
        values[ARMS.index(o.arm), o.draw, patients.index((o.label, o.patient))] = o.accuracy
    return values


def weights(
    values: np.ndarray, patients: list[tuple[int, str]], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """How often each patient (within its class) and each division is in a resample."""
    of_patients = np.zeros(len(patients))
    for label in {label for label, _ in patients}:
        places = [index for index, (other, _) in enumerate(patients) if other == label]
        np.add.at(of_patients, rng.choice(places, len(places)), 1)
    return of_patients, np.bincount(rng.integers(values.shape[1], size=values.shape[1]), minlength=values.shape[1])


def statistics(
    values: np.ndarray, patients: list[tuple[int, str]], of_patients: np.ndarray, of_draws: np.ndarray
) -> np.ndarray:
    """Balanced accuracy of each arm, and the gain of the second over the first; NaN where a class has no patient."""
    known = ~np.isnan(values[0])
    balanced = []
    for label in sorted({label for label, _ in patients}):
        inside = np.array([other == label for other, _ in patients])
        weight = known * of_patients * inside
        total = weight.sum(-1)
        balanced.append(np.where(total > 0, (np.nan_to_num(values) * weight).sum(-1) / np.maximum(total, 1e-9), np.nan))
    each = np.mean(balanced, axis=0)  # (arm, draw); a division counts where all its classes have a patient
    usable = ~np.isnan(each[0])
    if not (usable * of_draws).sum():
        return np.full(len(ARMS) + 1, np.nan)
    means = (np.nan_to_num(each) * usable * of_draws).sum(-1) / (usable * of_draws).sum()
    return np.array([*means, means[1] - means[0]])


def as_table(report: dict[str, Any]) -> str:
    """The figures as Markdown, in per cent."""
    lines = ["", f"Balanced accuracy in %, 95 % interval; model {report['model']}, {report['draws']} divisions"]
    for name, counts in report["classes"].items():
        told = f"{counts['clips']} clips of {counts['patients']} patients, {counts['patients_of_test_split']}"
        lines.append(f"class {name}: {told} of them in the test split")
    lines += ["", "| tested on | labelled clips of each class | learned from | % | interval |", "|---|---|---|---|---|"]
    for figure in report["figures"]:
        value, low, high = (100 * figure[key] for key in ("value", "low", "high"))
        sign = "+" if figure["figure"].startswith("gain") else ""
        interval = f"{low:{sign}.0f} to {high:{sign}.0f}"
        if figure["least_patients"] == 1:
            interval += ", of divisions alone: there is one patient"
        lines.append(
            f"| {figure['patients']} | {figure['labelled']} | {figure['figure']} | {value:{sign}.1f} | {interval} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
