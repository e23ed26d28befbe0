import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from utils.plots.evaluation import (
    plot_confidence_curve,
    plot_confusion_matrix,
    plot_pr_curve,
    plot_study,
)
from utils.plots.figures import class_colour, class_name, draw
from utils.plots.images import _fit, _font, plot_batch, plot_detections_pair
from utils.plots.pruning import (
    _bins_with_edge,
    _spaced_ticks,
    plot_importance_threshold,
    plot_layer_widths,
    plot_stage_table,
    plot_sweep,
)
from utils.plots.training import (
    _group_into_panels,
    _share_below,
    plot_gamma_history,
    plot_labels,
    plot_results,
)
from utils.run_dir import ResultsCsv

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("disc", "box", "größe")


def _is_picture(path: Path, min_colours: int = 3) -> bool:
    """A file that opens, of a sensible size, with something on it."""
    with Image.open(path) as image:
        colours = image.convert("RGB").getcolors(2**24)
        return min(image.size) >= 100 and len(colours) >= min_colours


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_plots_need_no_display_and_no_pyplot():
    code = "import sys, utils.plots.training; print('matplotlib.pyplot' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "False"


DRAW = {
    "figure": "figures.save_note('words', out)",
    "picture": "images.plot_batch(numpy.zeros((1, 3, 64, 64), 'uint8'), numpy.array("
    "[[0, 0, 0.5, 0.5, 0.5, 0.5]]), ['a.jpg'], ['disc'], out)",
}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere home is told in other ways")
@pytest.mark.parametrize("kind", DRAW)
@pytest.mark.parametrize("has_home", [False, True])
def test_matplotlib_does_without_a_home_in_silence(tmp_path, kind, has_home):
    code = f"""
import sys, numpy
from utils.plots import figures, images
out = sys.argv[1]
{DRAW[kind]}
"""
    home = tmp_path / "home" if has_home else Path("/proc/nobody")  # where not even root can write
    if has_home:
        (home / ".config/matplotlib").mkdir(parents=True)
    (tmp_path / "temporary").mkdir()
    environment = {"HOME": str(home), "TMPDIR": str(tmp_path / "temporary")}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out.png")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert _is_picture(tmp_path / "out.png", 2)
    assert not list((tmp_path / "temporary").iterdir())
    assert (home / ".cache/matplotlib").exists() == (has_home and kind == "figure")


# Names as files and yaml keys can hold them: formulas, line breaks, marks of other kinds.
HOSTILE_NAMES = ("a$^$", "$", "two\nlines", "tab\tand\x00", "_hidden", "\udcff", "x" * 400)


@pytest.mark.filterwarnings("error")
def test_names_are_shown_literally(tmp_path):
    num, x = len(HOSTILE_NAMES), np.linspace(0, 1, 5)
    boxes = np.column_stack([np.arange(num), np.full((num, 4), 0.5)])
    curves = np.full((num, 5), 0.5)
    plot_labels(boxes, HOSTILE_NAMES, tmp_path / "labels.png")
    plot_pr_curve(x, curves, np.ones(num), HOSTILE_NAMES, tmp_path / "pr.png")
    plot_confidence_curve(x, curves, HOSTILE_NAMES, tmp_path / "p.png", quantity="precision")
    plot_confusion_matrix(np.eye(num + 1), HOSTILE_NAMES, tmp_path / "matrix.png")
    plot_study({name: [(640, 1.0, 0.1)] for name in HOSTILE_NAMES[:-1]}, tmp_path / "s.png")
    plot_stage_table([{"stage": "train"}], tmp_path / "t.png", title=HOSTILE_NAMES[0])
    targets = np.column_stack([np.zeros(num), boxes])
    paths = [f"/where/{name}.jpg" for name in HOSTILE_NAMES]
    images = np.zeros((num, 3, 64, 64), np.uint8)
    plot_batch(images, targets, paths, HOSTILE_NAMES, tmp_path / "batch.png")
    assert len(list(tmp_path.iterdir())) == 7


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("$5$", "$5$"),
        (r"\$5$", r"\$5$"),
        ("a\nb", "a b"),
        ("a\x07", "a�"),
        ("größe 1", "größe 1"),
        ("", ""),
        ("_a", "\u200b_a"),  # a legend leaves out what starts with an underscore
    ],
)
def test_a_name_in_a_figure(name, shown):
    text = Text(0, 0, class_name(name))
    what, is_formula = text._preprocess_math(text.get_text())
    assert (what, is_formula) == (shown, False)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError, OSError])
