import base64
import dataclasses
import json
import math
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils.pruning.report import (
    ClassRow,
    Figures,
    LayerRow,
    Pictures,
    Report,
    SpeedRow,
    comparison_rows,
    headline,
    write_report,
)
from utils.pruning.sweep import SweepRow

EVIL = '<script>alert("1")</script>'
VOID_TAGS = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags that never close, all attributes, the text, and the cells of each table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID_TAGS:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if self.open[-1:] in (["td"], ["th"]):
            self.tables[-1][-1][-1] += data

    def values(self, attribute: str) -> list[str]:
        return [value for _, name, value in self.attributes if name == attribute]


def _figures(scale: float, map50: float | None) -> Figures:
    return Figures(
        precision=map50,
        recall=map50,
        map50=map50,
        map50_95=map50 and map50 / 2,
        channels=int(4752 * scale),
        parameters=int(2_000_000 * scale),
        gflops=4 * scale,
        file_mb=3.5 * scale,
        latency_ms=10 * scale,
    )


@pytest.fixture
def report() -> Report:
    return Report(
        command="python prune.py --percent 0.5",
        weights="runs/train/sparse/weights/last.pt",
        data="data/bccd.yaml",
        imgsz=320,
        device="cpu (2 threads)",
        percent=0.5,
        target="",
        shortcut="group",
        importance="output",
        compensate="linear",
        recalibrate=8,
        min_channels=4,
        round_to=8,
        suggested_percent=0.4,
        threshold=0.0123,
        cut_difference=3e-7,
        removed=0.5,
        before=_figures(1.0, 0.9),
        after=_figures(0.25, 0.893),
        speed_up=(1.83, 1.7, 1.95),
        layers=(
            LayerRow("0", 16, 12, True, 0, "first"),
            LayerRow("2.cv1", 64, 8, True, 3),
            LayerRow("2.m.0.cv1", 32, 32, False),
        ),
        widths={"0": 12, "2.cv1": 8, "2.m.0.cv1": 32},
    )


def _render(path: Path, report: Report, pictures: Pictures | None = None) -> Page:
    write_report(path / "report.html", report, pictures or Pictures())
    return Page((path / "report.html").read_text(encoding="utf-8"))


def _picture(path: Path) -> Path:
    Image.fromarray(np.full((4, 5, 3), 7, np.uint8)).save(path)
    return path


def test_the_smallest_report(tmp_path, report):
    page = _render(tmp_path, dataclasses.replace(report, layers=()))
    assert page.open == []
    assert "img" not in page.tags
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_all_is_embedded_in_one_file(tmp_path, report):
    folder = tmp_path / "pictures"
    folder.mkdir()
    files = [_picture(folder / name) for name in ("a.png", "b.png", "c.png", "d.jpg", "e.JPG")]
    rows = (SweepRow(0.0, 0.0, 100, 4.0, 10.0, 1.0, 0.9, 0.5),)
    pictures = Pictures(*files[:3], {"first": files[3], "second": files[4]})
    page = _render(tmp_path, dataclasses.replace(report, sweep=rows, knee=0), pictures)
    sources = page.values("src")
    assert len(sources) == page.tags.count("img") == 5
    embedded = [base64.b64decode(source.partition(";base64,")[2]) for source in sources]
    assert sorted(embedded) == sorted(path.read_bytes() for path in files)
    kinds = sorted(source.partition(";")[0] for source in sources)
    assert kinds == ["data:image/jpeg"] * 2 + ["data:image/png"] * 3
    assert {"first", "second"} <= set(page.values("alt"))


def test_nothing_is_loaded_or_run(tmp_path, report):
    pictures = Pictures(_picture(tmp_path / "a.png"))
    page = _render(tmp_path, report, pictures)
    assert all(source.startswith("data:") for source in page.values("src"))
    assert page.values("href") == []
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'; img-src data:" in text


def test_every_text_is_escaped(tmp_path, report):
    texts = {
        field.name: EVIL
        for field in dataclasses.fields(Report)
        if isinstance(getattr(report, field.name), str)
    }
    evil = dataclasses.replace(
        report,
        **texts,
        layers=(LayerRow(EVIL, 1, 1, True, 0, EVIL),),
        classes=(ClassRow(EVIL, 1, 0, 0, 0, 0),),
        warnings=(EVIL,),
        more={EVIL: EVIL},
    )
    broken = tmp_path / "gone.png"
    there = _picture(tmp_path / "a.png")
    captions = {EVIL: there, f'"{EVIL}': broken}
    page = _render(tmp_path, evil, Pictures(detections=captions))
    assert "script" not in page.tags
    assert EVIL in page.values("alt")
    title, layer, settings = f"Pruning report: {Path(EVIL).name}", page.tables[2], page.tables[3]
    assert title in page.text
    assert layer[1][0] == layer[1][-1] == EVIL
    assert page.tables[1][1][0] == EVIL
    assert [EVIL, EVIL] in settings
    assert page.text.count(EVIL) >= 12


def test_odd_names_do_not_stop_the_report(tmp_path, report):
    page = _render(tmp_path, dataclasses.replace(report, weights="a\udcff/$title\n.pt"))
    assert "a?/$title" in page.text
    page = _render(tmp_path, dataclasses.replace(report, weights="$body"))
    assert "$body" in page.text


