"""Loading, augmenting, batching."""

import dataclasses
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import pytest
import torch

from utils import dataset as loaders
from utils import device as devices
from utils import heap
from utils.boxes import to_letterbox, xyxy_from_cxcywh
from utils.config import load_hyperparameters
from utils.dataset import (
    DetectionDataset,
    build_loader,
    class_counts,
    image_weights_from_map,
    label_sizes_px,
    rect_shape_hw,
    sample_batches,
    scan_split,
)
from utils.image_files import read_image
from utils.scan import RaggedRows

ROOT = Path(__file__).resolve().parents[1]
LOW = load_hyperparameters(ROOT / "data" / "hyps" / "hyp.scratch-low.yaml")
HIGH = load_hyperparameters(ROOT / "data" / "hyps" / "hyp.scratch-high.yaml")
NAMES = ("disc", "box", "bar")


@pytest.fixture
def split(tiny_dataset):
    return scan_split([tiny_dataset.images], tiny_dataset.names)


# ------------------------------------------------------------------------------------ plain loading
def pixels_of_class(image: torch.Tensor, cls: int) -> np.ndarray:
    """xyxy of a class's colour in a uint8 RGB image [3, H, W] of the tiny data set."""
    colour = torch.tensor([(220, 60, 60), (80, 200, 80), (60, 120, 220)][cls])
    is_near = (image.int() - colour[:, None, None]).abs().amax(0) < 60
    ys, xs = is_near.nonzero(as_tuple=True)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


@pytest.mark.parametrize("rect", [False, True])
@pytest.mark.parametrize("imgsz", [64, 96, 128, 256])
def test_plain_items_are_letterboxed_rgb_with_boxes_on_their_objects(split, imgsz, rect):
    dataset = DetectionDataset(split, imgsz, rect=rect, batch_size=2, pad=0.5)
    for index in range(len(split)):
        image, targets, path, letterbox, problems = dataset[index]
        assert problems == ()
        assert image.dtype == torch.uint8
        assert path == split.paths[index]
        height, width = image.shape[1:]
        assert letterbox.original_hw == tuple(split.shapes_hw[index])
        boxes_px = xyxy_from_cxcywh(targets[:, 1:]) * torch.tensor([width, height] * 2)
        for cls, box in zip(targets[:, 0].int().tolist(), boxes_px.numpy(), strict=True):
            np.testing.assert_allclose(box, pixels_of_class(image, cls), atol=2 + imgsz / 96)
        original_h, original_w = letterbox.original_hw
        original = xyxy_from_cxcywh(split.labels[index][:, 1:]) * ([original_w, original_h] * 2)
        np.testing.assert_allclose(to_letterbox(original, letterbox), boxes_px, atol=1e-3)


def test_plain_items_of_the_right_size_keep_every_pixel(split):
    image, _, path, letterbox, _ = DetectionDataset(split, 96)[2]
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy()[..., ::-1], read_image(path))
    assert letterbox == ((96, 96), (1.0, 1.0), (0.0, 0.0))


def test_images_are_not_enlarged_beyond_imgsz_and_padded_with_grey(split):
    image, _, _, letterbox, _ = DetectionDataset(split, 192)[3]  # 64 x 96 -> 128 x 192
    assert letterbox == ((64, 96), (2.0, 2.0), (0.0, 32.0))
    assert (image[:, :32] == 114).all()
    assert (image[:, -32:] == 114).all()


@pytest.mark.parametrize(
    ("shapes_hw", "imgsz", "pad", "expected"),
    [
        pytest.param([(480, 640), (240, 640)], 640, 0.5, (512, 672), id="wide"),
        pytest.param([(640, 480), (640, 320)], 640, 0.5, (672, 512), id="tall"),
        pytest.param([(480, 640), (640, 480)], 640, 0.5, (672, 672), id="mixed"),
        pytest.param([(640, 640)], 640, 0.0, (640, 640), id="square"),
        pytest.param([(480, 640)], 320, 0.0, (256, 320), id="no pad"),
        pytest.param([(427, 640)], 640, 0.5, (448, 672), id="rounded up"),
    ],
)
def test_rect_shape(shapes_hw, imgsz, pad, expected):
    assert rect_shape_hw(np.array(shapes_hw), imgsz, 32, pad) == expected


