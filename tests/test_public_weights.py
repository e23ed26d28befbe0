"""Public YOLOv5 files are read as data; nothing in them runs."""

import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch
import yaml

import prune
from utils.checkpoint import load_detector
from utils.public_weights import read_public_weights


@pytest.mark.parametrize(
    ("file", "num_classes", "first_name"),
    [("yolov5n.pt", 80, "person"), ("face_nc1.pt", 1, "face")],
)
def test_real_checkpoints(shared_dir, file, num_classes, first_name):
    detector = load_detector(shared_dir / "weights" / file)
    assert detector.model.head.num_classes == num_classes == len(detector.names)
    assert detector.names[0] == first_name
    assert detector.model.spec.anchors[0] == (10, 13, 16, 30, 33, 23)
    assert all(p.dtype == torch.float32 for p in detector.model.parameters())


@pytest.mark.slow
def test_a_public_network_is_not_ready_to_be_pruned(shared_dir, tmp_path, caplog, monkeypatch):
    """It finds what there is, has never been trained to be sparse, and has little to spare."""
    images = sorted((shared_dir / "data/coco128/images/train2017").glob("*.jpg"))[:12]
    (tmp_path / "some.txt").write_text("\n".join(map(str, images)))
    spec = yaml.safe_load((shared_dir / "data/coco128/coco128.yaml").read_text())
    spec = {"train": "some.txt", "val": "some.txt", "names": spec["names"], "path": str(tmp_path)}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(spec))
    monkeypatch.setattr(prune, "LATENCY_SECONDS", 0)
    weights, data = shared_dir / "weights/yolov5n.pt", tmp_path / "a.yaml"
    flags = ["--weights", str(weights), "--data", str(data), "--percent", "0.3", "--dry-run"]
    flags += ["--img", "256", "--calibration-images", "12", "--recalibrate", "0", "--workers", "0"]
    with caplog.at_level("INFO"):
        prune.main([*flags, "--latency-batch", "1"])
    (said,) = [line for line in caplog.messages if "ready to prune" in line]
    assert said.startswith("\nnot ready to prune: only ")
    assert said.endswith("train.py --bn_sparsity --sparsity_rate auto comes first")


def rewrite_pickle(source, target, change):
    """Copy a torch zip file with another data.pkl."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry, change(data) if entry.filename.endswith("data.pkl") else data)


class Command:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("where", ["top", "beside the model"])
def test_hostile_file_is_refused_and_not_run(shared_dir, tmp_path, where):
    proof, path = tmp_path / "ran", tmp_path / "hostile.pt"
    attack = Command(f"touch {proof}")
    if where == "top":
        torch.save({"model": attack, "spec": 1}, path)
    else:
        # The attack in front of the real content: a pickle that runs it and throws it away.
        prefix = pickle.dumps(attack, protocol=2)[:-1] + b"0"
        rewrite_pickle(shared_dir / "weights/yolov5n.pt", path, lambda data: prefix + data[2:])
    with pytest.raises(ValueError, match=r"hostile.pt: (refused.*system|not a checkpoint)"):
        load_detector(path)
    assert not proof.exists()


def test_files_that_are_no_model(tmp_path):
    path = tmp_path / "x.pt"
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match=r"x.pt"):
        load_detector(path)
    torch.save({"weights": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="not a checkpoint of this toolkit"):
        load_detector(path)
    torch.save(OrderedDict(model=torch.zeros(1)), path)
    with pytest.raises(ValueError, match="holds no model"):
        read_public_weights(path)
    with pytest.raises(FileNotFoundError, match=r"none.pt"):
        load_detector(tmp_path / "none.pt")


def test_truncated_file(shared_dir, tmp_path):
    path = tmp_path / "half.pt"
    path.write_bytes((shared_dir / "weights/yolov5n.pt").read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"half.pt"):
        load_detector(path)
