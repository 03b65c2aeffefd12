"""OpenAI's own client talks to the server: whole, streamed, refused."""

import base64
import io
import threading

import numpy as np
import PIL.Image
import pytest

from pe_jax import endpoint
from tests import speakers
from tests.speakers import asked, picture

openai = pytest.importorskip("openai", reason="pip install openai")


@pytest.fixture(scope="module")
def client():
    server = endpoint.Server(speakers.assistant(), ("127.0.0.1", 0), endpoint.Limits(tokens=300), key="secret")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with openai.OpenAI(base_url=server.url, api_key="secret", max_retries=0, timeout=300) as client:
        yield client
    server.shutdown()
    server.server_close()


def messages(text: str, *images: np.ndarray) -> list:
    parts = []
    for image in images:
        file = io.BytesIO()
        PIL.Image.fromarray(image).save(file, "png")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def wanted():
    return speakers.assistant().reply([asked("What is this?", picture())], max_tokens=9)[0]


def test_an_image_is_talked_about(client, wanted):
    assert [model.id for model in client.models.list()] == ["tiny"]
    answer = client.chat.completions.create(
        model="tiny", messages=messages("What is this?", picture()), max_tokens=9, temperature=0
    )
    assert answer.choices[0].message.content == wanted and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 9


def test_a_stream_joins_to_the_answer(client, wanted):
    stream = client.chat.completions.create(
        model="tiny",
        messages=messages("What is this?", picture()),
        max_completion_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == wanted
    assert chunks[-1].usage.completion_tokens == 9 and len(chunks) > 5


def test_what_is_wrong_is_the_clients_own_error(client):
    with pytest.raises(openai.BadRequestError, match="this server fetches none"):
        part = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": [part]}])
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.chat.completions.create(model="gpt-4o", messages=messages("Hi"))
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
