"""YAML -> Hyperparameters and DatasetSpec, with their complaints."""

import dataclasses
import json
import logging
import time
from pathlib import Path

import pytest

from utils.config import (
    Hyperparameters,
    load_dataset_spec,
    load_hyperparameters,
    load_yaml,
)
from utils.lookup import find_config

ROOT = Path(__file__).resolve().parents[1]
HYPS = sorted((ROOT / "data" / "hyps").glob("hyp.*.yaml"))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------ YAML
@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        pytest.param("", "file is empty", id="empty"),
        pytest.param("- 1\n- 2\n", "file is a list", id="list"),
        pytest.param("a: 1\nb: [1, 2\nc: 3\n", ":3: not valid YAML", id="unclosed"),
        pytest.param(
            "a: 1\nb: 2\na: 3\n", ":3: not valid YAML: key 'a' is given twice", id="twice"
        ),
        pytest.param("a: !!python/object/apply:os.getcwd []\n", ":1: not valid YAML", id="code"),
        pytest.param("a: \x00\n", "not valid YAML", id="control character"),
        pytest.param('a: 1\nb: !!int ""\n', ":2: not valid YAML: '' cannot be", id="empty int"),
        pytest.param("a: !!bool x\n", ":1: not valid YAML: 'x' cannot be", id="wrong bool"),
        pytest.param("a: !!timestamp x\n", ":1: not valid YAML: 'x'", id="wrong time"),
        pytest.param("a: 2024-99-99\n", "'2024-99-99' cannot be read as timestamp", id="date"),
        pytest.param(f"a: {'9' * 5000}\n", ":1: not valid YAML", id="5000 digits"),
        pytest.param(f"a: 0x{'f' * 50}\n", "cannot be read as int", id="huge number"),
        pytest.param(f"a: {'x' * 5000}\n", "more than 4096 characters", id="long text"),
        pytest.param("[" * 1100, "nested too deeply", id="deep"),
        pytest.param("a: &x [*x]\n", ":1: not valid YAML: it contains itself", id="self"),
    ],
)
def test_load_yaml_complains_with_file_and_line(tmp_path, text, complaint):
    path = write(tmp_path / "x.yaml", text)
    with pytest.raises(ValueError, match=r"x\.yaml") as caught:
        load_yaml(path)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("step", ["[{}]", "{{<<: [{}]}}"], ids=["lists", "merged mappings"])
def test_aliases_that_multiply_are_refused(tmp_path, step):
    text = "a0: &a0 {x: 1}\n"
    for level in range(12):  # 8 ** 12 values in 700 bytes
        text += f"a{level + 1}: &a{level + 1} " + step.format(f"*a{level}, " * 8) + "\n"
    start = time.process_time()
    with pytest.raises(ValueError, match=r"x.yaml:\d+: not valid YAML: it holds more than 200000"):
        load_yaml(write(tmp_path / "x.yaml", text))
    assert time.process_time() - start < 1


def test_plain_aliases_are_read(tmp_path):
    path = write(tmp_path / "x.yaml", "train: &a [x, y]\nval: *a\n")
    assert load_yaml(path) == {"train": ["x", "y"], "val": ["x", "y"]}


def test_a_yaml_of_absurd_size_is_not_read(tmp_path):
    path = tmp_path / "x.yaml"
    with path.open("wb") as file:
        file.truncate(10**12)  # sparse
    with pytest.raises(OSError, match=r"x.yaml: 1000000000000 bytes"):
        load_yaml(path)


def test_load_yaml_of_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        load_yaml(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("1E5", 1e5), ("-2.5e+1", -25.0), (".5", 0.5), ("3", 3), ("no", "no"),
     ("on", "on"), ("true", True), ("False", False), ("e3", "e3"), ("1.2.3", "1.2.3")],
)  # fmt: skip
def test_load_yaml_reads_scalars_as_people_mean_them(tmp_path, text, value):
    loaded = load_yaml(write(tmp_path / "x.yaml", f"key: {text}\n"))["key"]
    assert loaded == value
    assert type(loaded) is type(value)


