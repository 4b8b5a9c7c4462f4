"""SwitchCIT's switch network: a small classifier over a frozen language model's features picks the adapter.

Source: Wu et al., arXiv 2407.11780, and the first author's code. :class:`SwitchRouter` is theirs;
:class:`SwitchTokensRouter` is ours, which reads token means, keeps more prompts, and knows "none of these".
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.numpy import save
from safetensors.torch import load
from torch import Tensor

from cit_fast.data.example import Example
from cit_fast.embeddings.embedder import Embedder
from cit_fast.errors import ConfigError, RunError
from cit_fast.evaluation.run_files import stages_until
from cit_fast.files import write_file
from cit_fast.methods.routing.familiarity import Familiarity
from cit_fast.methods.routing.features import LastTokenFeatures, build_features
from cit_fast.methods.routing.rejection import Rejection, lowest_trusted, rejection_threshold
from cit_fast.methods.routing.router import (
    Reads,
    SavedRouter,
    SetStart,
    check_reads,
    check_start,
    routing_text,
    set_name,
)
from cit_fast.methods.routing.switch_network import SwitchNetwork, train_switch
from cit_fast.methods.stage import Assignment, Learned, Stage
from cit_fast.models.adapter_bank import BASE
from cit_fast.models.image_places import without_images
from cit_fast.models.image_reader import Prompt

_TENSORS = "switch.safetensors"
_PROMPTS = "prompts-{:0>4}.safetensors"


def _as_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file; by way of numpy, for safetensors' own way from torch keeps three types for every new size."""
    return save({name: tensor.numpy(force=True) for name, tensor in tensors.items()})


