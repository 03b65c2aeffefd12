"""The server as its clients meet it: over HTTP, whole and streamed, together, and with requests that are wrong."""

import base64
import concurrent.futures
import http.client
import io
import json
import threading

import numpy as np
import PIL.Image
import pytest

from pe_jax import endpoint
from pe_jax.endpoint import Limits, Refused
from tests import speakers
from tests.speakers import asked, picture


def data_url(image: np.ndarray, kind: str = "png") -> str:
    file = io.BytesIO()
    PIL.Image.fromarray(image).save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def shown(image: np.ndarray) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(image)}}


def said(text: str) -> dict:
    return {"type": "text", "text": text}


def user(*content) -> dict:
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


QUESTION = [user(shown(picture()), said("What is this?"))]


@pytest.fixture(scope="module")
def server():
    limits = Limits(body_bytes=200_000, pixels=10_000, images=3, tokens=300)
    server = endpoint.Server(speakers.assistant(), ("127.0.0.1", 0), limits, batch_size=4)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def whole():
    return speakers.assistant().reply([asked("What is this?", picture())], max_tokens=9)[0]


def call(server, body=None, path=endpoint.CHAT, headers=(), method="POST"):
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=300)
    raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, path, raw, dict(headers))
    response = connection.getresponse()
    return response.status, response.read().decode()


def test_an_answer_is_the_assistants_own(server, whole):
    status, text = call(server, {"model": "tiny", "messages": QUESTION, "max_tokens": 9})
    answer = json.loads(text)
    assert status == 200 and answer["object"] == "chat.completion" and answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": whole, "refusal": None}
    assert choice["finish_reason"] == "length"
    prompt = len(speakers.assistant().prompt(asked("What is this?", picture())).ids)
    assert answer["usage"] == {"prompt_tokens": prompt, "completion_tokens": 9, "total_tokens": prompt + 9}


def test_a_stream_joins_to_the_answer_and_ends_as_told(server, whole):
    body = {"messages": QUESTION, "max_tokens": 9, "stream": True, "stream_options": {"include_usage": True}}
    status, text = call(server, body)
    events = text.split("\n\n")
    assert status == 200 and events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 9
    deltas = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert deltas[0]["delta"]["role"] == "assistant" and deltas[-1]["finish_reason"] == "length"
    assert "".join(delta["delta"].get("content", "") for delta in deltas) == whole


def test_requests_at_the_same_time_get_their_own_answers(server, whole):
    def ask(tokens):
        body = {"messages": QUESTION, "max_tokens": tokens}
        return json.loads(call(server, body)[1])["choices"][0]["message"]["content"]

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        found = list(pool.map(ask, [9, 2, 9, 5, 9, 1]))
    assert found[0] == found[2] == found[4] == whole
    assert all(whole.startswith(text.rstrip("\ufffd")) for text in found) and len(set(found)) == 4


def test_a_client_that_leaves_does_not_stop_the_others(server, whole):
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=300)
    body = {"messages": QUESTION, "max_tokens": 250, "stream": True}
    connection.request("POST", endpoint.CHAT, json.dumps(body).encode())
    connection.getresponse().read(50)
    connection.close()
    status, text = call(server, {"messages": QUESTION, "max_tokens": 9})
    assert status == 200 and json.loads(text)["choices"][0]["message"]["content"] == whole


def test_models_and_health_are_told(server):
    status, text = call(server, path="/v1/models", method="GET")
    assert status == 200 and [model["id"] for model in json.loads(text)["data"]] == ["tiny"]
    assert json.loads(call(server, path="/v1/models/tiny", method="GET")[1])["object"] == "model"
    assert call(server, path="/health", method="GET") == (200, '{"status": "ok"}')