def test_find_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "project"
    bare = write(root / "data" / "coco.yaml", "a: 1")
    hyp = write(root / "data" / "hyps" / "hyp.finetune.yaml", "a: 1")
    typed = write(tmp_path / "mine.yaml", "a: 1")
    (root / "data" / "coco").mkdir()  # a folder of that name does not count
    folders = ["data", "data/hyps"]
    assert find_config("coco", folders, root) == bare
    assert find_config("coco.yaml", folders, root) == bare
    assert find_config("data/coco.yaml", folders, root) == bare
    assert find_config(str(bare), folders, root) == bare
    assert find_config("hyp.finetune", folders, root) == hyp
    assert find_config("mine.yaml", folders, root).samefile(typed)
    with pytest.raises(FileNotFoundError) as caught:
        find_config("cocoa.yaml", folders, root)
    assert str(root / "data" / "cocoa.yaml") in str(caught.value)
    assert "did you mean 'coco.yaml'?" in str(caught.value)
    with pytest.raises(FileNotFoundError):
        find_config("", folders, root)


# ------------------------------------------------------------------------------- hyperparameters
def hyp_text(**changes) -> str:
    values = load_hyperparameters(ROOT / "data/hyps/hyp.scratch-low.yaml").to_dict() | changes
    return "".join(f"{key}: {value}\n" for key, value in values.items() if value is not ...)


@pytest.mark.parametrize("path", HYPS, ids=lambda path: path.name)
def test_shipped_hyperparameters_load(path):
    assert load_hyperparameters(path).lr0 > 0


def test_shipped_hyperparameters_equal_the_facts(shared_dir):
    facts = json.loads((shared_dir / "facts" / "hyperparameters.json").read_text())
    assert {path.name for path in HYPS} >= {f"hyp.{name}.yaml" for name in facts}
    for name, values in facts.items():
        loaded = load_hyperparameters(ROOT / "data" / "hyps" / f"hyp.{name}.yaml").to_dict()
        assert loaded == values | {"label_smoothing": 0.0}


def test_saved_hyperparameters_load_again(tmp_path):
    hyp = load_hyperparameters(HYPS[0])
    hyp = dataclasses.replace(hyp, anchors=4, label_smoothing=0.1, lr0=1e-5)
    text = "".join(f"{key}: {value}\n" for key, value in hyp.to_dict().items())
    assert "lr0: 1e-05" in text
    assert load_hyperparameters(write(tmp_path / "hyp.yaml", text)) == hyp


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        pytest.param({"lr0": ..., "mosaic": ...}, "missing: lr0, mosaic", id="missing"),
        pytest.param({"mosiac": 1.0}, "'mosiac'; did you mean 'mosaic'", id="unknown"),
        pytest.param({"lr0": 0}, "lr0 = 0 lies outside (0, 10]", id="open bound"),
        pytest.param({"scale": 1.0}, "scale = 1.0 lies outside [0, 1)", id="upper bound"),
        pytest.param({"fliplr": -0.1}, "fliplr = -0.1 lies outside [0, 1]", id="negative"),
        pytest.param({"box": "big"}, "box = 'big': expected a number", id="text"),
        pytest.param({"box": "true"}, "box = True: expected a number", id="bool"),
        pytest.param({"box": ".nan"}, "box = nan: expected a number", id="nan"),
        pytest.param({"box": f"{2**64 - 1}"}, "box = 18446744073709551615", id="huge"),
        pytest.param({"anchors": 0}, "anchors = 0: expected a whole number", id="anchors"),
    ],
)
def test_hyperparameters_complain(tmp_path, changes, complaint):
    text = hyp_text(**changes)
    path = write(tmp_path / "hyp.yaml", text)
    with pytest.raises(ValueError, match=r"hyp\.yaml") as caught:
        load_hyperparameters(path)
    assert complaint in str(caught.value)
    key = next(iter(changes))
    if changes[key] is not ...:
        lines = [line.split(":")[0] for line in text.splitlines()]
        assert f"hyp.yaml:{lines.index(key) + 1}:" in str(caught.value)


