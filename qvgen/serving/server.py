"""`qvgen serve-model`: an HTTP server that follows an alias of the registry and answers as `mlflow models serve` does.

POST /invocations   MLflow's scoring protocol; every answer names the version that gave it
GET /ping, /health  whether it is there; the port opens once a model is loaded, and one stays
GET /version        that version
GET /metrics        for Prometheus

The model is loaded from files that have the registry's hashes, with the code of the installed package: nothing that MLflow
keeps is run. There is no login and no TLS here; a proxy before it has both.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qvgen.hub.reference import parse_reference
from qvgen.hub.tracking import Registered
from qvgen.serving.engine import LOOK, WAITING, Engine, Turns, client_gone
from qvgen.serving.follow import Follower, Serving
from qvgen.serving.metrics import CLIENT_GONE, Metrics
from qvgen.serving.pyfunc import Served, signature_of

LARGEST_TEXT = 1 << 20  # bytes of a body without images: 4 rows of prompts at their limits are a tenth of it
NAMES = ("127.0.0.1", "localhost")  # of this host, under which the server always answers
HEADER = "Model-Version"
BODY = "largest_body"  # of a model's metadata
log = logging.getLogger("qvgen.serving")


class _Answers:
    """What MLflow's `PyFuncModel` asks, once it has checked the input against the signature."""

    def __init__(self, served: Served) -> None:
        self._served = served

    def predict(self, data: Any, params: Any = None) -> Any:
        from mlflow.exceptions import MlflowException

        try:
            return self._served.answer(data, params or {})
        except MlflowException:
            raise
        except Exception:  # not the request's fault, which MLflow would make of it
            log.exception("a video was not made")
            raise MlflowException("the video could not be made; the server's log says why") from None


def load(registered: Registered, folder: Path, turns: Turns, metrics: Metrics) -> Any:
    """A model that checks its input as one that MLflow loads does, because it is one, around an engine."""
    from mlflow.models import Model
    from mlflow.pyfunc import PyFuncModel

    from qvgen.sampling.settings import read_settings

    engine = Engine(folder, turns=turns, on_video=metrics.video)
    signature = signature_of(vars(read_settings(folder)), engine.reads_image, engine.makes)
    flavours = {"python_function": {"loader_module": __name__}}
    about = Model(signature=signature, flavors=flavours, metadata={BODY: _largest_body(engine)})
    return PyFuncModel(about, _Answers(Served(engine, registered.name)))


def _largest_body(engine: Engine) -> int:
    """Bytes of a request: four of base64 are three of an image."""
    limits = engine.limits
    return LARGEST_TEXT + (limits.videos * limits.image_bytes * 4 // 3 if engine.reads_image else 0)


def answer(serving: Serving, body: bytes, kind: str, gone: threading.Event) -> tuple[int, dict[str, Any]]:
    """Status and content for a request's body of content type `kind`. `gone`: set when its client has gone."""
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc.scoring_server import invocations

    client_gone.set(gone.is_set)  # of this thread, until its next request
    try:
        said = invocations(body, kind, serving.model, serving.model.metadata.get_input_schema())
    except MlflowException as error:
        content = json.loads(error.serialize_as_json())
        content.pop("stack_trace", None)
        return error.get_http_status_code(), content
    except Exception as error:  # `predict` raises MlflowException alone, so the input could not be read
        return 400, {"error_code": "BAD_REQUEST", "message": f"the input cannot be read: {error!s:.200}"}
    if said.status != 200:
        return said.status, {"error_code": "BAD_REQUEST", "message": said.response}
    return 200, json.loads(said.response)


def make_app(follower: Follower, metrics: Metrics, hosts: Sequence[str], threads: int) -> Any:
    """`hosts`: names besides this host's own under which it may be asked; a page whose name was made to point here is not."""
    from fastapi import FastAPI, Request
    from fastapi.middleware.trustedhost import TrustedHostMiddleware
    from fastapi.responses import JSONResponse, Response

    app, pool = FastAPI(openapi_url=None), ThreadPoolExecutor(threads, "video")
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*NAMES, *hosts], www_redirect=False)

    async def alive(request: Request) -> Response:
        return Response("\n", media_type="application/json")

    async def which(request: Request) -> Response:
        found = follower.serving.registered
        about = {"model": found.name, "version": found.version, "reference": str(follower.reference), "qvgen": _installed()}
        return JSONResponse(about)

    async def measured(request: Request) -> Response:
        return Response(metrics.text(), media_type=metrics.kind)

    async def invocations(request: Request) -> Response:
        started, body, serving = time.monotonic(), bytearray(), follower.serving
        largest = serving.model.metadata.metadata[BODY]
        async for piece in request.stream():
            body += piece
            if len(body) > largest:
                break
        if len(body) > largest:
            status, content = 413, {"error_code": "BAD_REQUEST", "message": f"limit body = {largest} bytes"}
        else:
            kind = request.headers.get("content-type", "")
            gone = threading.Event()
            made = asyncio.get_running_loop().run_in_executor(pool, answer, serving, bytes(body), kind, gone)
            while not (await asyncio.wait([made], timeout=LOOK))[0]:
                if await request.is_disconnected():
                    gone.set()
            status, content = await made
            if gone.is_set():
                status = CLIENT_GONE
        seconds, outcome = time.monotonic() - started, metrics.request(status)
        log.info("request status=%d outcome=%s version=%s seconds=%.2f", status, outcome, serving, seconds)
        content |= {"model": serving.registered.name, "version": serving.registered.version}
        return JSONResponse(content, status, headers={HEADER: str(serving)})

    for path, do in (("/ping", alive), ("/health", alive), ("/version", which), ("/metrics", measured)):
        app.add_route(path, do)
    app.add_route("/invocations", invocations, methods=["POST"])
    return app


def serve(text: str, host: str, port: int, interval: float, hosts: Sequence[str] = ()) -> None:
    """Until stopped; a request that was begun is finished first. Raises ValueError for a reference that cannot be served."""
    import uvicorn

    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)
    turns = Turns(WAITING)
    metrics = Metrics(lambda: turns.queue)
    follower = Follower(
        parse_reference(text),
        lambda registered, folder: load(registered, folder, turns, metrics),
        lambda outcome, now: metrics.look(outcome, now.registered.name, now.registered.version),
    )
    follower.start(interval)
    app = make_app(follower, metrics, hosts, WAITING + 4)  # some more than may wait, to refuse the next ones
    uvicorn.run(app, host=host, port=port, log_config=None, access_log=False, server_header=False)


def _installed() -> str | None:
    try:
        return version("qvgen")
    except PackageNotFoundError:
        return None
