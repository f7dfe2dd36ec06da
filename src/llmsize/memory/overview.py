"""One model, four jobs: what each part of memory takes for inference and for training.

Everything is on one device. Weights, gradients, optimizer states and the cache are counted;
activations of training are followed tensor by tensor; those of inference and the runtime's own
memory follow published rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from llmsize.anatomy import LoRA, Setting, Trace, traced
from llmsize.anatomy.parameters import count, hidden_size
from llmsize.architecture import Architecture
from llmsize.formats import FP16, FP32, TRAINED, Format
from llmsize.memory.kv_cache import kv_cache
from llmsize.memory.training import TrainingRun, TrainingStep, training_step
from llmsize.memory.weights import (
    Checkpoint,
    Recipe,
    checkpoint,
    folded_checkpoint,
    stored_weights,
    tells_layers_apart,
    without_experts,
)
from llmsize.optimizers import Optimizer, Precision, kept_format, state_bytes, state_format
from llmsize.quick_dataclasses import replace
from llmsize.term import Grade, Term, fact, term, total

if TYPE_CHECKING:
    from llmsize.engine import Engine
    from llmsize.hardware import Accelerator

Job = Literal["inference", "full training", "LoRA", "QLoRA"]
JOBS: tuple[Job, ...] = get_args(Job)

Parts = dict[str, Term | str]
"""A term for each component, or the reason why there is none."""

COMPONENTS = (
    "weights", "gradients", "optimizer states", "activations", "KV cache", "runtime overhead",
)  # fmt: skip

STATES = ("weights", "master weights", "optimizer states")
"""What a training step starts from, but for gradients that stay; inputs and buffers are small."""

KORTHIKANTI = "Korthikanti et al. 2022, arXiv:2205.05198, equation 2 and section 4.3"
RUNTIME = fact(
    "CUDA context and libraries", 612 * 2**20, unit="bytes", grade="assumed",
    source="as presets/stacks/transformers.yaml has it; 0.47 to 0.92 GiB seen on A100 and H200",
)  # fmt: skip

ADAPTERS = LoRA(rank=16, targets=("all-linear",))

SERVED_ALONE = "llama.cpp serves its files and trains none"

FormatOf = Callable[[str], Format]


class Subject(NamedTuple):
    """A model that was traced, or a bare parameter count with a shape that stands in for it."""

    architecture: Architecture
    trace: Trace
    parameters: int
    shape_parameters: int
    """Parameters of the shape; equal to `parameters` for a real model."""
    stored: dict[tuple[Recipe, Format], int]
    """Bytes of its tensors that have been asked for already, by recipe and own format."""

    @property
    def assumed(self) -> bool:
        """Whether the shape is that of another model."""
        return self.parameters != self.shape_parameters

    @property
    def grade(self) -> Grade:
        """The best grade of what follows from the shape."""
        return "assumed" if self.assumed or self.architecture.grade == "assumed" else "exact"


class Storage(NamedTuple):
    """How weights are stored: all in one format, or as a recipe of quantization says."""

    name: str
    format: Format
    """Of every weight, or of those that the recipe leaves alone."""
    recipe: Recipe | None = None

    @property
    def trainable(self) -> bool:
        """Whether weights stored so can be trained themselves."""
        return self.recipe is None and self.format in TRAINED


class Workload(NamedTuple):
    """What is done with a model, for all four jobs at once."""

    storage: Storage
    """Of the weights."""
    precision: Precision
    optimizer: Optimizer
    format_of: FormatOf
    """Looks up the formats that recipes name."""
    batch: int
    context: int
    """Tokens of each sequence."""
    lora: LoRA = ADAPTERS
    recompute: bool = False
    """Whether every layer keeps its input alone and runs again in the backward pass."""
    engine: Engine | None = None
    """That serves; absent for what is estimated by formulas alone."""
    card: Accelerator | None = None
    """That it is done on, where one is named."""


@lru_cache(maxsize=1024)  # with what is asked of it
def subject(architecture: Architecture, parameters: int | None = None) -> Subject:
    """The model traced once; `parameters` overrides the count and keeps the shape."""
    trace = traced(architecture)
    counted = count(trace.weights.values()).total
    return Subject(architecture, trace, parameters or counted, counted, {})


def need(model: Subject, work: Workload, job: Job) -> Parts:
    """What one job takes, part by part."""
    if job == "inference":
        return inference(model, work)
    return full_training(model, work) if job == "full training" else lora_training(model, work)


def inference(model: Subject, work: Workload) -> Parts:
    """Weights, the cache of all sequences, and the working memory of a prefill."""
    none = "inference computes no gradients"
    return {
        "weights": stored(model, work.storage, work.format_of),
        "gradients": none,
        "optimizer states": none,
        "activations": layer_activations(model, work),
        "KV cache": cache(model, work),
        "runtime overhead": RUNTIME,
    }


def full_training(model: Subject, work: Workload) -> Parts:
    """Every parameter trained, as the precision recipe keeps it."""
    if not work.storage.trainable:
        none = f"weights in {work.storage.name} are not trained; take fp32, fp16 or bf16"
        return dict.fromkeys(COMPONENTS, none)
    precision, dtype = work.precision, work.storage.format
    source = precision.source
    weights = kept_format(precision, precision.weights, dtype)
    gradients = kept_format(precision, precision.gradients, dtype)
    return {
        "weights": uniform(model, weights, source=source),
        "gradients": uniform(model, gradients, name="gradients", source=source),
        "optimizer states": states(model, work.optimizer, precision, dtype),
        "activations": activations(model, training_step(model.architecture, _full_run(work))),
        "KV cache": "training caches no keys and values",
        "runtime overhead": RUNTIME,
    }


def lora_training(model: Subject, work: Workload) -> Parts:
    """Frozen weights, and trained adapters beside every linear layer."""
    if reason := not_adapted(work.storage):
        return dict.fromkeys(COMPONENTS, reason)
    step = training_step(model.architecture, _adapter_run(work))
    kept = work.lora.format
    added = _per_parameter("adapters", step.trained, kept.block_bytes)
    return {
        "weights": total("weights", _frozen(model, work.storage, step, int(added.value)), added),
        "gradients": _per_parameter("gradients of the adapters", step.trained, kept.block_bytes),
        "optimizer states": _adapter_states(work.optimizer, kept, step),
        "activations": activations(model, step),
        "KV cache": "training caches no keys and values",
        "runtime overhead": RUNTIME,
    }


def _frozen(model: Subject, storage: Storage, step: TrainingStep, added: int) -> Term:
    """The weights beside adapters of `added` bytes: a step keeps wide what its kernels want so."""
    if storage.recipe is None:
        return uniform(model, storage.format)
    size = int(step.static.part("weights").value) - added
    return _scaled("weights", model, size, storage.recipe)


def not_adapted(storage: Storage) -> str:
    """Why nothing is trained beside weights that are stored so; empty where adapters are."""
    if storage.recipe is not None:
        return SERVED_ALONE if storage.recipe.container == "gguf" else ""
    if storage.trainable:
        return ""
    return f"no adapters beside {storage.name}; 16 bit, `llm-int8` and `nf4` are bases of them"


def article(parameters: int, format: Format) -> dict[Job, Parts]:
    """The rule of thumb of a widely read article: 24 bytes per parameter for training in fp32.

    It counts four fp32 numbers for AdamW, where PyTorch keeps two, and 1.2 × weights to serve.
    """
    source = "article convention: 4 + 4 + 16 bytes per parameter; inference 1.2 × weights"
    uncounted = "the article does not count it"
    kept = _per_parameter("weights", parameters, format.block_bytes, source=source)
    fifth = term(
        "runtime overhead", "ceil(weights * 2 / 10)", unit="bytes", weights=kept.value,
        source=source, grade="formula",
    )  # fmt: skip
    serving: Parts = dict.fromkeys(COMPONENTS, uncounted) | {
        "weights": kept,
        "runtime overhead": fifth,
    }
    training: Parts = dict.fromkeys(COMPONENTS, uncounted)
    if format == FP32:
        training |= {
            "weights": kept,
            "gradients": _per_parameter("gradients", parameters, 4, source=source),
            "optimizer states": _per_parameter("AdamW", parameters, 16, source=source),
        }
    else:
        training = dict.fromkeys(COMPONENTS, "the article counts training in fp32 only")
    none: Parts = dict.fromkeys(COMPONENTS, uncounted)
    return {"inference": serving, "full training": training, "LoRA": none, "QLoRA": none}


def on_each(parts: Parts, devices: int, *beside: Term) -> Term | str:
    """What each of several devices holds: an even share, and the whole runtime's own memory.

    `beside` is what each of them holds whole, too, such as the activations of its own batch.
    """
    if devices == 1:
        return sum_of(parts)
    whole = {"runtime overhead", *(part.name for part in beside)}
    kept = sum_of({name: part for name, part in parts.items() if name not in whole})
    if isinstance(kept, str):
        return kept
    share = term(
        "share of each device", "ceil(bytes / devices)", unit="bytes", bytes=kept.value,
        devices=devices, grade="assumed", note="all divided evenly",
    )  # fmt: skip
    return total("total", share, *beside, RUNTIME)


def sum_of(parts: Mapping[str, Term | str], name: str = "total") -> Term | str:
    """The sum of the terms among `parts`, or the reason why there is none."""
    terms = [part for part in parts.values() if isinstance(part, Term)]
    return total(name, *terms) if terms else next(str(reason) for reason in parts.values())


def stored(model: Subject, storage: Storage, format_of: FormatOf) -> Term:
    """The weights as they are stored; `format_of` looks up the formats that a recipe names."""
    recipe, own = storage.recipe, storage.format
    if recipe is None:
        return uniform(model, own)
    if tells_layers_apart(recipe) and not model.assumed:
        return _by_tensor(model, recipe, own, format_of)
    size = model.stored.get((recipe, own))
    if size is None:
        size = model.stored[recipe, own] = int(_by_tensor(model, recipe, own, format_of).value)
    return _scaled("weights", model, size, recipe)


def _by_tensor(model: Subject, recipe: Recipe, own: Format, format_of: FormatOf) -> Term:
    """The sum of a recipe's tensors, each in a format of its own."""
    tensors, recipe = _tensors(model, recipe), without_experts(recipe)
    return stored_weights(tensors, recipe, format_of, own=own, imatrix=recipe.needs_imatrix)


