import copy

import pytest
import torch
from torch import nn

from models.spec import ModelSpec
from models.yolo import Model
from utils.optim import build_optimizer
from utils.profile import count_gflops
from utils.pruning.channel_groups import find_channel_groups
from utils.pruning.rewrite import prune_model
from utils.pruning.slimming import (
    AutoRate,
    GradientNoise,
    SparsityPenalty,
    add_l1_subgradient,
    beta_magnitude,
    cost_weights,
    gamma_importance,
    gamma_statistics,
    median_gamma,
    prunable_batchnorms,
    scheduled_rate,
    shrink_gamma,
    zero_average,
)

FINITE, NOT_FINITE = torch.tensor(1.0), torch.tensor(float("inf"))


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


@pytest.mark.parametrize(
    ("epoch", "expected"), [(0, 1e-3), (10, 1e-3), (11, 8.75e-4), (14, 5e-4), (18, 0), (19, 0)]
)
def test_the_rate_is_held_and_then_falls_to_0(epoch, expected):
    assert scheduled_rate(1e-3, epoch, 20, "hold") == pytest.approx(expected, abs=1e-12)


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
    penalty.before_step(2, FINITE)
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
    assert set(SparsityPenalty(model, 0.1, 1).batchnorms) == everything


def test_the_penalty_acts_on_what_the_rule_lets_go(model):
    for rule in ("keep", "group"):
        trained = copy.deepcopy(model)
        penalty = SparsityPenalty(trained, 0.5, 1, rule)
        for parameter in trained.parameters():
            parameter.grad = torch.zeros_like(parameter)
        penalty.before_step(0, FINITE)
        pushed = {n for n, p in trained.named_parameters() if p.grad.any()}
        prunable = find_channel_groups(trained, rule).prunable
        producers = {path for group in prunable.values() for path in group.producers}
        assert pushed == {f"model.{path}.bn.weight" for path in producers}  # every beta is 0


def test_tied_gammas_are_pushed_alike_whatever_their_size(model):
    penalty = SparsityPenalty(model, 0.5, 1)
    first, second = (penalty.batchnorms[path] for path in ("2.cv1", "2.m.0.cv2"))
    second.weight.data.fill_(0.01)
    for bn in penalty.batchnorms.values():
        bn.weight.grad, bn.bias.grad = torch.zeros_like(bn.weight), torch.zeros_like(bn.bias)
    penalty.before_step(0, FINITE)
    assert torch.equal(first.weight.grad, second.weight.grad)


def test_the_proximal_step_by_hand():
    bn = nn.BatchNorm2d(5)
    bn.weight.data = torch.tensor([0.5, -0.5, 0.1, -0.05, 0.0])
    shrink_gamma([bn], 0.1)
    torch.testing.assert_close(bn.weight.data, torch.tensor([0.4, -0.4, 0.0, 0.0, 0.0]))
    assert bn.weight.count_nonzero() == 2
    shrink_gamma([bn], torch.tensor(0.3))
    torch.testing.assert_close(bn.weight.data, torch.tensor([0.1, -0.1, 0.0, 0.0, 0.0]))
    frozen = nn.BatchNorm2d(2).requires_grad_(False)
    shrink_gamma([frozen, bn], 1.0)
    shrink_gamma([], 1.0)
    assert frozen.weight.tolist() == [1, 1]
    assert not bn.weight.any()


def test_the_weights_follow_the_operations_that_a_channel_costs(model):
    """Independent answer: cut one channel of a group, let thop count."""
    groups = find_channel_groups(model, "group")
    weights = cost_weights(model, groups, 0.5)
    full = count_gflops(model, 64)
    saved = {}
    for name, group in groups.prunable.items():
        masks = {n: torch.ones(g.num_channels, dtype=bool) for n, g in groups.prunable.items()}
        masks[name][0] = False
        saved[name] = full - count_gflops(prune_model(model, groups, masks), 64)
        paths = list(group.producers)
        assert all(torch.equal(weights[paths[0]], weights[path]) for path in paths)
    first, *others = groups.prunable
    for name in others:
        ours = weights[next(iter(groups.prunable[name].producers))][0]
        theirs = weights[next(iter(groups.prunable[first].producers))][0]
        assert float(ours / theirs) == pytest.approx((saved[name] / saved[first]) ** 0.5)
    assert float(torch.cat(list(weights.values())).median()) == 1
    assert all((w == 1).all() for w in cost_weights(model, groups, 0).values())


