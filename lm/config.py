"""Every setting of a run: its meaning, its allowed values, its default."""

import glob
import textwrap
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lm import stream, tokenizers
from lm.corpora import CORPORA, Reading
from lm.corpora.files import is_pattern, known_encoding, refuse_pipe, shares
from lm.errors import UserError
from lm.files import read_text
from rnnorm import norms

Rate = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Alpha = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10**9)]
Whole = Annotated[int, Field(ge=0, le=10**9)]


class Section(BaseModel):
    """One table of the configuration. TOML has no null: where a value may be absent, it is written "none"."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _none(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        absent = {key for key, field in cls.model_fields.items() if type(None) in get_args(field.annotation)}
        return {key: None if value == "none" and key in absent else value for key, value in values.items()}


class DataConfig(Section):
    source: str = Field(
        default="python-docs",
        description="corpus by name (`data list`), folder of splits, file of text, pattern of files, or hf:NAME:CONFIG",
    )
    dir: str = Field(default="data", description="folder where corpora, and what is made from large texts, are kept")
    split: str = Field(default="90/5/5", description="shares of train, valid and test of a text that is one file")
    encoding: str = Field(default="utf-8", description="encoding of text files, by a name that Python knows")
    column: str = Field(default="text", description="column of a table (Parquet, hf:) that holds the text")
    tokenizer: Literal["word", "char", "byte", "bpe", "unigram"] = Field(default="word", description="kind of tokens")
    tokenizer_file: str | None = Field(
        default=None, description="tokenizer that `tokenizer train` wrote; none: train one on the training text"
    )
    vocab_size: Count | None = Field(default=None, description="maximum vocabulary size; none: the tokenizer's own")
    min_count: Count | None = Field(
        default=None,
        description="how often the training text must hold a word of the vocabulary, rarer ones being <unk>; "
        "none: 2 for words of a text of your own that holds no <unk>, else 1",
    )
    tokenizer_sample: Count = Field(
        default=tokenizers.SAMPLE, description="bytes of the training text that bpe and unigram are trained on"
    )

    @property
    def reading(self) -> Reading:
        """How files are read."""
        return Reading(self.encoding, self.split, self.column)

    @model_validator(mode="before")
    @classmethod
    def _measured(cls, values: Any) -> Any:
        """A corpus by name is trained by the tokens that it is measured by, unless others are named."""
        if isinstance(values, Mapping) and "tokenizer" not in values and values.get("source") in [*CORPORA]:
            return {**values, "tokenizer": CORPORA[values["source"]].tokenizer}
        return values

    @field_validator("split")
    @classmethod
    def _shares(cls, value: str) -> str:
        shares(value)
        return value

    @field_validator("encoding")
    @classmethod
    def _known(cls, value: str) -> str:
        return known_encoding(value, "data.encoding")


class ModelConfig(Section):
    cell: Literal["lstm", "gru", "rnn_tanh", "rnn_relu"] = Field(
        default="lstm", description="recurrent cell; rnn is short for rnn_tanh"
    )
    norm: norms.Name = Field(default="online", description="normalization in the recurrence")
    hidden_size: Count = Field(default=200, description="units per layer")
    embedding_size: Count | None = Field(default=None, description="embedding size; none: hidden_size")
    num_layers: Annotated[int, Field(ge=1, le=1000)] = Field(default=1, description="number of recurrent layers")
    layer_sizes: list[Count] | None = Field(
        default=None, description="units of each layer, such as [1150, 1150, 400]; none: hidden_size"
    )
    dropout: Rate = Field(default=0.0, description="dropout after the embedding, between layers, and after the last")
    input_dropout: Rate | None = Field(default=None, description="dropout after the embedding; none: dropout")
    output_dropout: Rate | None = Field(default=None, description="dropout after the last layer; none: dropout")
    locked_dropout: bool = Field(default=False, description="these three dropouts: one mask for all steps of a window")
    embedding_dropout: Rate = Field(default=0.0, description="dropout of whole embeddings, by word of the vocabulary")
    weight_dropout: Rate = Field(default=0.0, description="dropout of the entries of the recurrent weights")
    recurrent_dropout: Rate = Field(
        default=0.0, description="dropout of h where it enters the recurrent product, one mask per window"
    )
    zoneout: Rate = Field(default=0.0, description="probability that a unit keeps its previous state at a step")
    zoneout_c: Rate | None = Field(default=None, description="lstm: zoneout of c; none: zoneout")
    mogrifier_rounds: Annotated[int, Field(ge=0, le=100)] = Field(
        default=0, description="lstm: rounds in which input and state gate each other before each step"
    )
    mogrifier_rank: Whole = Field(default=0, description="lstm: rank of the weights of these rounds; 0: full")
    cap_input_gate: bool = Field(default=False, description="lstm: cap the input gate at one minus the forget gate")
    sum_layers: bool = Field(default=False, description="the output is the sum of the outputs of all layers")
    tied: bool = Field(
        default=True,
        description="share one weight between the embedding and the decoder, through a projection if sizes differ",
    )
    decoder: Literal["softmax", "mixture", "adaptive"] = Field(
        default="softmax",
        description="mixture: of several softmaxes; adaptive: for vocabularies of 100,000 words and more, untied",
    )
    experts: Count = Field(default=10, description="mixture: number of softmaxes")
    latent_dropout: Rate | None = Field(default=None, description="mixture: dropout of the latents; none: dropout")
    cutoffs: list[Count] | None = Field(
        default=None, description="adaptive: first id of each cluster of rarer words; none: V / 100 and V / 10"
    )
    sparse_embedding: bool = Field(
        default=False, description="train only the embeddings of the words of each step; sgd and asgd alone, untied"
    )
    alpha_fwd: Alpha = Field(default=8191 / 8192, description="online: decay of the running statistics")
    alpha_bwd: Alpha = Field(default=31 / 32, description="online: decay of the control states u and v")
    control_floor: float | None = Field(
        default=None,
        lt=1,
        description="online: lower bound on the decay of the control state v; none: the paper's equations",
    )
    guard: Literal["scale", "clamp", "none"] = Field(
        default="scale", description="online: guard against drift of the estimates"
    )
    cell_norm: bool = Field(default=False, description="lstm: normalize the cell state as well")
    embedding_range: Positive = Field(
        default=0.1, description="embeddings are initialized uniformly in ± this; 0.4 steadies norms without clipping"
    )
    init_range: Positive | None = Field(
        default=None, description="all weights are initialized uniformly in ± this; none: torch's own for layers"
    )

    @field_validator("cell", mode="before")
    @classmethod
    def _rnn(cls, value: Any) -> Any:
        return "rnn_tanh" if value == "rnn" else value

    @property
    def sizes(self) -> list[int]:
        """The units of each layer."""
        return self.layer_sizes or [self.hidden_size] * self.num_layers

    @model_validator(mode="after")
    def _fits(self) -> "ModelConfig":
        if self.layer_sizes is not None and len(self.layer_sizes) != self.num_layers:
            raise UserError(
                f"model.layer_sizes must have a size for each of the layers of model.num_layers; "
                f"got {len(self.layer_sizes)} for {self.num_layers}; correct one of them"
            )
        for name, given in (
            ("decoder=adaptive", self.decoder == "adaptive"),
            ("sparse_embedding", self.sparse_embedding),
        ):
            if given and self.tied:
                raise UserError(f"model.{name} must have an untied decoder; got a tied one; set model.tied=false")
        if self.zoneout_c is not None and self.cell != "lstm":
            raise UserError(
                f"model.zoneout_c must be used with the cell lstm; got {self.cell}; set model.zoneout_c=none"
            )
        if self.cell != "lstm" and (self.mogrifier_rounds or self.cap_input_gate):
            raise UserError(
                f"model.mogrifier_rounds and model.cap_input_gate must be used with the cell lstm; got {self.cell}; "
                "set them to 0 and false"
            )
        if self.sum_layers and len({*self.sizes}) > 1:
            raise UserError(
                f"model.sum_layers must be used with layers of one size; got {self.sizes}; set model.sum_layers=false"
            )
        if self.cell_norm and self.cell != "lstm":
            raise UserError(
                f"model.cell_norm must be used with the cell lstm; got {self.cell}; set model.cell_norm=false"
            )
        if self.cell_norm and self.norm == "none":
            raise UserError(
                "model.cell_norm must be used with a norm; got model.norm=none; set model.cell_norm=false, or another "
                "model.norm"
            )
        return self


class TrainConfig(Section):
    epochs: Count = Field(default=5, description="passes over the training text")
    max_steps: Count | None = Field(default=None, description="maximum number of optimizer steps, over all epochs")
    init_from: str | None = Field(
        default=None, description="run folder whose best weights and tokenizer the run begins with; none: fresh ones"
    )
    lr: Positive = Field(default=0.003, description="learning rate")
    batch_size: Count = Field(default=20, description="columns that the training text is read in, side by side")
    accumulate: Count = Field(
        default=1, description="parts that the columns of a step are computed in, one after another, to save memory"
    )
    window: str = Field(default="32", description="steps of truncated BPTT: 64, uniform{2..128} or awd{70}")
    optimizer: Literal["sgd", "asgd", "adam", "adamw", "rmsprop"] = Field(
        default="adam", description="asgd: sgd, its weights averaged; rmsprop: adam without a mean of gradients"
    )
    momentum: Rate = Field(default=0.0, description="sgd, asgd: momentum")
    average: bool = Field(default=False, description="average the weights, as asgd does, with any optimizer")
    average_patience: Whole | None = Field(
        default=5,
        description="asgd, average: begin once a validation is worse than the best of more than this many epochs "
        "before; none: from the first step",
    )
    weight_decay: Weight = Field(default=0.0, description="L2 penalty")
    ar: Weight = Field(
        default=0.0, description="activation regularization: factor of the mean square of the output after dropout"
    )
    tar: Weight = Field(
        default=0.0, description="temporal activation regularization: factor of the output's mean square change"
    )
    clip: Positive | None = Field(default=0.25, description="maximum norm of the gradient; none: no clipping")
    schedule: Literal["constant", "exponential", "plateau", "cosine"] = Field(
        default="constant", description="learning-rate schedule"
    )
    schedule_factor: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.5, description="exponential: factor per epoch; plateau: factor per reduction"
    )
    schedule_hold: Whole = Field(default=1, description="exponential: epochs at the full rate before it decays")
    schedule_patience: Whole = Field(
        default=0, description="plateau: epochs without a new best before the rate is reduced"
    )
    warmup_steps: Whole = Field(default=0, description="steps over which the rate rises from 0")
    patience: Count | None = Field(
        default=None, description="stop after this many epochs without a new best; none: never"
    )
    stop_patience: Whole | None = Field(
        default=None,
        description="stop once a validation is worse than the best of more than this many epochs before; none: never",
    )
    precision: Literal["float32", "bfloat16", "bfloat16-decoder", "auto"] = Field(
        default="float32",
        description="dtype of matrix products, of all or of the decoder's alone; sums and all else stay in float32; "
        "auto: bfloat16-decoder where the device has instructions for bfloat16",
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(default=1, description="random seed")
    backend: str = Field(default="auto", description="backend for the recurrent layers (`python -m rnnorm` lists them)")
    device: str = Field(default="auto", description="cpu, cuda, cuda:0, or auto: cuda where there is one, else cpu")
    valid_batch_size: Count = Field(
        default=20, description="columns that the validation text is read in after each epoch"
    )
    log_every: Count = Field(default=10, description="steps between logged steps")

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, values: Any) -> Any:
        if isinstance(values, dict) and "autocast" in values:  # as runs of version 0.1 have it
            values = {**values, "precision": {"none": "float32"}.get(values["autocast"], values["autocast"])}
            del values["autocast"]
        return values

    @field_validator("window", mode="before")
    @classmethod
    def _window(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str):
            try:
                stream.policy(value)
            except UserError as fault:
                raise UserError(f"train.window: {fault}") from None
        return value

    @property
    def averaging(self) -> bool:
        """True if the weights are averaged, from some epoch on."""
        return self.optimizer == "asgd" or self.average


class CheckpointConfig(Section):
    every_steps: Count | None = Field(
        default=None, description="save every this many steps; none: after each epoch only"
    )
    every_minutes: Positive | None = Field(
        default=10.0, description="save every this many minutes as well; none: never"
    )


class EvalConfig(Section):
    protocol: Literal["exact", "chunk-mean"] = Field(default="exact", description="evaluation protocol of `eval`")
    chunk: Annotated[int, Field(ge=1, le=10**9 - 1)] = Field(
        default=1024, description="steps evaluated at once; the exact result does not depend on it"
    )
    dynamic_lr: Positive = Field(default=5e-5, description="eval --dynamic: learning rate")
    dynamic_decay: Weight = Field(default=0.002, description="eval --dynamic: pull towards the trained weights")
    dynamic_eps: Positive = Field(default=2e-5, description="eval --dynamic: added to the root mean square gradient")
    dynamic_segment: Count = Field(default=5, description="eval --dynamic: tokens scored before each step")
    cache_weight: Share = Field(default=0.1, description="eval --cache: weight of the cache")
    cache_theta: Weight = Field(default=1.0, description="eval --cache: factor of the outputs' products")
    cache_window: Count = Field(default=500, description="eval --cache: how many tokens it holds")


class Config(Section):
    """All settings of a run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        train = self.train
        plain = train.optimizer in ("sgd", "asgd") and not train.momentum and not train.weight_decay
        if self.model.sparse_embedding and not plain:
            raise UserError(
                "model.sparse_embedding must be trained with train.optimizer sgd or asgd without momentum and "
                f"weight_decay; got {train.optimizer}, {train.momentum:g} and {train.weight_decay:g}; "
                "set model.sparse_embedding=false"
            )
        return self