def test_a_picture_that_fails_is_one_warning(caplog, kind):
    def plot_nothing(*_, **__):
        raise kind("first\nsecond")

    draw(plot_nothing, 1, key=2)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message == "warning: plot_nothing failed, the picture is missing: first"


def test_draw_hands_on_what_it_gets(tmp_path, caplog):
    draw(plot_stage_table, [], tmp_path / "a.png", title="empty")
    draw(plot_stage_table, [], tmp_path / "none" / "a.png")
    assert (tmp_path / "a.png").is_file()
    assert "plot_stage_table failed" in caplog.text
    with pytest.raises(TypeError):
        draw(plot_stage_table, wrong=1)


def test_class_colours_differ():
    assert len({class_colour(cls) for cls in range(80)}) == 80


@pytest.mark.parametrize("num_epochs", [0, 1, 3, 40])
def test_plot_results(tmp_path, num_epochs):
    results = ResultsCsv(tmp_path / "results.csv", ["train/box_loss", "val/box_loss"])
    for epoch in range(num_epochs):
        values = {"train/box_loss": 1 / (epoch + 1), "val/box_loss": float("nan")}
        results.append(epoch, values | {"metrics/mAP_0.5": 0.1, "new/thing": epoch})
    plot_results(tmp_path / "results.csv", tmp_path / "results.png")
    assert _is_picture(tmp_path / "results.png")


def test_every_column_with_a_number_gets_a_panel():
    columns = {
        "train/box_loss": [1.0],
        "val/box_loss": [2.0],
        "metrics/mAP_0.5:0.95": [0.1],
        "x/lr0": [0.1],
        "gamma/q50": [1.0],
        "gamma/below_1e-2": [0.0],
        "sparsity/rate": [0.1],
        "sparsity/suggested_percent": [0.1],
        "strange": [1.0],
        "empty": [float("nan")],
    }
    panels = dict(_group_into_panels(columns))
    shown = [name for names in panels.values() for name in names]
    assert sorted(shown) == sorted(set(columns) - {"empty"})
    assert panels["box loss"] == ["train/box_loss", "val/box_loss"]
    assert panels["|gamma|, quantiles"] == ["gamma/q50"]
    assert panels["other"] == ["strange"]


@pytest.mark.parametrize(
    ("num_boxes", "num_classes"),
    [
        pytest.param(0, 3, id="no labels"),
        pytest.param(1, 1, id="one box"),
        pytest.param(50, 80, id="80 classes"),
        pytest.param(20, 300, id="300 classes"),
    ],
)
def test_plot_labels(tmp_path, num_boxes, num_classes):
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0, 0.9, (num_boxes, 5))
    boxes[:, 0] = rng.integers(0, num_classes, num_boxes)
    plot_labels(boxes, [f"class {i}" for i in range(num_classes)], tmp_path / "labels.jpg")
    assert _is_picture(tmp_path / "labels.jpg")


def _grey_batch(num_images: int, height: int = 64, width: int = 96) -> torch.Tensor:
    return torch.full((num_images, 3, height, width), 114, dtype=torch.uint8)