def test_rect_batches_are_sorted_by_aspect_ratio(split):
    loader = build_loader(DetectionDataset(split, 128, rect=True, batch_size=2), 2)
    batches = list(loader)
    names = [[Path(path).name for path in batch.paths] for batch in batches]
    assert names == [["d.jpg", "a.jpg"], ["c.jpg", "b.png"]]
    assert [tuple(batch.images.shape) for batch in batches] == [(2, 3, 96, 128), (2, 3, 128, 128)]


def test_all_images_take_the_shape_that_is_asked_for(split):
    (batch,) = build_loader(DetectionDataset(split, 96, shape_hw=(64, 96)), 8)
    assert batch.images.shape == (4, 3, 64, 96)
    for path, letterbox in zip(batch.paths, batch.letterboxes, strict=True):
        height, width = letterbox.original_hw
        ratio = min(64 / height, 96 / width)
        assert letterbox.ratio_wh == pytest.approx((ratio, ratio), rel=0.02), path


def test_batches_hold_targets_with_their_image(split):
    (batch,) = build_loader(DetectionDataset(split, 64), 8)
    assert batch.images.shape == (4, 3, 64, 64)
    assert batch.images.dtype == torch.uint8
    assert batch.targets.shape == (6, 6)
    assert batch.targets.dtype == torch.float32
    assert batch.targets[:, 0].tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.targets[:, 1].tolist() == [0, 1, 2, 0, 1, 2]
    assert len(batch.paths) == len(batch.letterboxes) == 4


def test_a_batch_without_objects(split):
    batch = list(build_loader(DetectionDataset(split, 64), 1))[3]
    assert batch.targets.shape == (0, 6)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"imgsz": 100}, "imgsz 100 is no multiple"),
        ({"imgsz": 0}, "imgsz 0 is no multiple"),
        ({"seed": -1}, "seed -1"),
        ({"batch_size": 0}, "batch size 0"),
        ({"cache": "tape"}, "cache 'tape'"),
    ],
)
def test_dataset_complains(split, arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        DetectionDataset(split, **({"imgsz": 64} | arguments))


def test_loader_complains(split):
    square, rect = DetectionDataset(split, 64), DetectionDataset(split, 64, rect=True)
    for arguments in ({"batch_size": 0}, {"batch_size": 1, "workers": -1}):
        with pytest.raises(ValueError, match="too small"):
            build_loader(square, **arguments)
    with pytest.raises(ValueError, match="made for batch size 16, not 4"):
        build_loader(rect, 4)
    with pytest.raises(ValueError, match="weights cannot act"):
        build_loader(rect, 16).set_image_weights(np.ones(4))
    for weights in ([1, 1, np.nan, 1], [1, 1, -1, 1], [1, 1, 1]):
        with pytest.raises(ValueError, match="image weights must be 4"):
            build_loader(square, 4).set_image_weights(np.array(weights))
    with pytest.raises(IndexError):
        square[4]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("harm", "what"),
    [
        pytest.param(
            lambda path: path.write_bytes(path.read_bytes()[:300]), "damaged", id="damaged"
        ),
        pytest.param(lambda path: path.unlink(), "No such file or directory", id="deleted"),
    ],
)
def test_an_image_lost_after_the_scan_becomes_an_empty_picture(split, caplog, harm, what, workers):
    path = Path(split.paths[1])
    content = path.read_bytes()
    harm(path)
    loader = build_loader(DetectionDataset(split, 64), 1, workers=workers)
    assert (loader.num_workers > 0) == (workers > 0)
    for _ in range(2):
        batches = list(loader)
        assert [len(batch.targets) for batch in batches] == [2, 0, 3, 0]
        assert (batches[1].images == 114).all()
    (warning,) = caplog.records
    assert warning.getMessage().startswith(f"used as an empty picture (1 so far): {path}: ")
    assert what in warning.getMessage()
    assert list(loader.unreadable) == [str(path)]
    path.write_bytes(content)
    assert [len(batch.targets) for batch in loader] == [2, 1, 3, 0], "it has come back"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are none")
