"""Importances: what they are made of, and that they find what does not matter."""

import pytest
import torch
from test_rewrite import BLOCKS, image, lively, spec_of

from utils.pruning.activations import expected_inputs, measure_inputs
from utils.pruning.channel_groups import SHORTCUT_RULES, conv_block, find_channel_groups
from utils.pruning.importance import IMPORTANCES, channel_importance, output_errors
from utils.pruning.slimming import gamma_importance


def setup(name="C3 with shortcuts", rule="group"):
    model = lively(spec_of(*BLOCKS[name]))
    found = find_channel_groups(model, rule)
    return model, found, measure_inputs(model, found, [image()])


@pytest.mark.parametrize("rule", SHORTCUT_RULES)
@pytest.mark.parametrize("name", BLOCKS)
def test_errors_against_a_slow_loop(name, rule):
    model, found, statistics = setup(name, rule)
    squares = {key: [0.0] * group.num_channels for key, group in found.prunable.items()}
    for path, layout in found.inputs.items():
        module = model.model.get_submodule(path)
        conv, bn = (module, None) if path not in found.outputs else (module.conv, module.bn)
        channels = [(s.group, c) for s in layout for c in range(s.size)]
        for position, (group, channel) in enumerate(channels):
            for out in range(conv.out_channels):
                weight = float(conv.weight[out, position].detach().square().sum())
                if bn is not None:
                    weight *= float(bn.weight[out].detach() ** 2 / (bn.running_var[out] + bn.eps))
                if group in squares:
                    variance = float(statistics[path].variance[position])
                    squares[group][channel] += weight * variance
    found_errors = output_errors(model, found, statistics)
    assert found_errors.keys() == squares.keys()
    for key, values in squares.items():
        expected = torch.tensor(values).sqrt()
        torch.testing.assert_close(found_errors[key], expected, rtol=1e-4, atol=1e-6)


def test_a_channel_nobody_listens_to_comes_last():
    """Its gamma is the largest of all, but its consumer's weights are zero."""
    model, found, _ = setup("plain convolutions")
    with torch.no_grad():
        conv_block(model, "0").bn.weight[5] = 10
        conv_block(model, "1").conv.weight[:, 5] = 0
    statistics = measure_inputs(model, found, [image()])
    costs = dict.fromkeys(found.prunable, 1.0)
    by_kind = {
        kind: channel_importance(kind, model, found, statistics, costs)["0"] for kind in IMPORTANCES
    }
    assert by_kind["gamma"].argmax() == 5
    assert by_kind["error"].argmin() == 5 == by_kind["error-per-cost"].argmin()
    assert by_kind["error"][5] == 0


def test_a_constant_channel_costs_nothing_with_and_without_images():
    model, found, _ = setup("plain convolutions")
    with torch.no_grad():
        conv_block(model, "0").bn.weight[3] = 0
        conv_block(model, "0").bn.bias[3] = 2
    for statistics in (measure_inputs(model, found, [image()]), expected_inputs(model, found)):
        assert output_errors(model, found, statistics)["0"][3] < 1e-6


def test_cost_divides_by_its_root():
    model, found, statistics = setup()
    costs = {name: 4.0 ** (n + 1) for n, name in enumerate(found.prunable)}
    errors = channel_importance("error", model, found, statistics, costs)
    ranked = channel_importance("error-per-cost", model, found, statistics, costs)
    for n, name in enumerate(found.prunable):
        torch.testing.assert_close(ranked[name] * 2 ** (n + 1), errors[name])


def test_gamma_is_the_classic_one():
    model, found, statistics = setup()
    ours = channel_importance("gamma", model, found, statistics, {})
    for name, values in gamma_importance(model, found).items():
        assert torch.equal(ours[name], values)


def test_unknown_kind():
    with pytest.raises(ValueError, match="expected one of gamma, error"):
        channel_importance("taylor", *setup(), {})