def test_plot_batch_draws_targets_where_they_are(tmp_path):
    targets = torch.tensor([[1, 2, 0.5, 0.5, 0.5, 0.5]])
    paths = ["some/where/a.jpg", "b.jpg"]
    plot_batch(_grey_batch(2), targets, paths, NAMES, tmp_path / "batch.png")
    pixels = _pixels(tmp_path / "batch.png")
    height, width, _ = pixels.shape
    assert (height, width) == (64 * 4, 2 * 96 * 4)
    colour = np.abs(pixels - class_colour(2)).sum(2) < 30
    rows, columns = np.nonzero(colour)
    assert columns.min() == pytest.approx(96 * 4 * 1.25, abs=3)
    assert columns.max() == pytest.approx(96 * 4 * 1.75, abs=3)
    assert rows.max() == pytest.approx(64 * 4 * 0.75, abs=3)


def test_plot_batch_draws_the_same_box_for_detections(tmp_path):
    detections = [
        torch.zeros(0, 6),
        torch.tensor([[24.0, 16, 72, 48, 0.9, 2], [0, 0, 9, 9, 0.1, 0]]),
    ]
    plot_batch(_grey_batch(2), detections, ["a", "b"], NAMES, tmp_path / "pred.png")
    pixels = _pixels(tmp_path / "pred.png")
    colour = np.abs(pixels - class_colour(2)).sum(2) < 30
    assert np.nonzero(colour)[1].min() == pytest.approx(96 * 4 * 1.25, abs=3)
    below_min_conf = np.abs(pixels - class_colour(0)).sum(2) < 30
    assert not below_min_conf.any()


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_the_surest_detection_lies_on_top(tmp_path, order):
    found = torch.tensor([[24.0, 16, 72, 48, 0.9, 2], [24, 16, 72, 48, 0.3, 0]])
    plot_batch(_grey_batch(1), [found[order]], ["a"], NAMES, tmp_path / "pred.png")
    frame = _pixels(tmp_path / "pred.png")[32 * 4, 24 * 4 : 24 * 4 + 2]
    assert (np.abs(frame - class_colour(2)).sum(1) < 30).all()


@pytest.mark.parametrize(
    ("num_images", "boxes"),
    [
        pytest.param(1, torch.zeros(0, 6), id="no targets"),
        pytest.param(1, [torch.zeros(0, 6)], id="no detections"),
        pytest.param(30, torch.tensor([[29.0, 0, 0.5, 0.5, 1, 1]]), id="more than 16 images"),
        pytest.param(3, torch.tensor([[0.0, 9, 0, 0, 0, 0]]), id="unknown class, empty box"),
    ],
)
def test_plot_batch_edges(tmp_path, num_images, boxes):
    paths = ["a very long file name " * 9 + ".jpg"] * num_images
    before = _grey_batch(num_images)
    images = before.clone()
    plot_batch(images, boxes, paths, NAMES, tmp_path / "batch.jpg")
    assert _is_picture(tmp_path / "batch.jpg")
    assert torch.equal(images, before)


def test_plot_batch_takes_float_images(tmp_path):
    images = _grey_batch(2).float() / 255
    plot_batch(images, torch.zeros(0, 6), ["a", "b"], NAMES, tmp_path / "batch.png")
    assert abs(_pixels(tmp_path / "batch.png")[20, 20] - 114).max() <= 1


@pytest.mark.parametrize("num_classes", [0, 1, 3, 80])
def test_curves_and_confusion_matrix(tmp_path, num_classes):
    rng = np.random.default_rng(0)
    names = [f"class {i}" for i in range(num_classes)]
    x, curves = np.linspace(0, 1, 50), rng.uniform(0, 1, (num_classes, 50))
    matrix = rng.integers(0, 9, (num_classes + 1, num_classes + 1))
    plot_pr_curve(x, curves, curves.mean(1), names, tmp_path / "pr.png")
    plot_confidence_curve(x, curves, names, tmp_path / "f1.png", quantity="F1")
    plot_confusion_matrix(matrix, names, tmp_path / "cm.png")
    assert all(_is_picture(tmp_path / name) for name in ("pr.png", "f1.png", "cm.png"))


