"""docs/grafana.json draws what the server's /metrics has, and nothing else."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

from prometheus_client.parser import text_string_to_metric_families

from pascaline.serve.telemetry import STATS, Telemetry

BOARD = json.loads((Path(__file__).parents[2] / "docs" / "grafana.json").read_text(encoding="utf-8"))
NAME = re.compile(r"\b(?:vllm|pascaline):\w+")


def exported() -> dict[str, set[str]]:
    """Every sample name of /metrics -> the names of its labels."""
    numbers = {attribute: 1 for _, attribute, _ in STATS if attribute} | {"running": 1, "waiting": 1, "blocks": 2, "blocks_used": 1}
    page = Telemetry("demo", 1.0, lambda: SimpleNamespace(**numbers)).text().decode()
    return {s.name: set(s.labels) for family in text_string_to_metric_families(page) for s in family.samples}


def test_every_metric_of_the_dashboard_is_exported_with_the_labels_it_asks_for() -> None:
    found = exported()
    expressions = [target["expr"] for panel in BOARD["panels"] for target in panel["targets"]]
    queries = [v["query"]["query"] for v in BOARD["templating"]["list"] if v["type"] == "query"]
    for text in [*expressions, *queries]:
        names = NAME.findall(text)
        assert names, text
        for name in names:
            assert name in found, f"{name} is not on /metrics"
            grouped = {label for group in re.findall(r"by \(([\w, ]+)\)", text) for label in group.split(", ")}
            assert {"model_name", *grouped} <= found[name], f"{name} has no label {grouped}"
        assert text.count("(") == text.count(")") and text.count("{") == text.count("}"), text


def test_it_answers_what_an_operator_asks() -> None:
    drawn = {name for panel in BOARD["panels"] for target in panel["targets"] for name in NAME.findall(target["expr"])}
    assert drawn >= {
        "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:prompt_tokens_total", "vllm:generation_tokens_total",
        "vllm:time_to_first_token_seconds_bucket", "vllm:inter_token_latency_seconds_bucket", "vllm:e2e_request_latency_seconds_bucket",
        "vllm:kv_cache_usage_perc", "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total",
        "vllm:spec_decode_num_accepted_tokens_total", "vllm:spec_decode_num_draft_tokens_total", "vllm:request_success_total",
        "pascaline:price_per_million_tokens",
    }  # fmt: skip


def test_it_can_be_imported_as_it_is() -> None:
    """No address and no data source of one installation; panels that do not overlap."""
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= set(BOARD) and "__inputs" not in BOARD
    assert [v["name"] for v in BOARD["templating"]["list"] if v["type"] == "datasource"] == ["datasource"]
    assert "http" not in json.dumps(BOARD)
    taken: set[tuple[int, int]] = set()
    for panel in BOARD["panels"]:
        where = panel["gridPos"]
        cells = {(x, y) for x in range(where["x"], where["x"] + where["w"]) for y in range(where["y"], where["y"] + where["h"])}
        assert where["x"] + where["w"] <= 24 and not taken & cells, panel["title"]
        taken |= cells
        assert {t["datasource"]["uid"] for t in panel["targets"]} == {"${datasource}"} == {panel["datasource"]["uid"]}
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(BOARD["panels"])