def _tensors(model: Subject, recipe: Recipe) -> Checkpoint:
    """The tensors that a recipe is about."""
    if not tells_layers_apart(recipe):
        return folded_checkpoint(model.architecture, model.trace)
    if recipe.container != "gguf":
        return checkpoint(model.architecture, model.trace)
    from llmsize.memory.llamacpp.gguf import gguf  # llama.cpp is large and mostly not asked for

    return gguf(model.architecture, model.trace)


def uniform(model: Subject, format: Format, *, name: str = "weights", source: str = "") -> Term:
    """Every parameter in `format`; tied matrices once."""
    source = source or format.source
    if format.block_elements == 1:
        return _per_parameter(name, model.parameters, format.block_bytes, source=source)
    return term(
        name, "ceil(parameters / block_elements) * block_bytes", unit="bytes", source=source,
        parameters=model.parameters, block_bytes=format.block_bytes,
        block_elements=format.block_elements,
    )  # fmt: skip


def states(model: Subject, optimizer: Optimizer, precision: Precision, dtype: Format) -> Term:
    """Optimizer states, and the master copy if there is one."""
    stepped = kept_format(precision, precision.stepped, dtype)
    name = optimizer.title or optimizer.name
    if optimizer.layout == "elementwise":
        size = _element_bytes(optimizer, stepped)
        kept = _per_parameter(name, model.parameters, size, source=optimizer.source)
    else:
        size = sum(
            state_bytes(optimizer, w.shape, role=w.role, stepped=stepped) * w.copies
            for w in model.trace.weights.values()
        )
        kept = _scaled(name, model, size, optimizer)
    if not precision.master:
        return kept
    master = uniform(model, stepped, name=f"{stepped.name} master copy", source=precision.source)
    return total("optimizer states", kept, master)


