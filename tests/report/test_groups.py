"""What belongs together in a report, by names alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from report.examples import large_report, mixture_report

from tsenor_cli.report.groups import group_pruned

PRUNED = next(record for record in large_report().tensors if record.action == "pruned")


def named(*names):
    return [replace(PRUNED, name=name) for name in names]


@pytest.mark.parametrize(
    ("name", "layer", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", 3, "self_attn.q_proj"),
        ("transformer.h.11.mlp.c_fc.weight", 11, "mlp.c_fc"),
        ("model.layers.0.block_sparse_moe.experts.7.w1.weight", 0, "block_sparse_moe.experts.w1"),
        ("model.layers.2.mlp.experts.gate_up_proj", 2, "mlp.experts.gate_up_proj"),
        ("classifier.dense.weight", None, "classifier.dense"),
        ("layers.5.weight", 5, "layers"),
        ("x.٣.weight", 3, "x"),
        ("x.999999999999.weight", None, "x.999999999999"),
    ],
)
def test_names(name, layer, kind):
    (group,) = group_pruned(named(name))
    assert (group.layer, group.kind) == (layer, kind)


def test_several_stacks_of_layers_are_told_apart():
    groups = group_pruned(named("vision.layers.0.q.weight", "text.layers.0.q.weight", "head.weight"))
    assert [group.name for group in groups] == ["layer 0, vision.layers: q", "layer 0, text.layers: q", "head"]


def test_layers_stand_in_order_whatever_the_files_do():
    groups = group_pruned(named("h.10.q.weight", "head.weight", "h.9.q.weight"))
    assert [group.layer for group in groups] == [9, 10, None]


def test_figures_of_a_group_are_those_of_all_its_weights_together():
    records = [
        replace(
            PRUNED,
            energy=3.0,
            kept_energy=0.5,
            output_energy=2.0,
            error=0.1,
            upper_bound=4.0,
            objective=3.0,
            seconds=1.0,
        ),
        replace(
            PRUNED,
            energy=1.0,
            kept_energy=0.9,
            output_energy=6.0,
            error=0.3,
            upper_bound=4.0,
            objective=4.0,
            seconds=2.0,
        ),
    ]
    (group,) = group_pruned(records)
    assert group.kept_energy == pytest.approx((1.5 + 0.9) / 4)
    assert group.error == pytest.approx((0.2 + 1.8) / 8)
    assert group.gap == pytest.approx(1 / 8)
    assert group.seconds == 3.0
    assert group_pruned([replace(records[0], error=None), records[1]])[0].error is None


def test_experts_are_one_group_a_layer():
    groups = group_pruned(mixture_report().tensors)
    assert len(groups) == 8
    assert {len(group.records) for group in groups} == {512}