def test_plot_study(tmp_path):
    curves = {"dense": [(640, 9.0, 0.4), (320, 3.0, 0.3)], "slim": [(320, 2.0, 0.2)]}
    plot_study(curves, tmp_path / "study.png")
    assert _is_picture(tmp_path / "study.png")


@pytest.mark.parametrize(("num_epochs", "num_layers"), [(0, 2), (1, 2), (5, 0), (40, 150)])
def test_plot_gamma_history(tmp_path, num_epochs, num_layers):
    rows = np.sort(np.random.default_rng(0).uniform(0, 1, (num_epochs, 11)), axis=1)
    layers = {f"model.{i}.bn": rows for i in range(num_layers)}
    plot_gamma_history(range(num_epochs), rows, layers, tmp_path / "bn_gamma.png")
    assert _is_picture(tmp_path / "bn_gamma.png")


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.0, 0.0), (0.05, 0.05), (0.5, 0.5), (2.0, 1.0)]
)
def test_share_below_reads_the_quantiles(threshold, expected):
    levels = np.linspace(0, 1, 11)
    assert _share_below(threshold, levels, levels) == pytest.approx(expected)


def test_share_below_sees_exact_zeros():
    levels = np.linspace(0, 1, 11)
    quantiles = np.array([0, 0, 0, 0, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1])
    assert _share_below(1e-3, levels, quantiles) == pytest.approx(0.3, abs=0.001)


def test_plot_stage_table(tmp_path):
    rows = [
        {"stage": "train", "map50": 0.7, "parameters": 1_765_270, "latency_ms": float("nan")},
        {"stage": "prune", "map50": 0.6, "parameters": 900_000, "gflops": 2.0},
    ]
    plot_stage_table(rows, tmp_path / "stages.png", title="yolov5n")
    plot_stage_table([], tmp_path / "empty.png")
    assert _is_picture(tmp_path / "stages.png")
    assert (tmp_path / "empty.png").stat().st_size > 0


def _sweep_rows(scores) -> list[dict]:
    return [
        {"percent": n / 10, "gflops": 4 - n / 4, "latency_ms": 9.0 - n, "map50": s, "map50_95": s}
        for n, s in enumerate(scores)
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("scores", "knee"),
    [
        pytest.param([], None, id="nothing"),
        pytest.param([0.9], 0, id="the dense network alone"),
        pytest.param([None, None, None], None, id="no mAP"),
        pytest.param([0.9, None, 0.2], 1, id="the knee has no mAP"),
        pytest.param([0.9, 0.9, 0.89, 0.1], 2, id="a cliff"),
        pytest.param(list(np.linspace(0.9, 0, 10)), None, id="no knee"),
    ],
)
def test_plot_sweep(tmp_path, scores, knee):
    plot_sweep(_sweep_rows(scores), knee, tmp_path / "sweep.png")
    assert _is_picture(tmp_path / "sweep.png")


def test_plot_sweep_finds_the_knee_in_any_order(tmp_path):
    rows = _sweep_rows([0.9, 0.9, 0.89, 0.1])
    plot_sweep(rows, 2, tmp_path / "a.png")
    plot_sweep(rows[::-1], 1, tmp_path / "b.png")
    assert np.array_equal(_pixels(tmp_path / "a.png"), _pixels(tmp_path / "b.png"))


def test_sweep_ticks_keep_apart():
    places, labels = _spaced_ticks(
        np.array([0.0, 40.0, 41.0, 80.0]), np.array([0, 0.3, 0.31, 0.625]), 80.0
    )
    assert (places, labels) == ([0, 40, 80], ["0", "30", "62.5"])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("num_layers", [0, 1, 159])