def _adapter_states(optimizer: Optimizer, stepped: Format, step: TrainingStep) -> Term:
    name = f"{optimizer.title or optimizer.name} of the adapters"
    if optimizer.layout == "elementwise":
        size = _element_bytes(optimizer, stepped)
        return _per_parameter(name, step.trained, size, source=optimizer.source)
    kept = next(part.value for part in step.static.parts if part.name == "optimizer states")
    return Term(name, kept, "bytes", source=optimizer.source, note=optimizer.note)


def _element_bytes(optimizer: Optimizer, stepped: Format) -> int:
    """Bytes of all states for one parameter; step counters are left out."""
    states = optimizer.states.values()
    return sum(state_format(optimizer, name, stepped).block_bytes for name in states)


def cache(model: Subject, work: Workload) -> Term:
    """Keys and values of every sequence at its full context, in the format of plain weights."""
    kept = work.storage.format if work.storage.format.block_elements == 1 else FP16
    layers = model.trace.layer_caches()
    made = kv_cache(layers, context=work.context, keys=kept, values=kept, sequences=work.batch)
    return _graded(made, model.grade)


def activations(model: Subject, step: TrainingStep) -> Term:
    """What a training step needs at its peak beyond weights, gradients and optimizer states.

    Gradients appear as activations go, so this is less than all that the forward pass keeps.
    """
    states = sum(part.value for part in step.static.parts if part.name in STATES)
    beyond = max(step.total - int(states) - step.gradients, 0)
    where = (
        "what the optimizer allocates, whose step has the peak"
        if step.phase == "step"
        else f"the peak is in the {step.phase} pass"
    )
    return Term(
        "activations", beyond, "bytes", source="a training step followed tensor by tensor",
        grade=_weaker("formula", model.grade), note=f"beyond the model states; {where}",
    )  # fmt: skip


