"""On ort-cpu, images over HTTP equal those of the pipeline, and those that share a batch equal those alone."""

from __future__ import annotations

import base64
import io
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from http_client import png
from PIL import Image

from flexvar_runtime import FlexVARPipeline

if TYPE_CHECKING:
    from http_client import Running


def requests(classes: int) -> list[dict[str, Any]]:
    """20 requests with mixed seeds, classes and guidance weights, three of them without guidance."""
    rng = random.Random(0)
    return [
        {
            "class_id": rng.randrange(classes),
            "seed": str(rng.randrange(2**64)),
            "guidance": 0.0 if i % 7 == 0 else rng.choice([1.5, 2.5, 4.0]),
            "n": 1 + i % 2,
        }
        for i in range(20)
    ]


def test_twenty_at_once_equal_twenty_one_by_one(tiny_service: Running) -> None:
    classes = tiny_service.get("/v1/models").json["data"][0]["flexvar"]["class_count"]
    wanted = requests(classes)
    alone = [tiny_service.generate(**fields) for fields in wanted]
    with ThreadPoolExecutor(20) as pool:
        together = list(pool.map(lambda fields: tiny_service.generate(**fields), wanted))
    assert {answer.status for answer in (*alone, *together)} == {200}
    sizes = [int(size) for answer in together for size in answer.headers["x-flexvar-batch"].split(",")]
    assert max(sizes) >= 4, "they did not share batches"
    for one, other in zip(alone, together, strict=True):
        assert [image["b64_json"] for image in one.json["data"]] == [image["b64_json"] for image in other.json["data"]]


def pixels(file: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(file))))


def test_over_http_is_as_in_python(tiny_service: Running, tiny_bundle: Path) -> None:
    """A generation, an edit with OpenAI's mask, and a refinement."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (48, 64, 3), np.uint8)
    mask = np.zeros((48, 64), np.uint8)
    mask[16:32, 8:40] = 255
    opposite = np.dstack([picture, 255 - mask])
    with FlexVARPipeline.from_bundle(tiny_bundle, "ort-cpu", threads=1) as pipe:
        made = pipe([1, 1], guidance=1.5, seed=5).images
        inpainted = pipe.edit(picture, "inpaint", mask=mask, labels=[1], seed=5, paste=True).images
        refined = pipe.edit(picture, "refine", seed=5, strength=0.5).images
    files = {"image": png(Image.fromarray(picture)), "mask": png(Image.fromarray(opposite))}
    answers = (
        tiny_service.generate(class_id=1, n=2, guidance=1.5, seed=5),
        tiny_service.edit(files, class_id=1, seed=5, paste="true"),
        tiny_service.edit({"image": files["image"]}, seed=5, strength=0.5, prompt=""),
    )
    for answer, images in zip(answers, (made, inpainted, refined), strict=True):
        assert answer.status == 200, answer.body
        found = [pixels(image["b64_json"]) for image in answer.json["data"]]
        assert all(map(np.array_equal, found, images)) and len(found) == len(images)
    transparent = tiny_service.edit({"image": files["mask"]}, class_id=1, seed=5)
    assert transparent.status == 200, "without a mask, the transparent part of the picture is repainted"