def test_nobody_waits_for_a_pipe_in_the_place_of_an_image(split):
    """Nor when others are looked at to tell a lost image from a lost drive."""

    def give_up(*_):
        pytest.fail("waited")

    Path(split.paths[0]).unlink()
    os.mkfifo(split.paths[0])
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(5)
    try:
        item = DetectionDataset(split, 64)[0]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    ((path, what),) = item.problems
    assert path == split.paths[0]
    assert what.startswith(f"{path}: not a regular file but a pipe or a device")


def test_the_parts_of_a_mosaic_that_were_lost_are_named(split):
    for path in split.paths[1:]:
        Path(path).unlink()
    hyp = dataclasses.replace(LOW, mosaic=1.0, mixup=1.0)
    loader = build_loader(DetectionDataset(split, 64, hyp=hyp), 4)
    for epoch in range(8):
        loader.set_epoch(epoch)
        list(loader)
    assert set(loader.unreadable) == set(split.paths[1:])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "lose",
    [
        pytest.param(shutil.rmtree, id="folder"),
        pytest.param(
            lambda images: [path.unlink() for path in images.iterdir()], id="empty mount point"
        ),
    ],
)
def test_a_lost_folder_stops_with_one_line(tiny_dataset, split, lose, workers):
    lose(tiny_dataset.images)
    loader = build_loader(DetectionDataset(split, 64), 2, workers=workers)
    with pytest.raises(FileNotFoundError, match="connect its drive") as caught:
        list(loader)
    assert str(caught.value).startswith(f"{tiny_dataset.images}: the images")
    assert "a.jpg" in str(caught.value)
    assert "\n" not in str(caught.value)
    loader.end_workers()  # `caught` keeps it


# -------------------------------------------------------------------------------- augmented loading
def collect(loader, epoch: int) -> list[torch.Tensor]:
    loader.set_epoch(epoch)
    return [part for batch in loader for part in (batch.images, batch.targets)]


def are_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("rect", [False, True])
def test_batches_depend_on_seed_and_epoch_alone(split, rect):
    def loader(seed=3, workers=0):
        dataset = DetectionDataset(split, 64, hyp=HIGH, rect=rect, batch_size=2, seed=seed)
        return build_loader(dataset, 2, workers=workers, shuffle=True, seed=seed)

    first = loader()
    epochs = [collect(first, epoch) for epoch in range(3)]
    assert not are_equal(epochs[0], epochs[1])
    assert are_equal(collect(first, 1), epochs[1])
    assert are_equal(collect(loader(), 2), epochs[2])
    assert not are_equal(collect(loader(seed=4), 0), epochs[0])
    with_workers = loader(workers=2)
    assert with_workers.num_workers >= 1
    for epoch in (0, 1):
        assert are_equal(collect(with_workers, epoch), epochs[epoch])


@pytest.mark.parametrize("workers", [0, 1])
def test_augmented_batches_are_well_formed(split, workers):
    dataset = DetectionDataset(split, 96, hyp=HIGH, seed=1)
    loader = build_loader(dataset, 3, workers=workers, shuffle=True)
    assert len(loader) == 2
    sizes = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        for batch in loader:
            sizes.append(len(batch.images))
            assert batch.images.shape[1:] == (3, 96, 96)
            cx, cy, w, h = batch.targets[:, 2:].T
            assert (w > 0).all()
            assert (h > 0).all()
            for low, high in ((cx - w / 2, cx + w / 2), (cy - h / 2, cy + h / 2)):
                assert (low >= -1e-6).all()
                assert (high <= 1 + 1e-6).all()
            assert (batch.targets[:, 0] < len(batch.images)).all()
    assert sizes == [3, 1] * 3


