"""The answers of the images API: JSON, one picture, or a stream of events."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from ..errors import HTTPError
from ..scheduling.jobs import Job
from ..scheduling.orders import Image, Order, Spent
from .encoding import Output, Pixels


@dataclass(frozen=True)
class Encoder:
    """Encodes pixels in threads. seconds: called with the time that a request took."""

    executor: Executor
    seconds: Callable[[float], None]

    async def images(self, output: Output, images: Sequence[Image]) -> tuple[list[bytes], float]:
        """The file of every image, and the seconds that this took."""
        loop, started = asyncio.get_running_loop(), time.monotonic()
        files = [
            loop.run_in_executor(self.executor, output.encode, image.pixels, image.settings.to_json())
            for image in images
        ]
        encoded = await asyncio.gather(*files)
        spent = time.monotonic() - started
        self.seconds(spent)
        return encoded, spent

    async def preview(self, output: Output, pixels: Pixels) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self.executor, output.encode, pixels)


def base_headers(order: Order, bundle: str, backend: str) -> dict[str, str]:
    """What is known of an answer before the images are."""
    known = {} if order.schedule is None else {"x-flexvar-schedule": str(order.schedule)}
    return {"x-flexvar-seed": str(order.seed), "x-flexvar-bundle": bundle, "x-flexvar-backend": backend, **known}


def result_headers(images: Sequence[Image], spent: Spent, encode: float) -> dict[str, str]:
    """What is known when the images are done. x-flexvar-batch: images that ran at once with each image."""
    times = {"queue": spent.queue, "generate": spent.generate, "decode": spent.decode, "encode": encode}
    return {
        "x-flexvar-schedule": str(images[0].settings.schedule),
        "x-flexvar-batch": ",".join(str(image.together) for image in images),
        "server-timing": ", ".join(f"{name};dur={seconds * 1e3:.1f}" for name, seconds in times.items()),
    }


def size_text(pixels_HW3: Pixels) -> str:
    """The size of an image in OpenAI's form, width x height."""
    return f"{pixels_HW3.shape[1]}x{pixels_HW3.shape[0]}"


def json_body(order: Order, output: Output, images: Sequence[Image], files: Sequence[bytes]) -> bytes:
    """OpenAI's ImagesResponse, with the seed of every image. It is joined as bytes: that is fast for large images."""
    parts = [b'{"created": %d, "data": [' % time.time()]
    for i, (image, file) in enumerate(zip(images, files, strict=True)):
        own = {"seed": str(image.settings.seed), "index": str(image.settings.index), "class_id": image.settings.label}
        parts += [b", " if i else b"", b'{"b64_json": "', base64.b64encode(file), b'", ', json.dumps(own)[1:].encode()]
    parts += [b"], ", json.dumps(_common(order, output, images)).encode()[1:]]
    return b"".join(parts)


def _common(order: Order, output: Output, images: Sequence[Image]) -> dict[str, Any]:
    return {
        "seed": str(order.seed),
        "schedule": str(images[0].settings.schedule),
        "size": size_text(images[0].pixels),
        "output_format": output.format,
        "background": "opaque",
        "usage": _usage(images),
    }


def _usage(images: Sequence[Image]) -> dict[str, Any]:
    """The number of generated tokens, of all scales."""
    made = sum(image.settings.schedule.tokens for image in images)
    details = {"image_tokens": 0, "text_tokens": 0}
    return {"input_tokens": 0, "input_tokens_details": details, "output_tokens": made, "total_tokens": made}


OnImages = Callable[[Sequence[Image], Spent, float], object]


async def events(job: Job, output: Output, encoder: Encoder, name: str, on_images: OnImages) -> AsyncIterator[bytes]:
    """The events of a streamed image: its previews, then the image. name: the first part of their type.

    A partial image has the size of its scale, which is smaller than that of the image. on_images: called with the
    images, and with the seconds of the job and of the encoder. Raises what the job raises.
    """
    shown = 0
    while (scale := await job.scales.get()) is not None:
        file = await encoder.preview(output, scale.pixels)
        h, w = scale.size
        place = {"index": scale.index, "count": scale.count, "height": h, "width": w}
        own: dict[str, Any] = {"partial_image_index": shown, "scale": place}
        yield _event(f"{name}.partial_image", file, _of_event(output, size_text(scale.pixels)) | own)
        shown += 1
    images, spent = await job.finished
    files, encode = await encoder.images(output, images)
    on_images(images, spent, encode)
    common = _common(job.order, output, images)
    own = {"index": str(images[0].settings.index), "class_id": images[0].settings.label}
    yield _event(f"{name}.completed", files[0], _of_event(output, common["size"]) | common | own)


def error_event(error: HTTPError) -> bytes:
    """The event of a stream that fails."""
    return b"event: error\ndata: " + error.body() + b"\n\n"


def _of_event(output: Output, size: str) -> dict[str, Any]:
    values = {"created_at": int(time.time()), "size": size, "quality": "auto", "background": "opaque"}
    return {**values, "output_format": output.format}


def _event(kind: str, file: bytes, values: dict[str, Any]) -> bytes:
    rest = json.dumps(values)[1:].encode()
    start = f'event: {kind}\ndata: {{"type": "{kind}", "b64_json": "'.encode()
    return b"".join([start, base64.b64encode(file), b'", ', rest, b"\n\n"])
