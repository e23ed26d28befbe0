import pytest
import torch
from torch import nn

from models.spec import ModelSpec
from models.yolo import Model
from utils.pruning.channel_groups import find_channel_groups
from utils.pruning.slimming import (
    SparsityPenalty,
    add_l1_subgradient,
    beta_magnitude,
    gamma_importance,
    gamma_statistics,
    prunable_batchnorms,
    scheduled_rate,
)


@pytest.fixture
def model(tiny_spec):
    torch.manual_seed(0)
    return Model(ModelSpec.from_dict(tiny_spec))


def set_gammas(model, values):
    """Fill gamma and beta of all batch norms: gamma from `values`, cycling, beta its negative."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            gamma = torch.tensor(values).repeat(module.num_features)[: module.num_features]
            module.weight.data.copy_(gamma)
            module.bias.data.copy_(-gamma)


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, 1e-3), (5, 1e-3 * 0.55), (9, 1e-3 * 0.19)], ids=str
)
def test_the_rate_falls_linearly(epoch, expected):
    assert scheduled_rate(1e-3, epoch, 10) == pytest.approx(expected)


def test_the_subgradient_by_hand():
    bn = nn.BatchNorm2d(3)
    bn.weight.data = torch.tensor([0.5, -0.5, 0.0])
    bn.bias.data = torch.tensor([-2.0, 0.0, 3.0])
    bn.weight.grad, bn.bias.grad = torch.ones(3), torch.zeros(3)
    add_l1_subgradient([bn], 0.1, 0.2)
    torch.testing.assert_close(bn.weight.grad, torch.tensor([1.1, 0.9, 1.0]))
    torch.testing.assert_close(bn.bias.grad, torch.tensor([-2.0, 0.0, 2.0]))


def test_nothing_to_penalise_is_no_error():
    add_l1_subgradient([], 0.1, 0.1)
    frozen = nn.BatchNorm2d(2)
    add_l1_subgradient([frozen], 0.1, 0.1)
    assert frozen.weight.grad is None
    assert frozen.weight.tolist() == [1, 1]


def test_beta_keeps_the_full_rate_while_that_of_gamma_falls(model):
    penalty = SparsityPenalty(model, sparsity_rate=0.01, epochs=4)
    set_gammas(model, [0.5, -0.5])
    for bn in penalty.batchnorms.values():
        bn.weight.grad, bn.bias.grad = torch.zeros_like(bn.weight), torch.zeros_like(bn.bias)
    penalty.add_to_gradients(epoch=2)
    bn = penalty.batchnorms["0"]
    rate = 0.01 * (1 - 0.9 * 2 / 4)
    torch.testing.assert_close(bn.weight.grad[:2], torch.tensor([rate, -rate]))
    torch.testing.assert_close(bn.bias.grad[:2], torch.tensor([-0.1, 0.1]))


def test_what_the_classic_rule_freezes_is_not_penalised(model):
    kept = prunable_batchnorms(model, "keep")
    everything = {p for p, m in model.model.named_modules() if type(m).__name__ == "Conv"}
    frozen = {"2.cv1", "2.m.0.cv1", "2.m.0.cv2", "4.cv1"}
    frozen |= {f"4.m.{n}.cv{k}" for n in (0, 1) for k in (1, 2)}
    assert set(kept) == everything - frozen
    assert set(prunable_batchnorms(model, "group")) == everything


def one_step(loss_scale, accumulate, rate):
    """gamma after one optimizer step, with the loss scaled as AMP does and split in parts."""
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(4)
    bn.weight.data = torch.tensor([0.5, -0.4, 0.3, 0.2])
    optimizer = torch.optim.SGD(bn.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=loss_scale, enabled=loss_scale != 1)
    x = torch.randn(8, 4, 2, 2)
    for part in (x,) * accumulate:
        scaler.scale((bn(part) ** 2).mean() / accumulate).backward()
    scaler.unscale_(optimizer)
    add_l1_subgradient([bn], rate, rate)
    scaler.step(optimizer)
    return bn.weight.detach().clone()


@pytest.mark.parametrize(("loss_scale", "accumulate"), [(65536.0, 1), (1.0, 4), (1024.0, 2)])
def test_lambda_means_the_same_with_loss_scale_and_accumulation(loss_scale, accumulate):
    """Added to scaled or accumulated gradients it would move gamma too little, or too much."""
    reference = one_step(1.0, 1, rate=0.05)
    torch.testing.assert_close(one_step(loss_scale, accumulate, rate=0.05), reference)
    pulled = one_step(1.0, 1, rate=0.0) - reference
    torch.testing.assert_close(pulled, 0.1 * 0.05 * torch.tensor([1.0, -1.0, 1.0, 1.0]))


def test_a_rate_of_zero_changes_nothing():
    assert torch.equal(one_step(1.0, 1, rate=0.0), one_step(1.0, 1, rate=-0.0))
    bn = nn.BatchNorm2d(3)
    bn.weight.grad, bn.bias.grad = torch.randn(3), torch.randn(3)
    before = bn.weight.grad.clone(), bn.bias.grad.clone()
    add_l1_subgradient([bn], 0.0, 0.0)
    assert torch.equal(bn.weight.grad, before[0])
    assert torch.equal(bn.bias.grad, before[1])


@pytest.mark.parametrize("rate", [-1e-4, float("nan"), float("inf")])
def test_a_rate_that_is_no_rate_is_refused(model, rate):
    with pytest.raises(ValueError, match="expected a number from 0"):
        SparsityPenalty(model, rate, 10)


def test_a_fused_network_is_refused(model):
    with pytest.raises(ValueError, match="no batch norm"):
        prunable_batchnorms(model.fuse())


def test_statistics_of_a_fresh_network(model):
    statistics = gamma_statistics(model)
    assert set(statistics.percentiles) == {1.0}
    assert len(statistics.percentiles) == 101
    assert statistics.suggested_percent == statistics.share_below_1e2 == 0
    assert all(len(layer) == 21 for layer in statistics.layers.values())


def test_statistics_by_hand(model):
    set_gammas(model, [-1.0, 0.5, 0.005, -0.0005])  # all widths are multiples of 4
    statistics = gamma_statistics(model)
    assert statistics.share_below_1e2 == 0.5
    assert statistics.share_below_1e3 == 0.25
    assert statistics.suggested_percent == 0.75  # only gamma = 1 is left in every layer
    row = statistics.as_row()
    assert list(row) == [
        *(f"gamma/q{q}" for q in ("00", "05", "25", "50", "75", "95", "100")),
        "gamma/below_1e-2",
        "gamma/below_1e-3",
        "gamma/suggested_percent",
    ]
    assert row["gamma/q00"] == pytest.approx(0.0005)
    assert row["gamma/q100"] == 1
    assert statistics.layers["0"][0] == pytest.approx(0.0005)


def test_only_prunable_channels_count(model):
    bn = model.model.get_submodule("2.cv1").bn
    bn.weight.data.zero_()
    assert gamma_statistics(model, "keep").share_below_1e3 == 0
    assert gamma_statistics(model, "group").share_below_1e3 == 0  # the mean with 2.m.0.cv2
    model.model.get_submodule("2.m.0.cv2").bn.weight.data.zero_()
    assert gamma_statistics(model, "group").share_below_1e3 > 0


def test_importance_of_tied_channels_is_their_mean(model):
    found = find_channel_groups(model, "group")
    model.model.get_submodule("2.cv1").bn.weight.data.fill_(-0.2)
    model.model.get_submodule("2.m.0.cv2").bn.weight.data.fill_(0.4)
    importance = gamma_importance(model, found)
    assert set(importance) == set(found.prunable)
    torch.testing.assert_close(importance["2.cv1"], torch.full((8,), 0.3))
    model.model.get_submodule("2.cv1").bn.bias.data.fill_(-1.0)  # the other beta is 0
    torch.testing.assert_close(beta_magnitude(model, found)["2.cv1"], torch.full((8,), 0.5))


def test_a_diverged_network_is_refused(model):
    model.model.get_submodule("0").bn.weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="0: gamma is NaN"):
        gamma_statistics(model)