def build(values: Mapping[str, Any]) -> Config:
    """Returns the configuration that holds these tables, and the defaults elsewhere.

    Raises:
        UserError: an unknown section or key, a wrong type, a value out of range: names the key, what is
            allowed and what was got.
    """
    try:
        return Config.model_validate(dict(values))
    except ValidationError as fault:
        raise UserError(_explain(fault)) from None


def _explain(fault: ValidationError) -> str:
    first = fault.errors()[0]
    *path, last = (str(part) for part in first["loc"])
    name = ".".join([*path, last])
    if first["type"] == "extra_forbidden":
        table = Config.model_fields[path[0]].annotation if path else Config
        valid = ", ".join(table.model_fields)  # type: ignore[union-attr]
        where = f"key of [{path[0]}]" if path else "section"
        return f"{name} must be a known {where}; got {last!r}; the known ones are {valid}"
    rule = first["msg"].removeprefix("Input should ")
    return f"{name} must {rule}; got {_short(first['input'])}; see `train --help` for every key"


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        return "a huge number"
    return text if len(text) <= 200 else f"{text[:200]}…"


def presets() -> dict[str, str]:
    """Returns the names of the presets and what each is, in alphabetical order."""
    files = resources.files("lm").joinpath("presets").iterdir()
    found = {file.name.removesuffix(".toml"): file for file in files if file.name.endswith(".toml")}
    return {name: tomllib.loads(found[name].read_text("utf-8"))["description"] for name in sorted(found)}


