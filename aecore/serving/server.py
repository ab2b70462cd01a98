"""The server behind the page: pictures in, restored pictures out, over HTTP.

| address | what it does |
|---|---|
| `GET /` | the page |
| `GET /networks` | JSON: what can be chosen, and the limits |
| `POST /restore?network=NAME&strength=1` | a picture file in, the restored one out, in its format |
| `POST /preview` | a picture file in, its first frame out as PNG, which every browser can show |
| `GET /progress?visit=ID` | JSON: how far a request with `visit=ID` has come |

Whatever fails is answered by a status of 400 or more and one sentence as plain text.
"""

import asyncio
import concurrent.futures
import dataclasses
import json
import logging
import mimetypes
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

import uvicorn
from etils import epath
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from aecore.errors import AecoreError, ConfigError
from aecore.media import images
from aecore.media.images import Picture
from aecore.restoring.restorer import Restorer
from aecore.serving import PAGE
from aecore.serving.device import AbandonedError, Device, Visit
from aecore.serving.limits import Limits
from aecore.storage import reason

_log = logging.getLogger(__name__)

_LOOK_EVERY = 0.2
"""Seconds after which it is looked again whether a visitor is still there."""

_BAD_REQUEST, _NOT_FOUND, _NOT_BY_GET, _TOO_LARGE, _NOT_A_FILE = 400, 404, 405, 413, 415
_FAILED, _BUSY = 500, 503


class RefusedError(Exception):
    """A request that is answered by a sentence instead of a picture."""

    def __init__(self, status: int, sentence: str):
        super().__init__(sentence)
        self.status = status


Work = Callable[[Path, Visit], Response]
"""What is done with a file that a visitor sent; it may write others beside it."""