@pytest.mark.parametrize(
    "key",
    ["hsv_h", "hsv_s", "hsv_v", "degrees", "translate", "scale", "shear", "perspective", "flipud",
     "fliplr", "mosaic", "mixup", "copy_paste"],
)  # fmt: skip
@pytest.mark.parametrize("rect", [False, True])
def test_every_augmentation_key_acts(tiny_dataset, key, rect):
    polygons = "0 0.05 0.1 0.4 0.1 0.4 0.7 0.05 0.7\n1 0.1 0.75 0.3 0.75 0.3 0.95\n"
    for name in "abcd":
        (tiny_dataset.labels / f"{name}.txt").write_text(polygons)
    split = scan_split([tiny_dataset.images], NAMES)
    keys = [field.name for field in dataclasses.fields(LOW)]
    start = keys.index("hsv_h")
    still = dict.fromkeys(keys[start : keys.index("copy_paste") + 1], 0.0)
    strength = {"degrees": 10.0, "shear": 10.0, "perspective": 0.001, "scale": 0.5}.get(key, 1.0)
    strength = 0.3 if key in ("translate", "hsv_h") else strength
    without = dataclasses.replace(LOW, **still)
    with_key = dataclasses.replace(LOW, **(still | {key: strength}))
    pictures = []
    for hyp in (without, with_key):
        dataset = DetectionDataset(split, 96, hyp=hyp, rect=rect, batch_size=4)
        pictures.append(torch.stack([dataset[(0, index)].image for index in range(4)]))
    changes = not torch.equal(*pictures)
    assert changes == (key != "mosaic" or not rect), "only mosaic is left out of rectangles"


def test_without_strengths_training_images_are_the_plain_ones(tiny_dataset):
    split = scan_split([tiny_dataset.images], NAMES)
    keys = [field.name for field in dataclasses.fields(LOW)]
    still = dict.fromkeys(keys[keys.index("hsv_h") : keys.index("copy_paste") + 1], 0.0)
    train = DetectionDataset(split, 128, hyp=dataclasses.replace(LOW, **still))
    plain = DetectionDataset(split, 128)
    for index in range(4):
        assert torch.equal(train[index].image, plain[index].image)
        torch.testing.assert_close(train[index].targets, plain[index].targets)


def test_boxes_of_augmented_images_lie_on_their_objects(split):
    hyp = dataclasses.replace(LOW, hsv_h=0, hsv_s=0, hsv_v=0, mixup=0, mosaic=0, scale=0.2)
    dataset = DetectionDataset(split, 96, hyp=hyp)
    compared = 0
    for epoch in range(5):
        for index in range(3):
            image, targets, *_ = dataset[(epoch, index)]
            for cls, *box in targets.tolist():
                seen = pixels_of_class(image, int(cls))
                box = xyxy_from_cxcywh(np.array(box)) * 96
                np.testing.assert_allclose(box, seen, atol=2.5)
                compared += 1
    assert compared > 20


# ----------------------------------------------------------------------------------- order, weights
def order(loader, epoch: int = 0) -> list[str]:
    loader.set_epoch(epoch)
    return [Path(path).stem for batch in loader for path in batch.paths]


@pytest.mark.parametrize("rect", [False, True])
def test_without_shuffling_every_image_comes_once(split, rect):
    dataset = DetectionDataset(split, 64, rect=rect, batch_size=3)
    seen = order(build_loader(dataset, 3))
    assert sorted(seen) == ["a", "b", "c", "d"]
    assert seen == (["d", "a", "c", "b"] if rect else ["a", "b", "c", "d"])


