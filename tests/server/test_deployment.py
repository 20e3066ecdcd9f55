"""What stands around the server when it is deployed: HTTPS, traces, the dashboard, the files in deploy/."""

import configparser
import json
import re
import shlex
import ssl
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
import trustme
from opentelemetry.sdk.trace.export import SpanExportResult

from ernie45.cli import flags_of
from ernie45.errors import ConfigError
from ernie45.recipes.serve import ServeConfig
from ernie45.server.listener import make_server
from ernie45.server.settings import ServerSettings
from ernie45.server.telemetry import Telemetry

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def papers(tmp_path_factory):
    """A certificate for this machine, its key, and what a client must trust."""
    folder, authority = tmp_path_factory.mktemp("tls"), trustme.CA()
    own = authority.issue_cert("127.0.0.1", "localhost")
    own.private_key_pem.write_to_path(str(folder / "key.pem"))
    for blob in own.cert_chain_pems:
        blob.write_to_path(str(folder / "certificate.pem"), append=True)
    authority.cert_pem.write_to_path(str(folder / "authority.pem"))
    return folder


def test_https(serve, papers):
    running = serve(tls_certificate=papers / "certificate.pem", tls_key=papers / "key.pem")
    url = running.url.replace("http:", "https:")
    with httpx.Client(verify=ssl.create_default_context(cafile=str(papers / "authority.pem"))) as client:
        body = {"messages": [{"role": "user", "content": "«safe»"}]}
        assert client.post(f"{url}/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == "safe"
        with client.stream("POST", f"{url}/v1/chat/completions", json=body | {"stream": True}) as response:
            assert "[DONE]" in response.read().decode()
    with httpx.Client() as stranger, pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        stranger.get(f"{url}/health/live")
    with httpx.Client() as plain, pytest.raises(httpx.HTTPError):
        plain.get(f"{running.url}/health/live")


def test_certificates_that_are_none(papers, tmp_path):
    with pytest.raises(ConfigError, match="needs both"):
        ServerSettings(tls_certificate=papers / "certificate.pem")
    (tmp_path / "junk.pem").write_text("no certificate")
    for certificate in (tmp_path / "junk.pem", tmp_path / "missing.pem"):
        with pytest.raises(ConfigError, match="cannot speak HTTPS"):
            make_server(lambda: None, ServerSettings(tls_certificate=certificate, tls_key=papers / "key.pem"))


class Kept:
    """An exporter that keeps its spans."""

    def __init__(self):
        self.spans = []

    def export(self, spans):
        self.spans += spans
        return SpanExportResult.SUCCESS

    def shutdown(self):
        return None


def test_a_request_is_a_span_with_its_parts_and_no_words(serve, monkeypatch):
    kept = Kept()
    monkeypatch.setattr("ernie45.server.build.otlp_exporter", lambda endpoint: kept)
    running = serve(otlp_endpoint="http://127.0.0.1:9/v1/traces")
    assert running.chat("«secret words»").status_code == 200
    running.do(running.service.close())
    by_name = {span.name: span for span in kept.spans}
    assert set(by_name) == {"request", "queue", "prefill", "decode"}
    whole = by_name["request"]
    assert whole.attributes["gen_ai.usage.output_tokens"] > 1
    for name in ("queue", "prefill", "decode"):
        assert by_name[name].parent.span_id == whole.context.span_id
    assert whole.start_time == by_name["queue"].start_time
    assert by_name["queue"].end_time == by_name["prefill"].start_time
    assert by_name["decode"].end_time == whole.end_time
    assert "secret" not in "".join(span.to_json() for span in kept.spans)


def test_traces_are_posted_to_a_collector(serve):
    got = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            return None

    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    Thread(target=collector.serve_forever, daemon=True).start()
    running = serve(otlp_endpoint=f"http://127.0.0.1:{collector.server_port}/v1/traces")
    assert running.chat("«hello»").status_code == 200
    running.do(running.service.close())
    collector.shutdown()
    collector.server_close()
    assert [path for path, _ in got] == ["/v1/traces"]
    assert b"prefill" in got[0][1]


def test_telemetry_passes_everything_on():
    told = []

    class Inner:
        def stepped(self, model, message):
            told.append((model, message))

    Telemetry(Inner(), Kept()).stepped("m", "a step")
    assert told == [("m", "a step")]


def test_the_dashboard_shows_only_what_is_exported(running):
    running.chat("«hello»")
    page = running.client().get("/metrics").text
    exported = set(re.findall(r"^([a-z0-9_:]+)(?:\{| )", page, re.MULTILINE))
    # a counter without labels yet has no line; its type names it
    exported |= {f"{name}_total" for name in re.findall(r"^# TYPE ([a-z0-9_:]+?)(?:_total)? counter", page, re.MULTILINE)}
    board = json.loads((DEPLOY / "grafana.json").read_text())
    told = " ".join(target["expr"] for panel in board["panels"] for target in panel["targets"])
    shown = set(re.findall(r"(?:vllm:|ernie_)[a-z0-9_]+", told))
    assert len(shown) > 12
    assert shown - exported == set()
    places = [tuple(panel["gridPos"].values()) for panel in board["panels"]]
    assert len(set(places)) == len(places)


def test_the_unit_and_the_image_start_the_server_as_it_can_be_started():
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str
    unit.read(DEPLOY / "ernie45.service")
    words = shlex.split(unit["Service"]["ExecStart"])
    image = (DEPLOY / "Dockerfile").read_text()
    [entry] = re.findall(r"^ENTRYPOINT (.*)$", image, re.MULTILINE)
    known = dict(flags_of(ServeConfig))
    for command in (words, json.loads(entry)):
        assert command[:2][-1] == "serve"
        assert {word for word in command if word.startswith("--")} <= set(known)
    drain = float(words[words.index("--drain-seconds") + 1])
    assert float(unit["Service"]["TimeoutStopSec"]) > drain
    assert unit["Service"]["KillMode"] == "mixed"
    assert "\nUSER ernie\n" in image


def test_the_proxy_lets_streams_through_at_once():
    text = (DEPLOY / "nginx.conf").read_text()
    assert "proxy_buffering off;" in text
    assert text.count("{") == text.count("}")