def step_of(model: Subject, work: Workload, job: Job) -> TrainingStep:
    """The training step of a job, followed tensor by tensor in the shape of the model."""
    run = _full_run(work) if job == "full training" else _adapter_run(work)
    return training_step(model.architecture, run)


def _full_run(work: Workload) -> TrainingRun:
    """A step that trains every weight."""
    precision, dtype = work.precision, work.storage.format
    setting = Setting(
        batch=work.batch, sequence=work.context, training=True,
        format=kept_format(precision, precision.weights, dtype),
        autocast=dtype if precision.autocast else None,
        checkpoint_every=int(work.recompute),
    )  # fmt: skip
    return TrainingRun(precision, work.optimizer, setting)


def _adapter_run(work: Workload) -> TrainingRun:
    """A step that trains adapters beside frozen, perhaps quantized weights."""
    recipe = work.storage.recipe
    setting = Setting(
        batch=work.batch, sequence=work.context, training=True, format=work.storage.format,
        trained=frozenset(), adapter=work.lora, checkpoint_every=int(work.recompute),
        input_gradients=work.recompute,
        quantized=work.format_of(recipe.base) if recipe else None,
        autocast=work.storage.format if work.precision.autocast else None,
    )  # fmt: skip
    return TrainingRun(work.precision, work.optimizer, setting)


def layer_activations(model: Subject, work: Workload) -> Term:
    """One layer at work on all prompts, or on as many tokens as the engine reads at a time.

    That is at most what training would keep of it.
    """
    prompts = work.batch * work.context
    pieces = work.engine.prefill if work.engine is not None else 0
    made = term(
        "activations", "34 * tokens * hidden", unit="bytes", grade="formula",
        source=KORTHIKANTI, note="prefill; one layer at a time",
        tokens=min(prompts, pieces or prompts), hidden=hidden_size(model.trace),
    )  # fmt: skip
    return _graded(made, _weaker("formula", model.grade))


def _per_parameter(name: str, parameters: int, size: int, *, source: str = "") -> Term:
    return term(
        name, "parameters * bytes_per_parameter", unit="bytes", source=source,
        parameters=parameters, bytes_per_parameter=size,
    )  # fmt: skip


def _scaled(name: str, model: Subject, size: int, told: Recipe | Optimizer) -> Term:
    """Bytes that were summed over the tensors of the shape, brought to the parameter count."""
    source, note = told.source, told.note
    if not model.assumed:
        return Term(name, size, "bytes", source=source, note=note)
    return term(
        name, "parameters * shape_bytes // shape_parameters", unit="bytes", source=source,
        grade="assumed", note=note, parameters=model.parameters, shape_bytes=size,
        shape_parameters=model.shape_parameters,
    )  # fmt: skip


def _weaker(first: Grade, second: Grade) -> Grade:
    return second if second == "assumed" else first


def _graded(term: Term, grade: Grade) -> Term:
    return term if grade == term.grade else replace(term, grade=grade)