@pytest.mark.parametrize(
    ("num_images", "expected"), [(1, [0]), (2, [0, 2]), (3, [0, 2]), (9, [0, 1, 2, 3])]
)
def test_a_sample_is_spread_over_the_batches(split, num_images, expected):
    loader = build_loader(DetectionDataset(split, 64, rect=True, batch_size=1, pad=0.5), 1)
    batches = list(loader)
    sample = sample_batches(loader, num_images)
    assert [batch.paths for batch in sample] == [batches[n].paths for n in expected]
    for ours, n in zip(sample, expected, strict=True):
        assert torch.equal(ours.images, batches[n].images)
        assert torch.equal(ours.targets, batches[n].targets)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("weights", [None, np.array([1.0, 5, 0, 2])])
def test_a_batch_can_be_read_again(split, rank, weights):
    dataset = DetectionDataset(split, 64, hyp=HIGH)
    loader = build_loader(dataset, 1, shuffle=True, rank=rank, world_size=3)
    loader.set_image_weights(weights)
    loader.set_epoch(5)
    batches = list(loader)
    assert len(batches) == 2  # the second one of rank 2 is extra
    for number, batch in enumerate(batches):
        whole = loader.read_again(number, of_all=True)
        assert len(whole.paths) == (3, 1)[number]
        assert set(batch.paths) <= set(whole.paths)
        again = loader.read_again(number)
        assert again.paths == batch.paths
        assert torch.equal(again.images, batch.images)
        assert torch.equal(again.targets, batch.targets)


@pytest.mark.parametrize("rect", [False, True])
def test_shuffling_visits_every_image_in_another_order_each_epoch(split, rect):
    loader = build_loader(DetectionDataset(split, 64, rect=rect, batch_size=1), 1, shuffle=True)
    orders = [order(loader, epoch) for epoch in range(8)]
    assert all(sorted(names) == ["a", "b", "c", "d"] for names in orders)
    assert len({tuple(names) for names in orders}) > 3


