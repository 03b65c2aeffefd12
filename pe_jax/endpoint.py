"""The chat completions of OpenAI's interface over HTTP, answered by an assistant: `pe-jax serve`.

  POST /v1/chat/completions    whole, or streamed by server-sent events
  GET  /v1/models, /health

Images and videos come inside the request, as data: URLs of base64; addresses are fetched only where that is allowed.
Requests that wait at the same time are answered in one batch. What is wrong with a request is its answer, with a 4xx
status and OpenAI's form of an error.
"""

import base64
import binascii
import dataclasses
import hmac
import http.server
import io
import json
import queue
import re
import threading
import time
import urllib.error
import urllib.request
import uuid
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import PIL.Image

from pe_jax.assistant import Assistant, Options, Prompt
from pe_jax.data import chat, sources
from pe_jax.data.image import BadImage
from pe_jax.data.video import BadVideo

CHAT, MODELS, HEALTH = "/v1/chat/completions", "/v1/models", "/health"
# Fields that change nothing at these values, and that we cannot honour at others.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1, None),
    "logprobs": (False, None),
    "top_logprobs": (0, None),
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": ({}, None),
    "tools": ([], None),
    "functions": ([], None),
    "response_format": ({"type": "text"}, None),
    "audio": (None,),
}


class Refused(ValueError):
    """A request that cannot be answered; `status` is HTTP's, `param` the field that is wrong."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may ask for.

    Attributes:
      body_bytes: of a whole request.
      pixels: of one image.
      images: of one conversation.
      tokens: of one answer.
      waiting: requests that wait for their turn; more are told to come back.
      urls: whether images are fetched from http:// and https:// addresses, which lets clients make this machine ask
        any address it can reach.
    """

    body_bytes: int = 64 * 2**20
    pixels: int = 50_000_000
    images: int = 16
    tokens: int = 2048
    waiting: int = 64
    urls: bool = False


# ------------------------------------------------------------------------------------------------------------ requests


@dataclasses.dataclass(frozen=True)
class Request:
    """A chat request that was understood."""

    conversation: chat.Conversation
    options: Options
    stream: bool
    usage: bool  # whether a stream ends with the numbers of tokens


def parse(body: Any, limits: Limits) -> Request:
    """A request from its JSON.

    Raises:
      Refused: saying which field is wrong, what it is and what is wanted.
    """
    if not isinstance(body, Mapping):
        raise Refused(f"the request is {_shown(body)}; want an object with `messages`.")
    for name, allowed in _NEUTRAL.items():
        if name in body and body[name] not in allowed:
            raise Refused(f"{name}={_shown(body[name])} is not supported here; leave it out.", name)
    wanted = body.get("max_completion_tokens", body.get("max_tokens"))
    tokens = min(512, limits.tokens) if wanted is None else wanted
    if not _is_int(tokens) or not 1 <= tokens <= limits.tokens:
        raise Refused(f"max_tokens={_shown(tokens)}; want a whole number from 1 to {limits.tokens}.", "max_tokens")
    temperature = _number(body, "temperature", 0.0, 0.0, 2.0)
    top_p = _number(body, "top_p", 1.0, 0.0, 1.0)
    if top_p == 0:
        raise Refused("top_p=0 leaves no token to draw; want a number above 0 and at most 1.", "top_p")
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or len(stop) > 4 or not all(isinstance(text, str) and text for text in stop):
        raise Refused(f"stop={_shown(stop)}; want a text, or a list of up to four.", "stop")
    seed = body.get("seed")
    if seed is not None and not (_is_int(seed) and 0 <= seed < 2**32):
        raise Refused(f"seed={_shown(seed)}; want a whole number from 0 to 2^32 - 1.", "seed")
    stream = body.get("stream") or False
    if not isinstance(stream, bool):
        raise Refused(f"stream={_shown(stream)}; want true or false.", "stream")
    asked = body.get("stream_options") or {}
    if not isinstance(asked, Mapping):
        raise Refused(f"stream_options={_shown(asked)}; want an object.", "stream_options")
    # Without a seed no two requests draw alike; with one, the same draws again.
    drawn = seed if seed is not None else uuid.uuid4().int % 2**32 if temperature else 0
    options = Options(tokens, temperature, 0, top_p, drawn, tuple(stop))
    return Request(_conversation(body.get("messages"), limits), options, stream, bool(asked.get("include_usage")))


