"""The page of the server's state, with everything, with nothing, and with nonsense."""

import re

import pytest
from playwright.sync_api import expect

WHOLE = {
    "version": "9.9",
    "uptime_seconds": 7300,
    "draining": False,
    "queue": {"running": 3, "waiting": 1, "max_running": 16, "max_waiting": 64},
    "throughput": {"prompt_tokens_per_second": 410.0, "generated_tokens_per_second": 35.25},
    "totals": {"requests": 1204, "errors": 1, "cancelled": 3, "prompt_tokens": 512000, "generated_tokens": 90210, "preemptions": 0},
    "cache": {"pages_total": 1000, "pages_used": 250, "pages_reusable": 100, "page_size": 16, "prefix_hit_rate": 0.42},
    "memory": {"weights_bytes": 538_000_000, "cache_bytes": 400_000_000, "resident_bytes": 1_300_000_000},
    "latency": {"window_seconds": 300, "ttft": {"p50": 0.21, "p90": 0.5, "p95": 0.7, "p99": 1.1}, "tpot": {"p50": 0.028, "p99": 0.09}},
    "models": [{"id": "<b>tiny</b>", "state": "loaded", "parameters": 134_515_008, "dtype": "float32", "threads": 2}],
    "experts": {"num_experts": 4, "top_k": 2, "layers": [{"layer": 1, "load": [1, 1, 1, 1]}, {"layer": 2, "load": [7, 1, 0, 0]}]},
}


def test_everything_is_shown_and_kept_up_to_date(visit, server):
    server.state = dict(WHOLE)
    page = visit("/status")
    expect(page.locator("#state")).to_have_text("Running · for 2 h · version 9.9")
    assert page.locator(".tile h3").all_inner_texts() == ["Running", "Waiting", "Writing", "Cache", "First token"]
    assert page.locator(".tile .value").all_inner_texts() == ["3", "1", "35.3", "25 %", "210 ms"]
    expect(page.locator("#latency tbody tr").first).to_contain_text("To the first token")
    assert page.locator("#latency tbody tr").nth(1).locator("td").all_inner_texts()[:4] == ["28 ms", "–", "–", "90 ms"]
    expect(page.locator("#cache .legend")).to_contain_text("4,000 tokens in use")
    expect(page.locator("#experts rect")).to_have_count(8)
    expect(page.locator("#experts .hint")).to_contain_text("The busiest expert stands in layer 2, with 3.5 times an even share.")
    expect(page.locator("#models tbody th")).to_have_text("<b>tiny</b>")
    server.state = {**WHOLE, "draining": True, "queue": {"running": 2}}
    expect(page.locator("#state")).to_contain_text("Finishing what runs", timeout=6000)
    expect(page.locator("#charts polyline").first).to_have_attribute("points", re.compile("593.3,41.9 600.0,41.9$"))


@pytest.mark.parametrize(
    "state",
    [
        {},
        [],
        None,
        {
            "queue": [],
            "cache": {"pages_total": "x"},
            "experts": {"layers": [{"load": "x"}, None]},
            "models": [None],
            "latency": {"ttft": 5},
        },
    ],
    ids=str,
)
def test_what_is_missing_is_said_to_be_missing(visit, server, state):
    server.state = state
    page = visit("/status")
    expect(page.locator("#state")).to_have_text("Running")
    expect(page.locator("#latency")).to_have_text("Latency is not reported by this server.")
    expect(page.locator("#experts-section")).to_be_hidden()
    expect(page.locator("#problem")).to_be_hidden()


def test_experts_that_nobody_chose_yet_are_no_picture(visit, server):
    server.state = {"experts": {"layers": [{"layer": 1, "load": [0, 0]}]}}
    expect(visit("/status").locator("#experts")).to_have_text("No choice of an expert has been counted yet.")


def test_a_server_without_a_report_says_so(visit, server):
    server.state_status = 404
    page = visit("/status")
    expect(page.locator("#problem")).to_have_text("This server does not report its state.")


def test_the_state_may_need_a_key(visit, server):
    server.key, server.state = "secret", dict(WHOLE)
    page = visit("/status")
    page.fill("#key", "secret")
    page.press("#key", "Enter")
    expect(page.locator("#state")).to_contain_text("version 9.9")
    expect(page.locator("#problem")).to_be_hidden()


def test_the_state_fits_a_phone(visit, server):
    server.state = dict(WHOLE)
    page = visit("/status", viewport={"width": 360, "height": 640})
    expect(page.locator(".tile")).to_have_count(5)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
