"""The readers, each on a small tree made in the published layout; and that every mistake is named."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from training.errors import DataError
from training.prepare.config import PrepareConfig
from training.prepare.layouts import detect_layout, list_source
from training.prepare.source import Item, Listing

Put = Callable[..., Path]
CONFIG = PrepareConfig(min_frames=3)


def listing(source: Path, **changes: object) -> Listing:
    return list_source(source, dataclasses.replace(CONFIG, **changes))  # type: ignore[arg-type]


def by_name(found: Listing) -> dict[str, Item]:
    return {item.name: item for item in found.items}


def conditions(found: Listing) -> dict[str, dict[str, str]]:
    return {item.name: item.segments[0].conditions for item in found.items}


# a plain folder


def test_folder_names_are_labels(tmp_path: Path, put_video: Put, put_frames: Put) -> None:
    put_video(tmp_path / "polyp" / "b.mp4", 1)
    put_video(tmp_path / "polyp" / "a10.mp4", 1)
    put_video(tmp_path / "polyp" / "a9.mp4", 1)
    put_frames(tmp_path / "normal" / "clip1", 2, range(4))
    (tmp_path / "README.md").write_text("about", encoding="utf-8")
    (tmp_path / ".hidden.mp4").write_bytes(b"")
    assert detect_layout(tmp_path) == "folder"
    found = listing(tmp_path, fps=5.0)
    assert conditions(found) == {
        "normal/clip1": {"label": "normal"},
        "polyp/a9.mp4": {"label": "polyp"},
        "polyp/a10.mp4": {"label": "polyp"},
        "polyp/b.mp4": {"label": "polyp"},
    }
    assert [item.name for item in found.items] == list(conditions(found))
    assert found.ignored == ("README.md",)
    assert by_name(found)["normal/clip1"].numbers == (0, 1, 2, 3)
    assert conditions(listing(tmp_path, fps=5.0, label_columns=()))["polyp/b.mp4"] == {}


def test_frame_folders_need_a_rate(tmp_path: Path, put_frames: Put) -> None:
    put_frames(tmp_path / "normal" / "clip1", 2, range(4))
    with pytest.raises(DataError, match=r"1 items are folders of frames, e\.g\. normal/clip1, .*: give it with --fps"):
        listing(tmp_path)


def test_gaps_between_frames_are_kept_and_a_common_step_is_none(tmp_path: Path, put_frames: Put) -> None:
    put_frames(tmp_path / "gap", 1, [0, 1, 2, 5, 6])
    put_frames(tmp_path / "third", 1, [3, 6, 9, 15])
    found = by_name(listing(tmp_path, fps=5.0))
    assert found["gap"].numbers == (0, 1, 2, 5, 6)
    assert found["third"].numbers == (0, 1, 2, 4)


def test_groups_by_pattern(tmp_path: Path, put_video: Put) -> None:
    put_video(tmp_path / "a" / "pat1_x.mp4", 1)
    put_video(tmp_path / "b" / "pat1_y.mp4", 1)
    assert {item.group for item in listing(tmp_path, group_pattern=r"(pat\d+)").items} == {"pat1"}
    assert {item.group for item in listing(tmp_path).items} == {"a/pat1_x", "b/pat1_y"}
    with pytest.raises(DataError, match=r"does not fit 2 names, e\.g\. a/pat1_x\.mp4"):
        listing(tmp_path, group_pattern=r"(case\d+)")
    with pytest.raises(DataError, match="needs a bracket"):
        listing(tmp_path, group_pattern=r"pat\d+")
    with pytest.raises(DataError, match="no regular expression"):
        listing(tmp_path, group_pattern=r"(pat")


def test_clear_mistakes(tmp_path: Path, put_video: Put) -> None:
    with pytest.raises(DataError, match="is not there"):
        listing(tmp_path / "nothing")
    with pytest.raises(DataError, match="holds nothing that the layout folder knows"):
        listing(tmp_path)
    video = put_video(tmp_path / "a.mp4", 1)
    with pytest.raises(DataError, match="neither a folder nor a manifest"):
        listing(video)
    with pytest.raises(DataError, match=r"label_columns names age; allowed: label"):
        listing(tmp_path, label_columns=("age",))
    with pytest.raises(DataError, match=r"has no folder videos/VID01 or data/VID01"):
        listing(tmp_path, layout="cholectriplet")
    with pytest.raises(ValueError, match=r"layout must be one of auto, folder, .*, got 'zip'"):
        PrepareConfig(layout="zip")


@pytest.mark.parametrize(
    ("changes", "option"),
    [({"fold": 1}, "--fold"), ({"bridge_frames": 3}, "--bridge-frames"), ({"deidentify": True}, "--deidentify")],
)
def test_settings_without_effect_are_refused(
    tmp_path: Path, put_video: Put, changes: dict[str, object], option: str
) -> None:
    put_video(tmp_path / "a" / "a.mp4", 1)
    with pytest.raises(DataError, match=f"{option} is for the layouts .*, and this is folder"):
        listing(tmp_path, **changes)


# Colonoscopic


def test_colonoscopic_as_it_is_passed_on(tmp_path: Path, put_video: Put, put_frames: Put) -> None:
    put_video(tmp_path / "Colonoscopic" / "00001.mp4", 1)
    put_frames(tmp_path / "Colonoscopic_frames" / "00001", 1, range(4), "{:05d}.jpg")
    put_frames(tmp_path / "Colonoscopic_frames" / "00002", 2, range(4), "{:05d}.jpg")
    (tmp_path / "Colonoscopic_frames" / "train_128_list.txt").write_text("00001/00000.jpg\n", encoding="utf-8")
    assert detect_layout(tmp_path) == "colonoscopic"
    found = listing(tmp_path, fps=25.0)
    assert conditions(found) == {"Colonoscopic/00001.mp4": {}, "Colonoscopic_frames/00002": {}}
    assert found.dataset == "colonoscopic"
    assert found.modality == "ES"
    assert any("1 frame folders were passed over" in note for note in found.notes)
    assert any("no name says a lesion" in note for note in found.notes)


def test_colonoscopic_with_lesion_and_light_in_its_names(tmp_path: Path, put_video: Put) -> None:
    root = tmp_path / "colonoscopic"
    for name in ("adenoma/01_WL.mp4", "adenoma/01_NBI.mp4", "serrated/01_WL.mp4", "hyperplasic/07_NBI.mp4"):
        put_video(root / name, 1)
    found = listing(root)
    assert conditions(found)["hyperplasic/07_NBI.mp4"] == {"label": "hyperplastic", "light": "NBI"}
    groups = {name: item.group for name, item in by_name(found).items()}
    assert groups["adenoma/01_WL.mp4"] == groups["adenoma/01_NBI.mp4"] != groups["serrated/01_WL.mp4"]
    put_video(root / "unknown" / "9.mp4", 1)
    with pytest.raises(DataError, match=r"1 names do not say the label, e\.g\. unknown/9\.mp4; others do"):
        listing(root)


# CholecTriplet


def cholect45(root: Path, put_frames: Put, rows: dict[str, list[tuple[int, int, int]]]) -> Path:
    """Frames under ``data``, and for each task one text file a video with three classes."""
    names = {
        "triplet": ["0:grasper,dissect,cystic_plate", "1:grasper,retract,gallbladder", "2:hook,dissect,omentum"],
        "verb": ["0:dissect", "1:retract", "2:grasp"],
    }
    for task, lines in names.items():
        (root / "dict").mkdir(parents=True, exist_ok=True)
        (root / "dict" / f"{task}.txt").write_text("\n".join(lines), encoding="utf-8")
        (root / task).mkdir(exist_ok=True)
    for video, flags in rows.items():
        put_frames(root / "data" / video, 1, range(len(flags)))
        text = "\n".join(",".join(map(str, (frame, *row))) for frame, row in enumerate(flags))
        for task in names:
            (root / task / f"{video}.txt").write_text(text + "\n", encoding="utf-8")
    return root


def test_cholect45(tmp_path: Path, put_frames: Put) -> None:
    rows = [(0, 1, 0)] * 4 + [(1, 1, 0)] * 3 + [(0, 0, 1)] + [(0, 0, 0)] * 3
    root = cholect45(tmp_path, put_frames, {"VID01": rows, "VID79": rows[:4], "VID80": rows[:2]})
    assert detect_layout(root) == "cholectriplet"
    found = listing(root, fold=1)
    first = by_name(found)["data/VID01"]
    assert [(s.first, s.last, s.conditions["triplet"]) for s in first.segments] == [
        (0, 3, "grasper,retract,gallbladder"),
        (4, 6, "grasper,dissect,cystic_plate+grasper,retract,gallbladder"),
        (8, 10, "none"),
    ]
    assert first.fps == 1.0
    assert first.group == "VID01"
    assert {item.group: item.split for item in found.items} == {"VID01": "train", "VID79": "test"}
    assert [(entry.name, entry.count) for entry in found.skipped] == [("data/VID01", 1), ("data/VID80", 1)]
    both = by_name(listing(root, label_columns=("verb", "triplet"), bridge_frames=2))["data/VID01"]
    assert both.segments[0].conditions == {"verb": "retract", "triplet": "grasper,retract,gallbladder"}
    with pytest.raises(DataError, match="label_columns names phase; allowed: triplet, instrument, verb, target"):
        listing(root, label_columns=("phase",))
    with pytest.raises(DataError, match="fold must be 1 to 5"):
        listing(root, fold=6)


def test_cholect45_names_damaged_labels(tmp_path: Path, put_frames: Put) -> None:
    root = cholect45(
        tmp_path, put_frames, {"VID01": [(1, 0, 0)] * 4, "VID02": [(1, 0, 0)] * 4, "VID04": [(1, 0, 0)] * 4}
    )
    (root / "triplet" / "VID01.txt").write_text("0,1\n", encoding="utf-8")
    (root / "triplet" / "VID02.txt").unlink()
    (root / "data" / "VID08").mkdir()
    found = listing(root)
    assert list(by_name(found)) == ["data/VID04"]
    reasons = {entry.name: entry.reason for entry in found.skipped}
    assert "VID01.txt, line 1: has 1 classes, dict/triplet.txt names 3" in reasons["data/VID01"]
    assert "VID02.txt cannot be read" in reasons["data/VID02"]
    assert "holds no frames called 000000.png" in reasons["data/VID08"]


@pytest.mark.parametrize("is_list", [False, True])
def test_cholect50(tmp_path: Path, put_frames: Put, is_list: bool) -> None:
    put_frames(tmp_path / "videos" / "VID111", 1, range(8))
    categories = {
        "triplet": {"7": "grasper,grasp,gallbladder", "17": "grasper,retract,gallbladder"},
        "phase": {"0": "preparation", "1": "carlot-triangle-dissection"},
    }
    box = [1.0, -1, -1, -1, -1]

    def row(triplet: int, phase: int) -> list[float]:
        return [triplet, 0, *box, 2, 0, *box, phase]

    annotations = {str(frame): [row(17, 0)] for frame in range(3)}
    annotations |= {str(frame): [row(17, 0), row(7, 0)] for frame in range(3, 6)}
    annotations |= {str(frame): [row(-1, 1)] for frame in range(6, 8)}
    tree = {"video": 111, "fps": 1, "num_frames": 8, "annotations": annotations}
    tree["categories"] = [{key: value} for key, value in categories.items()] if is_list else categories
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "VID111.json").write_text(json.dumps(tree), encoding="utf-8")
    (tmp_path / "label_mapping.txt").write_text("0,0,2,1,2,1\n", encoding="utf-8")
    assert detect_layout(tmp_path) == "cholectriplet"
    (item,) = listing(tmp_path).items
    assert [(s.first, s.last, s.conditions["triplet"]) for s in item.segments] == [
        (0, 2, "grasper,retract,gallbladder"),
        (3, 5, "grasper,grasp,gallbladder+grasper,retract,gallbladder"),
    ]
    (item,) = listing(tmp_path, label_columns=("phase",), fold=1).items
    assert item.segments[0].conditions == {"phase": "preparation"}
    assert item.split == "test"
    (item,) = listing(tmp_path, label_columns=()).items
    assert item.segments[0].last is None
    (tmp_path / "labels" / "VID111.json").write_text('{"annotations": {"0": [[1]]}}', encoding="utf-8")
    assert "labels/VID111.json is not as published" in listing(tmp_path).skipped[0].reason


# Kvasir-Capsule

VIDEO, OTHER = "131368cc17e44240", "8ebf0e483cac48d6"


def split_file(path: Path, rows: list[tuple[str, int, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["filename,label", *(f"{video}_{frame}.jpg,{label}" for video, frame, label in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_kvasir_capsule_videos_and_split_files(tmp_path: Path, put_video: Put) -> None:
    put_video(tmp_path / "labelled_videos" / f"{VIDEO}.mp4", 1, 30)
    put_video(tmp_path / "labelled_videos" / f"{OTHER}.mp4", 2, 30)
    put_video(tmp_path / "unlabelled_videos" / "aa11.mp4", 3, 30)
    # as published: newest frame first, and one video in both files
    split_file(
        tmp_path / "official_splits" / "split_0.csv",
        [(VIDEO, frame, "Erosion") for frame in range(9, 3, -1)] + [(VIDEO, 20, "Pylorus")],
    )
    split_file(
        tmp_path / "official_splits" / "split_1.csv",
        [(OTHER, frame, "Reduced Mucosal View") for frame in range(4)]
        + [(VIDEO, 10, "Erosion")]
        + [("ad91cf7ca91440aa", 5, "Polyp")],
    )
    assert detect_layout(tmp_path) == "kvasir-capsule"
    found = listing(tmp_path, fold=1)
    second, first = found.items  # 8... before 131...: in natural order
    assert [(s.first, s.last, s.conditions) for s in first.segments] == [(4, 10, {"label": "Erosion"})]
    assert (first.group, first.split) == (VIDEO, "train")
    assert (second.group, second.split) == (OTHER, "test")
    assert any(f"video {VIDEO} is in both split files (7 frames train, 1 test)" in note for note in found.notes)
    assert any("1 videos without any labelled frame" in note for note in found.notes)
    reasons = {entry.name: entry.reason for entry in found.skipped}
    assert "no video and no images" in reasons["ad91cf7ca91440aa"]
    assert "1 runs of one label with 1 frames" in reasons[f"labelled_videos/{VIDEO}.mp4"]
    assert listing(tmp_path).items[0].split is None
    with pytest.raises(DataError, match="fold must be 0 or 1 for Kvasir-Capsule"):
        listing(tmp_path, fold=2)


def test_kvasir_capsule_images_and_metadata(tmp_path: Path, put_frames: Put) -> None:
    put_frames(tmp_path / "labelled_images" / "Polyp", 1, range(3, 8), VIDEO + "_{}.jpg")
    (tmp_path / "metadata.csv").write_text(
        "filename;video_id;frame_number;finding_category;finding_class;x1;y1\n"
        + "".join(f"{VIDEO}_{n}.jpg;{VIDEO};{n};Luminal findings;Polyp;;\n" for n in range(3, 8)),
        encoding="utf-8",
    )
    assert detect_layout(tmp_path) == "kvasir-capsule"
    with pytest.raises(DataError, match="labelled_images do not say their frame rate"):
        listing(tmp_path)
    (item,) = listing(tmp_path, fps=30.0).items
    assert item.kind == "frames"
    assert item.numbers == (3, 4, 5, 6, 7)
    assert [(s.first, s.last, s.conditions) for s in item.segments] == [(3, 7, {"label": "Polyp"})]


# VideoFolder


def test_videofolder_by_folders(tmp_path: Path, put_video: Put) -> None:
    for name in ("train/dog/a.mp4", "train/cat/b.mp4", "test/dog/c.mp4", "validation/cat/d.mp4"):
        put_video(tmp_path / name, 1)
    assert detect_layout(tmp_path) == "videofolder"
    found = by_name(listing(tmp_path))
    assert {name: (item.split, item.segments[0].conditions["label"]) for name, item in found.items()} == {
        "train/dog/a.mp4": ("train", "dog"),
        "train/cat/b.mp4": ("train", "cat"),
        "test/dog/c.mp4": ("test", "dog"),
        "validation/cat/d.mp4": ("validation", "cat"),
    }


def test_videofolder_with_metadata_in_each_split(tmp_path: Path, put_video: Put) -> None:
    put_video(tmp_path / "train" / "1.mp4", 1)
    put_video(tmp_path / "train" / "9.mp4", 1)
    put_video(tmp_path / "test" / "clips" / "2.mp4", 1)
    (tmp_path / "train" / "metadata.csv").write_text(
        "file_name,finding,age,patient_id\n1.mp4,polyp,40,p1\nlost.mp4,polyp,41,p2\n", encoding="utf-8"
    )
    (tmp_path / "test" / "metadata.jsonl").write_text(
        '{"file_name": "clips/2.mp4", "finding": "normal", "age": 3, "patient_id": "p3"}\n', encoding="utf-8"
    )
    assert detect_layout(tmp_path) == "videofolder"
    found = listing(tmp_path)
    assert {name: (item.split, item.group, item.segments[0].conditions) for name, item in by_name(found).items()} == {
        "train/1.mp4": ("train", "p1", {"finding": "polyp"}),
        "test/clips/2.mp4": ("test", "p3", {"finding": "normal"}),
    }
    reasons = {entry.name: entry.reason for entry in found.skipped}
    assert reasons == {"train/lost.mp4": "is not there (metadata.csv, row 3)", "train/9.mp4": "is not in the metadata"}
    assert any("columns that are not used: age" in note for note in found.notes)


def test_videofolder_with_metadata_in_the_root(tmp_path: Path, put_video: Put) -> None:
    put_video(tmp_path / "train" / "1.mp4", 1)
    put_video(tmp_path / "test" / "2.mp4", 1)
    (tmp_path / "metadata.csv").write_text("file_name,label\ntrain/1.mp4,a\ntest/2.mp4,b\n", encoding="utf-8")
    assert {name: item.split for name, item in by_name(listing(tmp_path)).items()} == {
        "train/1.mp4": "train",
        "test/2.mp4": "test",
    }


# manifests


def manifest(root: Path, text: str, name: str = "list.csv") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text, encoding="utf-8")
    return root / name


def test_manifest_with_everything(tmp_path: Path, put_video: Put, put_frames: Put) -> None:
    put_video(tmp_path / "v" / "a.mp4", 1, 40)
    put_frames(tmp_path / "f", 2, range(5))
    table = manifest(
        tmp_path,
        "path;finding;side;patient;split;fps;start_frame;end_frame;cuts;licence;attribution\n"
        "v/a.mp4;polyp;left;p1;train;;0;9;4;CC0;Ann\n"
        "v/a.mp4;normal;right;p1;train;;20;;;CC0;Ann\n"
        "f;normal;left;p2;val;12.5;;;;;\n",
    )
    assert detect_layout(table) == "manifest"
    found = by_name(listing(table, label_columns=("finding", "side"), licence="CC BY 4.0"))
    video, frames = found["v/a.mp4"], found["f"]
    assert [(s.first, s.last, s.cuts, s.conditions) for s in video.segments] == [
        (0, 9, (4,), {"finding": "polyp", "side": "left"}),
        (20, None, (), {"finding": "normal", "side": "right"}),
    ]
    assert (video.group, video.split, video.licence, video.attribution) == ("p1", "train", "CC0", "Ann")
    assert (frames.kind, frames.fps, frames.split, frames.licence) == ("frames", 12.5, "validation", "CC BY 4.0")


def test_jsonl_manifest(tmp_path: Path, put_video: Put) -> None:
    put_video(tmp_path / "a.mp4", 1)
    table = manifest(tmp_path, '{"file": "a.mp4", "label": "x", "cuts": [3, 7], "fps": 8}\n\n', "list.jsonl")
    (item,) = listing(table).items
    assert item.segments[0].cuts == (3, 7)
    assert item.fps == 8.0


def test_a_table_of_several_data_sets_needs_a_choice(tmp_path: Path, put_video: Put) -> None:
    put_video(tmp_path / "a.mp4", 1)
    put_video(tmp_path / "b.mp4", 1)
    table = manifest(tmp_path, "file,dataset,label\na.mp4,one,x\nb.mp4,two,y\n")
    with pytest.raises(DataError, match="holds the data sets one, two: choose one with --dataset"):
        listing(table)
    assert list(by_name(listing(table, dataset="two"))) == ["b.mp4"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("name,label\na.mp4,x\n", "no column names the file"),
        ("file,label\n,x\n", r"list\.csv, row 2, column file: must not be empty"),
        ("file,label\n../a.mp4,x\n", "column file: '../a.mp4' must be a path below the table's folder"),
        ("file,label\na.mp4,x\na.mp4,\n", r"row 3, column label: must not be empty"),
        ("file,label\na.mp4\n", "row 2: has another number of values"),
        ("file,label,split\na.mp4,x,holdout\n", "column split: 'holdout' is none of train, "),
        ("file,label,fps\na.mp4,x,fast\n", "column fps: 'fast' is no number"),
        ("file,label,fps\na.mp4,x,0\n", "column fps: must be above 0"),
        ("file,label,start_frame\na.mp4,x,-1\n", "column start_frame: '-1' is no frame number"),
        ("file,label,start_frame,end_frame\na.mp4,x,5,2\n", "column end_frame: 2 is before start_frame 5"),
        ("file,label,cuts\na.mp4,x,9 3\n", "column cuts: '9 3' must rise"),
        ("file,label,start_frame,end_frame\na.mp4,x,0,9\na.mp4,y,9,12\n", "listed twice, with stretches that overlap"),
        ("file,label,patient\na.mp4,x,p\na.mp4,y,q\n", "listed twice"),
        ("", "is empty"),
        ("file,label\nf,x\n", "column file: 'f' is a folder of frames: give its frame rate"),
    ],
)
def test_manifest_mistakes_name_row_and_column(
    tmp_path: Path, put_video: Put, put_frames: Put, text: str, problem: str
) -> None:
    put_video(tmp_path / "a.mp4", 1)
    put_frames(tmp_path / "f", 1, range(2))
    with pytest.raises(DataError, match=problem):
        listing(manifest(tmp_path, text))


@pytest.mark.parametrize(("line", "problem"), [("[1]", "must be an object, not list"), ("{", "line 1: is no JSON")])
def test_jsonl_mistakes_name_the_line(tmp_path: Path, line: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        listing(manifest(tmp_path, line + "\n", "list.jsonl"))
