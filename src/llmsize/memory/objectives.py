"""What a model is trained for, and which other models and moments that brings.

A preference needs the log-probabilities of a frozen reference; a policy needs rollouts, perhaps a
reference, and for PPO a reward and a value model. They live beside the trained model, or take
their turn before it, and the peak of the step is the highest of all moments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from llmsize.anatomy import Setting, Trace, outlined, run_forward
from llmsize.anatomy.setting import Objective as Head
from llmsize.architecture import Architecture
from llmsize.errors import LLMSizeError, one_of
from llmsize.formats import FP32, INT64
from llmsize.memory.states import stored
from llmsize.memory.timeline import counted, peak, stretches, traced
from llmsize.term import Term, total

Reference = Literal["model", "adapter", "precomputed", "none"]
"""A frozen copy of the model; the model itself without its adapters; log-probabilities that were
computed before training; or none at all."""


class Objective(NamedTuple):
    """What is trained for."""

    name: str
    title: str
    source: str
    head: Head = "tokens"
    """What is made of the last hidden states."""
    pairs: bool = False
    """Whether each example is a chosen and a rejected sequence, in one batch."""
    reference: Reference = "none"
    """By default, where all weights are trained."""
    rollouts: bool = False
    """Whether the model first writes what it is trained on."""
    critic: bool = False
    """Whether a value model is trained beside it, and a reward model scores what it wrote."""
    note: str = ""


_KNOWN = (
    Objective("sft", "the next token", "cross entropy"),
    Objective("dpo", "direct preference optimization",
              "Rafailov et al. 2023, arXiv:2305.18290; TRL v1.16, trl/trainer/dpo_trainer.py",
              head="log-probabilities", pairs=True, reference="model",
              note="--batch counts pairs"),
    Objective("reward", "a reward model from preferences",
              "Ouyang et al. 2022, arXiv:2203.02155; TRL v1.16, trl/trainer/reward_trainer.py",
              head="score", pairs=True, note="--batch counts pairs; the head gives one number"),
    Objective("grpo", "group relative policy optimization",
              "Shao et al. 2024, arXiv:2402.03300; TRL v1.16, trl/trainer/grpo_trainer.py",
              head="log-probabilities", rollouts=True),
    Objective("ppo", "proximal policy optimization with a value and a reward model",
              "Schulman et al. 2017, arXiv:1707.06347; TRL v0.29, trl/experimental/ppo",
              head="policy", reference="model", rollouts=True, critic=True,
              note="reward and value model are as large as the policy"),
)  # fmt: skip

GIVEN = "a share of the device, as it was given"

OBJECTIVES = {objective.name: objective for objective in _KNOWN}
SFT = OBJECTIVES["sft"]


class Rollout(NamedTuple):
    """How the model writes what it is trained on."""

    sequences: int
    """Written at once."""
    completion: int
    """Tokens that are written of each sequence."""
    scored: int
    """Sequences that the frozen models read at once."""
    engine: int = 0
    """Bytes that an engine on the same device takes, its own weights and cache; 0 for
    transformers' `generate`."""
    sleeps: bool = False
    """Whether the engine gives its memory back while the model is trained."""


def objective_named(name: str) -> Objective:
    """The objective of that name. Raises `LLMSizeError` with close names."""
    return OBJECTIVES[one_of(name, OBJECTIVES, "objective")]


def objective_notes(objective: Objective, reference: Reference) -> Iterator[str]:
    """What is taken for granted about the batch, and about the frozen reference."""
    if objective.note:
        yield objective.note
    if objective.rollouts and reference == "none":
        yield "without a reference, as where beta is 0; `--reference model` adds one"
    elif reference == "precomputed":
        yield "the reference's log-probabilities were computed before training"
    elif objective.pairs and reference != "none":
        yield "the reference runs after the policy's forward pass"


def check_rollout(objective: Objective, **given: float | None) -> None:
    """Raise `LLMSizeError` for options of rollouts where nothing is written."""
    for option, value in given.items():
        if value and not objective.rollouts:
            so = "" if option == "rollouts" else f", so no {option}"
            raise LLMSizeError(
                f"`{objective.name}` has no rollouts{so}",
                hint="objectives that have: "
                + ", ".join(name for name, known in OBJECTIVES.items() if known.rollouts),
            )