def _conversation(messages: Any, limits: Limits) -> chat.Conversation:
    if not isinstance(messages, list) or not messages:
        raise Refused(f"messages={_shown(messages)}; want a list of at least one.", "messages")
    turns: list[tuple[str, list[Any]]] = []
    system = None
    for i, message in enumerate(messages):
        at = f"messages[{i}]"
        if not isinstance(message, Mapping) or message.get("role") not in ("system", "developer", "user", "assistant"):
            raise Refused(f"{at} is {_shown(message)}; want a role of system, user or assistant, and content.", at)
        parts = _parts(message.get("content"), f"{at}.content", limits)
        if message["role"] in ("system", "developer"):
            if i or not all(isinstance(part, str) for part in parts):
                raise Refused(f"{at} is the system's; want it first, and text alone.", at)
            system = "".join(parts)
            continue
        if message["role"] == "assistant" and not all(isinstance(part, str) for part in parts):
            raise Refused(f"{at} is the assistant's; want text alone.", at)
        turns.append((message["role"], parts))
    media = [part for _, parts in turns for part in parts if isinstance(part, _Medium)]
    images = tuple(part.content for part in media if part.kind == "image")
    videos = [part.content for part in media if part.kind == "video"]
    if len(images) > limits.images:
        raise Refused(
            f"there are {len(images)} images; at most {limits.images} are allowed in one request.", "messages"
        )
    if len(videos) > 1 or (videos and images):
        raise Refused(
            f"there are {len(images)} images and {len(videos)} videos; want images, or one video.", "messages"
        )
    # Several images stand where they are in the text; a single one, and a video, at the beginning, as was trained.
    mark = "<image>" if len(images) > 1 else ""
    texts = [(role, "".join(part if isinstance(part, str) else mark for part in parts)) for role, parts in turns]
    if not texts or texts[-1][0] != "user":
        raise Refused("the last message must be the user's: it is what is answered.", "messages")
    try:
        return chat.Conversation(tuple(texts), images, videos[0] if videos else None, system=system)
    except ValueError as error:
        raise Refused(f"messages: {error}", "messages") from error


@dataclasses.dataclass(frozen=True)
class _Medium:
    kind: str  # "image" or "video"
    content: bytes


def _parts(content: Any, at: str, limits: Limits) -> list[Any]:
    """A message's texts and media, in order."""
    given = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(given, list):
        raise Refused(f"{at} is {_shown(content)}; want a text, or a list of parts.", at)
    found: list[Any] = []
    for i, part in enumerate(given):
        where = f"{at}[{i}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            if mark := re.search("<image>|<video>", part["text"]):
                raise Refused(f"{where}: {mark[0]} marks an image's place here; write it in another way.", where)
            found.append(part["text"])
        elif kind in ("image_url", "video_url"):
            url = part.get(kind)
            url = url.get("url") if isinstance(url, Mapping) else url
            if not isinstance(url, str):
                raise Refused(f'{where} has no address; want {{"{kind}": {{"url": "data:..."}}}}.', where)
            name = kind.removesuffix("_url")
            medium = _Medium(name, _content(url, name, where, limits))
            if name == "image":
                _check_pixels(medium.content, where, limits)
            found.append(medium)
        else:
            raise Refused(f"{where} is {_shown(part)}; want a part of type text, image_url or video_url.", where)
    return found


def _content(url: str, kind: str, where: str, limits: Limits) -> bytes:
    if found := re.match(r"data:([\w.+-]+/[\w.+-]+)?(?:;[\w.+=-]+)*;base64,", url):
        if found[1] and not found[1].startswith(f"{kind}/"):
            raise Refused(f"{where} is {found[1]}; want a data: URL of {kind}/....", where)
        try:
            return base64.b64decode(url[found.end() :], validate=True)
        except binascii.Error as error:
            raise Refused(f"{where} is no base64: {error}.", where) from error
    if not re.match(r"https?://", url):
        raise Refused(f"{where} is {_shown(url)}; want data:{kind}/...;base64,....", where)
    if not limits.urls:
        raise Refused(
            f"{where} is the address {_shown(url)}, and this server fetches none; send the {kind} itself as "
            f"data:{kind}/...;base64,... (or start it with --allow-urls).",
            where,
        )
    try:
        with urllib.request.urlopen(url, timeout=20) as response:
            content = response.read(limits.body_bytes + 1)
    except (OSError, ValueError) as error:
        raise Refused(f"{where}: {_shown(url)} cannot be fetched: {error}.", where) from error
    if len(content) > limits.body_bytes:
        raise Refused(f"{where}: {_shown(url)} has more than {limits.body_bytes:,} bytes.", where)
    return content