def test_the_tables_have_the_numbers(tmp_path, report):
    full = dataclasses.replace(
        report,
        classes=(ClassRow("kept", 3, 0.9, 0.9, 0.5, 0.5), ClassRow("lost", 4, 0.8, 0.1, 0.4, 0.0)),
        sweep=(
            SweepRow(0.0, 0.0, 2_000_000, 4.0, 10.0, 1.0, 0.9, 0.45),
            SweepRow(0.5, 0.5, 500_000, 1.0, 5.5, 1.8, 0.893, 0.44),
        ),
        knee=1,
        speeds=(SpeedRow(1, 10, 5.5, 1.8, 1.7, 1.9), SpeedRow(16, 80, 40, 2.0, 1.9, 2.1)),
        more={"teacher": "dense.pt"},
    )
    page = _render(tmp_path, full)
    comparison, speeds, classes, sweep, layers, settings = page.tables
    assert ["parameters", "2,000,000", "500,000", "-75.0 %"] in comparison
    assert ["mAP@.5", "0.9000", "0.8930", "-0.0070"] in comparison
    assert ["GFLOPs at 320 px", "4.000", "1.000", "-75.0 %"] in comparison
    assert speeds[2] == ["16", "80.00", "40.00", "2.00x (1.90 to 2.10)"]
    assert [row[0] for row in classes] == ["class", "lost", "kept"]
    assert sweep[2][:4] == ["50.0%", "50.0%", "500,000", "1.000"]
    assert ["0", "16", "12", "75%", "first"] in layers
    assert ["2.cv1", "64", "8", "12%", "3 more for floor and rounding"] in layers
    assert ["2.m.0.cv1", "32", "32", "100%", "frozen (shortcut)"] in layers
    assert {tuple(row) for row in settings} >= {
        ("command", "python prune.py --percent 0.5"),
        ("recalibration", "8 batches"),
        ("compensation", "linear"),
        ("importance", "output"),
        ("threshold", "0.0123"),
        ("teacher", "dense.pt"),
    }
    assert page.values("class").count("marked") == 1
    assert "is at 50 %" in page.text


def test_many_classes_are_folded_away(tmp_path, report):
    rows = tuple(ClassRow(f"class {n}", 1, 0.5, 0.5, 0.5, 0.5) for n in range(80))
    page = _render(tmp_path, dataclasses.replace(report, classes=rows))
    assert page.tags.count("details") == 2
    assert "80 classes" in page.text


def test_a_missing_picture_is_a_word(tmp_path, report):
    page = _render(tmp_path, report, Pictures(gamma=tmp_path / "gone.png"))
    assert "could not be made" in page.text


def test_warnings_and_verdict_are_shown(tmp_path, report):
    page = _render(tmp_path, dataclasses.replace(report, warnings=("first", "second")))
    assert "warnings" in page.values("class")
    assert "second" in page.text
    page = _render(tmp_path, dataclasses.replace(report, verdict="ready to prune"))
    assert "warnings" not in page.values("class")
    assert "ready to prune" in page.text


def test_a_sweep_that_loses_at_once(tmp_path, report):
    rows = [SweepRow(p, p, 1, 1 - p, 1.0, 1.0, 0.9 - p, 0.1) for p in (0.0, 0.5)]
    page = _render(tmp_path, dataclasses.replace(report, sweep=tuple(rows), knee=0))
    assert "No percent of the sweep is without a clear loss" in page.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({}, "50.0 % of the prunable channels are removed", id="what went"),
        pytest.param({}, "-75.0 % parameters, -75.0 % GFLOPs", id="what is saved"),
        pytest.param({}, "1.83 times as fast (1.70 to 1.95) on cpu (2 threads)", id="speed"),
        pytest.param({"speeds": (SpeedRow(16, 1, 1, 1, 1, 1),)}, "16 images", id="a batch"),
        pytest.param({"speed_up": (1.1, 0.9, 1.3)}, "no measurable difference", id="noise"),
        pytest.param({"speed_up": (0.9, 0.8, 0.95)}, "slower: 0.90 times as fast", id="slower"),
        pytest.param({}, "from 0.900 to 0.893 (-0.7 points)", id="cost"),
        pytest.param({"after": _figures(0.5, 0.9)}, "(unchanged)", id="no cost"),
        pytest.param({"before": _figures(1, None)}, "was not measured", id="no data"),
        pytest.param({"removed": 0.0}, "0.0 % of the prunable channels", id="nothing"),
    ],
)
def test_headline(report, change, words):
    assert words in headline(dataclasses.replace(report, **change))


def test_comparison_without_data():
    titles = [row[0] for row in comparison_rows(_figures(1, None), _figures(1, None), 64, "cpu")]
    assert titles == [
        "channels", "parameters", "GFLOPs at 64 px", "file size, MB", "latency on cpu, ms",
    ]  # fmt: skip


def test_json_holds_what_programs_read(report):
    rows = (SweepRow(np.float64(0.5), 0.5, np.int64(7), 1.0, math.nan, 1.0, None, None),)
    changed = dataclasses.replace(report, sweep=rows, threshold=-math.inf, more={"path": Path("a")})
    content = json.loads(json.dumps(changed.to_dict(), allow_nan=False))
    # what has been in it since version 1
    assert set(content) >= {
        "weights", "data", "imgsz", "device", "percent", "suggested_percent", "threshold",
        "cut_difference", "before", "after", "speed_up", "layers", "widths",
    }  # fmt: skip
    assert content["after"]["parameters"] == 500_000
    assert content["layers"][1]["added"] == 3
    assert content["speed_up"] == [1.83, 1.7, 1.95]
    assert content["sweep"][0]["parameters"] == 7
    assert content["sweep"][0]["latency_ms"] is None
    assert content["threshold"] is None
    assert content["more"] == {"path": "a"}


def test_an_old_report_survives_a_failure(tmp_path, report):
    _render(tmp_path, report)
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(KeyError):
        _render(tmp_path, report, Pictures(gamma=_picture(tmp_path / "a.bmp")))
    assert (tmp_path / "report.html").read_bytes() == before
