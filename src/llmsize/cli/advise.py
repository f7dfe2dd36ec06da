"""`llmsize advise`: from machines, time and data to a plan, step by step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, NamedTuple

from llmsize import presets, units
from llmsize.anatomy import traced
from llmsize.anatomy.parameters import count
from llmsize.answer import Absent, Cell, Estimate, Row, Table
from llmsize.architecture import Architecture
from llmsize.cli import catalogue, declare, laws, machines, options
from llmsize.cli.jobs import need_of, on, workload
from llmsize.cli.laws import Tokens
from llmsize.cli.machines import Hardware, Pricing, words
from llmsize.engine import Engine
from llmsize.errors import LLMSizeError, printable
from llmsize.formats import Format
from llmsize.hardware import Machine, bandwidth, peak, training_format
from llmsize.memory import overview
from llmsize.memory.overview import Job, Storage, Workload
from llmsize.memory.weights import Recipe
from llmsize.optimizers import Precision
from llmsize.planning import advise as planning
from llmsize.planning.advise import TITLES, Option, Pretraining, Resources, Task
from llmsize.planning.catalogue import Choice, Filter, best, wanted
from llmsize.planning.needs import Way
from llmsize.planning.support import obstacle
from llmsize.quick_dataclasses import dataclass, replace
from llmsize.term import Term, fact
from llmsize.units import format_bytes, format_count, format_duration, format_share

EXAMPLES = (
    "llmsize advise --gpu rtx-4090 --gpus 2 --days 14",
    "llmsize advise --instance colab-t4 --days 12h --task finetune --data 20MB",
    "llmsize advise llama-7b --gpu a100 --gpus 8 --days 1 --task finetune --samples 52000 "
    "--tokens 6.8M --epochs 3 --price 4",
    "llmsize advise --gpu h100 --gpus 1024 --days 60 --task pretrain",
)

PLAIN = "16-bit"
TUNED: dict[Way, tuple[str, ...]] = {"full": (PLAIN,), "lora": (PLAIN,), "qlora": ("nf4",)}
"""How the weights may be stored in each way of tuning: a recipe, or as they are."""
ALONE = (PLAIN, "q8_0", "q6_k", "q5_k_m", "q4_k_m")
"""How they are stored for one user, the most precise first: a published file for llama.cpp, …"""
SHARED = (PLAIN, "fp8", "awq-int4-g128")
"""… and for several at once, whom an engine with a paged cache serves where it runs."""
PAGED = "vllm"
JOBS: dict[Way, Job] = {
    "serve": "inference", "full": "full training", "lora": "LoRA", "qlora": "QLoRA"
}  # fmt: skip
TRAINED_CONTEXT, SERVED_CONTEXT = 2048, 8192
"""Tokens of a sequence unless `--context` says otherwise, …"""
HELD_CONTEXT = 2048
"""… and those that each of several users holds on average: a paged cache gives what is used."""
SERVER = 8
"""Devices that one copy of a model is divided over, at most: those of a server, with fast links."""
DAY = 86_400.0
LAW, REPEATING = "chinchilla", "muennighoff"
SHOWN = 2
"""Models that are offered for each way."""
RECENT_MONTHS = 24
"""Released at most so long before the newest model of the catalogue: older ones of the same size
have seen fewer and worse tokens."""


def _seconds(text: str) -> float:
    """A number of days, or a duration with its unit."""
    try:
        days = float(text)
    except ValueError:
        return units.parse_duration(text, "time")
    if not days * DAY > 0:
        raise LLMSizeError(
            f"cannot plan for {printable(text)} days", hint="write a number above zero, or `3h`"
        )
    return units.parse_duration(f"{text.strip()}d", "time")


def _epochs(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 10_000:
        raise LLMSizeError(
            f"cannot train for `{printable(text)}` epochs", hint="write a number above zero"
        )
    return value


# fmt: off
Days = Annotated[
    float,
    declare.Option(
        "--days", help="How long the machines are there: days, or `3h`.", metavar="TIME",
        parser=lambda given: given if isinstance(given, float) else _seconds(given),
        show_default="7",
    ),
]
TaskName = Annotated[
    Task,
    declare.choosing(
        "--task", known=planning.WAYS, what="task", metavar="TASK"
    ),
]
Data = Annotated[
    int | None,
    declare.Option(
        "--data", help="Text at hand, in place of `--tokens`: `2GB`.", metavar="SIZE",
        parser=lambda text: units.parse_bytes(text, "data"), show_default=False,
    ),
]
Samples = Annotated[
    int | None,
    declare.counting(
        "--samples", what="number of samples", metavar="N", show_default=False,
        help="Samples that the data come in, if they are not packed.",
    ),
]
Epochs = Annotated[
    float,
    declare.Option(
        "--epochs", help="Passes over the data.", metavar="N",
        parser=lambda given: given if isinstance(given, float) else _epochs(given),
    ),
]
Users = Annotated[
    int, declare.Option("--users", metavar="N", help="Served at once.", min=1)
]
# fmt: on


class Goal(NamedTuple):
    """Goal.

    What is wanted, for how long, and from which data.
    """

    days: Days = 7 * DAY
    task: TaskName = "chatbot"
    tokens: Tokens = None
    data: Data = None
    samples: Samples = None
    epochs: Epochs = 1.0
    context: options.OptionalContext = None
    users: Users = 1
    commercial: options.Commercial = False


def advise(
    model: options.OptionalModel = None,
    *,
    hardware: Hardware,
    goal: Goal,
    pricing: Pricing,
    mfu: machines.Mfu = None,
) -> Estimate:
    """What to load, tune or train with these machines, time and data, and what it reaches."""
    case = _case(model, hardware, goal, pricing, mfu)
    ranges = _ranges(case)
    planned = _pretraining(case, ranges) if "scratch" in planning.WAYS[case.task] else None
    found = planning.ranked(
        _options(case, ranges, planned), case.task, data=case.have.tokens is not None
    )
    question = {
        "model": model, "machine": case.have.machine.title, "task": case.task,
        "seconds": case.have.seconds, "tokens": case.have.tokens, "samples": goal.samples,
        "epochs": goal.epochs, "context": goal.context, "users": goal.users,
        "commercial": goal.commercial,
        "price": None if case.have.price is None else case.have.price.value,
    }  # fmt: skip
    path = _path(case, ranges, planned)
    return Estimate(
        "advise", question, _headline(case, found), (path, _ranking(case, found)),
        _assumptions(case), tuple(_changes(case, found, planned)),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """Everything that one piece of advice is about."""

    task: Task
    words: str
    """The machine as options of a command line, …"""
    served_words: str
    """… and as much of it as one copy of a served model has."""
    context: int | None
    users: int
    have: Resources
    models: tuple[Architecture, ...]
    named: bool = False
    """Whether they are the one model that was asked about."""

    @property
    def engine(self) -> str:
        """What serves several users at once, if it runs here; else whatever runs weights so."""
        card = self.have.machine.accelerator
        paged = self.users > 1 and not (card and obstacle(presets.get(Engine, PAGED), card))
        return PAGED if paged else ""

    @property
    def storages(self) -> Mapping[Way, tuple[str, ...]]:
        """How weights may be stored in each way."""
        return {"serve": SHARED if self.engine else ALONE, **TUNED}

    @property
    def ways(self) -> tuple[Way, ...]:
        """Those that answer the task; who trains a new model wants to know what serves it, too."""
        asked = planning.WAYS[self.task]
        return tuple(
            way for way in self.storages if way in asked or (way == "serve" and "scratch" in asked)
        )

    def machine(self, way: Way) -> Machine:
        """All devices to train on, and those of one server to serve on."""
        every = self.have.machine
        return replace(every, devices=min(every.devices, SERVER)) if way == "serve" else every

    def flags(self, way: Way) -> str:
        """What the way is asked with: the machine, and for serving whom and by what."""
        context = f"--context {_context(self, way)}"
        if way != "serve":
            return f"{context} {self.words}"
        engine = f"--engine {self.engine} " if self.engine else ""
        users = f"--batch {self.users} " if self.users > 1 else ""
        return f"{context} {engine}{users}{self.served_words}"

    @property
    def format(self) -> Format:
        """What one trains in on this machine."""
        assert self.have.machine.accelerator is not None
        return presets.get(Format, training_format(self.have.machine.accelerator))


def _case(
    model: str | None, hardware: Hardware, goal: Goal, pricing: Pricing, mfu: float | None
) -> Case:
    _check_text(model, goal)
    machine = machines.machine(hardware)
    have = _have(machine, goal, mfu, machines.price(machine, pricing))
    filter = Filter(commercial=goal.commercial, context=goal.context or 0)
    return Case(
        goal.task, words(hardware), words(_server(hardware, have.machine)), goal.context,
        goal.users, have,
        tuple(_models(model, filter)), named=model is not None,
    )  # fmt: skip


def _server(hardware: Hardware, machine: Machine) -> Hardware:
    """The same hardware, no more of it than a server has."""
    card = machine.accelerator
    if card is None or machine.devices <= SERVER:
        return hardware
    return hardware._replace(gpu=card.name, gpus=SERVER // card.devices, instance=None)


def _tokens(tokens: float | None, data: int | None) -> float | None:
    if tokens is not None and data is not None:
        raise LLMSizeError(
            "`--tokens` and `--data` both say how much text there is", hint="give one"
        )
    return tokens if data is None else float(planning.tokens_in(data).value)


def _check_text(model: str | None, goal: Goal) -> None:
    """Raise `LLMSizeError` for what is said of text that is not there, or of models beside one."""
    unsaid = goal.tokens is None and goal.data is None
    if unsaid and (goal.samples is not None or goal.epochs != Goal().epochs):
        raise LLMSizeError("how much text is there?", hint="add `--tokens 6.8M` or `--data 20MB`")
    if model is not None and goal.commercial:
        raise LLMSizeError("`--commercial` chooses among models", hint="leave it out, or MODEL")


def _have(machine: Machine | None, goal: Goal, mfu: float | None, price: Term | None) -> Resources:
    if machine is None:
        raise LLMSizeError(
            "no machine to advise on", hint="name it: `--gpu rtx-4090`, `--instance g5.xlarge`"
        )
    accelerator = machine.accelerator
    if accelerator is None:
        raise LLMSizeError(
            "the speed of this machine is not known",
            hint="name the accelerator with `--gpu`; `--vram` beside it corrects its memory",
        )
    format = training_format(accelerator)
    return Resources(
        machine, goal.days, peak(accelerator, format),
        machines.efficiency(accelerator, format, mfu), bandwidth(accelerator).value,
        _tokens(goal.tokens, goal.data), goal.samples, goal.epochs,
        goal.context or TRAINED_CONTEXT, price=price,
    )  # fmt: skip


def _models(name: str | None, filter: Filter) -> Iterator[Architecture]:
    if name is not None:
        yield options.architecture(name)
        return
    yield from (m for m in presets.every(Architecture).values() if wanted(m, filter))


def _work(case: Case, way: Way, name: str) -> Workload:
    """What is asked of a model in this way, its weights stored by a recipe or as they are."""
    storage = Storage(case.format.name, case.format)
    if name != PLAIN:
        storage = Storage(name, case.format, presets.get(Recipe, name))
    engine = case.engine if way == "serve" else ""
    made = workload(storage, _users(case, way), _context(case, way), engine)
    made = made._replace(precision=presets.get(Precision, "mixed"))
    return on(case.have.machine, made)


def _ranges(case: Case) -> dict[tuple[Way, str], Cell]:
    """The most parameters for each way and storage, as `llmsize fits` counts them."""
    return {
        (way, storage): catalogue.most_parameters(
            JOBS[way], _work(case, way, storage), case.machine(way)
        )
        for way in case.ways
        for storage in case.storages[way]
    }


def _context(case: Case, way: Way) -> int:
    if way == "serve":
        return case.context or (HELD_CONTEXT if case.users > 1 else SERVED_CONTEXT)
    return case.context or TRAINED_CONTEXT


def _users(case: Case, way: Way) -> int:
    return case.users if way == "serve" else 1


def _pretraining(case: Case, ranges: dict[tuple[Way, str], Cell]) -> Pretraining:
    """A new model that the compute is best spent on, if it can be trained and served here."""
    limits = [ranges["full", PLAIN], ranges["serve", PLAIN]]
    counts = [int(limit.value) if isinstance(limit, Term) else 1 for limit in limits]
    return planning.pretraining(
        case.have, laws.named(LAW), [law for law in laws.every() if not law.experimental],
        laws.named(REPEATING), min(counts),
    )  # fmt: skip


def _options(
    case: Case, ranges: dict[tuple[Way, str], Cell], planned: Pretraining | None
) -> Iterator[Option]:
    """Every way of the task with the best models for it."""
    for way in case.storages:
        if way in planning.WAYS[case.task]:
            for choice in _search(case, way):
                layers, active = _size(choice.model)
                yield planning.adapt(case.have, way, choice, layers, active, named=case.named)
    if planned is not None and isinstance(ranges["full", PLAIN], Term):
        yield planning.scratch(planned)


def _size(model: Architecture) -> tuple[int, int]:
    """Its layers, and the parameters that one token meets."""
    trace = traced(model)
    return trace.depth, count(trace.weights.values()).active


def _search(case: Case, way: Way) -> list[Choice]:
    """The best models that fit: recent ones that anyone may use, or any recent one, or older ones,
    or those that are tight but within.
    """
    works = {name: _work(case, way, name) for name in case.storages[way]}
    newest = max((_month(model) for model in case.models), default=0)
    recent = [model for model in case.models if _month(model) > newest - RECENT_MONTHS]
    free = [model for model in recent if model.commercial]
    tiers = ((free, True), (recent, True), (case.models, True), (case.models, False))
    for models, certain in tiers:
        searched = catalogue.searching(works, case.machine(way), JOBS[way], certain=certain)
        if found := best(models, searched, SHOWN):
            return found
    return []


def _month(model: Architecture) -> int:
    """The month of the release, counted from year 0; 0 if it is not known."""
    year, _, month = model.released.partition("-")
    return 12 * int(year) + int(month or 1) if year.isdigit() else 0


def _path(case: Case, ranges: dict[tuple[Way, str], Cell], planned: Pretraining | None) -> Table:
    """The steps from memory to loss, each with its number and the command that gives it alone."""
    rows = [_step("memory of each device", case.have.machine.usable, f"llmsize fits {case.words}")]
    for (way, storage), most in ranges.items():
        title = f"{TITLES[way]}, {storage}: at most"
        if isinstance(most, Term) and most.value >= catalogue.MOST:
            most = Absent("more than any model has")
        rows.append(_step(title, most, _fits(case, way, storage)))
    if planned is not None:
        rows += _training_steps(case, planned)
    return Table("the path", ("result", "on its own"), tuple(rows), heading="step")


def _step(name: str, result: Cell, command: str) -> Row:
    return Row(name, {"result": result, "on its own": command})


def _training_steps(case: Case, planned: Pretraining) -> Iterator[Row]:
    have, plan = case.have, planned.plan
    best = f"llmsize optimal --compute {planned.compute.value:.3g}"
    time = format_duration(have.seconds)
    yield _step(f"compute in {time}", planned.compute, best)
    yield _step("best size for it", _by_law("parameters", planned.optimum.parameters), best)
    yield _step("tokens for that", _by_law("tokens", planned.optimum.tokens), best)
    if planned.limit is not None:
        bound = f"{best} --max-params {planned.limit}"
        yield _step("size that also fits here", _by_law("parameters", plan.parameters), bound)
        yield _step("tokens for that", _by_law("tokens", plan.tokens), bound)
    run = f"--params {plan.parameters:.0f} --tokens {plan.tokens:.0f}"
    if planned.epochs is not None and have.tokens:
        repeated = f"llmsize loss {run} --unique-tokens {have.tokens:.0f} --law {REPEATING}"
        epochs = fact("epochs", planned.epochs, unit="epochs", source="tokens needed over at hand")
        yield _step("passes over the data at hand", epochs, repeated)
        if planned.repeated_loss is not None:
            yield _step("loss, data repeated", _by_law("loss", planned.repeated_loss), repeated)
    yield from _losses(planned, f"llmsize loss {run} --law")
    timed = f"llmsize time {run} {_speed(case)}"
    yield _step("time", planned.time, timed)
    if planned.cost is not None and have.price is not None:
        yield _step("cost", planned.cost, f"{timed} --price {have.price.value:g}")


def _speed(case: Case) -> str:
    """What decides the speed, as options of a command line."""
    machine = case.have.machine
    assert machine.accelerator is not None
    cards = machine.devices // machine.accelerator.devices
    share = case.have.utilization
    given = f" --mfu {share.value:g}" if share.source == "given" else ""
    return f"--gpu {machine.accelerator.name} --gpus {cards} --dtype {case.format.name}{given}"


def _losses(planned: Pretraining, command: str) -> Iterator[Row]:
    """The loss by the law that allocated, and the lowest and the highest of all laws."""
    losses = planned.losses
    yield _step(f"loss, {LAW}", _by_law("loss", losses[LAW]), f"{command} {LAW}")
    for kind, chosen in (("lowest", min), ("highest", max)):
        name = chosen(losses, key=losses.__getitem__)
        yield _step(f"{kind} of all laws, {name}", _by_law("loss", losses[name]), f"{command} all")


_UNITS = {"loss": "nats/token"}


def _by_law(name: str, value: float) -> Term:
    return fact(name, value, unit=_UNITS.get(name, name), source=f"law `{LAW}`", grade="fitted")


def _ranking(case: Case, found: list[Option]) -> Table:
    rows = [
        Row(f"{place}. {TITLES[option.way]}: {option.subject}", _cells(case, option))
        for place, option in enumerate(found, 1)
    ]
    columns: tuple[str, ...] = (
        "parameters",
        "weights",
        "memory",
        "verdict",
        "time",
        "cost",
        "why",
        "on its own",
    )
    if case.have.price is None:
        columns = tuple(column for column in columns if column != "cost")
    return Table("what to do, best first", columns, tuple(rows), heading="plan")


def _cells(case: Case, option: Option) -> dict[str, Cell]:
    idle = "tuning time needs `--tokens` or `--data`"
    if option.way == "serve":
        idle = "serving has no end"
    memory: Cell = Absent("the path says how many parameters fit")
    if option.need is not None:
        memory = fact("memory", option.need, unit="bytes", source="the anatomy of the model")
    cells: dict[str, Cell] = {
        "parameters": fact(
            "parameters", int(option.parameters), unit="parameters", source="published count"
        ),
        "weights": option.format,
        "memory": memory,
        "verdict": option.verdict if option.in_time else f"{option.verdict}, takes too long",
        "time": option.seconds or Absent(idle),
        "why": option.why,
        "on its own": _command(case, option),
    }
    return cells if case.have.price is None else cells | {"cost": option.cost or Absent(idle)}


def _command(case: Case, option: Option) -> str:
    """The command that answers for this option alone."""
    if option.way == "scratch":
        flop = planning.training_compute(case.have).value
        return f"llmsize optimal --compute {flop:.3g} --max-params {option.parameters:.0f}"
    return _fits(case, option.way, option.format, f" {option.subject}")


def _fits(case: Case, way: Way, stored: str, subject: str = "") -> str:
    """The command that answers for one way to use a model, or any model."""
    job = {"serve": "inference"}.get(way, way)
    dtype = case.format.name if stored == PLAIN else stored
    return f"llmsize fits{subject} --job {job} --dtype {dtype} {case.flags(way)}"


def _headline(case: Case, found: list[Option]) -> str:
    title, time = case.have.machine.title, format_duration(case.have.seconds)
    if not found:
        return f"{title}: no known model fits"
    best = found[0]
    size = format_count(best.parameters)
    name = f"{best.subject} ({size})"
    return f"{title} for {time}: {TITLES[best.way]} of {name}, {best.why}"


def _assumptions(case: Case) -> tuple[str, ...]:
    reached = case.have.utilization
    training = (
        f"training in {case.format.name} at {format_share(reached.value)} of the peak"
        + (f" ({reached.note})" if reached.note else ""),
        f"training on sequences of {case.context or TRAINED_CONTEXT:,} tokens, every layer "
        "recomputed; LoRA of rank 16 on every linear layer; needs are tensors and context, to "
        "which `llmsize fits MODEL` adds what the allocator caches",
    )
    told = (*training, *_tuned_on(case)) if set(case.ways) != {"serve"} else ()
    told += machines.dated(case.have.price)
    return (*told, _serving(case)) if "serve" in case.ways else told


def _tuned_on(case: Case) -> Iterator[str]:
    """How the text at hand comes to the devices."""
    tokens, samples, passes = case.have.tokens, case.have.samples, case.have.epochs
    if tokens and samples:
        yield (
            f"tuning {passes:g} × on {samples:,} samples of {tokens / samples:,.0f} tokens, one at "
            "a time on each device, where short ones wait for kernels to be launched"
        )
    elif tokens:
        yield f"tuning {passes:g} × on {format_count(tokens)} tokens, packed into such sequences"


def _serving(case: Case) -> str:
    tokens = f"{_context(case, 'serve'):,} tokens"
    who = f"one user with {tokens}"
    if case.users > 1:
        who = f"{case.users:,} users with {tokens} each"
        who += f" on average, by {case.engine}" if case.engine else ""
    copied = case.have.machine.devices > SERVER
    return f"serving {who}" + (f", a copy of the model on {SERVER} devices" if copied else "")


def _changes(case: Case, found: list[Option], planned: Pretraining | None) -> Iterator[str]:
    """What would change the answer."""
    if planned is not None:
        longer = replace(case.have, seconds=2 * case.have.seconds)
        twice = planning.pretraining(
            longer, laws.named(LAW), [], laws.named(REPEATING), planned.limit
        )
        yield (
            f"twice the time: a new model of {format_count(twice.plan.parameters)} on "
            f"{format_count(twice.plan.tokens)} tokens, instead of "
            f"{format_count(planned.plan.parameters)} on {format_count(planned.plan.tokens)}"
        )
        if planned.epochs and planned.epochs > planning.REPEATABLE_EPOCHS:
            yield (
                f"more text: beyond {planning.REPEATABLE_EPOCHS} passes repetition adds little; "
                f"{format_count(planned.plan.tokens / planning.REPEATABLE_EPOCHS)} tokens would do"
            )
    yield from _packed(case, found)
    tuned = next((option for option in found if option.way == "qlora"), None)
    if tuned is not None:
        model = next(model for model in case.models if model.name == tuned.subject)
        work, devices = _work(case, "lora", PLAIN), case.have.machine.devices
        more = int(need_of(overview.subject(model), work, "LoRA", devices).value)
        if more > case.have.machine.usable.value:
            yield f"{format_bytes(more)} on each device: LoRA of {model.name} without quantizing it"


def _packed(case: Case, found: list[Option]) -> Iterator[str]:
    """How long the best way of tuning would take if samples were joined into full sequences."""
    best = next((option for option in found if option.seconds), None)
    if best is None or best.seconds is None or not case.have.samples:
        return
    if best.way == "serve" or best.way == "scratch":
        return
    model = next(model for model in case.models if model.name == best.subject)
    layers, active = _size(model)
    time = planning.tuning_time(replace(case.have, samples=None), best.way, active, layers)
    if time.value < best.seconds.value:
        yield (
            f"samples packed into sequences of {case.have.context:,} tokens: "
            f"{format_duration(time.value)}, instead of {format_duration(best.seconds.value)} one "
            f"by one, for {TITLES[best.way]} of {best.subject}"
        )