@pytest.mark.parametrize("shuffle", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("rect", [False, True], ids=["square", "rect"])
@pytest.mark.parametrize(("world_size", "share"), [(1, 3), (2, 1), (2, 2), (3, 1), (3, 2), (5, 1)])
def test_ranks_share_what_one_process_would_see(split, world_size, share, rect, shuffle):
    """The same batches, each image once, dealt out in turn, and in training as many steps."""
    size = world_size * share
    dataset = DetectionDataset(split, 64, rect=rect, batch_size=size)
    settings = {"shuffle": shuffle, "seed": 1}
    alone = build_loader(dataset, size, **settings)
    loaders = [
        build_loader(dataset, share, rank=rank, world_size=world_size, **settings)
        for rank in range(world_size)
    ]
    for epoch in range(3):
        for loader in (alone, *loaders):
            loader.set_epoch(epoch)
        whole, parts = list(alone), [list(loader) for loader in loaders]
        assert [len(loader) for loader in loaders] == [len(part) for part in parts]
        assert not shuffle or len({len(part) for part in parts}) == 1
        shared = [[b for b in step if b and not b.is_extra] for step in zip_longest(*parts)]
        assert len(shared) == len(whole)
        for batch, of_ranks in zip(whole, shared, strict=True):
            for rank, part in enumerate(of_ranks):
                assert part.paths == batch.paths[rank::world_size]
                assert torch.equal(part.images, batch.images[rank::world_size])
            assert sum(len(part.paths) for part in of_ranks) == len(batch.paths)


def test_image_weights_draw_with_replacement(split):
    dataset = DetectionDataset(split, 64, hyp=LOW)
    loader = build_loader(dataset, 2, shuffle=True)
    loader.set_image_weights(np.array([0, 1, 0, 0]))
    loader.set_epoch(0)
    batches = list(loader)
    assert [Path(path).stem for batch in batches for path in batch.paths] == ["b"] * 4
    images = torch.cat([batch.images for batch in batches])
    assert not torch.equal(images[0], images[1]), "each repeat is augmented in its own way"
    loader.set_image_weights(np.array([0, 0, 1, 0]))
    assert set(order(loader)) == {"c"}
    loader.set_image_weights(np.zeros(4))
    assert len(order(loader)) == 4
    loader.set_image_weights(None)
    assert sorted(order(loader)) == ["a", "b", "c", "d"]


def test_image_weights_from_map(split):
    # a: disc, box; b: bar; c: disc, box, bar; d: nothing. Two boxes of each class.
    even = image_weights_from_map(split, np.zeros(3))
    np.testing.assert_allclose(even, [1.0, 0.5, 1.5, 0.0])
    learnt = image_weights_from_map(split, np.array([1.0, 0.5, 0.0]))
    np.testing.assert_allclose(learnt, [0.125, 0.5, 0.625, 0.0])


def test_label_statistics(split):
    assert class_counts(split, 5).tolist() == [2, 2, 2, 0, 0]
    sizes = label_sizes_px(split, 64)
    assert sizes.shape == (6, 2)
    np.testing.assert_allclose(sizes[:3], [[20, 20], [18, 24], [30, 8]], atol=1e-3)
    assert label_sizes_px(scan_subset(split, 0), 64).shape == (0, 2)


def scan_subset(split, count: int):
    labels = RaggedRows.pack([np.zeros((0, 5), np.float32)] * count, 5)
    return dataclasses.replace(
        split, paths=split.paths[:count], labels=labels, shapes_hw=split.shapes_hw[:count]
    )


def test_an_epoch_can_be_taken_up_after_some_of_its_batches(split):
    dataset = DetectionDataset(split, 64, hyp=LOW, seed=3)
    loader = build_loader(dataset, 1, shuffle=True, seed=3)
    loader.set_epoch(2)
    whole = list(loader)
    state = torch.get_rng_state()
    loader.set_epoch(2, first_batch=3)
    rest = list(loader)
    assert torch.equal(torch.get_rng_state(), state)  # which a run saves in between
    assert [batch.paths for batch in rest] == [batch.paths for batch in whole[3:]]
    assert all(torch.equal(a.images, b.images) for a, b in zip(rest, whole[3:], strict=True))
    assert len(loader) == len(whole) == 4
    loader.set_epoch(2, first_batch=4)
    assert list(loader) == []


@pytest.mark.parametrize(("ranks", "expected"), [(1, 6), (3, 2), (8, 1)])
def test_processes_that_train_together_share_the_cores(split, monkeypatch, ranks, expected):
    monkeypatch.setattr(devices, "num_usable_cores", lambda: 6)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert build_loader(DetectionDataset(split, 64), 2).dataset.num_threads == expected


@pytest.mark.parametrize(
    ("cache", "forks", "expected"),
    [("ram", True, 1), ("ram", False, 0), ("disk", False, 1), (None, False, 1)],
)
def test_images_in_memory_are_held_once(split, monkeypatch, caplog, cache, forks, expected):
    """A process that is not forked would be sent a copy of the cache, of any size."""
    monkeypatch.setattr(loaders, "FORKS", forks)
    caplog.set_level("INFO")
    dataset = DetectionDataset(split, 64, cache=cache)
    assert build_loader(dataset, 2, workers=1).num_workers == expected
    assert ("each would hold a copy" in caplog.text) == (not expected)


def test_workers_leave_the_answer_to_signals_to_their_parent(split):
    """Ctrl-C and batch systems signal them as well, while the parent still needs their batches."""
    loader = build_loader(DetectionDataset(split, 64, hyp=LOW), 1, workers=1)
    batches = iter(loader)
    next(batches)
    (worker,) = loader._iterator._workers
    for cause in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, cause)
    assert len(list(batches)) == 3


