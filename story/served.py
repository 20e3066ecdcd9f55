"""The last step: `ernie serve` answers about pictures it has not seen, over HTTP, as any client of OpenAI's protocol would ask."""

import base64
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from ernie45.errors import RunError
from story.children import end_with_parent
from story.exam import Paper, read_papers

_READY = re.compile(r"ready: (http\S+)/v1")
_PATIENCE = 180.0
_EACH = 2  # questions of each group


def ask_the_server(model: Path, data: Path, logs: Path) -> list[dict[str, Any]]:
    """Start a server, ask it the first questions of each group, stop it; returns question, answer and picture of each.

    Raises RunError when the server does not come up, with its last words.
    """
    logs.mkdir(exist_ok=True)
    log = logs / "server.log"
    with log.open("w", encoding="utf-8") as file:
        command = [sys.executable, "-m", "ernie45", "serve", str(model), "--port", "0"]
        server = subprocess.Popen(command, stdout=file, stderr=file, preexec_fn=end_with_parent)
        try:
            address = _address(server, log)
            return [_asked(address, model.name, paper, thinking) for paper, thinking in _chosen(read_papers(data))]
        finally:
            server.terminate()
            server.wait(timeout=60)


def _chosen(papers: list[Paper]) -> list[tuple[Paper, bool]]:
    """The first questions of each group, the second one after thinking where that is taught."""
    groups: dict[str, list[Paper]] = {}
    for paper in papers:
        groups.setdefault(paper.group, []).append(paper)
    numbered = (pair for group in groups.values() for pair in enumerate(group[:_EACH]))
    return [(paper, number == 1 and bool(paper.question.thought)) for number, paper in numbered]


def _address(server: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + _PATIENCE
    while time.monotonic() < end:
        found = _READY.search(log.read_text("utf-8"))
        if found:
            return found[1]
        if server.poll() is not None:
            break
        time.sleep(0.2)
    raise RunError(f"the server did not come up: {' '.join(log.read_text('utf-8').split())[-300:]}")


def _asked(address: str, model: str, paper: Paper, thinking: bool) -> dict[str, Any]:
    picture = base64.b64encode(paper.picture.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": paper.question.text},
    ]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 120,
        "chat_template_kwargs": {"enable_thinking": thinking},
    }
    request = Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=120) as reply:
        message = json.load(reply)["choices"][0]["message"]
    return {
        "group": paper.group,
        "picture": paper.picture.name,
        "asked": paper.question.text,
        "thought": message.get("reasoning_content") or "",
        "said": message["content"],
        "expected": paper.question.answer,
        "right": paper.question.is_right(message["content"] or ""),
    }
