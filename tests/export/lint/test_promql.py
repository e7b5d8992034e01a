"""How many elements a query gives: as many as Prometheus would say."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuplan.export.lint import promql

ONE = [
    'sum(vllm:num_requests_waiting{model_name="chat"})',
    "sum by () (x)",
    "sum(rate(x_total[2m])) * 60",
    "(sum(a) / sum(b)) * 100",
    "sum(a) or vector(0)",
    "scalar(sum(a))",
    "histogram_quantile(0.95, sum(rate(x_bucket[5m])) by (le))",
    'sum by (model_name) (x{model_name="chat"})',  # one value of the label
    "count(x) * (avg(avg_over_time(x[1m])) > bool 0.5)",
    "max(x offset 5m) - min(x @ 1609746000)",
    "-sum(x)",
    "ceil(sum(x) / 3)",
    "sum(x # the queue\n)",
    "sum({__name__='x'})",
    "absent(x)",
    "vector(1)",
    "max_over_time(sum(x)[5m:1m])",
]
MANY = [
    ("x", None),
    ('vllm:num_requests_waiting{model_name="chat", pod=~"chat-.*"}', None),
    ("rate(x_total[2m])", None),
    ("sum by (pod) (x)", {"pod"}),
    ("sum(x) by (pod, model_name)", {"pod", "model_name"}),
    ("sum without (pod) (x)", None),
    ("topk(1, x)", None),
    ("x / on(pod) group_left() y", None),
    ("avg by (namespace) (a) / sum(b)", {"namespace"}),
    ("histogram_quantile(0.95, rate(x_bucket[5m]))", None),
    ("label_replace(x, 'a', '$1', 'b', '(.*)')", None),
    ("sum(x) and y", set()),
]


@pytest.mark.parametrize("query", ONE)
def test_one_element(query: str) -> None:
    shape = promql.read(query)
    assert shape is not None and shape.apart == frozenset()


@pytest.mark.parametrize(("query", "apart"), MANY, ids=[m[0] for m in MANY])
def test_several_elements_and_what_tells_them_apart(query: str, apart: set[str] | None) -> None:
    shape = promql.read(query)
    assert shape is not None and shape.apart == (apart if apart is None else frozenset(apart))


@pytest.mark.parametrize("query", ["", "sum(", "sum(x))", "x{", "{{ .Values.query }}", "select * from x", "sum()"])
def test_of_what_it_does_not_understand_it_says_nothing(query: str) -> None:
    assert promql.read(query) is None


@given(st.text(alphabet="sumx(){}[]<>=\"'*/+-, by1mbool#\\", max_size=40))
def test_no_text_makes_it_fail(query: str) -> None:
    promql.read(query)


def test_factors_and_counters() -> None:
    percent = promql.read("avg(vllm:kv_cache_usage_perc) * 100")
    assert percent is not None and (percent.factor, percent.outer) == (100.0, "avg")
    rated = promql.read("sum(rate(a_total[1m])) / sum(b_total)")
    assert rated is not None and (rated.plain, rated.counted) == ({"b_total"}, {"a_total"})