def _check_pixels(content: bytes, where: str, limits: Limits) -> None:
    """Refuses by the header alone what would take much memory to decode."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            with PIL.Image.open(io.BytesIO(content)) as opened:
                width, height = opened.size
    except PIL.Image.DecompressionBombError as error:
        raise Refused(f"{where}: {error}; at most {limits.pixels:,} pixels are allowed.", where) from error
    except (OSError, SyntaxError, ValueError) as error:
        raise Refused(f"{where} is no image that can be read: {error}.", where) from error
    if width * height > limits.pixels:
        raise Refused(f"{where} has {width} x {height} pixels; at most {limits.pixels:,} are allowed.", where)


def _number(body: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = default if body.get(name) is None else body[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Refused(f"{name}={_shown(value)}; want a number from {low:g} to {high:g}.", name)
    return float(value)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


# ------------------------------------------------------------------------------------------------------------- batches


@dataclasses.dataclass(eq=False)  # one is itself; prompts are arrays
class _Job:
    prompt: Prompt
    options: Options
    pieces: queue.SimpleQueue = dataclasses.field(default_factory=queue.SimpleQueue)
    left: bool = False  # whether nobody waits for it any more

    @property
    def batch(self) -> tuple[Any, ...]:
        """What all requests of a batch share; drawn ones have their own seed and are alone."""
        return self.options.top_k, self.options.top_p, self.options.seed


class _Answer:
    """Iterates over the pieces of one answer; `close` leaves it to the others of its batch."""

    def __init__(self, job: _Job):
        self._job, self._ended = job, False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._ended:
            raise StopIteration
        piece = self._job.pieces.get()
        if isinstance(piece, BaseException):
            raise piece
        self._ended = piece.ended is not None
        return piece

    def close(self) -> None:
        self._job.left = True


class Answering:
    """One thread that answers what waits, as many at a time as fit together."""

    def __init__(self, assistant: Assistant, batch_size: int, waiting: int):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1.")
        self._assistant, self._size = assistant, batch_size
        self._jobs: queue.Queue[_Job | None] = queue.Queue(waiting)
        self._thread = threading.Thread(target=self._run, name="answering", daemon=True)
        self._thread.start()

    def ask(self, prompt: Prompt, options: Options) -> "_Answer":
        """The pieces of an answer as they come.

        Raises:
          Refused: if too many wait already.
        """
        job = _Job(prompt, options)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Refused("too many requests are waiting; come back later.", status=429) from None
        return _Answer(job)

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        held: list[_Job] = []
        closing = False
        while True:
            if not held:
                if closing:
                    return
                job = self._jobs.get()
                closing = job is None
                held += [] if job is None else [job]
            while not closing and len(held) < self._size:  # whoever came meanwhile
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
                closing = job is None
                held += [] if job is None else [job]
            held = [job for job in held if not job.left]
            if held:
                batch = [job for job in held if job.batch == held[0].batch][: self._size]
                held = [job for job in held if job not in batch]
                self._answer(batch)

    def _answer(self, batch: list[_Job]) -> None:
        try:
            pieces = self._assistant.pieces([job.prompt for job in batch], [job.options for job in batch])
            for piece in pieces:
                batch[piece.row].pieces.put(piece)
                if all(job.left for job in batch):
                    return
        except Exception as error:  # whatever it is, those who wait must hear of it, and the next batch go on
            for job in batch:
                job.pieces.put(error)


# ---------------------------------------------------------------------------------------------------------------- HTTP


class Server(http.server.ThreadingHTTPServer):
    """Serves an assistant at `address`, (host, port); a port of 0 takes a free one.

    Args:
      assistant: what answers.
      address: where to listen.
      limits: of a request.
      batch_size: answers written at a time.
      key: if given, what clients must send as their API key.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        assistant: Assistant,
        address: tuple[str, int],
        limits: Limits | None = None,
        batch_size: int = 8,
        key: str | None = None,
    ):
        super().__init__(address, _Handler)
        self.assistant, self.limits, self.key = assistant, limits or Limits(), key
        self.answering = Answering(assistant, batch_size, self.limits.waiting)
        self.started = int(time.time())

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{host}:{port}/v1"

    def server_close(self) -> None:
        super().server_close()
        self.answering.close()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds that a client may be silent within a request

    def do_GET(self) -> None:
        self._answered(self._get)

    def do_POST(self) -> None:
        self._answered(self._post)

    def _answered(self, answer: Any) -> None:
        """Runs a method; what it raises becomes an answer."""
        try:
            answer()
        except Refused as error:
            self._error(str(error), error.status, "invalid_request_error", error.param, error.code)
        except (ConnectionError, TimeoutError):
            self.close_connection = True
        except Exception as error:  # ours, not the client's; the server goes on
            self.log_error("%s: %s", type(error).__name__, error)
            self._error("the server failed to answer; its log says why.", 500, "server_error")

    def _get(self) -> None:
        path = self.path.partition("?")[0].rstrip("/")
        name = self.server.assistant.name
        model = {"id": name, "object": "model", "created": self.server.started, "owned_by": "pe-jax"}
        if path == HEALTH:
            self._json({"status": "ok"})
            return
        self._check_key()
        if path == MODELS:
            self._json({"object": "list", "data": [model]})
        elif path == f"{MODELS}/{name}":
            self._json(model)
        else:
            raise Refused(f"there is no {self.path}; want {CHAT}, {MODELS} or {HEALTH}.", status=404)

    def _post(self) -> None:
        body = self._body()  # read also where it is refused, or what it says would be taken for the next request
        self._check_key()
        if self.path.partition("?")[0].rstrip("/") != CHAT:
            raise Refused(f"there is no {self.path} to post to; want {CHAT}.", status=404)
        try:
            content = json.loads(body)
        except ValueError as error:
            raise Refused(f"the request is no JSON: {error}.") from error
        server, name = self.server, self.server.assistant.name
        request = parse(content, server.limits)
        if content.get("model", name) != name:
            asked = _shown(content["model"])
            raise Refused(f"model {asked} is not served here; {name!r} is.", "model", 404, "model_not_found")
        try:
            prompt = server.assistant.prompt(request.conversation, request.options.max_tokens)
        except chat.TooLong as error:
            raise Refused(str(error), "messages", code="context_length_exceeded") from error
        except (BadImage, BadVideo, sources.BadRecord, ModuleNotFoundError) as error:
            raise Refused(f"messages: {error}", "messages") from error
        pieces = server.answering.ask(prompt, request.options)
        about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
        if request.stream:
            self._streamed(pieces, about, len(prompt.ids) if request.usage else None)
            return
        text, ended, tokens = "", None, 0
        for piece in pieces:
            text, ended, tokens = text + piece.text, piece.ended, piece.tokens
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": ended}
        usage = _usage(len(prompt.ids), tokens)
        self._json(about | {"object": "chat.completion", "choices": [choice], "usage": usage})

    def _streamed(self, pieces: _Answer, about: dict[str, Any], prompt_tokens: int | None) -> None:
        about = about | {"object": "chat.completion.chunk"}

        def event(content: Any) -> None:
            text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
            self.wfile.write(f"data: {text}\n\n".encode())
            self.wfile.flush()

        def chunk(delta: dict[str, Any], ended: str | None = None) -> dict[str, Any]:
            return about | {"choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": ended}]}

        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")  # which is how the end of a stream is told
        self.end_headers()
        self.close_connection = True
        piece = None
        try:
            event(chunk({"role": "assistant", "content": ""}))
            for piece in pieces:
                if piece.text:
                    event(chunk({"content": piece.text}))
            assert piece is not None
            event(chunk({}, piece.ended))
            if prompt_tokens is not None:
                event(about | {"choices": [], "usage": _usage(prompt_tokens, piece.tokens)})
            event("[DONE]")
        except ConnectionError:
            raise
        except Exception as error:  # the status is sent; the stream itself has to tell
            self.log_error("%s: %s", type(error).__name__, error)
            event({"error": {"message": "the server failed to answer; its log says why.", "type": "server_error"}})
        finally:
            pieces.close()  # a client that went away leaves its batch

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdigit():
            self.close_connection = True
            raise Refused("the request has no Content-Length; want one.", status=411)
        if int(length) > self.server.limits.body_bytes:
            self.close_connection = True
            most = self.server.limits.body_bytes
            raise Refused(f"the request has {int(length):,} bytes; at most {most:,} are allowed.", status=413)
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError("the client went away within its request")
        return body

    def _check_key(self) -> None:
        if self.server.key is None:
            return
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.server.key.encode()):
            raise Refused("the API key is missing or wrong.", status=401, code="invalid_api_key")

    def _json(self, content: Any, status: int = 200) -> None:
        body = json.dumps(content, ensure_ascii=False).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _error(self, message: str, status: int, kind: str, param: str | None = None, code: str | None = None) -> None:
        try:
            self._json({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)
        except ConnectionError:
            self.close_connection = True


def _usage(prompt: int, answer: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