def serve(restorers: Mapping[str, Restorer], *, host: str, port: int, limits: Limits) -> None:
    """Serves the page until the process is interrupted.

    Args:
      restorers: what visitors may choose from, by name; of full strength.
      host: the address to listen on.
      port: likewise; 0 for any that is free.
      limits: what visitors may ask for.

    Raises:
      ConfigError: nothing can listen there.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"the server can't listen on {host}, port {port} ({reason(error)}); choose another "
            "--host or --port"
        ) from error
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{listening.getsockname()[1]}/  (Ctrl-C ends it)", flush=True)
    config = uvicorn.Config(
        application(restorers, limits), log_level="warning", timeout_graceful_shutdown=1
    )
    uvicorn.Server(config).run(sockets=[listening])


def application(restorers: Mapping[str, Restorer], limits: Limits) -> Starlette:
    """The server as an ASGI application; the arguments are as for `serve`."""
    service = _Service(restorers, limits)
    return Starlette(
        routes=[
            Route("/networks", service.networks),
            Route("/restore", service.restore, methods=["POST"]),
            Route("/preview", service.preview, methods=["POST"]),
            # Otherwise they would be looked for among the page's files.
            *(Route(path, _only_by_post) for path in ("/restore", "/preview")),
            Route("/progress", service.progress),
            Route("/restore.js", lambda _: FileResponse(PAGE / "remote.js")),
            Mount("/", StaticFiles(directory=PAGE, html=True)),
        ],
        exception_handlers={RefusedError: _refused},
    )


async def _refused(request: Request, refusal: Exception) -> Response:
    del request
    assert isinstance(refusal, RefusedError)
    return PlainTextResponse(str(refusal), refusal.status)


async def _only_by_post(request: Request) -> Response:
    del request
    sentence = "Send a picture by POST, as the body of the request."
    return PlainTextResponse(sentence, _NOT_BY_GET, {"Allow": "POST"})


class _Service:
    """Answers requests."""

    def __init__(self, restorers: Mapping[str, Restorer], limits: Limits):
        self._restorers = restorers
        self._limits = limits
        self._device = Device()
        self._visits: dict[str, Visit] = {}
        self._threads = concurrent.futures.ThreadPoolExecutor(limits.pictures)

    async def networks(self, request: Request) -> Response:
        del request
        networks = [
            {
                "name": name,
                "scale": restorer.network.scale,
                "purpose": restorer.trained.about.get("purpose", ""),
                "limits": restorer.trained.about.get("limits", ""),
                "strength": True,
            }
            for name, restorer in self._restorers.items()
        ]
        return JSONResponse({"networks": networks, "limits": dataclasses.asdict(self._limits)})

    async def progress(self, request: Request) -> Response:
        key = request.query_params.get("visit", "")
        if key not in self._visits:
            raise RefusedError(_NOT_FOUND, "No picture of this name is being restored.")
        # Visits are in the order in which they came.
        ahead = list(self._visits).index(key)
        return JSONResponse({"share": self._visits[key].share, "ahead": ahead})

    async def restore(self, request: Request) -> Response:
        _check_parameters(request, "network", "strength", "visit")
        name = request.query_params.get("network", next(iter(self._restorers)))
        if name not in self._restorers:
            raise RefusedError(
                _NOT_FOUND, f"There is no network {name}; use {' or '.join(self._restorers)}."
            )
        restorer = self._restorers[name]
        try:
            blending = restorer.with_strength(float(request.query_params.get("strength", 1)))
        except (AecoreError, ValueError):
            raise RefusedError(_BAD_REQUEST, "The strength must be a number from 0 to 1.") from None

        def work(source, visit):
            with self._device.room_for(self._pixels(source, restorer.network.scale), visit):
                picture = images.read_picture(source)
                arrays = [frame.values for frame in picture.frames]
                notes = [*picture.notes, *restorer.differences(arrays[0])]
                restored = self._device.restore(restorer, arrays, visit)
                frames = tuple(
                    frame.restored(blending.blended(frame.values, values))
                    for frame, values in zip(picture.frames, restored, strict=True)
                )
                picture = dataclasses.replace(picture, frames=frames)
                return _written(picture, source.with_name("restored"), notes)

        return await self._answer(request, work)

    async def preview(self, request: Request) -> Response:
        _check_parameters(request, "visit")

        def work(source, visit):
            with self._device.room_for(self._pixels(source), visit):
                frame = images.read_picture(source).frames[0]
                return _written(Picture((frame,), "PNG"), source.with_name("preview"), [])

        return await self._answer(request, work)

    def _pixels(self, source: Path, scale: int = 1) -> int:
        """How many pixels a file's picture has once it is enlarged, decoding none.

        Raises:
          RefusedError: they are more than are allowed.
        """
        pixels = scale**2 * images.read_extent(epath.Path(source))[1]
        if pixels > self._limits.pixels:
            has = "has" if scale == 1 else f"would, {scale} times as large, have"
            raise RefusedError(
                _TOO_LARGE,
                f"The picture {has} {pixels / 1e6:,.1f} million pixels; the most that this server "
                f"takes are {self._limits.megapixels:,.4g} million.",
            )
        return pixels

    async def _answer(self, request: Request, work: Work) -> Response:
        """Receives a file and has it worked on in a thread.

        Raises:
          RefusedError: the file can't be restored, or not in time; too many are waiting; or the
            visitor has left.
        """
        if len(self._visits) >= self._limits.pictures:
            raise RefusedError(_BUSY, "Too many pictures are waiting; try again in a minute.")
        visit = Visit()
        key = request.query_params.get("visit", "")
        if not key or key in self._visits:
            key = str(id(visit))
        self._visits[key] = visit
        try:
            with tempfile.TemporaryDirectory(prefix="aecore-") as folder:
                source = Path(folder, "picture")
                try:
                    return await self._worked(request, work, source, visit)
                except AecoreError as error:
                    sentence = str(error).replace(str(source), "the file")
                    raise RefusedError(
                        _BAD_REQUEST, f"{sentence[:1].upper()}{sentence[1:]}."
                    ) from None
        except (RefusedError, asyncio.CancelledError):
            raise
        except Exception:
            _log.exception("a picture could not be restored")
            raise RefusedError(
                _FAILED, "Something failed on the server; its log says what."
            ) from None
        finally:
            self._visits.pop(key, None)

    async def _worked(self, request: Request, work: Work, source: Path, visit: Visit) -> Response:
        late = RefusedError(
            _BUSY,
            f"The picture took longer than {self._limits.seconds:g} seconds, so that it was given "
            "up; try a smaller one, or later.",
        )
        end = time.monotonic() + self._limits.seconds
        try:
            async with asyncio.timeout(self._limits.seconds):
                await self._receive(request, source)
        except TimeoutError:
            raise late from None
        refusal = None
        working = asyncio.get_running_loop().run_in_executor(self._threads, work, source, visit)
        while not (await asyncio.wait([working], timeout=_LOOK_EVERY))[0]:
            if time.monotonic() > end:
                refusal = late
            elif await request.is_disconnected():
                refusal = _left()
            visit.is_abandoned = refusal is not None
        try:
            return working.result()
        except AbandonedError:
            raise refusal or late from None

    async def _receive(self, request: Request, source: Path) -> None:
        """Writes the body of a request to a file."""
        if request.headers.get("Content-Type", "").startswith("multipart/"):
            raise RefusedError(
                _NOT_A_FILE,
                "The request is a form; send the file itself as its body, with curl by "
                "--data-binary @FILE.",
            )
        size = 0
        with source.open("wb") as file:
            async for chunk in _body(request):
                size += len(chunk)
                if size > self._limits.bytes:
                    raise RefusedError(
                        _TOO_LARGE,
                        "The file is too large; the most that this server takes are "
                        f"{self._limits.megabytes:,.4g} million bytes.",
                    )
                file.write(chunk)
        if not size:
            raise RefusedError(_BAD_REQUEST, "The request has no picture; send a file as its body.")


def _check_parameters(request: Request, *known: str) -> None:
    """Refuses what would be ignored, such as a misspelt strength."""
    for name in request.query_params:
        if name not in known:
            raise RefusedError(
                _BAD_REQUEST, f"There is no parameter {name!a}; use {' or '.join(known)}."
            )


async def _body(request: Request) -> AsyncIterator[bytes]:
    try:
        async for chunk in request.stream():
            yield chunk
    except ClientDisconnect:
        raise _left() from None


def _left() -> RefusedError:
    return RefusedError(_BAD_REQUEST, "The visitor left.")


def _written(picture: Picture, path: Path, notes: list[str]) -> Response:
    """A picture as the file that is the answer, with notes of what it lacks in a header."""
    path = path.with_suffix(images.ending(picture.format))
    notes += images.write_picture(picture, epath.Path(path))
    return Response(
        path.read_bytes(),
        media_type=mimetypes.guess_type(path.name)[0] or "application/octet-stream",
        headers={
            "Content-Disposition": f'attachment; filename="{path.name}"',
            "X-Content-Type-Options": "nosniff",
            "X-Notes": json.dumps(notes),
        },
    )
