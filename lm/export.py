"""A run's model as a file that other programs use without this one: TorchScript, torch.export, ONNX to run; its weights
as safetensors, and its embeddings as text.

A file to run holds one function, in evaluation mode: tokens [T, B] int64 and the state [L, B, H] (`h`; for an LSTM `h`
and `c`; zeros at the start) give log-probabilities [T, B, V] and the state after. Where layers differ in size, the
state is that of the first layer, then of the second, ..., [1, B, H] each. T and B are free, from 1 on. The tokenizer
goes with it, as JSON.
"""

import copy
import importlib.util
import io
import json
import logging
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import rnnorm
from lm import files
from lm.errors import UserError
from lm.evaluator import evaluating
from lm.model import LanguageModel, state_of, state_tensors
from lm.trained import TrainedModel

TOLERANCE = 1e-3  # of log-probabilities, in nats; formats differ in the order of sums only
_TOKENIZER = "tokenizer.json"


def _stacked(model: LanguageModel, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The state of a model as its file has it: where all layers are of one size, one tensor for each name."""
    names = len(rnnorm.CELLS[model.recurrent[0].cell].states)
    if len({layer.hidden_size for layer in model.recurrent}) > 1:
        return (*states,)
    return tuple(torch.cat([*states[name::names]]) for name in range(names))


class _Function(nn.Module):
    """The language model from ordinary operators."""

    def __init__(self, model: LanguageModel, **options: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.embedding, self.decoder = model.embedding, model.decoder
        self.layers = nn.ModuleList(layer.to_plain(**options) for layer in model.recurrent)
        self.depths = [layer.num_layers for layer in model.recurrent]
        self.names = len(rnnorm.CELLS[model.recurrent[0].cell].states)

    def forward(self, tokens: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        hidden, stacked = self.embedding(tokens), len(states) == self.names
        if stacked:
            given = list(zip(*(state.split(self.depths) for state in states), strict=True))
        else:
            given = [states[first : first + self.names] for first in range(0, len(states), self.names)]
        after: list[list[Tensor]] = []
        for layer, own in zip(self.layers, given, strict=True):
            hidden, *last = layer(hidden, *own)
            after.append(last)
        if stacked:
            return self.decoder.log_probs(hidden), *(torch.cat(of_name) for of_name in zip(*after, strict=True))
        return self.decoder.log_probs(hidden), *(state for last in after for state in last)


class _Steps(nn.Module):
    """The loop over the steps, as TorchScript reads it."""

    def __init__(self, step: nn.Module) -> None:
        super().__init__()
        self.step = step

    def forward(self, inputs: Tensor, state: Tensor) -> Tensor:
        after: list[Tensor] = []
        for t in range(inputs.size(0)):
            state = self.step(inputs[t], state)
            after.append(state)
        return torch.stack(after)


def _torchscript(model: LanguageModel, example: tuple[Tensor, ...], tokenizer: str) -> bytes:
    def loop(step: nn.Module) -> nn.Module:
        gates, units = step.weight_hh.shape  # type: ignore[misc]
        width = units * len(rnnorm.CELLS[model.recurrent[0].cell].states)
        part, state = torch.zeros(2, gates), torch.zeros(2, width)
        return torch.jit.script(_Steps(torch.jit.trace(step, (part, state), check_trace=False)))

    traced = torch.jit.trace(_Function(model, make_loop=loop), example, check_trace=False)
    file = io.BytesIO()
    torch.jit.save(traced, file, _extra_files={_TOKENIZER: tokenizer})
    return file.getvalue()


def _free(example: tuple[Tensor, ...]) -> tuple[dict[int, object], tuple[dict[int, object], ...]]:
    """Which sizes of tokens and states are free."""
    columns = torch.export.Dim("B", min=1)
    return {0: torch.export.Dim("T", min=1), 1: columns}, tuple({1: columns} for _ in example[1:])


def _torch_export(model: LanguageModel, example: tuple[Tensor, ...], tokenizer: str) -> bytes:
    program = torch.export.export(_Function(model), example, dynamic_shapes=_free(example))
    for module in program.graph_module.modules():  # the places in this machine's files
        for node in module.graph.nodes:
            node.meta.pop("stack_trace", None)
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={_TOKENIZER: tokenizer})
    return file.getvalue()


def _onnx(model: LanguageModel, example: tuple[Tensor, ...], tokenizer: str) -> bytes:
    names = rnnorm.CELLS[model.recurrent[0].cell].states
    own = ["", *(f"_l{layer}" for layer in range(1, (len(example) - 1) // len(names)))]
    states = [f"{name}{layer}" for layer in own for name in names]
    program = torch.onnx.export(
        _Function(model),
        example,
        dynamo=True,
        verbose=False,
        dynamic_shapes=_free(example),
        input_names=["tokens", *states],
        output_names=["log_probs", *(f"{name}_after" for name in states)],
    )
    assert program is not None
    for node in program.model.graph.all_nodes():  # the places in this machine's files
        node.metadata_props.clear()
    program.model.metadata_props[_TOKENIZER] = tokenizer
    return program.model_proto.SerializeToString()


@dataclass(frozen=True)
class Format:
    """How a file that runs is made, what Python packages that and checking it need, and the code that loads it.

    Attributes:
        content: of the file.
        load: makes of `path` a function of and to tensors, in a process that knows nothing of this program.
    """

    content: Callable[[LanguageModel, tuple[Tensor, ...], str], bytes]
    needs: tuple[str, ...]
    check_needs: tuple[str, ...]
    load: str


FORMATS: Mapping[str, Format] = {
    "torchscript": Format(_torchscript, (), (), "call = torch.jit.load(path)"),
    "torch-export": Format(_torch_export, (), (), "call = torch.export.load(open(path, 'rb')).module()"),
    "onnx": Format(
        _onnx,
        ("onnx", "onnxscript"),
        ("onnxruntime",),
        "import onnxruntime\n"
        "session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])\n"
        "names = [given.name for given in session.get_inputs()]\n"
        "run = lambda *given: session.run(None, {n: g.numpy() for n, g in zip(names, given)})\n"
        "call = lambda *given: [torch.from_numpy(found) for found in run(*given)]",
    ),
}


def _safetensors(trained: TrainedModel) -> bytes:
    """A tied weight is kept once, under the first of its names; the metadata says which the others stand for."""
    kept: dict[str, Tensor] = {}
    again: dict[str, str] = {}
    names: dict[tuple[object, ...], str] = {}
    for name, tensor in sorted(trained.model.state_dict().items()):
        place = (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if (first := names.setdefault(place, name)) == name:
            kept[name] = tensor.contiguous()
        else:
            again[name] = first
    about = {"settings": trained.config.model_dump_json(), "tokenizer": json.dumps(trained.tokenizer.state())}
    return to_bytes(kept, metadata={"format": "pt", **about, **again})


def _embeddings(trained: TrainedModel) -> bytes:
    """word2vec's text format: V and E, then a line for each token; white space in a token is written as `<U+0020>`
    (`<0x20>` is a byte of tokens from sentencepiece)."""
    weight = trained.model.embedding.weight.detach().cpu().float()
    lines = [f"{len(weight)} {weight.size(1)}\n"]
    for token, vector in enumerate(weight.tolist()):
        piece = re.sub(r"\s", lambda found: f"<U+{ord(found[0]):04X}>", trained.tokenizer.piece(token))
        lines.append(f"{piece} {' '.join(f'{value:.9g}' for value in vector)}\n")
    return "".join(lines).encode()


# What is not run: the content of a file that is read back by whoever wants it.
TABLES: Mapping[str, Callable[[TrainedModel], bytes]] = {"safetensors": _safetensors, "embeddings": _embeddings}

_CHECK = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
path, cases = sys.argv[1:]
{load}
found_differences = [torch.zeros(())]
for given, wanted in torch.load(cases):
    with torch.no_grad():
        found = call(*given)
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted):
        assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
        same = (ours == theirs) | (ours.isnan() & theirs.isnan())  # infinities too
        found_differences.append(torch.where(same, 0.0, (ours - theirs).abs()).max())
assert not {{"rnnorm", "lm"}} & set(sys.modules)
print(torch.stack(found_differences).max().item())  # NaN, where one is
"""


def export(trained: TrainedModel, to: str, path: Path) -> float | None:
    """Writes a run's model to a new file; one that runs, after loading it in a fresh process and comparing what it
    computes.

    Arguments:
        to: `torchscript`, `torch-export`, `onnx`, `safetensors` or `embeddings`.

    Returns:
        The largest difference found, of log-probabilities (nats) and states; None where nothing here can run the file.

    Raises:
        UserError: the file exists or cannot be written; a package is missing; the file computes something else.
    """
    form = FORMATS.get(to)
    if form and (missing := [name for name in form.needs if importlib.util.find_spec(name) is None]):
        raise UserError(
            f"{to} needs the packages {', '.join(form.needs)}; {', '.join(missing)} not installed; install with: "
            "pip install 'rnnorm[export]'"
        )
    if path.exists():
        raise UserError(
            f"an export must be written to a new file; got {path}, which exists; choose another, or move it away"
        )
    with files.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    content, worst = _checked(trained, form) if form else (TABLES[to](trained), None)
    files.write_whole(path, content)
    return worst


def _checked(trained: TrainedModel, form: Format) -> tuple[bytes, float | None]:
    """The content of a file that runs, and what is wrong with it, at most."""
    shape = trained.config.model
    if shape.mogrifier_rounds or shape.cap_input_gate or shape.sum_layers:
        raise UserError(
            "a model to export must have model.mogrifier_rounds=0, model.cap_input_gate=false and "
            f"model.sum_layers=false; got {shape.mogrifier_rounds}, {shape.cap_input_gate} and {shape.sum_layers}; "
            "use it through lm.load"
        )
    model = copy.deepcopy(trained.model).cpu().float()
    for layer in model.recurrent:
        layer.backend = "auto"  # the one that was asked for may not run on the CPU
    tokenizer = json.dumps(trained.tokenizer.state())
    with evaluating(model), _quietly():
        tokens = torch.zeros(3, 2, dtype=torch.int64)
        example = (tokens, *_stacked(model, state_tensors(model(tokens)[1])))
        content = form.content(model, example, tokenizer)
    worst = _worst(model, form, content)
    if worst is not None and not worst <= TOLERANCE:
        raise UserError(
            f"the file must compute what the run's model does; got a difference of {worst:.3g}; report this"
        )
    return content, worst


def _worst(model: LanguageModel, form: Format, content: bytes) -> float | None:
    """The largest difference from the model in a fresh process, over several sizes and carried states."""
    if any(importlib.util.find_spec(name) is None for name in form.check_needs):
        return None
    generator, cases = torch.Generator().manual_seed(0), []
    with evaluating(model):
        for steps, columns in ((5, 3), (1, 3), (7, 1), (1, 1)):
            tokens = torch.randint(model.embedding.num_embeddings, (steps, columns), generator=generator)
            _, first = model(torch.randint(model.embedding.num_embeddings, (9, columns), generator=generator))
            hidden, last = model(tokens, state_of(state_tensors(first)))
            states, after = (_stacked(model, state_tensors(state)) for state in (first, last))
            cases.append(([tokens, *states], [model.log_probs(hidden), *after]))
    given = io.BytesIO()
    torch.save(cases, given)
    with tempfile.TemporaryDirectory() as folder:
        made, kept = Path(folder) / "model", Path(folder) / "cases.pt"
        files.write_whole(made, content)
        files.write_whole(kept, given.getvalue())
        done = subprocess.run(
            [sys.executable, "-I", "-c", _CHECK.format(load=form.load), str(made), str(kept)],
            **{"capture_output": True, "text": True, "check": False, "cwd": folder},  # type: ignore[call-overload]
        )
    if done.returncode:
        why = done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else f"exit code {done.returncode}"
        raise UserError(f"the file must load in a fresh process; got an error ({why}); report this")
    return float(done.stdout)


@contextmanager
def _quietly() -> Iterator[None]:
    """Inside, torch's exporters print nothing: their messages are about their own internals."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
