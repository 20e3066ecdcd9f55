"""Pictures over HTTP, to a tiny random model that sees in an engine process of its own: every protocol, and what each refuses."""

import base64
import re

import httpx
import pytest

from ernie45.server.anthropic_types import MessagesRequest, as_chat
from ernie45.server.failures import Failure
from ernie45.tokens.images import ImageLimits, read_image
from ernie45.tokens.video import FrameChoice, read_video
from tests.hostile_files import images_for, videos
from tests.serving import serving
from tests.sighted import RULES, sighted_folder

LARGE = ImageLimits(file_bytes=48 << 20)


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    folder = sighted_folder(tmp_path_factory.mktemp("served") / "model")
    with serving(str(folder), "--limits.images", "2", "--engine.num-pages", "256") as server:
        yield server.url


@pytest.fixture(scope="module")
def cat(photo):
    return base64.b64encode(photo("chelsea.png")).decode()


@pytest.fixture(scope="module")
def tokens(photo):
    return read_image(photo("chelsea.png"), RULES).tokens


def post(url, path, body):
    return httpx.post(url + path, json=body, timeout=60)


def chat(url, *parts, **fields):
    body = {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}], "max_tokens": 3, "temperature": 0}
    return post(url, "/v1/chat/completions", body | fields)


def image(data, **more):
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}", **more}}


def test_the_models_say_that_they_see(url):
    (card,) = httpx.get(url + "/v1/models").json()["data"]
    assert card["capabilities"]["vision"] is True


def test_a_server_without_eyes_says_what_it_left_in_the_files(tmp_path):
    with serving(str(sighted_folder(tmp_path / "model")), "--engine.text-only", "--engine.num-pages", "64") as server:
        told = httpx.get(server.url + "/status.json").text
    assert re.search(r"vision tower \(2 blocks\).* were left in the files \(text_only\): [\d.]+ MiB as stored", told)


def test_openai_chat_counts_images_and_finds_them_again(url, cat, tokens):
    first = chat(url, image(cat))
    assert first.status_code == 200, first.text
    usage = first.json()["usage"]
    assert usage["prompt_tokens_details"]["image_tokens"] == tokens
    assert usage["prompt_tokens"] > tokens
    again = chat(url, image(cat))
    assert again.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > tokens
    assert again.json()["choices"] == first.json()["choices"]
    assert "image_tokens" not in chat(url).json()["usage"]["prompt_tokens_details"]


def test_videos_are_counted_as_videos(url, clip):
    film = base64.b64encode(clip("carphone_pristine.mp4")).decode()
    part = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{film}", "num_frames": 2}}
    done = chat(url, part)
    assert done.status_code == 200, done.text
    assert done.json()["usage"]["prompt_tokens_details"]["video_tokens"] > 0


def test_responses_and_messages_take_images_and_count_the_same(url, cat):
    whole = chat(url, image(cat)).json()["usage"]["prompt_tokens"]
    content = [{"type": "input_image", "image_url": f"data:image/png;base64,{cat}"}, {"type": "input_text", "text": "What?"}]
    asked = {"model": "model", "input": [{"role": "user", "content": content}], "max_output_tokens": 3}
    response = post(url, "/v1/responses", asked)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["input_tokens"] == whole
    block = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": cat}}
    messages = [{"role": "user", "content": [block, {"type": "text", "text": "What?"}]}]
    said = post(url, "/v1/messages", {"model": "model", "messages": messages, "max_tokens": 3})
    assert said.status_code == 200, said.text
    usage = said.json()["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == whole
    counted = post(url, "/v1/messages/count_tokens", {"model": "model", "messages": messages})
    assert counted.json() == {"input_tokens": whole}


def test_pictures_are_streamed_about_too(url, cat):
    body = {"messages": [{"role": "user", "content": [image(cat)]}], "max_tokens": 3, "stream": True}
    with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=60) as stream:
        assert stream.status_code == 200
        assert list(stream.iter_lines())[-2] == "data: [DONE]"


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}}, "addresses of other machines are not fetched"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/hostname"}}, "files of this machine are not read"),
        ({"type": "image_url", "image_url": {"url": "/etc/hostname"}}, "is no address that is read here"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}, "no image of a known format"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "most"}}, "detail is 'most'"),
        ({"type": "input_audio", "input_audio": {}}, "reads text only|reads no"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}, "no video of a known container"),
    ],
)
def test_what_cannot_be_seen_is_a_400_that_names_the_part(url, part, says):
    answer = chat(url, part)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert any(word in error["message"] for word in says.split("|")), error
    assert "messages[0]" in error["message"]