def test_hyperparameters_are_checked_when_replaced():
    hyp = load_hyperparameters(HYPS[0])
    with pytest.raises(ValueError, match="label_smoothing"):
        dataclasses.replace(hyp, label_smoothing=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        hyp.lr0 = 1  # type: ignore[misc]


@pytest.mark.parametrize("path", HYPS, ids=lambda path: path.name)
def test_hyperparameter_files_say_what_does_not_act(path):
    comments = dict(line.split(":", 1) for line in path.read_text().splitlines() if ": " in line)
    assert "not used; kept so that existing files load" in comments["iou_t"]
    assert "SGD only" in comments["warmup_bias_lr"]


def test_every_hyperparameter_has_a_comment():
    source = (ROOT / "utils" / "config.py").read_text(encoding="utf-8")
    for entry in dataclasses.fields(Hyperparameters):
        if entry.name != "label_smoothing":
            line = next(text for text in source.splitlines() if f"    {entry.name}: " in text)
            assert "  # " in line


# ------------------------------------------------------------------------------------- data sets
def dataset_text(**changes) -> str:
    values = {"path": "set", "train": "images", "val": "images", "names": "[a, b]"} | changes
    return "".join(f"{key}: {value}\n" for key, value in values.items() if value is not ...)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param({"names": "[a, b]"}, ("a", "b"), id="list"),
        pytest.param({"names": "{1: b, 0: a}"}, ("a", "b"), id="mapping"),
        pytest.param({"names": "{'0': a, '1': b}"}, ("a", "b"), id="text keys"),
        pytest.param({"names": "[a, b]", "nc": 2}, ("a", "b"), id="with nc"),
        pytest.param({"names": ..., "nc": 2}, ("class0", "class1"), id="nc alone"),
        pytest.param({"names": "[no, 7, 1.5]"}, ("no", "7", "1.5"), id="odd names"),
        pytest.param({"names": "[größe, 'a b']"}, ("größe", "a b"), id="unicode"),
    ],
)
def test_names(tmp_path, names, expected):
    path = write(tmp_path / "data.yaml", dataset_text(**names))
    spec = load_dataset_spec(path, tmp_path)
    assert spec.names == expected
    assert spec.num_classes == len(expected)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        pytest.param({"names": ...}, "key 'names' is missing", id="no names"),
        pytest.param({"names": "[]"}, ":4: names must be a list", id="empty names"),
        pytest.param({"names": "abc"}, ":4: names must be a list", id="text names"),
        pytest.param({"names": "{0: a, 2: b}"}, "2 entries but no class 1", id="gap"),
        pytest.param({"names": "{a: 0}"}, "must be class indices", id="turned mapping"),
        pytest.param({"names": "[[a], b]"}, "must be a plain text", id="nested names"),
        pytest.param({"nc": 3}, "nc is 3, but there are 2 names", id="nc differs"),
        pytest.param({"nc": 0}, ":5: nc = 0", id="nc 0"),
        pytest.param({"nc": "many"}, ":5: nc = 'many'", id="nc text"),
        pytest.param({"trian": "x"}, ":5: unknown key 'trian'; did you mean 'train'", id="typo"),
        pytest.param({"train": 5}, ":2: train must be a folder", id="train number"),
        pytest.param({"val": "[a, 5]"}, ":3: val must be a folder", id="val number"),
        pytest.param({"path": "[a]"}, ":1: path", id="path list"),
        pytest.param({"download": 5}, ":5: download must be", id="download"),
        pytest.param({"names": ..., "nc": 10**9}, ":4: nc = 1000000000", id="nc absurd"),
        pytest.param({"names": "{.inf: a}"}, "must be class indices", id="infinite class"),
        pytest.param({"path": '"a\\0b"'}, ":1: path = 'a\\x00b': no file", id="path with a zero"),
        pytest.param({"path": '"\\ud800"'}, ":1: path = '\\ud800': no file", id="path surrogate"),
        pytest.param({"val": "x" * 300}, ":3: val = 'xxx", id="val too long"),
    ],
)
def test_dataset_spec_complains(tmp_path, changes, complaint):
    path = write(tmp_path / "data.yaml", dataset_text(**changes))
    with pytest.raises(ValueError, match=r"data\.yaml") as caught:
        load_dataset_spec(path, tmp_path)
    assert complaint in str(caught.value)


def test_the_home_of_nobody_is_just_missing(tmp_path):
    path = write(tmp_path / "data.yaml", dataset_text(path="~nobody-of-that-name/x"))
    assert load_dataset_spec(path, tmp_path).missing()