@pytest.mark.parametrize("mode", ["subgradient", "proximal"])
def test_a_channel_is_pushed_by_its_weight_also_beside_a_frozen_layer(model, mode):
    penalty = SparsityPenalty(model, 0.01, 4, mode=mode, cost_power=0.5)
    weights = cost_weights(model, find_channel_groups(model, "group"), 0.5)
    assert len({float(w[0]) for w in weights.values()}) > 3
    set_gammas(model, [0.5, -0.5])
    frozen = list(penalty.batchnorms)[1]
    penalty.batchnorms[frozen].requires_grad_(False)
    for bn in penalty.batchnorms.values():
        if bn.weight.requires_grad:
            bn.weight.grad, bn.bias.grad = torch.zeros_like(bn.weight), torch.zeros_like(bn.bias)
    penalty.before_step(0, FINITE)
    optimizer = build_optimizer(model, "SGD", lr=0.1, momentum=0.9, weight_decay=0)
    penalty.after_step(0, FINITE, optimizer, copy.deepcopy(model))
    for path, bn in penalty.batchnorms.items():
        gamma = bn.weight.detach()
        if path == frozen:
            assert bn.weight.grad is None
            assert torch.equal(gamma.abs(), torch.full_like(gamma, 0.5))
        elif mode == "subgradient":
            torch.testing.assert_close(bn.weight.grad, 0.01 * weights[path] * gamma.sign())
            torch.testing.assert_close(bn.bias.grad, 0.1 * weights[path] * bn.bias.sign())
        else:
            torch.testing.assert_close(gamma.abs(), 0.5 - 0.1 * 0.01 * weights[path])


def test_an_average_is_0_where_gamma_is_and_untouched_elsewhere():
    averaged, live = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    averaged.weight.data = torch.tensor([0.3, -0.3, 1e-9, 0.2])
    live.weight.data = torch.tensor([0.0, -1e-12, 0.0, 5.0])
    zero_average([averaged], [live])
    torch.testing.assert_close(averaged.weight.data, torch.tensor([0.0, -0.3, 0.0, 0.2]))
    assert averaged.weight.count_nonzero() == 2


def a_noise(width=3):
    bn = nn.BatchNorm2d(width)
    return bn, GradientNoise([bn.weight])


def test_noise_is_the_median_rms_whatever_the_number_of_steps():
    bn, noise = a_noise()
    assert noise.sigma() == 0
    torch.manual_seed(0)
    scale = torch.tensor([0.01, 0.2, 3.0])
    bn.weight.grad = scale * torch.tensor([1.0, -1.0, 1.0])
    noise.take_in(torch.tensor(True))
    assert noise.sigma().item() == pytest.approx(0.2, rel=1e-4)
    for _ in range(2000):
        bn.weight.grad = scale * torch.randn(3)
        noise.take_in(torch.tensor(True))
    assert noise.sigma().item() == pytest.approx(0.2, rel=0.1)


def test_noise_passes_over_steps_that_are_left_out():
    bn, noise = a_noise()
    bn.weight.grad = torch.full((3,), 0.5)
    noise.take_in(torch.tensor(True))
    before = noise.sigma()
    bn.weight.grad = torch.tensor([0.0, float("inf"), float("nan")])
    noise.take_in(torch.tensor(False))
    assert torch.equal(noise.sigma(), before)


def test_noise_of_nothing_and_of_parameters_without_a_gradient():
    GradientNoise([]).take_in(torch.tensor(True))
    assert GradientNoise([]).sigma() == 0
    _, noise = a_noise()
    noise.take_in(torch.tensor(True))
    assert noise.sigma() == 0


