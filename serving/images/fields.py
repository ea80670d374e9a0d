"""The fields of a request, as OpenAI's API names them and with those that flexvar adds. Unknown fields are refused."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_IMAGES, MOST_PREVIEWS = 10, 3
_Seed = Annotated[int | Annotated[str, Field(pattern=r"^[0-9]{1,20}$")] | None, Field(union_mode="left_to_right")]


class Fields(BaseModel):
    """What both endpoints take. None means that a field was left out."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Annotated[str | None, Field(max_length=200, description="The name in /v1/models.")] = None
    prompt: Annotated[
        Annotated[str, Field(max_length=1000)] | int | None, Field(description="A class, by name or number.")
    ] = None
    n: Annotated[int | None, Field(ge=1, le=MOST_IMAGES, description="Number of images.")] = None
    size: Annotated[
        str | None, Field(pattern=r"^(auto|[0-9]{1,5}x[0-9]{1,5})$", description="Width x height in pixels, or auto.")
    ] = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int | None, Field(ge=0, le=100, description="Quality of jpeg and webp.")] = None
    stream: bool | None = None
    partial_images: Annotated[int | None, Field(ge=0, le=MOST_PREVIEWS, description="Scales to show, with stream.")] = (
        None
    )
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    user: Annotated[str | None, Field(max_length=200, description="Written to the log.")] = None
    class_id: Annotated[int | None, Field(ge=0, description="A class by number, in place of prompt.")] = None
    seed: Annotated[_Seed, Field(description="0 to 2**64 - 1, as a number or as text.")] = None
    first_index: Annotated[_Seed, Field(description="Index of the first image in the stream of its seed.")] = None
    schedule: Annotated[str | None, Field(max_length=1000, description="Scales in tokens, such as 1_2_4_8_16.")] = None
    steps: Annotated[int | None, Field(ge=1, le=64, description="Number of scales, in place of schedule.")] = None
    guidance: Annotated[
        float | None, Field(allow_inf_nan=False, description="Guidance scale, as --cfg of flexvar generate.")
    ] = None
    top_k: Annotated[int | None, Field(ge=0)] = None
    top_p: Annotated[float | None, Field(allow_inf_nan=False)] = None
    preset: Annotated[str | None, Field(max_length=100, description="Published settings by name.")] = None


class GenerationFields(Fields):
    """The body of POST /v1/images/generations."""


class EditFields(Fields):
    """The form of POST /v1/images/edits, without its files."""

    task: Literal["inpaint", "refine", "outpaint", "expand"] | None = None
    strength: Annotated[
        float | None, Field(allow_inf_nan=False, description="For refine: share of scales to generate.")
    ] = None
    sides: Annotated[
        str | None,
        Field(
            pattern=r"^[0-9]{1,5}(,[0-9]{1,5}){3}$",
            description="For outpaint: pixels to add above, right, below, left.",
        ),
    ] = None
    anchor: Literal["centre", "top", "bottom", "left", "right"] | None = None
    fit: Literal["resize", "crop", "pad"] | None = None
    paste: bool | None = None
    feather: int | None = None
