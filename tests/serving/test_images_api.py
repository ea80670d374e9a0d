"""OpenAI's images API over HTTP, with the stand-in model: answers, headers, streams and refusals."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from http_client import MASK, PICTURE, png, until
from PIL import Image

from flexvar_runtime.model.noise import fresh_seed

if TYPE_CHECKING:
    from http_client import Answer, Running


def pixels(answer: Answer, image: int = 0) -> np.ndarray:
    content = base64.b64decode(answer.json["data"][image]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(content)))


def expected(label: int, seed: int, index: int, side: int = 64) -> np.ndarray:
    from stub_service import pixels_of

    return pixels_of(label, seed, index, side, side)


def test_images_come_with_their_seeds(stub_service: Running) -> None:
    seed = 2**64 - 1
    answer = stub_service.generate(prompt="Plain", n=3, seed=seed)
    assert answer.status == 200
    body = answer.json
    assert body["seed"] == str(seed) and body["size"] == "64x64" and body["schedule"] == "1_2_3_4"
    assert [(one["seed"], one["index"], one["class_id"]) for one in body["data"]] == [
        (str(seed), str(i), 0) for i in range(3)
    ]
    for i in range(3):
        assert np.array_equal(pixels(answer, i), expected(0, seed, i))
    assert body["usage"]["output_tokens"] == 3 * 30


def test_first_index_goes_on_with_a_seed(stub_service: Running) -> None:
    whole = stub_service.generate(prompt="plain", n=3, seed="5")
    last = stub_service.generate(prompt="plain", seed="5", first_index="2")
    assert np.array_equal(pixels(whole, 2), pixels(last)) and last.json["data"][0]["index"] == "2"


def test_a_fresh_seed_is_returned_and_repeats_the_image(stub_service: Running) -> None:
    first = stub_service.generate(class_id=7)
    again = stub_service.generate(class_id=7, seed=first.json["seed"])
    assert np.array_equal(pixels(first), pixels(again))
    assert stub_service.generate(class_id=7).json["seed"] != first.json["seed"]


def test_headers(stub_service: Running) -> None:
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    answer = stub_service.generate({"x-request-id": "mine-1", "traceparent": trace}, prompt="plain", n=2, seed=3)
    found = answer.headers
    assert found["x-request-id"] == "mine-1" and found["traceparent"] == trace
    assert (found["x-flexvar-seed"], found["x-flexvar-schedule"]) == ("3", "1_2_3_4")
    assert (found["x-flexvar-bundle"], found["x-flexvar-backend"]) == ("a" * 64, "stub")
    assert found["x-flexvar-batch"] == "2,2"
    assert [part.partition(";")[0] for part in found["server-timing"].split(", ")] == [
        *["queue", "generate", "decode", "encode"]
    ]
    made = stub_service.generate({"x-request-id": "not a valid id!"}, prompt="plain").headers["x-request-id"]
    assert len(made) == 32 and made.isalnum()


@pytest.mark.parametrize(("kind", "name"), [("image/png", "PNG"), ("image/jpeg", "JPEG"), ("image/webp", "WEBP")])
def test_a_picture_itself(stub_service: Running, kind: str, name: str) -> None:
    answer = stub_service.generate({"accept": f"{kind}, text/html;q=0.5"}, prompt="plain", seed=1)
    assert answer.status == 200 and answer.headers["content-type"] == kind
    assert Image.open(io.BytesIO(answer.body)).format == name
    assert answer.headers["x-flexvar-seed"] == "1"


def test_accept_any_image_takes_the_output_format(stub_service: Running) -> None:
    answer = stub_service.generate({"accept": "image/*"}, prompt="plain", output_format="webp", output_compression=10)
    assert answer.headers["content-type"] == "image/webp"
    conflict = stub_service.generate({"accept": "image/png"}, prompt="plain", output_format="webp")
    assert conflict.status == 400 and conflict.error["param"] == "output_format"
    several = stub_service.generate({"accept": "image/png"}, prompt="plain", n=2)
    assert several.status == 400 and several.error["param"] == "n"


def test_a_stream_shows_scales(stub_service: Running) -> None:
    answer = stub_service.generate(prompt="plain", seed=9, stream=True, partial_images=3)
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.headers["x-flexvar-seed"] == "9"
    events = answer.events()
    assert [kind for kind, _ in events] == [*["image_generation.partial_image"] * 3, "image_generation.completed"]
    for i, (kind, data) in enumerate(events[:3]):
        assert data["type"] == kind and data["partial_image_index"] == i
        side = 16 * data["scale"]["height"]
        found = np.asarray(Image.open(io.BytesIO(base64.b64decode(data["b64_json"]))))
        assert np.array_equal(found, expected(0, 9, 0, side)) and data["size"] == f"{side}x{side}"
    last = events[-1][1]
    assert last["seed"] == "9" and last["usage"]["total_tokens"] == 30
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(last["b64_json"])))), expected(0, 9, 0))


def test_a_stream_tells_its_error(stub_service: Running) -> None:
    [(kind, data)] = stub_service.generate(prompt="no memory", stream=True).events()
    assert kind == "error" and data["error"]["code"] == "out_of_memory"


def test_edits(stub_service: Running) -> None:
    answer = stub_service.edit({"image": PICTURE, "mask": MASK}, prompt="plain", seed=4, n=2)
    assert answer.status == 200, answer.body
    assert len(answer.json["data"]) == 2 and answer.headers["x-flexvar-batch"] == "2,2"
    assert stub_service.edit({"image[]": PICTURE}, prompt="", task="refine").status == 200
    streamed = stub_service.edit({"image": PICTURE, "mask": MASK}, prompt="plain", stream="true", partial_images=1)
    assert [kind for kind, _ in streamed.events()] == ["image_edit.partial_image", "image_edit.completed"]


@pytest.mark.parametrize(
    ("files", "fields", "param"),
    [
        ({"image": b"GIF89a nonsense"}, {}, "image"),
        ({"image": b"/etc/passwd"}, {}, "image"),
        ({"image": PICTURE, "mask": b"x"}, {}, "mask"),
        ({"image": PICTURE, "mask": PICTURE}, {}, "mask"),
        ({"image": PICTURE, "mask": png(Image.new("RGBA", (32, 64)))}, {}, "mask"),
        ({"mask": MASK}, {}, "image"),
        ({"image": b""}, {}, "image"),
        ({"image": PICTURE, "other": MASK}, {}, "other"),
        ({"image": PICTURE}, {"image2": "x"}, "image2"),
        ({"image": PICTURE, "mask": MASK}, {"task": "refine"}, "mask"),
    ],
)
def test_edits_that_are_refused(stub_service: Running, files: Any, fields: Any, param: str) -> None:
    answer = stub_service.edit(files, prompt="plain", **fields)
    assert answer.status == 400 and answer.error["param"] == param, answer.body
    assert "passwd" not in answer.error["message"]


def test_an_edit_without_what_it_needs(stub_service: Running) -> None:
    missing = stub_service.edit({"image": PICTURE}, prompt="plain", task="inpaint")
    assert missing.status == 400 and missing.error["param"] == "mask" and "ransparent" in missing.error["message"]
    text = stub_service.edit({"image": PICTURE}, prompt="plain", mask="mask.png")
    assert text.status == 400 and text.error["param"] == "mask" and "-F mask=@FILE" in text.error["message"]


def test_paths_that_are_nearly_right(stub_service: Running) -> None:
    for path in ("/images/generations", "/v1/images/generations/"):
        answer = stub_service.request("POST", path, {"prompt": "plain"})
        assert answer.status == 404 and "under /v1" in answer.error["message"]


def test_the_schema_lists_what_is_sent(stub_service: Running) -> None:
    schema = stub_service.get("/openapi.json").json
    statuses = {status for path in schema["paths"].values() for one in path.values() for status in one["responses"]}
    assert "422" not in statuses and {"200", "400", "429"} <= statuses
    assert set(schema["paths"]) >= {"/v1/images/generations", "/v1/images/edits", "/v1/models", "/health/ready"}


def test_allowed_schedules(start_stub: Callable[..., Running]) -> None:
    """Size and steps choose among them, in generations and in edits."""
    running = start_stub(layout={"in_thread": True}, command={"schedules": "1_2_4,1_4,1_2_3x5"})
    assert running.generate(prompt="plain").headers["x-flexvar-schedule"] == "1_2_4"
    assert running.generate(prompt="plain", steps=2).headers["x-flexvar-schedule"] == "1_4"
    assert running.generate(prompt="plain", size="80x48").headers["x-flexvar-schedule"] == "1_2_3x5"
    assert running.generate(prompt="plain", steps=10).error["code"] == "schedule_not_allowed"
    assert running.generate(prompt="plain", schedule="1_2_3_4").error["param"] == "schedule"
    assert running.edit({"image": PICTURE}, prompt="plain", task="refine").headers["x-flexvar-schedule"] == "1_2_4"
    refused = running.edit({"image": PICTURE}, prompt="plain", task="refine", size="32x32")
    assert refused.error["code"] == "schedule_not_allowed"


def test_models(stub_service: Running) -> None:
    [model] = stub_service.get("/v1/models").json["data"]
    assert model["id"] == "stub" and model["object"] == "model"
    assert model["flexvar"]["classes"][0] == "plain" and model["flexvar"]["size"] == "64x64"
    assert stub_service.get("/v1/models/stub").json == model
    missing = stub_service.get("/v1/models/other")
    assert missing.status == 404 and missing.error["code"] == "model_not_found"


def test_errors_have_openais_shape(stub_service: Running) -> None:
    for answer, status in (
        (stub_service.generate(prompt="plain", n=0), 400),
        (stub_service.get("/nothing"), 404),
        (stub_service.get("/v1/images/generations"), 405),
        (stub_service.request("POST", "/v1/images/generations", b"{}", {"content-type": "text/plain"}), 415),
        (stub_service.generate(prompt="broken"), 500),
        (stub_service.generate(prompt="no memory"), 507),
    ):
        assert answer.status == status and set(answer.error) == {"message", "type", "param", "code"}
        assert answer.headers["content-type"] == "application/json"
    assert b"passwd" not in stub_service.generate(prompt="broken").body


def test_a_body_with_nan_or_a_key_twice_is_refused(stub_service: Running) -> None:
    for body in (b'{"prompt": "plain", "guidance": NaN}', b'{"prompt": "plain", "n": 1, "n": 2}', b"[]", b"{", b"\xff"):
        answer = stub_service.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
        assert answer.status == 400 and answer.error["code"] == "invalid_json"


def test_requests_share_a_batch_and_equal_those_alone(stub_service: Running) -> None:
    """Different seeds, classes and guidance weights; the first request keeps the worker busy meanwhile."""
    seeds = [fresh_seed() for _ in range(8)]
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(stub_service.generate, prompt="slow")
        others = [
            pool.submit(stub_service.generate, class_id=i % 2 * 7, seed=seed, guidance=2.5 + i)
            for i, seed in enumerate(seeds)
        ]
        answers = [other.result() for other in others]
        assert first.result().status == 200
    assert max(int(answer.headers["x-flexvar-batch"]) for answer in answers) > 1
    for i, (seed, answer) in enumerate(zip(seeds, answers, strict=True)):
        assert np.array_equal(pixels(answer), expected(i % 2 * 7, seed, 0))


def test_exact_asks_for_a_batch_of_its_own(stub_service: Running) -> None:
    with ThreadPoolExecutor(6) as pool:
        first = pool.submit(stub_service.generate, prompt="slow")
        many = [pool.submit(stub_service.generate, {"x-flexvar-exact": "1"}, prompt="plain", n=2) for _ in range(4)]
        assert {job.result().headers["x-flexvar-batch"] for job in many} == {"2,2"}
        assert first.result().status == 200
    assert stub_service.generate({"x-flexvar-exact": "yes"}, prompt="plain").status == 400


def test_a_batch_that_does_not_fit_runs_in_parts(stub_service: Running) -> None:
    answer = stub_service.generate(prompt="crowded", n=4)
    assert answer.status == 200 and answer.headers["x-flexvar-batch"] == "1,1,1,1"


def test_deadlines_choose_a_schedule(stub_service: Running) -> None:
    stub_service.generate(prompt="plain")
    easy = stub_service.generate({"x-flexvar-deadline-ms": "60000"}, prompt="plain")
    assert easy.status == 200 and easy.headers["x-flexvar-schedule"] == "1_2_3_4"
    for text in ("0.0001", "0", "nan", "soon"):
        never = stub_service.generate({"x-flexvar-deadline-ms": text}, prompt="plain")
        assert never.status == 400 and never.error["param"] == "x-flexvar-deadline-ms", text
    both = stub_service.generate({"x-flexvar-deadline-ms": "100"}, prompt="plain", steps=3)
    assert both.status == 400


def test_health_metrics_and_page(stub_service: Running) -> None:
    assert stub_service.get("/health/live").json == {"status": "live"}
    assert stub_service.get("/health/ready").json == {"status": "ready"}
    before = stub_service.metric('flexvar_requests_total{method="POST",route="/v1/images/generations",status="200"}')
    stub_service.generate(prompt="plain")
    after = stub_service.metric('flexvar_requests_total{method="POST",route="/v1/images/generations",status="200"}')
    assert after == before + 1
    page = stub_service.get("/")
    assert (
        page.status == 200 and b"<html" in page.body and "default-src 'none'" in page.headers["content-security-policy"]
    )
    text = stub_service.get("/metrics").body.decode()
    for name in (
        *["request_seconds", "queue_seconds", "generation_seconds", "decode_seconds", "encode_seconds", "batch_images"],
        *["loop_lag_seconds", "queue_images", "worker_restarts_total", "build_info"],
    ):
        assert f"flexvar_{name}" in text, name


def test_every_request_is_one_line_of_the_log(stub_service: Running) -> None:
    name = f"line-{fresh_seed()}"
    stub_service.generate({"x-request-id": name}, prompt="plain", user="someone")
    until(lambda: any(name in line for line in list(stub_service.log)))
    lines = [json.loads(line) for line in list(stub_service.log) if name in line]
    [line] = lines
    assert line["status"] == 200 and line["user"] == "someone" and line["path"] == "/v1/images/generations"
