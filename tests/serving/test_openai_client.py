"""The official client of OpenAI generates, edits and streams."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

import numpy as np
import pytest
from http_client import MASK, PICTURE
from PIL import Image

if TYPE_CHECKING:
    from http_client import Running
    from openai import OpenAI

pytestmark = pytest.mark.serving


@pytest.fixture
def client(tiny_service: Running) -> OpenAI:
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{tiny_service.ready['url']}v1", api_key="none", max_retries=0)


def decoded(text: str | None) -> np.ndarray:
    assert text is not None
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_generate(client: OpenAI) -> None:
    [model] = client.models.list().data
    answer = client.images.generate(model=model.id, prompt="0", n=2, response_format="b64_json", extra_body={"seed": 7})
    assert answer.data is not None and len(answer.data) == 2
    again = client.images.generate(
        prompt="0", output_format="png", quality="auto", user="me", extra_body={"seed": "7", "first_index": 1}
    )
    assert again.data is not None
    assert np.array_equal(decoded(answer.data[1].b64_json), decoded(again.data[0].b64_json))


def test_edit(client: OpenAI) -> None:
    whole = Image.open(io.BytesIO(PICTURE))
    answer = client.images.edit(image=("a.png", PICTURE), mask=("m.png", MASK), prompt="1", extra_body={"seed": 7})
    assert answer.data is not None and whole.size == (64, 64)
    assert decoded(answer.data[0].b64_json).ndim == 3


def test_stream(client: OpenAI) -> None:
    events = list(client.images.generate(prompt="1", stream=True, partial_images=2, extra_body={"seed": 7}))
    assert [event.type for event in events] == [
        *["image_generation.partial_image"] * 2,
        "image_generation.completed",
    ]
    whole = client.images.generate(prompt="1", extra_body={"seed": 7})
    assert whole.data is not None
    assert np.array_equal(decoded(events[-1].b64_json), decoded(whole.data[0].b64_json))
    edits = list(client.images.edit(image=("a.png", PICTURE), mask=("m.png", MASK), prompt="1", stream=True))
    assert [event.type for event in edits] == ["image_edit.completed"]


def test_errors_are_those_of_the_client(client: OpenAI) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="not a class"):
        client.images.generate(prompt="a cat on a sofa")
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt="0", model="gpt-image-1")
    with pytest.raises(openai.BadRequestError, match="not known"):
        client.images.generate(prompt="0", extra_body={"cfg": 3})
