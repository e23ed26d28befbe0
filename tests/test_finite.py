"""Numbers that are not finite are found, with the batch and the layer they come from."""

import math

import pytest
import torch
from torch import nn

from utils.dataset import Batch
from utils.finite import (
    NotFinite,
    Reading,
    are_of_one_colour,
    check_finite,
    first_layer_not_finite,
    first_not_finite,
    save_for_a_look,
)

IMAGES = torch.zeros(5, 3, 32, 32, dtype=torch.uint8)


def paths_of(name):
    return [f"/data/{name}{i}.jpg" for i in range(5)]


def test_what_was_not_looked_at_is_found_later():
    unread = [
        Reading("the loss", torch.tensor(value), index)
        for index, value in enumerate((1.0, math.inf, math.nan))
    ]
    with pytest.raises(NotFinite, match=r"the loss is inf in epoch 4, batch 1$") as caught:
        check_finite(unread, 4)
    assert caught.value.number == 1
    del unread[1:]
    check_finite(unread, 4)
    assert unread == []
    check_finite(unread, 4)


def test_the_first_tensor_that_is_not_finite_is_named():
    good, bad = torch.ones(3), torch.tensor([1.0, -math.inf])
    assert first_not_finite({}) is None
    assert first_not_finite({"count": torch.tensor(3)}) is None
    assert first_not_finite({"a": good, "n": torch.tensor(3), "b": bad, "c": bad}) == "b"


def test_the_first_layer_is_named_and_no_hook_is_left():
    network = nn.Sequential(nn.Identity(), nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Tanh())
    x = torch.ones(1, 2)
    assert first_layer_not_finite(network, lambda: network(x)) is None
    network[1][0].weight.data[0, 0] = math.nan
    assert first_layer_not_finite(network, lambda: network(x)) == "1.0"
    assert not any(module._forward_hooks for module in network.modules())


def test_images_of_one_colour_are_known():
    images = IMAGES.clone()
    images[1, 2] = 200
    assert are_of_one_colour(images)
    images[4, 0, 31, 31] = 1
    assert not are_of_one_colour(images)


def test_the_batch_is_saved_for_a_look(tmp_path):
    batch = Batch(IMAGES, torch.zeros(0, 6), paths_of("x"), [])
    picture = save_for_a_look(tmp_path, batch, 3, 7, ("a",))
    assert picture == tmp_path / "nan_batch_3_7.jpg"
    assert picture.stat().st_size > 500
    assert (tmp_path / "nan_batch_3_7.txt").read_text().splitlines()[4] == "/data/x4.jpg"