@pytest.mark.parametrize(
    ("body", "headers", "path", "status", "message"),
    [
        (b"{", {}, endpoint.CHAT, 400, "no JSON"),
        ({"messages": QUESTION, "model": "gpt"}, {}, endpoint.CHAT, 404, "model \\\"gpt\\\" is not served here"),
        ({}, {}, "/v1/completions", 404, "there is no /v1/completions to post to"),
        (b" " * 200_001, {}, endpoint.CHAT, 413, "200,001 bytes; at most 200,000"),
        ({"messages": [user("word " * 500)]}, {}, endpoint.CHAT, 400, "more than the context of 400"),
        ({"messages": [user(shown(picture()), shown(picture()), said("<|image|>"))], "max_tokens": 390}, {},
         endpoint.CHAT, 400, "want a whole number from 1 to 300"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_with_a_reason(server, body, headers, path, status, message):
    found, text = call(server, body, path, headers)
    assert found == status and message in text and json.loads(text)["error"]["type"] == "invalid_request_error"


def test_a_key_is_asked_for_where_one_is_set():
    server = endpoint.Server(speakers.assistant(), ("127.0.0.1", 0), key="secret")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert call(server, path="/v1/models", method="GET")[0] == 401
        assert call(server, {"messages": QUESTION}, headers={"Authorization": "Bearer wrong"})[0] == 401
        assert call(server, path="/v1/models", method="GET", headers={"Authorization": "Bearer secret"})[0] == 200
        assert call(server, path="/health", method="GET")[0] == 200
    finally:
        server.shutdown()
        server.server_close()


# ------------------------------------------------------------------------------------------------- what is understood

LIMITS = Limits(pixels=10_000, images=3, tokens=300)


def test_several_images_stand_where_they_are_shown_and_one_at_the_beginning():
    a, b = picture(seed=1), picture(seed=2)
    two = endpoint.parse({"messages": [user(said("First "), shown(a), said(", then "), shown(b))]}, LIMITS)
    assert two.conversation.turns == (("user", "First <image>, then <image>"),) and len(two.conversation.images) == 2
    one = endpoint.parse({"messages": [user(said("See: "), shown(a))]}, LIMITS)
    assert one.conversation.turns == (("user", "See: "),)
    system = [
        {"role": "system", "content": "Be brief."},
        user("Hi"),
        {"role": "assistant", "content": "Yes"},
        user("So?"),
    ]
    talk = endpoint.parse({"messages": system}, LIMITS).conversation
    assert talk.system == "Be brief." and talk.turns == (("user", "Hi"), ("assistant", "Yes"), ("user", "So?"))


def test_a_video_may_be_sent():
    content = base64.b64encode(b"film").decode()
    part = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{content}"}}
    assert endpoint.parse({"messages": [user(part, said("What happens?"))]}, LIMITS).conversation.video == b"film"


BOMB = data_url(np.zeros((101, 100, 3), np.uint8))


def part_of(url) -> dict:
    return {"messages": [user({"type": "image_url", "image_url": {"url": url}})]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "the request is []; want an object"),
        ({}, "messages=null; want a list"),
        ({"messages": ["hi"]}, 'messages[0] is "hi"; want a role'),
        ({"messages": [{"role": "tool", "content": "x"}]}, "want a role of system, user or assistant"),
        ({"messages": [user("a"), user("b")]}, "wanted the user's first and then one of each in turn"),
        ({"messages": [user("a"), {"role": "assistant", "content": "b"}]}, "the last message must be the user's"),
        ({"messages": [user("a"), {"role": "system", "content": "b"}]}, "want it first"),
        ({"messages": [{"role": "assistant", "content": [shown(picture())]}]}, "want text alone"),
        ({"messages": [user("a <image> b")]}, "<image> marks an image's place"),
        ({"messages": [user(said("a"), {"type": "input_audio"})]}, "want a part of type text, image_url or video_url"),
        ({"messages": [user({"type": "image_url"})]}, "has no address"),
        ({"messages": [user(*[shown(picture())] * 4)]}, "there are 4 images; at most 3"),
        (part_of("http://127.0.0.1/secret"), "this server fetches none"),
        (part_of("file:///etc/passwd"), "want data:image/...;base64,"),
        (part_of("/etc/passwd"), "want data:image/...;base64,"),
        (part_of("data:text/plain;base64,aGk="), "is text/plain; want a data: URL of image/"),
        (part_of("data:image/png;base64,a$b"), "is no base64"),
        (part_of("data:image/png;base64,aGk="), "no image that can be read"),
        (part_of(BOMB), "has 100 x 101 pixels; at most 10,000"),
        ({"messages": [user("a")], "max_tokens": 301}, "max_tokens=301; want a whole number from 1 to 300"),
        ({"messages": [user("a")], "max_tokens": True}, "max_tokens=true"),
        ({"messages": [user("a")], "temperature": 3}, "temperature=3; want a number from 0 to 2"),
        ({"messages": [user("a")], "top_p": 0}, "top_p=0 leaves no token"),
        ({"messages": [user("a")], "seed": -1}, "seed=-1"),
        ({"messages": [user("a")], "stop": ["a"] * 5}, "want a text, or a list of up to four"),
        ({"messages": [user("a")], "stream": "yes"}, 'stream="yes"'),
        ({"messages": [user("a")], "n": 2}, "n=2 is not supported"),
        ({"messages": [user("a")], "tools": [{}]}, "tools=[{}] is not supported"),
        ({"messages": [user("a")], "response_format": {"type": "json_object"}}, "is not supported"),
    ],
)  # fmt: skip
def test_a_wrong_request_is_refused_with_the_field_that_is_wrong(body, message):
    with pytest.raises(Refused) as caught:
        endpoint.parse(body, LIMITS)
    assert message in str(caught.value) and caught.value.status == 400


def test_addresses_are_fetched_where_that_is_allowed(server):
    host, port = server.server_address[:2]
    limits = Limits(pixels=10_000, images=3, tokens=300, urls=True)
    with pytest.raises(Refused, match="no image that can be read"):  # it was fetched, and is JSON
        endpoint.parse(part_of(f"http://{host}:{port}/health"), limits)
    with pytest.raises(Refused, match="cannot be fetched: HTTP Error 404"):
        endpoint.parse(part_of(f"http://{host}:{port}/nothing"), limits)
    with pytest.raises(Refused, match="want data:image"):
        endpoint.parse(part_of("file:///etc/passwd"), limits)


def test_more_requests_than_may_wait_are_told_to_come_back():
    answering = endpoint.Answering(speakers.assistant(), 1, waiting=1)
    try:
        prompt = speakers.assistant().prompt(asked("Say something."))
        asked_for = []
        with pytest.raises(Refused) as caught:
            for _ in range(50):
                asked_for.append(answering.ask(prompt, endpoint.Options(9)))
        assert caught.value.status == 429
    finally:
        for answer in asked_for:
            answer.close()
        answering.close()