def preset(name: str) -> dict[str, Any]:
    """Returns the tables of a preset: one by name, or a TOML file of one's own by path.

    Its key `base` names another preset, whose tables it changes.

    Raises:
        UserError: no such preset, or base; a file that is missing or not TOML.
    """
    if name.endswith(".toml"):
        return _on_base(read_toml(Path(name), "a preset"))
    known = presets()
    if name not in known:
        raise UserError(
            f"a preset must be one of {', '.join(known)}, or a path that ends in .toml; got {name!r}; choose one"
        )
    text = resources.files("lm").joinpath("presets", f"{name}.toml").read_text("utf-8")
    return _on_base(_without_description(tomllib.loads(text)))


def _on_base(tables: dict[str, Any]) -> dict[str, Any]:
    """The tables put into those of the preset that their key `base` names."""
    base = tables.pop("base", None)
    if base is None:
        return tables
    known = presets()
    if not (isinstance(base, str) and base in known):  # by name only: a file could name itself
        raise UserError(f"a preset's base must be one of {', '.join(known)}; got {_short(base)}; correct it")
    changed = preset(base)
    for section, table in tables.items():
        if not isinstance(table, dict):
            changed[section] = table  # which `build` refuses
            continue
        for key, value in table.items():
            put(changed, section, key, value)
    return changed


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """Returns the tables of a TOML file but its description; a fault is a UserError that names the file."""
    return _without_description(read_tables(path, what))