def test_noise_goes_on_from_its_state():
    bn, noise = a_noise()
    bn.weight.grad = torch.tensor([0.1, 0.2, 0.3])
    noise.take_in(torch.tensor(True))
    resumed = GradientNoise([bn.weight])
    resumed.load_state_dict(copy.deepcopy(noise.state_dict()))
    for both in (noise, resumed):
        both.take_in(torch.tensor(True))
    assert torch.equal(noise.sigma(), resumed.sigma())


def test_auto_measures_the_noise_in_the_first_epoch_and_decays(model):
    penalty = SparsityPenalty(model, AutoRate(2.0), epochs=4)
    bn = penalty.batchnorms["0"]
    for other in penalty.batchnorms.values():
        other.weight.grad = torch.full_like(other.weight, 0.01)
        other.bias.grad = torch.zeros_like(other.bias)
    bn.bias.data.fill_(1.0)
    penalty.before_step(0, FINITE)
    for other in penalty.batchnorms.values():  # as gammas shrink their gradients grow
        other.weight.grad = torch.full_like(other.weight, 0.3)
        other.bias.grad.zero_()
    penalty.before_step(2, FINITE)
    rate = 2 * 0.01 * (1 - 0.9 * 2 / 4)
    assert penalty.rate(2) == pytest.approx(rate, rel=1e-4)
    torch.testing.assert_close(bn.weight.grad, torch.full_like(bn.weight, 0.3 + rate))
    torch.testing.assert_close(bn.bias.grad, torch.full_like(bn.bias, 10 * 2 * 0.01))


def test_a_resumed_penalty_has_the_auto_rate_of_its_run(model):
    penalty = SparsityPenalty(model, AutoRate(2.0, least=0.3, noise_gain=5.0), epochs=4)
    for bn in penalty.batchnorms.values():
        bn.weight.grad = torch.full_like(bn.weight, 0.04)
    penalty.before_step(0, FINITE)
    resumed = SparsityPenalty(copy.deepcopy(model), AutoRate(9.0), epochs=4)
    resumed.load_state_dict(penalty.state_dict())
    assert resumed.sparsity_rate == penalty.sparsity_rate
    assert resumed.rate(1) == penalty.rate(1) > 0.3


def averaged_with(penalty, model, gammas):
    """A copy of `model` whose penalised gammas are these; those of `model` itself are 1."""
    averaged = copy.deepcopy(model)
    place(gammas, SparsityPenalty(averaged, 0.1, epochs=4, shortcut=penalty.shortcut))
    return averaged


def pulled_at(penalty, model):
    """Which gammas the penalty alone moves, and which betas."""
    for bn in penalty.batchnorms.values():
        bn.weight.grad, bn.bias.grad = torch.zeros_like(bn.weight), torch.zeros_like(bn.bias)
        torch.nn.init.ones_(bn.bias)
    before = torch.cat([bn.weight.detach().clone() for bn in penalty.batchnorms.values()])
    optimizer = build_optimizer(model, "SGD", 0.1, momentum=0, weight_decay=0)
    penalty.before_step(0, FINITE)
    optimizer.step()
    penalty.after_step(0, FINITE, optimizer, model)
    layers = penalty.batchnorms.values()
    after = torch.cat([bn.weight.detach() for bn in layers])
    return after != before, torch.cat([bn.bias.detach() for bn in layers]) != 1


@pytest.mark.parametrize("mode", ["subgradient", "proximal"])
def test_once_enough_is_down_the_rest_is_let_go(model, mode):
    penalty = SparsityPenalty(model, 0.5, 4, "keep", mode, release_share=0.75)
    num_channels = penalty.num_channels  # no ties: a group is a layer
    gammas = torch.ones(num_channels)
    down = round(num_channels * 0.75)
    for number, expected in ((down - 1, None), (down, down / num_channels), (down, None)):
        gammas[:number] = 0.009
        gammas[number:] = 0.011
        assert penalty.release(averaged_with(penalty, model, gammas)) == expected
    twin = copy.deepcopy(model)
    resumed = SparsityPenalty(twin, 0.5, 4, "keep", mode, release_share=0.75)
    resumed.load_state_dict(copy.deepcopy(penalty.state_dict()))
    for each, trained in ((penalty, model), (resumed, twin)):
        on_gamma, on_beta = pulled_at(each, trained)
        assert torch.equal(on_gamma, gammas < 0.01)
        assert torch.equal(on_beta, gammas < 0.01) if mode == "subgradient" else not on_beta.any()
        assert each.share_let_go == pytest.approx(1 - down / num_channels)
        assert each.release(averaged_with(penalty, model, gammas)) is None