def test_paths_are_tried_at_the_project_then_beside_the_yaml(tmp_path):
    root, beside = tmp_path / "project", tmp_path / "elsewhere"
    path = write(beside / "data.yaml", dataset_text(test="[images, list.txt]"))
    (root / "data").mkdir(parents=True)
    nowhere = load_dataset_spec(path, root)
    assert nowhere.root == root / "set"  # where a download would put it
    assert nowhere.missing(("train", "val")) == (root / "set" / "images",)
    with pytest.raises(FileNotFoundError) as caught:
        nowhere.check_exists()
    assert str(root / "set" / "images") in str(caught.value)
    assert str(beside / "set" / "images") in str(caught.value)

    (beside / "set" / "images").mkdir(parents=True)
    assert load_dataset_spec(path, root).train == (beside / "set" / "images",)
    assert load_dataset_spec(path, root).missing() == ()

    (root / "set" / "images").mkdir(parents=True)
    found = load_dataset_spec(path, root)
    assert found.train == (root / "set" / "images",)
    assert found.test == (root / "set" / "images", root / "set" / "list.txt")
    assert found.missing(("test",)) == (root / "set" / "list.txt",)
    found.check_exists()


@pytest.mark.parametrize("folder", [".", "data", "set"])
@pytest.mark.parametrize("splits", [("images",), ("images", "list.txt")])
def test_the_base_is_where_the_splits_are(tmp_path, folder, splits):
    root, beside = tmp_path / "project", tmp_path / "elsewhere"
    path = write(beside / "data.yaml", dataset_text(path=folder, val=splits[-1]))
    (root / folder).mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset_spec(path, root).check_exists()
    for split in splits:
        assert str(root / folder / split) in str(caught.value)
        assert str(beside / folder / split) in str(caught.value)

    (beside / folder / "images").mkdir(parents=True)
    write(beside / folder / "list.txt", "")
    spec = load_dataset_spec(path, root)
    assert spec.root == beside / folder
    assert spec.train == (beside / folder / "images",)
    assert spec.val == (beside / folder / splits[-1],)
    spec.check_exists()

    (root / folder / "images").mkdir()  # as complete or less complete
    chosen = root if len(splits) == 1 else beside
    assert load_dataset_spec(path, root).train == (chosen / folder / "images",)


def test_parent_folders_and_absolute_paths(tmp_path):
    root = tmp_path / "project"
    (tmp_path / "shared" / "images").mkdir(parents=True)
    root.mkdir()
    path = write(root / "a.yaml", dataset_text(path="../shared"))
    assert load_dataset_spec(path, root).train == (tmp_path / "shared" / "images",)
    path = write(root / "b.yaml", dataset_text(path=(tmp_path / "shared").as_posix()))
    assert load_dataset_spec(path, root).val == (tmp_path / "shared" / "images",)
    path = write(root / "c.yaml", dataset_text(path=..., train="../shared/images", val=...))
    spec = load_dataset_spec(path, root)
    assert spec.train == (tmp_path / "shared" / "images",)
    assert spec.val == ()
    with pytest.raises(ValueError, match="no key 'val'"):
        spec.check_exists()


def test_foreign_keys_are_ignored_aloud(tmp_path, caplog):
    path = write(tmp_path / "data.yaml", dataset_text(roboflow="{license: x}", kpt_shape="[1, 2]"))
    with caplog.at_level(logging.INFO):
        assert load_dataset_spec(path, tmp_path).num_classes == 2
    assert "'roboflow' is not used" in caplog.text


@pytest.mark.parametrize(
    ("name", "num_classes"), [("coco", 80), ("coco128", 80), ("VOC", 20), ("bccd", 3)]
)
def test_shipped_data_sets(name, num_classes):
    spec = load_dataset_spec(ROOT / "data" / f"{name}.yaml", ROOT)
    assert spec.num_classes == num_classes
    assert spec.train
    assert spec.val
    assert spec.download
    assert spec.root.parent == ROOT.parent / "datasets"


def test_shared_bccd(shared_dir):
    if shared_dir.parent != ROOT.parent:
        pytest.skip("its path is relative to this project's folder")
    spec = load_dataset_spec(shared_dir / "data" / "bccd" / "bccd.yaml", ROOT)
    spec.check_exists(("train", "val", "test"))
    assert spec.names == ("RBC", "WBC", "Platelets")
