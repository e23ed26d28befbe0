"""Detections as text."""

from pathlib import Path

import pytest
import torch

from utils.coco_json import write_json
from utils.yolo_text import write_text

FULL = Path("/dev/full")  # every write to it says that no space is left


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_a_full_disk_names_the_file():
    detections = torch.tensor([[0.0, 0.0, 4.0, 4.0, 0.5, 1.0]])
    for write in (
        lambda: write_text(FULL, detections, (8, 8), save_conf=True),
        lambda: write_json(FULL, [{"image_id": 1}]),
    ):
        with pytest.raises(OSError, match="No space left") as caught:
            write()
        assert caught.value.filename == "/dev/full"