class SwitchTokensRouter(SavedRouter):
    """A set per task, trained on that task alone; a switch network sends each prompt to its task's set.

    When a task has been trained, the network is trained anew on the features of all of its prompts and of the retained
    few of every earlier task. Features are kept, never texts.

    A prompt goes to the base model if its features are too far from those of every task: its score is
    :class:`~cit_fast.methods.routing.familiarity.Familiarity`, and the threshold is the lower of two, each set as
    :class:`~cit_fast.methods.routing.rejection.Rejection` says: on known prompts, and on known prompts whose wording
    the task is not known by, where it has others. For a user's wording is seldom one that was trained.

    Args:
        features: ``"tokens"``: the mean of the base model's token embeddings, which costs next to nothing and told
            tasks apart best where we measured it; ``"base"``: last-token states of the base model, adapters off, as in
            the paper; ``"sentence"``: all-MiniLM-L6-v2; else a folder or hub name of a sentence-transformers model or
            of any causal language model (OPT-125M in the paper).
        retained: share of a task's prompts whose features are kept, in (0, 1].
        at_least: so many are kept of a small task, >= 1.
        max_length: tokens of a prompt that a model reads for its last-token state, the middle of a longer one left out.
        hidden, learning_rate, epochs, batch_size, balanced: of the network, see :func:`train_switch`.
        reads: what of a prompt is read, ``"prompt"`` (instruction and input, as a plain text has them),
            ``"instruction"``, or ``"whole"``: the text that the model is given, chat template and all. Images are seen
            with ``reads: whole`` and ``features: base``, then with every token of their prompt.
        reject: share of the known prompts that may go to the base model, in [0, 1); 0: every prompt goes to some set.
        reject_reworded: the same of known prompts in a wording that the task is not known by.
        held_out: tasks that are never trained (built-in names, files, folders), whose prompts the threshold must keep
            out; without any, it follows from known prompts alone.
        start: how a new set starts: ``"random"``; ``"previous"``, from the set trained last; or ``"nearest"``, from the
            set of the task which the network finds most likely of the new prompts, on average.

    Raises:
        ConfigError: an option out of range or unknown.
    """

    name = "switch-tokens"
    adopts = "examples"

    def __init__(
        self,
        features: str = "tokens",
        retained: float = 0.05,
        at_least: int = 20,
        max_length: int = 128,
        hidden: int = 256,
        learning_rate: float = 1e-3,
        epochs: int = 20,
        batch_size: int = 32,
        balanced: bool = True,
        reads: Reads | Literal["whole"] = "prompt",
        reject: float = 0.01,
        held_out: Sequence[str] = (),
        reject_reworded: float = 0.1,
        start: SetStart = "random",
    ) -> None:
        if not 0 < retained <= 1:
            raise ConfigError(f"retained: {retained}; expected a share of a task's prompts in (0, 1]")
        for key, value in (("at_least", at_least), ("hidden", hidden), ("epochs", epochs), ("batch_size", batch_size)):
            if value < 1:
                raise ConfigError(f"{key}: {value}; expected at least 1")
        if max_length < 2:
            raise ConfigError(f"max_length: {max_length}; expected at least 2 tokens")
        if not learning_rate > 0:
            raise ConfigError(f"learning_rate: {learning_rate}; expected above 0")
        if reads != "whole":
            check_reads(reads)
        self.features, self.retained, self.at_least = features, retained, at_least
        self.max_length, self.reads = max_length, reads
        self.hidden, self.learning_rate, self.epochs = hidden, learning_rate, epochs
        self.batch_size, self.balanced = batch_size, balanced
        self._rejection = Rejection(reject, held_out)
        if not 0 <= reject_reworded < 1:
            raise ConfigError(f"reject_reworded: {reject_reworded}; expected a share of the known prompts in [0, 1)")
        self.reject, self.held_out = self._rejection.reject, self._rejection.held_out
        check_start(start)
        self.reject_reworded, self.start = reject_reworded, start
        self._set_of: dict[str, str] = {}
        self._kept: list[Tensor] = []  # of each learned task, in the order of the sets: [n, d]
        self._known: list[Tensor] = []  # the same of prompts that were not learned from, for the threshold
        self._reworded: list[float] = []  # scores of those that their task is not known by, when they were learned
        self._familiarity = Familiarity()
        self._network: SwitchNetwork | None = None
        self._unread: tuple[Path, int] | None = None  # where the features of so many tasks are
        self._extractor: Embedder | None = None

    # What the published network does otherwise.
    _fraction_of_all: ClassVar[bool] = False  # of the new task, too, it learns from the retained fraction alone
    _cut: ClassVar[Literal["middle", "end"]] = "middle"
    _training: ClassVar[dict[str, Any]] = {}

    @property
    def sets(self) -> tuple[str, ...]:
        """One per task."""
        return tuple(self._set_of.values())

    def assign(self, stage: Stage) -> Assignment:
        """A new set."""
        self._rejection.unknown_prompts()  # what cannot be read is better known before anything is trained
        start = self._start(stage)
        self._set_of[stage.task.name] = set_name(stage.task, self.sets)
        return Assignment(self._set_of[stage.task.name], start_from=start)

    def _start(self, stage: Stage) -> str | None:
        """The set that the new one starts from."""
        if self._network is None or self.start == "random":
            return None
        if self.start == "previous":
            return self.sets[-1]
        likely = self._network(self._read(stage.task.train, stage)[0]).softmax(1).mean(0)
        return self.sets[int(likely.argmax())]

    def adopt(self, stage: Stage, adapter: str) -> None:
        """Learn the task from what there is of its prompts."""
        self._set_of[stage.task.name] = adapter
        self.learn(stage)

    def learn(self, stage: Stage) -> Learned:
        """Train the switch network anew, now that the new task has a set.

        Raises:
            DataError: a prompt without text.
        """
        self._take_up()
        task, rng = stage.task, stage.rng("router")
        new, truncated = self._read(task.train, stage)
        seed = rng.getrandbits(62)
        count = min(max(self.at_least, round(self.retained * len(new))), len(new))
        retained = [*self._kept, new[sorted(rng.sample(range(len(new)), count))].clone()]
        learned = retained if self._fraction_of_all else [*self._kept, new]
        labels = torch.tensor([label for label, own in enumerate(learned) for _ in own])
        self._network = network = train_switch(
            torch.cat(learned),
            labels,
            len(learned),
            seed=seed,
            hidden=self.hidden,
            learning_rate=self.learning_rate,
            epochs=self.epochs,
            batch_size=self.batch_size,
            balanced=self.balanced,
            **self._training,
        )
        self._kept = retained
        aside = self._rejection.known_prompts(task)
        self._known.append(self._read(aside, stage)[0])
        # Without a dev split they are training prompts, and must not make themselves familiar.
        first = 0 if task.dev or len(new) == len(aside) else len(aside)
        self._reworded += self._reworded_scores(aside, self._known[-1], task.train[first:], new[first:])
        self._familiarity.learn(new[first:])
        known, unknown = torch.cat(self._known), self._read(self._rejection.unknown_prompts(), stage)[0]
        strange = self._familiarity(unknown).tolist() if len(unknown) else []
        reject_below = self._rejection.learn(self._familiarity(known).tolist(), strange)
        lower = rejection_threshold(self._reworded, strange, self.reject_reworded)
        if reject_below is not None and lower is not None:
            reject_below = self._rejection.below = min(reject_below, lower)
        right = network(known).argmax(1) == torch.tensor([n for n, own in enumerate(self._known) for _ in own])
        too_long = f"{truncated} prompts are longer than {self.max_length} tokens; their {self._cut} was not read."
        return Learned(
            reject_below=reject_below,
            examples=len(labels),
            retained=sum(map(len, self._kept)),
            accuracy=float(right.float().mean()),
            truncated=truncated,
            notes=[too_long] if truncated else [],
        )

    def _reworded_scores(
        self, prompts: Sequence[Example], features: Tensor, trained: Sequence[Example], learned: Tensor
    ) -> list[float]:
        """Familiarity of a task's prompts, each where the task is known by its other wordings alone; of one, none.

        Args:
            features: of the prompts; ``learned``: of the trained examples.
        """
        if not self.reject:
            return []
        wordings = [routing_text(example, "instruction") for example in trained]
        asked = [routing_text(prompt, "instruction") for prompt in prompts]
        scores: list[float] = []
        for wording in dict.fromkeys(asked):
            others = [k for k, own in enumerate(wordings) if own != wording]
            if 0 < len(others) < len(wordings):
                without = copy.deepcopy(self._familiarity)
                without.learn(learned[others])
                scores += without(features[[k for k, own in enumerate(asked) if own == wording]]).tolist()
        return scores

    def answer(self, examples: Sequence[Example], stage: Stage) -> list[str]:
        """The set of the most likely task of each prompt, or the base model.

        Raises:
            DataError: an empty prompt.
            RunError: nothing was learned yet.
        """
        if self._network is None:
            raise RunError(f"router {self.name}: no task has been learned yet, so there is no set to choose")
        if not examples:
            return []
        features, _ = self._read(examples, stage)
        logits = self._network(features)
        if set(self.sets) <= stage.damaged:
            return [BASE] * len(examples)
        logits[:, [label for label, name in enumerate(self.sets) if name in stage.damaged]] = -torch.inf
        chosen = logits.argmax(1).tolist()
        below = self._rejection.below
        sure = [True] * len(chosen)
        if below is not None:
            sure = (self._familiarity(features) >= lowest_trusted(below)).tolist()
        return [self.sets[label] if trusted else BASE for label, trusted in zip(chosen, sure, strict=True)]

    def as_tensors(self, embeddings: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that :meth:`answer` computes with, for ``cit_fast.inference.route``: matrices, and plain values.

        Args:
            embeddings: [V, d], the token embeddings that prompts are means of.

        Raises:
            RunError: nothing was learned yet, or the features are no token means.
        """
        if self._network is None:
            raise RunError(f"router {self.name}: no task has been learned yet, so there is no set to choose")
        if self.features != "tokens":
            raise RunError(
                f"router {self.name}: reads {self.features!r} of a prompt, which takes a model; one with features "
                "'tokens' can be exported"
            )
        tensors, below = {"embeddings": embeddings, **vars(self._network)}, self._rejection.below
        if below is not None:
            below = lowest_trusted(below)
            tensors["whitening"], tensors["means"] = self._familiarity.whitening(embeddings.shape[1])
        return tensors, {"sets": list(self.sets), "below": below, "reads": self.reads}

    # -- features ------------------------------------------------------------------------------------------------

    def _read(self, examples: Sequence[Example], stage: Stage) -> tuple[Tensor, int]:
        """Features [examples, d], and how many prompts were too long to be read whole; equal prompts are read once."""
        seen = self._seen(examples, stage)
        plain = [index for index in range(len(examples)) if index not in seen]
        features, truncated = self._read_texts([examples[index] for index in plain], stage)
        if not seen:
            return features, truncated
        keys = {index: (examples[index].images, *prompt) for index, prompt in seen.items()}
        prompts = {key: seen[index] for index, key in keys.items()}
        position = {key: number for number, key in enumerate(prompts)}
        states = cast("LastTokenFeatures", self._features(stage)).embed_seen(list(prompts.values()))
        rows = dict(zip(plain, features, strict=True))
        rows |= {index: states[position[key]] for index, key in keys.items()}
        return torch.stack([rows[index] for index in range(len(examples))]), truncated

    def _seen(self, examples: Sequence[Example], stage: Stage) -> dict[int, Prompt]:
        """The prompts that are read with their images, by the index of their examples."""
        if (self.features, self.reads) != ("base", "whole"):
            return {}
        encoder = stage.encoder.with_limit(None, "error")
        asked = {index: encoder.prompt(example) for index, example in enumerate(examples) if example.images}
        return {index: prompt for index, prompt in asked.items() if isinstance(prompt, Prompt)}

    def _read_texts(self, examples: Sequence[Example], stage: Stage) -> tuple[Tensor, int]:
        """The same of their texts alone."""
        texts = self._texts(examples, stage)
        position = {text: index for index, text in enumerate(dict.fromkeys(texts))}
        extractor = self._features(stage)
        before = getattr(extractor, "truncated", 0)
        features = extractor.embed(list(position))
        return features[[position[text] for text in texts]], getattr(extractor, "truncated", 0) - before

    def _texts(self, examples: Sequence[Example], stage: Stage) -> list[str]:
        if self.reads != "whole":
            return [routing_text(example, self.reads) for example in examples]
        for example in examples:
            routing_text(example)  # refuses an empty one, which a template would fill
        encoder = stage.encoder.with_limit(None, "error")
        return [encoder.tokenizer.decode(encoder.prompt(without_images(example))) for example in examples]

    def _features(self, stage: Stage) -> Embedder:
        if self.features in ("base", "tokens"):  # of a model that is another object after every stage
            return build_features(self.features, stage, self.max_length, self._cut)
        if self._extractor is None:
            self._extractor = build_features(self.features, stage, self.max_length, self._cut)
        return self._extractor

    # -- memory --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """The sets, and the threshold."""
        learned = len(self._kept) if self._unread is None else self._unread[1]
        remembered = {"set_of": self._set_of, "learned": learned, "apart": learned, "reworded": self._reworded}
        return remembered | {"reject_below": self._rejection.below}

    def _take_up(self) -> None:
        """Read the retained features, which learning needs and answering does not.

        Raises:
            RunError: a file is missing or damaged.
        """
        if self._unread is None:
            return
        folder, count = self._unread
        found = {path.name: path for each in stages_until(folder) for path in each.glob("prompts-*.safetensors")}
        for name in map(_PROMPTS.format, range(count)):
            path = found.get(name, folder / name)
            try:
                own = load(path.read_bytes())
                self._kept.append(own["kept"])
                self._known.append(own["known"])
            except FileNotFoundError:
                raise RunError(f"{path}: not there; it holds what is retained of a task") from None
            except (OSError, SafetensorError, KeyError) as error:
                raise RunError(f"{path}: damaged ({error})") from None
        self._unread = None

    def save(self, folder: Path, earlier: Path | None = None) -> None:
        """Write ``router.json``, the network as ``switch.safetensors``, and each task's retained features as a file of
        its own, which a later stage need not write again.
        """
        if earlier is None:
            self._take_up()
        before = 0 if earlier is None else int(self._state_in(earlier).get("apart", 0))
        for n in range(before, len(self._kept)):
            own = {"kept": self._kept[n], "known": self._known[n]}
            write_file(Path(folder) / _PROMPTS.format(n), _as_bytes(own))
        tensors = {f"familiarity.{key}": value for key, value in self._familiarity.tensors().items()}
        if self._network is not None:
            tensors.update({f"network.{key}": value for key, value in vars(self._network).items()})
        write_file(Path(folder) / _TENSORS, _as_bytes(tensors))
        super().save(folder, earlier)

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Take them back.

        Raises:
            RunError: the tensors are missing or damaged.
        """
        self._set_of = {str(task): str(name) for task, name in state["set_of"].items()}
        self._rejection.below = None if state["reject_below"] is None else float(state["reject_below"])
        self._reworded = [float(score) for score in state["reworded"]]
        path = folder / _TENSORS
        try:
            tensors = load(path.read_bytes())
            count = int(state["learned"])
            if "apart" in state:
                self._unread = folder, count
            else:  # as it was before they lay in files of their own
                self._kept, self._known = (
                    [tensors[f"{kind}.{n:04d}"] for n in range(count)] for kind in ("kept", "known")
                )
            own = {key.removeprefix("familiarity."): value for key, value in tensors.items()}
            self._familiarity = Familiarity.from_tensors(own)
            if count:
                fields = {field.name: tensors[f"network.{field.name}"] for field in dataclasses.fields(SwitchNetwork)}
                self._network = SwitchNetwork(**fields)
        except FileNotFoundError:
            raise RunError(f"{path}: not there; it holds the switch network") from None
        except (OSError, SafetensorError, KeyError) as error:
            raise RunError(f"{path}: damaged ({error})") from None
        classes = len(self._network.bias) if self._network is not None else 0
        if not len(self._set_of) >= count == classes == len(self._familiarity.counts):
            raise RunError(f"{path}: damaged (it tells {classes} tasks apart, and router.json {len(self._set_of)})")


class SwitchRouter(SwitchTokensRouter):
    """The published switch: last-token states as they are, and a random fraction of every task's prompts, unbalanced.

    The network is that of the first author's code: 200 hidden units with a ReLU, AdamW, on prompts as the model gets
    them, of which the first ``max_length`` tokens are read. (Their training set leaves out the first task, by an
    off-by-one that is not followed here.) Every prompt goes to some task's set.

    Args:
        features: ``"base"``: last-token states of the base model, adapters off; or any causal language model
            (``facebook/opt-125m`` in the paper), a folder or hub name.
        fraction: of every task's prompts that is kept and learned from, in (0, 1], at least one.
        max_length: tokens read of a prompt.
        hidden, learning_rate, epochs, batch_size: of the network.

    Raises:
        ConfigError: an option out of range.
    """

    name = "switch"
    _fraction_of_all = True
    _cut = "end"
    _training: ClassVar[dict[str, Any]] = {"standardised": False, "optimizer": "adamw"}

    def __init__(
        self,
        features: str = "base",
        fraction: float = 0.0001,
        max_length: int = 512,
        hidden: int = 200,
        learning_rate: float = 1e-3,
        epochs: int = 20,
        batch_size: int = 32,
    ) -> None:
        self.fraction = fraction
        super().__init__(
            features,
            retained=fraction,
            at_least=1,
            max_length=max_length,
            hidden=hidden,
            learning_rate=learning_rate,
            epochs=epochs,
            batch_size=batch_size,
            balanced=False,
            reads="whole",
            reject=0.0,
        )