def test_plot_layer_widths(tmp_path, num_layers):
    before = np.random.default_rng(0).integers(16, 1280, num_layers)
    paths = [f"_{n}.m.0.cv1$x^$" for n in range(num_layers)]
    plot_layer_widths(paths, before, before // 2, tmp_path / "widths.png")
    assert _is_picture(tmp_path / "widths.png")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("gamma", "threshold"),
    [
        pytest.param([], None, id="no channels"),
        pytest.param([0.0, 0.0], 0.0, id="all zero"),
        pytest.param([1.0, 1.0, -1.0], 1.0, id="all alike"),
        pytest.param([0.0] * 50 + [0.5, 1.0], 0.1, id="mostly zero"),
        pytest.param([1e-40, 1e-7, 0.1, 2.0], 1e-9, id="threshold among the zeros"),
        pytest.param([0.1, 0.2], 9.0, id="threshold above all"),
        pytest.param([0.1, 0.2], -1.0, id="threshold below zero"),
        pytest.param(list(np.logspace(-5, 0, 99)), None, id="another importance decided"),
    ],
)
def test_plot_importance_threshold(tmp_path, gamma, threshold):
    kept = np.arange(len(gamma)) % 2 == 0
    plot_importance_threshold(gamma, kept, threshold, tmp_path / "gamma.png")
    assert _is_picture(tmp_path / "gamma.png")


@pytest.mark.parametrize("line", [None, -1.23, 0.001, -9.0])
def test_bins_hold_everything_and_break_at_the_threshold(line):
    low, high = -2.0, 0.7
    edges = _bins_with_edge(low, high, 0.1, line)
    assert (np.diff(edges) > 0).all()
    assert edges[0] <= low
    assert edges[-1] > high
    if line is not None and line > low:
        assert np.abs(edges - line).min() < 1e-9


def test_plot_detections_pair_draws_both_sides(tmp_path):
    image = np.full((60, 90, 3), 114, np.uint8)
    left = torch.tensor([[10.0, 10, 50, 50, 0.9, 1], [0, 0, 9, 9, 0.1, 0]])
    right = [[30.0, 10, 80, 50, 0.9, 2]]
    plot_detections_pair(image, left, right, NAMES, ("dense", "slim"), tmp_path / "pair.png")
    pixels = _pixels(tmp_path / "pair.png")
    scale = 4.0  # small images are enlarged, four times at most
    columns = [
        np.nonzero((np.abs(pixels - class_colour(cls)).sum(2) < 30).any(0))[0] for cls in range(3)
    ]
    second = pixels.shape[1] - 90 * scale
    assert len(columns[0]) == 0  # below min_conf
    assert columns[1].min() == pytest.approx(10 * scale, abs=3)
    assert columns[2].min() == pytest.approx(second + 30 * scale, abs=3)
    assert columns[2].max() == pytest.approx(second + 80 * scale, abs=3)
    assert (image == 114).all()


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("image_hw", [(1, 1), (20, 3000), (3000, 200)])
def test_plot_detections_pair_edges(tmp_path, image_hw, suffix):
    image = np.zeros((*image_hw, 3), np.uint8)
    out = tmp_path / f"pair{suffix}"
    titles = ("a very long title " * 20, "two\nlines")
    plot_detections_pair(image, [], torch.zeros(0, 6), NAMES, titles, out)
    with Image.open(out) as picture:
        assert max(picture.size) <= 2000


def test_a_title_keeps_its_number():
    font = _font(12)
    text = _fit("a long title", font, 90, ": 12 boxes")
    assert text.endswith("…: 12 boxes")
    assert font.getlength(text) <= 90
    assert _fit("a", font, 900, ": 1 box") == "a: 1 box"


@pytest.mark.filterwarnings("error")
def test_names_that_the_font_lacks_are_drawn_without_a_warning(tmp_path):
    plot_confusion_matrix(np.eye(3), ("\u732b", "\U0001f600"), tmp_path / "a.png")
    assert _is_picture(tmp_path / "a.png")
