"""The pages that declarations and thresholds generate, and what every declaration must say."""

from pathlib import Path

import pytest

from moe_lab.observe import evidence, load, thresholds
from moe_lab.observe.document import PAGES, SHAPES, TOPICS, metrics, reasons
from moe_lab.observe.metric import METRICS

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_up_to_date(name: str):
    page = (DOCS / name).read_text(encoding="utf-8")
    assert page == PAGES[name](), "run: python -m moe_lab.observe.document docs"


def test_every_metric_is_described_once_and_in_full():
    page = metrics()
    for metric in METRICS.values():
        assert page.count(f"**`{metric.name}`**") == 1
        assert all((metric.formula, metric.low, metric.high, metric.balanced, metric.collapsed, metric.floor))
        assert metric.reads.endswith(".") and metric.shape in SHAPES
    assert {m.topic for m in METRICS.values()} == {module.TOPIC for module in TOPICS}


def test_names_that_other_parts_rely_on():
    per_layer = (
        "load_cv load_cv_of_ceiling importance_cv max_vio load_gini load_min_max effective_experts load_entropy "
        "token_entropy mutual_information dead_experts dropped_fraction logit_norm logsumexp nmi_domain nmi_token "
        "nmi_position coupling_matched coupling_mismatched coupling_gap coupling_z coupling_baseline router_cos "
        "router_cos_abs centroid_cos load_shift churn router_grad_ratio score_act_pearson score_act_spearman "
        "bias_range l1_lambda"
    )
    per_expert = "selected kept dropped top1 importance gate_mass expert_loss"
    for names, shape in ((per_layer, "L"), (per_expert, "LE")):
        assert all(METRICS[name].shape == shape for name in names.split())


def test_every_threshold_has_a_reason():
    names = [name for name in vars(thresholds) if name.isupper()]
    assert [name for name, *_ in reasons()] == names
    assert all(len(reason) > 20 for *_, reason in reasons())


def test_the_judge_and_the_metric_mean_the_same_by_dead():
    assert (thresholds.DEAD, thresholds.DEAD_WINDOW) == (load.DEAD, load.DEAD_WINDOW)
    assert evidence.ceiling(8, 2) == load.cv_ceiling(8, 2)
