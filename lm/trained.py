"""A trained model as something to use: scores of texts, next words, samples."""

import itertools
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lm import adaptation, checkpoint, config, corpora, scoring, store, stream, tokenizers
from lm import sample as sampling
from lm.adaptation import Adaptation
from lm.config import Config
from lm.corpora import Reading, Split, checks
from lm.errors import UserError
from lm.evaluator import ProtocolName, Score, evaluate, in_bands, of_text, summarize, token_nlls
from lm.machine import require_backend, require_device
from lm.model import LanguageModel, sketch
from lm.run_folder import RunFolder, Say, Which
from lm.scoring import ScoredLine, Token
from lm.stream import Stream
from lm.text import Text
from lm.tokenizers import Tokenizer
from lm.trainer import TrainerState


@dataclass(frozen=True)
class TrainedModel:
    """A model from a run folder, in evaluation mode: dropout is off, and no call changes anything.

    Equal calls give equal results. A text is a string of lines; a word outside the vocabulary is `<unk>`.

    Attributes:
        config: the settings of its run.
        tokenizer: its vocabulary.
        model: the network.
        train_counts: [V] int64, how often the training text holds each token.
        data_sha256: of the run's own texts, by split, as it began; of a split that an older run does not tell of, the
            one that `eval` scored last.
        step: optimizer steps it has taken.
        say: receives warnings of a text that is scored.

    Example:
        >>> model = lm.load("runs/mine")
        >>> model.score("return the value\\n").ppl
        >>> [(token.text, token.prob) for token in model.next_words("return the", 3)]
        >>> print(model.sample("return the", length=20, temperature=0.8, seed=1))
    """

    config: Config
    tokenizer: Tokenizer
    model: LanguageModel
    train_counts: Tensor
    data_sha256: Mapping[str, str]
    step: int
    say: Say = field(default=print, repr=False, compare=False)

    def score(self, text: str) -> Score:
        """Returns the exact perplexity of a text, and all that is needed to read it.

        The text is one stream: the words of each line, then `<eos>`. The model starts from the zero state with `<eos>`
        as its first input, carries the state to the end, and scores each of the N tokens once:
        `ppl = exp(nll / N)`, nats summed in float64. `unit` is what the tokenizer's `ppl` is per.

        Raises:
            UserError: a text of fewer than 2 tokens, or that holds the word `<eos>`, or half of a surrogate pair.

        Example:
            >>> score = model.score("the cat sat\\non the mat\\n")
            >>> score.ppl, score.tokens, score.unk
        """
        whole = Text.of_string(text)
        return self._score(whole, store.encoded(whole, self.tokenizer), "exact", self.config.eval.chunk)

    def token_log_probs(self, text: str) -> list[Token]:
        """Returns the N tokens of a text, each with its log-probability; they add up to the `nll` of `score`.

        Raises:
            UserError: see `score`.

        Example:
            >>> for token in model.token_log_probs("the cat sat\\n"):
            ...     print(f"{token.text:12} {token.log_prob:8.3f}")
        """
        encoded = stream.encode(Text.of_string(text), self.tokenizer)
        nats = token_nlls(self.model, encoded, self.tokenizer, self.config.eval.chunk)
        return [Token(self.tokenizer.piece(int(i)), -float(n)) for i, n in zip(encoded.ids, nats, strict=True)]

    def next_words(self, prompt: str = "", count: int = 10) -> list[Token]:
        """Returns the most probable next tokens after a text, the most probable first; of a word vocabulary, words.

        Arguments:
            prompt: lines end with `<eos>`, the last one is left open; empty: the start of a line.
            count: how many, at most the vocabulary.

        Raises:
            UserError: a count below 1; a prompt that is not text.

        Example:
            >>> [(token.text, round(token.prob, 3)) for token in model.next_words("return the", 5)]
        """
        likeliest = sampling.next_tokens(self.model, self.tokenizer, prompt, count)
        return [Token(self.tokenizer.piece(token), log_prob) for token, log_prob in likeliest]

    def sample(
        self,
        prompt: str = "",
        *,
        length: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        no_unk: bool = False,
        seed: int = 0,
    ) -> str:
        """Returns the prompt and `length` tokens drawn after it; `<eos>` becomes a line feed.

        Arguments:
            prompt: lines end with `<eos>`, the last one is left open.
            temperature: divides the logits; 0 takes the most probable token each time.
            top_k: draw among the most probable tokens, so many.
            top_p: draw among the fewest most probable tokens that hold this probability.
            no_unk: never draw `<unk>`.
            seed: random seed; the same seed gives the same text, and no global random number is drawn.

        Raises:
            UserError: a value out of range; a prompt that is not text.

        Example:
            >>> print(model.sample("return the", length=60, temperature=0.8, top_k=40, seed=1))
        """
        prefix = sampling.encode_prompt(prompt, self.tokenizer)
        law = sampling.Law(temperature, top_k, top_p, no_unk, seed)
        return self.tokenizer.decode([*prefix, *sampling.draw(self.model, self.tokenizer, prefix, length, law)])

    def stream(
        self,
        prompt: str = "",
        *,
        length: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        no_unk: bool = False,
        seed: int = 0,
    ) -> Iterator[str]:
        """Returns an iterator of what `sample` returns, piece by piece as it is drawn.

        Raises:
            UserError: see `sample`.

        Example:
            >>> for text in model.stream("return the", length=60):
            ...     print(text, end="", flush=True)
        """
        prefix = sampling.encode_prompt(prompt, self.tokenizer)
        law = sampling.Law(temperature, top_k, top_p, no_unk, seed)
        drawn = sampling.draw(self.model, self.tokenizer, prefix, length, law)
        return sampling.texts(self.tokenizer, itertools.chain(prefix, drawn))

    def score_lines(self, text: str) -> Iterator[ScoredLine]:
        """Returns an iterator of the lines of a text, each scored by itself, from the zero state.

        Raises:
            UserError: a text that holds the word `<eos>`, or half of a surrogate pair.

        Example:
            >>> for line in model.score_lines("the cat sat\\nthe cat ran\\n"):
            ...     print(line.log_prob, [token.text for token in line.tokens])
        """
        return scoring.lines(self, Text.of_string(text), one_stream=False)

    def score_split(
        self,
        split: Split,
        *,
        data: str | None = None,
        protocol: ProtocolName | None = None,
        chunk: int | None = None,
        groups: bool = False,
        reading: Reading | None = None,
    ) -> Score:
        """Returns the score of a split of the run's own corpus, or of another.

        Arguments:
            data: another corpus, by name or folder.
            protocol: `exact` or `chunk-mean`; None: the run's.
            chunk: steps evaluated at once; the exact score does not depend on it; None: the run's.
            groups: by frequency and by position too, where the protocol is `exact`.
            reading: how the files of `data` are read; None: as the run's own.

        Raises:
            UserError: no such split or corpus; a text that the tokenizer cannot take, or too short for the protocol;
                a chunk below 1; without `data`, another text than the run's.
        """
        settings = self.config.eval
        text, encoded = self._text(split, data, reading)
        chunk = settings.chunk if chunk is None else chunk
        return self._score(text, encoded, protocol or settings.protocol, chunk, groups)

    def score_adapted(
        self,
        split: Split,
        means: Adaptation,
        *,
        rms: Sequence[Tensor] | None = None,
        data: str | None = None,
        groups: bool = False,
        reading: Reading | None = None,
    ) -> Score:
        """Returns the exact score of a split under a model that adapts to what it has scored; its protocol says how.

        Arguments:
            means: temperature, dynamic evaluation, cache.
            rms: what `gradient_rms` returned; None: computed where it is needed.
            data, groups, reading: as in `score_split`.

        Raises:
            UserError: see `score_split` and `gradient_rms`.

        Example:
            >>> cache = Cache(weight=0.1, theta=0.3, window=500)
            >>> model.score_adapted("test", Adaptation(cache=cache)).ppl
        """
        text, encoded = self._text(split, data, reading)
        if means.dynamic is not None and rms is None:
            rms = self.gradient_rms(means.dynamic.segment)
        chunk, tokenizer = self.config.eval.chunk, self.tokenizer
        nats = adaptation.token_nlls(self.model, encoded.ids, tokenizer.eos, means, rms, chunk)
        score = summarize(nats, encoded.ids, encoded, tokenizer, means.protocol)
        if groups:
            score = in_bands(score, nats, encoded, tokenizer, self.train_counts)
        return of_text(score, encoded, tokenizer, self.train_counts, text.facts.digest(tokenizer.lossless))

    def gradient_rms(self, segment: int) -> list[Tensor]:
        """Returns the root mean square gradients over the run's training text, for dynamic evaluation.

        Raises:
            UserError: the text is not the one that the model was trained on.

        Example:
            >>> rms = model.gradient_rms(segment=5)
        """
        _, encoded = self._text("train", None)
        return adaptation.gradient_rms(self.model, encoded.ids, self.tokenizer.eos, segment)

    def tune(
        self,
        means: Adaptation,
        *,
        rms: Sequence[Tensor] | None = None,
        tokens: int | None = None,
        temperature: bool = True,
        say: Say = print,
    ) -> Adaptation:
        """Returns the means with the constants that score the run's validation text best; see `adaptation.tune`.

        Arguments:
            tokens: of the text's beginning, so many; None: all.

        Example:
            >>> means = model.tune(Adaptation(cache=Cache(weight=0.1, theta=0.3, window=500)), tokens=20000)
            >>> model.score_adapted("test", means).ppl
        """
        ids = self._text("valid", None)[1].ids[:tokens]
        if means.dynamic is not None and rms is None:
            rms = self.gradient_rms(means.dynamic.segment)
        return adaptation.tune(
            self.model,
            ids,
            self.tokenizer.eos,
            means,
            rms,
            chunk=self.config.eval.chunk,
            temperature=temperature,
            say=say,
        )

    def _text(self, split: Split, data: str | None, reading: Reading | None = None) -> tuple[Text, Stream]:
        """A split of the run's own corpus, or of another, that the tokenizer can take; and its ids."""
        if split not in corpora.SPLITS:
            raise UserError(f"a split must be one of {', '.join(corpora.SPLITS)}; got {split!r}; choose one of these")
        settings = self.config.data
        source = settings.source if data is None else data
        options = settings.reading if data is None or reading is None else reading
        corpus = corpora.load(source, Path(settings.dir), [split], options)
        text = corpus.splits[split]
        # where one text is split, each part of another one is another: older checkpoints tell of train and valid alone
        for name in (corpus.splits if corpus.note else [split]) if data is None else ():
            self._require_own(name, corpus.splits[name])
        ways = checks.Ways("" if data is None else "--encoding ", "")
        for warning in checks.require({split: text}, self.tokenizer.kind, ways):
            self.say(f"warning: {warning}")
        if data is not None and corpus.note:
            self.say(
                f"{corpus.note}; only {split} is scored: to score a whole text, give a folder with it as {split}.txt"
            )
        encoded = store.encoded(text, self.tokenizer)
        if unknown := stream.many_unknown(encoded, self.tokenizer, split):
            self.say(f"{unknown}; check that the text, its language and its encoding are those of the training text")
        return text, encoded

    def _require_own(self, split: str, text: Text) -> None:
        """Raises UserError where the run is known to have had another text."""
        known, source = self.data_sha256.get(split), self.config.data.source
        if known is None or known == text.facts.digest(self.tokenizer.lossless):
            return
        raise UserError(
            f"a run must be evaluated with its own {split} text; got another in {source}; restore that, or score this "
            f"as another text, by --data {shlex.quote(source)}"
        )

    def _score(self, text: Text, encoded: Stream, protocol: ProtocolName, chunk: int, groups: bool = False) -> Score:
        return evaluate(
            self.model,
            encoded,
            self.tokenizer,
            protocol=protocol,
            chunk=chunk,
            train_counts=self.train_counts,
            data_sha256=text.facts.digest(self.tokenizer.lossless),
            groups=groups,
        )