def answered(answer, kind):
    """Tokens of what was seen, or the words of a refusal that names the part."""
    if answer.status_code == 200:
        return answer.json()["usage"]["prompt_tokens_details"][f"{kind}_tokens"]
    assert answer.status_code == 400, answer.text
    message = answer.json()["error"]["message"]
    assert message.startswith("messages[0].content[0]: "), message
    return message


def test_hostile_images_are_seen_or_refused_and_the_server_stays(url):
    found = images_for(RULES)
    found["byte bomb"] = (found["byte bomb"][0], None)  # a server's own limit is 48 MiB for all files of a request
    for name, (data, refusal) in found.items():
        said = answered(chat(url, image(base64.b64encode(data).decode())), "image")
        if refusal:
            assert re.search(refusal, str(said)), (name, said)
        else:
            assert said == read_image(data, RULES, LARGE).tokens, name
    assert chat(url).status_code == 200


def test_hostile_videos_are_seen_or_refused_and_the_server_stays(url):
    for name, (data, refusal) in videos().items():
        part = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{base64.b64encode(data).decode()}", "num_frames": 2}}
        said = answered(chat(url, part), "video")
        assert re.search(refusal, str(said)) if refusal else said == read_video(data, RULES, FrameChoice(count=2)).picture.tokens, (
            name,
            said,
        )
    assert chat(url).status_code == 200


def test_more_images_than_allowed_are_refused(url, cat):
    assert chat(url, *[image(cat)] * 2).status_code == 200
    answer = chat(url, *[image(cat)] * 3)
    assert answer.status_code == 400
    assert "more than 2 images" in answer.json()["error"]["message"]


def test_a_model_without_eyes_refuses_by_field(serve, cat):
    answer = serve().post("/v1/chat/completions", {"messages": [{"role": "user", "content": [image(cat)]}]})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "messages[0].content[0]"
    assert "reads text only" in answer.json()["error"]["message"]


def test_images_that_a_tool_gave_back_are_shown_by_the_user(cat):
    """Anthropic's `tool_result` may hold images; ERNIE's templates show pictures of users only."""
    shown = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": cat}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "zoomed"}, shown]}
    said = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "zoom", "input": {}}]},
        {"role": "user", "content": [result, {"type": "text", "text": "And now?"}]},
    ]
    tools = [{"name": "zoom", "input_schema": {"type": "object"}}]
    asked = {"messages": said, "tools": tools, "max_tokens": 3}
    last = as_chat(MessagesRequest.model_validate(asked), asked).messages[-2:]
    assert last[0] == {"role": "tool", "tool_call_id": "a", "content": "zoomed"}
    assert last[1] == {"role": "user", "content": [shown, {"type": "text", "text": "And now?"}]}
    only = {"messages": [*said[:2], {"role": "user", "content": [{**result, "content": [shown]}]}], "tools": tools, "max_tokens": 3}
    last = as_chat(MessagesRequest.model_validate(only), only).messages[-2:]
    assert (last[0]["content"], last[1]) == ("", {"role": "user", "content": [shown]})
    bad = {"messages": [*said[:2], {"role": "user", "content": [{**result, "content": [{"type": "search"}, shown]}]}], "max_tokens": 3}
    with pytest.raises(Failure, match="text blocks"):
        as_chat(MessagesRequest.model_validate(bad), bad)