class Companions(NamedTuple):
    """The other models of a step, and how a trained one is set up."""

    architecture: Architecture
    setting: Setting
    """Of the trained model."""
    objective: Objective
    reference: Reference
    rollout: Rollout | None

    def resident(self) -> Iterator[Term]:
        """Frozen models that live through the step."""
        if self.reference == "model":
            yield counted("reference model", self._weights(self.objective.head))
        if self.objective.critic:
            yield counted("reward model", self._weights("score"))
        if self.rollout and self.rollout.engine and not self.rollout.sleeps:
            yield counted("engine of the rollouts", self.rollout.engine, source=GIVEN)

    def moments(self, kept: int) -> Iterator[Term]:
        """The highest moments of what runs besides the trained pass, above what is resident.

        `kept` is what the trained model's forward pass leaves alive.
        """
        if self.rollout:
            yield total("rollouts", *self._rollouts(self.rollout), unit="bytes")
        if self.rollout and (self.reference in ("model", "adapter") or self.objective.critic):
            yield total("scoring", *self._scoring(self.rollout), unit="bytes")
        if not self.rollout and self.reference in ("model", "adapter"):
            reading = self._read(self.objective.head, self.setting.batch)
            yield total(
                "reference", traced("kept by the policy", kept),
                traced("reference's pass", reading), unit="bytes",
            )  # fmt: skip

    def _frozen(self, head: Head, batch: int) -> Setting:
        """A pass without gradients of a model without adapters.

        A reference is stored as the trained model's own weights are, a reward model plain.
        """
        return self.setting._replace(
            batch=batch, objective=head, training=False, adapter=None,
            modules_to_save=(), checkpoint_every=0, input_gradients=False,
            quantized=None if head == "score" else self.setting.quantized,
        )  # fmt: skip

    def _weights(self, head: Head) -> int:
        setting = self._frozen(head, 1)
        weights = outlined(self.architecture, setting).weights.values()
        return sum(stored(weight, setting) for weight in weights)

    def _read(self, head: Head, batch: int) -> int:
        return _highest(run_forward(self.architecture, self._frozen(head, batch))[0])

    def _scoring(self, rollout: Rollout) -> Iterator[Term]:
        """The frozen models read what was written, one model after the other."""
        heads: list[Head] = ["score"] if self.objective.critic else []
        if self.reference in ("model", "adapter"):
            heads.append(self.objective.head)
        yield traced("a frozen model's pass", max(self._read(h, rollout.scored) for h in heads))
        if self.objective.critic:
            yield counted("logits of the rollouts", self._logits(rollout))

    def _rollouts(self, rollout: Rollout) -> Iterator[Term]:
        if rollout.engine:
            if rollout.sleeps:
                yield counted("engine of the rollouts", rollout.engine, source=GIVEN)
            return
        whole = self.setting.sequence
        written = self.setting._replace(
            batch=rollout.sequences, objective="tokens", training=False,
            cache=True, checkpoint_every=0, input_gradients=False, last_logits=True,
        )  # fmt: skip
        prompt = _highest(self._run(written._replace(sequence=whole - rollout.completion)))
        cache = _cached(self._run(written._replace(sequence=whole - 1)))
        token = _highest(self._run(written._replace(sequence=1, past=whole - 1)))
        yield counted("token ids", INT64.block_bytes * rollout.sequences * whole)
        if self.objective.critic:
            yield counted("logits of the rollouts", 2 * self._logits(rollout), "as list and stack")
        yield traced("keys, values and the pass", max(prompt, cache + token))

    def _run(self, setting: Setting) -> Trace:
        return run_forward(self.architecture, setting)[0]

    def _logits(self, rollout: Rollout) -> int:
        """Those of every written token in fp32, as `generate` returns them."""
        trace, logits = run_forward(
            self.architecture, self._frozen("tokens", 1)._replace(sequence=1), outline=True
        )
        del trace
        return FP32.block_bytes * rollout.sequences * rollout.completion * logits.shape[-1]


def _highest(trace: Trace) -> int:
    trace.leave_autocast()
    trace.outputs = None
    return peak(list(stretches(trace))).bytes


def _cached(trace: Trace) -> int:
    """Bytes of the keys and values that the pass left."""
    return sum(
        change * part.times
        for part in stretches(trace)
        for change, (role, *_) in part.lasting()
        if role == "cache"
    )