def read_tables(path: Path, what: str) -> dict[str, Any]:
    """Returns all that a TOML file holds; a fault is a UserError that names the file."""
    try:
        return tomllib.loads(read_text(path, what))
    except (ValueError, RecursionError) as fault:  # an integer of 5,000 digits is a bare ValueError
        raise UserError(f"{what} must be TOML; got {path}: {fault}; correct it") from None


def _without_description(tables: dict[str, Any]) -> dict[str, Any]:
    return {name: table for name, table in tables.items() if name != "description"}


def override(tables: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Returns the tables with each `section.key=value` put in; a value is read as TOML, else as bare text.

    Raises:
        UserError: an assignment of another form; a section that is no table.
    """
    changed = {name: dict(table) if isinstance(table, Mapping) else table for name, table in tables.items()}
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        section, dot, key = path.strip().partition(".")
        if not (equals and dot and section and key):
            raise UserError(f"--set must be section.key=value, such as train.lr=0.5; got {assignment!r}; write it so")
        put(changed, section, key, _value(text.strip()))
    return changed


def assigned(assignments: Sequence[str]) -> set[str]:
    """Returns the full names of the settings that assignments set."""
    return {assignment.partition("=")[0].strip() for assignment in assignments}


def put(tables: dict[str, Any], section: str, key: str, value: Any) -> None:
    """Sets one value in tables that a file may have given.

    Raises:
        UserError: what stands under the section's name is no table.
    """
    table = tables.setdefault(section, {})
    if not isinstance(table, dict):
        raise UserError(f"{section} must be a table of settings; got {_short(table)}; write [{section}]")
    table[key] = value


def assignment(name: str, value: Any) -> str:
    """Returns `section.key=value` as `override` reads it back: text is bare where that is read as the same text."""
    bare = isinstance(value, str) and _value(value.strip()) == value
    return f"{name}={value if bare else _written(value)}"


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


def absolute(data: DataConfig) -> DataConfig:
    """Returns the section with whole paths, so that a run folder can be used from any working folder."""
    if "\0" in f"{data.dir}{data.source}{data.tokenizer_file}":
        raise UserError("data.dir, data.source and data.tokenizer_file must not hold the character NUL; remove it")
    changed: dict[str, str] = {"dir": str(Path(data.dir).resolve())}
    if data.source and data.source not in CORPORA:  # an empty path is the working folder
        refuse_pipe(Path(data.source), "give --data - and pipe the text in")
        if Path(data.source).exists():
            changed["source"] = str(Path(data.source).resolve())
        elif is_pattern(data.source):
            changed["source"] = str(Path(glob.escape(str(Path.cwd()))) / data.source)
    if data.tokenizer_file is not None:
        changed["tokenizer_file"] = str(Path(data.tokenizer_file).resolve())
    data = data.model_copy(update=changed)
    for path in (data.dir, data.source, data.tokenizer_file or ""):
        try:
            path.encode()
        except UnicodeEncodeError:  # bytes of a path that are not UTF-8 arrive as halves of surrogate pairs
            raise UserError(
                "data.dir, data.source and data.tokenizer_file must be UTF-8, as config.toml is; "
                f"got {_short(path)}; rename the file or folder"
            ) from None
    return data


_OF_TOKENIZER = ("tokenizer", "tokenizer_file", "vocab_size", "min_count", "tokenizer_sample")


def with_tokenizer_of_run(settings: Config, theirs: DataConfig, run: Path | str, given: Collection[str]) -> Config:
    """Returns the settings with those of the tokenizer of a run that another begins with.

    Arguments:
        theirs: the section of that run.
        given: full names of settings that were chosen, which must not be others.

    Raises:
        UserError: one of them is.
    """
    found = {name: getattr(theirs, name) for name in _OF_TOKENIZER}
    _require_given(settings.data, found, f"{run}, whose tokenizer the run begins with", given)
    return settings.model_copy(update={"data": settings.data.model_copy(update=found)})


def with_tokenizer_of_file(settings: Config, path: str, given: Collection[str]) -> Config:
    """Returns the settings with the kind of the tokenizer that a file holds; see `with_tokenizer_of_run`."""
    made = tokenizers.load(Path(path))
    usual = DataConfig()
    found = {"tokenizer": made.kind, "vocab_size": made.size}
    found |= {name: getattr(usual, name) for name in ("min_count", "tokenizer_sample")}
    _require_given(settings.data, found, path, given)
    return settings.model_copy(update={"data": settings.data.model_copy(update={"tokenizer": made.kind})})


def _require_given(ours: DataConfig, theirs: Mapping[str, Any], place: str, given: Collection[str]) -> None:
    for name, value in theirs.items():
        if f"data.{name}" in given and getattr(ours, name) not in (None, value):
            there = "none" if value is None else value
            raise UserError(
                f"a tokenizer that is there must be taken as it is; got data.{name}={getattr(ours, name)}, and {there} "
                f"in {place}; leave data.{name} out"
            )


def _is_named(data: DataConfig) -> bool:
    return data.source in CORPORA


def _is_table(data: DataConfig) -> bool:
    return data.source.startswith("hf:") or data.source.lower().endswith(".parquet")


def _outlasts(stop: int | None, begin: int | None) -> bool:
    """Whether a run trains on after the validation that averaging begins with."""
    return stop is None or begin is None or stop > begin


# Settings that have an effect in some runs alone: which of them, where, and whether a run is such a one.
_CONDITIONAL: tuple[tuple[tuple[str, ...], str, Callable[[Config], bool]], ...] = (
    (
        ("data.split",),
        "a text that is one (a file, a pattern or hf:NAME)",
        lambda c: not (_is_named(c.data) or Path(c.data.source).is_dir()),
    ),
    (
        ("data.encoding",),
        "a text in files of your own that are no tables",
        lambda c: not (_is_named(c.data) or _is_table(c.data)),
    ),
    (
        ("data.column",),
        "a text in tables (.parquet or hf:NAME)",
        lambda c: not _is_named(c.data) and (_is_table(c.data) or not Path(c.data.source).is_file()),
    ),
    (("model.embedding_range",), "model.init_range=none", lambda c: c.model.init_range is None),
    (
        ("model.hidden_size",),
        "model.layer_sizes=none or model.embedding_size=none",
        lambda c: c.model.layer_sizes is None or c.model.embedding_size is None,
    ),
    (
        ("model.alpha_fwd", "model.alpha_bwd", "model.control_floor", "model.guard"),
        "model.norm=online",
        lambda c: c.model.norm == "online",
    ),
    (("data.min_count",), "data.tokenizer=word or char", lambda c: c.data.tokenizer in ("word", "char")),
    (("data.tokenizer_sample",), "data.tokenizer=bpe or unigram", lambda c: c.data.tokenizer in ("bpe", "unigram")),
    (
        ("model.locked_dropout",),
        "model.dropout, model.input_dropout or model.output_dropout above 0",
        lambda c: any((c.model.dropout, c.model.input_dropout, c.model.output_dropout)),
    ),
    (("model.mogrifier_rank",), "model.mogrifier_rounds above 0", lambda c: c.model.mogrifier_rounds > 0),
    (("model.experts", "model.latent_dropout"), "model.decoder=mixture", lambda c: c.model.decoder == "mixture"),
    (("model.cutoffs",), "model.decoder=adaptive", lambda c: c.model.decoder == "adaptive"),
    (("train.momentum",), "train.optimizer=sgd or asgd", lambda c: c.train.optimizer in ("sgd", "asgd")),
    (("train.average_patience",), "train.average=true or train.optimizer=asgd", lambda c: c.train.averaging),
    (
        ("train.average", "train.average_patience"),
        "train.stop_patience above train.average_patience, or none",
        lambda c: not c.train.averaging or _outlasts(c.train.stop_patience, c.train.average_patience),
    ),
    (
        ("train.schedule_factor",),
        "train.schedule=exponential or plateau",
        lambda c: c.train.schedule in ("exponential", "plateau"),
    ),
    (("train.schedule_hold",), "train.schedule=exponential", lambda c: c.train.schedule == "exponential"),
    (("train.schedule_patience",), "train.schedule=plateau", lambda c: c.train.schedule == "plateau"),
)


def without_effect(config: Config, names: Collection[str]) -> Iterator[str]:
    """Yields a warning of each of these settings that has no effect among the others, and says what gives it one.

    Arguments:
        names: full names of settings that someone chose, such as `train.momentum`.
    """
    found, usual = flatten(config), flatten(Config())
    chosen = {name for name in names if found.get(name) != usual.get(name)}
    for settings, where, given in _CONDITIONAL:
        if not given(config):
            yield from (f"warning: {name} has no effect without {where}" for name in settings if name in chosen)


def flatten(config: Config) -> dict[str, Any]:
    """Returns every setting under its full name, such as `train.lr`; an absent value is "none"."""
    return {
        f"{section}.{key}": "none" if value is None else value
        for section, table in config.model_dump().items()
        for key, value in table.items()
    }


def unusual(tables: Mapping[str, Any], section: str) -> set[str]:
    """Returns the full names of a section's keys to which tables give another value than the default."""
    usual, table = flatten(Config()), tables.get(section)
    given = table.items() if isinstance(table, Mapping) else ()
    return {f"{section}.{key}" for key, value in given if usual.get(f"{section}.{key}") != value}


_LEADING = ("data.source", "data.tokenizer", "model.cell", "model.norm", "model.hidden_size", "train.lr", "train.seed")
_WHERE = {"data.source", "data.dir", "train.device", "train.backend", "train.log_every"}  # not what is trained


def differing(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns which settings differ from the default preset's, with its value; not where a run is and what it logs."""
    plain = flatten(build(preset("default")))
    named = (name for name in plain if name not in _WHERE and not name.startswith("checkpoint."))
    return {name: plain[name] for name in named if flat[name] != plain[name]}


def telling(config: Config) -> dict[str, Any]:
    """Returns, as `flatten` does, what tells runs apart: a few settings, and those that differ from the default
    preset's."""
    found = flatten(config)
    return {name: found[name] for name in [*_LEADING, *differing(found)]}


def to_toml(config: Config) -> str:
    """Returns the whole configuration as TOML, each key under its description; `build` reads it back."""
    lines: list[str] = []
    for section, table in config.model_dump().items():
        lines.append(f"[{section}]")
        for key, value in table.items():
            lines += [f"# {_meaning(section, key)}", f"{key} = {_written(value)}"]
        lines.append("")
    return "\n".join(lines)


def describe(width: int = 106) -> Iterator[str]:
    """Yields lines for a person: of each section, every key with the default of a plain `train`, which is that of the
    default preset, and its meaning."""
    for section, table in build(preset("default")).model_dump().items():
        yield f"[{section}]"
        for key, default in table.items():
            first = f"  {section}.{key}={_written(default)}"
            yield from textwrap.wrap(f"{first}  {_meaning(section, key)}", width, subsequent_indent=" " * 6)
        yield ""


def _meaning(section: str, key: str) -> str:
    field = Config.model_fields[section].annotation.model_fields[key]  # type: ignore[union-attr]
    choices = " | ".join(get_args(field.annotation)) if get_origin(field.annotation) is Literal else ""
    return f"{field.description} ({choices})" if choices else f"{field.description}"


def _written(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_written, value))}]"  # on one line
    return tomli_w.dumps({"": "none" if value is None else value}).partition(" = ")[2].strip()