def load(
    folder: Path | str, *, which: Which = "best", backend: str = "auto", device: str = "auto", say: Say = print
) -> TrainedModel:
    """Returns the model of a run folder, in evaluation mode.

    Arguments:
        folder: where `train` trained it, as by `python -m lm train --run FOLDER`.
        which: the checkpoint, `best` (on the validation text) or `last`. Of the last the averages are taken once a
            whole epoch is done, with the running statistics of the last validation.
        backend: backend for the recurrent layers, by `rnnorm`'s names.
        device: where to put it: cpu, cuda, cuda:0, or auto: cuda where there is one, else cpu.
        say: receives warnings: of a damaged `last`, where the one before it is taken, and of texts that are scored.

    Raises:
        UserError: no such run; a damaged checkpoint, or one of another vocabulary or model.

    Example:
        >>> model = lm.load("runs/mine")
    """
    place = RunFolder(Path(folder))
    where = require_device(device)
    require_backend(backend, where)
    saved = place.saved(which, say)
    settings = config.build(saved["config"])
    train = settings.train.model_copy(update={"backend": backend})
    settings = settings.model_copy(update={"train": train, "data": place.data(settings.data)})
    tokenizer = tokenizers.from_state(saved["tokenizer"])
    place.require_vocabulary(tokenizer)
    with place.fitting("counts"):
        state = TrainerState(**saved["trainer"])
        counts = saved["train_counts"]
        if len(counts) != tokenizer.size or not all(type(count) is int and 0 <= count < 2**63 for count in counts):
            raise ValueError(f"train_counts must be {tokenizer.size} integers from 0 up")
    texts = {**place.scored_texts(), **saved["data_sha256"]}
    weights = (saved.get("averages") if state.epoch else None) or saved
    with place.fitting("model"):  # before any memory is taken for it
        # not torch's default dtype, which a program may have set
        dtype = (
            torch.float64 if torch.float64 in {value.dtype for value in weights["model"].values()} else torch.float32
        )
        checkpoint.require_tensors(weights["model"], sketch(settings.model, tokenizer.size).to(dtype).state_dict())
    with torch.random.fork_rng(devices=[]):
        model = LanguageModel(settings.model, tokenizer.size, backend).to(where, dtype)
    model.load_state_dict(weights["model"])
    return TrainedModel(settings, tokenizer, model.eval(), torch.tensor(counts), texts, state.step, say)