def test_tied_channels_are_let_go_together(model):
    """By the mean over their layers; a single gamma that is down says nothing."""
    penalty = SparsityPenalty(model, 0.5, epochs=4, release_share=0.01)
    averaged = averaged_with(penalty, model, torch.ones(penalty.num_channels))
    first, second = (averaged.model.get_submodule(path).bn for path in ("2.cv1", "2.m.0.cv2"))
    first.weight.data[:3] = 0
    second.weight.data[:2] = torch.tensor([0.019, 0.021])
    groups = find_channel_groups(model, "group").prunable
    assert penalty.release(averaged) is None  # one channel of a hundred
    penalty.release_share = 1 / sum(group.num_channels for group in groups.values())
    assert penalty.release(averaged) == penalty.release_share
    weights = dict(zip(penalty.batchnorms, penalty.weights, strict=True))
    expected = torch.zeros(8).index_fill(0, torch.tensor([0]), 1)
    for path, mask in weights.items():
        wanted = expected if path in ("2.cv1", "2.m.0.cv2") else torch.zeros_like(mask)
        assert torch.equal(mask, wanted)


def test_a_state_from_before_the_release_undoes_it(model):
    penalty = SparsityPenalty(model, 0.5, 4, cost_power=0.5, release_share=0.3)
    before = [weights.clone() for weights in penalty.weights]
    earlier = copy.deepcopy(penalty.state_dict())
    gammas = torch.arange(penalty.num_channels) % 2 * 1.0
    share = penalty.release(averaged_with(penalty, model, gammas))
    assert 0.3 < share < 0.7
    assert not all(map(torch.equal, penalty.weights, before))
    penalty.load_state_dict(earlier)
    assert not penalty.is_released
    assert all(map(torch.equal, penalty.weights, before))
    assert penalty.release(averaged_with(penalty, model, gammas)) == share


def test_frozen_layers_do_not_count_for_the_release(model):
    penalty = SparsityPenalty(model, 0.5, epochs=4, release_share=0.6)
    gammas = torch.ones(penalty.num_channels)
    first, *others = penalty.batchnorms.values()
    gammas[: first.num_features] = 0
    for bn in others:
        bn.weight.requires_grad_(False)
    assert penalty.release(averaged_with(penalty, model, gammas)) == 1


def test_by_default_nothing_is_let_go(model):
    penalty = SparsityPenalty(model, 0.5, epochs=4)
    assert penalty.release(averaged_with(penalty, model, torch.zeros(penalty.num_channels))) is None
    assert all(weights.all() for weights in penalty.weights)
    assert penalty.share_let_go == 0


def place(gammas, penalty):
    """Give the penalised layers these gammas, one after the other."""
    layers = list(penalty.batchnorms.values())
    for bn, part in zip(layers, gammas.split([bn.num_features for bn in layers]), strict=True):
        bn.weight.data.copy_(part)


def test_median_gamma_looks_at_what_is_trained(model):
    batchnorms = prunable_batchnorms(model)
    for bn in batchnorms.values():
        bn.weight.data.fill_(-0.5)
    assert median_gamma(batchnorms.values()) == 0.5
    batchnorms["0"].weight.requires_grad_(False).fill_(7)
    assert median_gamma(batchnorms.values()) == 0.5
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        median_gamma(batchnorms.values())


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


def test_an_unknown_mode_is_refused(model):
    with pytest.raises(ValueError, match="expected one of subgradient, proximal"):
        SparsityPenalty(model, 0.1, 10, mode="exact")
    with pytest.raises(ValueError, match="schedule is 'steep', expected one of linear, hold"):
        SparsityPenalty(model, 0.1, 10, schedule="steep")


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
