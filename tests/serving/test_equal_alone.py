"""On ort-cpu, images that share a batch equal those alone, bit for bit, through HTTP."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

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