@pytest.mark.parametrize("num_read", [1, 4])
def test_a_killed_worker_is_said_where_its_batch_is_asked_for(split, num_read):
    """And not whenever the signal of its end comes, in the midst of a step."""
    loader = build_loader(DetectionDataset(split, 64), 1, workers=1)
    batches = iter(loader)
    for _ in range(num_read):
        next(batches)
    (worker,) = loader._iterator._workers
    worker.kill()
    worker.join()
    sum(range(10**5))  # signals are answered between instructions
    with pytest.raises(ChildProcessError, match=r"was killed \(SIGKILL\).* fewer --workers"):
        list(chain(batches, loader))
    loader.end_workers()


def test_workers_end_with_the_program_though_an_error_holds_their_loader(split):
    """Nobody told them, and their parent waited for as long as they outlive SIGTERM."""
    loader = build_loader(DetectionDataset(split, 64), 1, workers=1)
    list(loader)
    (worker,) = loader._iterator._workers
    loaders._end_all_workers()  # what Python calls when it ends
    assert worker.exitcode == 0
    list(loader)  # which nothing forbids
    (worker,) = loader._iterator._workers
    del loader
    assert worker.exitcode == 0


@pytest.mark.parametrize("extra", [0, 1])
def test_sockets_of_workers_need_a_short_folder(split, tmp_path, monkeypatch, extra):
    """Beyond the limit torch waits for ever for batches that its workers could not send."""
    with tempfile.TemporaryDirectory() as short:
        folder = Path(short) / ("x" * (loaders.LONGEST_TEMPDIR + extra - len(short) - 1))
        folder.mkdir()
        monkeypatch.setattr(tempfile, "tempdir", str(folder))
        monkeypatch.delitem(multiprocessing.current_process()._config, "tempdir", raising=False)
        if extra:
            with pytest.raises(ValueError, match="set TMPDIR to one of up to 75 bytes"):
                build_loader(DetectionDataset(split, 64), 1, workers=1)
        else:
            loader = build_loader(DetectionDataset(split, 64), 1, workers=1)
            assert len(list(loader)) == len(split)


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
@pytest.mark.parametrize("parent_keeps_blocks", [False, True])
def test_workers_hold_no_memory_that_they_do_not_need(parent_keeps_blocks):
    """Without the settings it would be 200 MiB, or 60 where the parent keeps its blocks."""
    context = multiprocessing.get_context("spawn")  # forks may find old holes
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=fragment, args=(parent_keeps_blocks, sender))
    process.start()
    sender.close()
    held = receiver.recv()
    process.join()
    assert held < 10 * 2**20


def fragment(parent_keeps_blocks: bool, sender) -> None:
    if parent_keeps_blocks:
        heap.keep_large_blocks()
        np.ones(2**24, np.uint8)
    loaders._start_worker(0)
    before, pins = resident_bytes(), []
    np.ones(2**22, np.uint8)  # when it is freed, glibc begins to keep blocks of this size
    blocks = []
    for _ in range(100):
        blocks.append(np.ones(2**21, np.uint8))
        pins.append(bytes(10_000))  # it would lie behind the block
    blocks.clear()
    sender.send(resident_bytes() - before)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_too_little_shared_memory_is_told_not_waited_for(tiny_dataset, monkeypatch):
    """Docker gives 64 MB unless it is asked for more."""

    def fail(*_):
        raise RuntimeError(
            "unable to allocate shared memory(shm): No space left on device (28)\nat"
        )

    split = scan_split([tiny_dataset.images], tiny_dataset.names)
    loader = build_loader(DetectionDataset(split, 64), 2, workers=1)
    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)  # workers are forks
    with pytest.raises(
        OSError, match=r"^unable to .* \(28\); give it more .*--workers 0 needs none$"
    ):
        next(iter(loader))
