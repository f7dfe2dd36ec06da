"""What `llmsize infer` answers: parts by place, bounds of speed, what a log would say, advice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from llmsize import presets, units
from llmsize.anatomy.towers import towers
from llmsize.answer import Absent, Cell, Estimate, Row, Table
from llmsize.cli import options
from llmsize.cli.served import PREDICTION, Setting, Subject, recipes, restored
from llmsize.formats import Format
from llmsize.hardware import Accelerator
from llmsize.memory.serving import ELSEWHERE, Serving, fullest, has_encoder, need, pool
from llmsize.planning import changes as planning
from llmsize.planning import serving as asking
from llmsize.planning.serving import Budget
from llmsize.planning.support import check_draft, obstacle_to
from llmsize.term import Term, total
from llmsize.throughput import Bandwidth, efficiency, measured_bandwidth
from llmsize.units import format_bytes, format_count, format_share

SHOWN_DEVICES = 4
"""Columns of a table; of more devices the fullest stands for all."""


def estimate(subject: Subject, question: Serving, name: str, budget: Budget | None) -> Estimate:
    """One question answered; `name` is how the weights are stored."""
    places = need(question)
    fits = None if budget is None else asking.fits(question, budget)
    answer, assumed = [_table(places)], list(_assumptions(subject, question))
    accelerator = subject.accelerator
    if accelerator is not None and accelerator.bandwidth_gb_s and accelerator.peak_tflops:
        reached = None if _host_computes(question) else _reached(question, accelerator)
        answer.append(_bounds(question, accelerator, reached))
        if reached is not None:
            assumed.append(
                f"tokens/s as measured: {format_share(reached.median)} of the bandwidth, as one "
                f"sequence reached in published runs ({efficiency(reached).note}; {reached.title})"
            )
        if question.drafting or question.predicting:
            assumed.append("tokens/s are those of the model alone: what a draft gains is not known")
    return Estimate(
        command="infer",
        question={
            "model": question.architecture.name, "engine": question.engine.name,
            "quant": name or None, "dtype": question.format.name, "kv_dtype": question.keys.name,
            "context": question.context, "prompt": question.prompt or question.context,
            "batch": question.batch, "rows": question.rows,
            "devices": question.devices * question.stages, "stages": question.stages,
            "gpu_layers": question.gpu_layers, "host_bytes": question.host_bytes,
            "host_experts": question.host_experts,
            "draft": _draft_name(question),
            "memory_bytes": budget.memory if budget else None,
            "gpu_memory_utilization": _share(question, budget),
        },
        headline=_headline(question, name, places, budget, fits),
        answer=tuple(answer),
        assumptions=tuple(assumed),
        notes=tuple(_notes(subject, question, name, budget, fits)),
        verdict=fits,
    )  # fmt: skip


def _draft_name(question: Serving) -> str | None:
    if question.predicting:
        return PREDICTION
    return question.drafting.architecture.name if question.drafting else None


def _share(question: Serving, budget: Budget | None) -> float | None:
    if question.engine.allocation != "pool":
        return None
    given = budget.utilization if budget else None
    return question.engine.utilization if given is None else given


def _headline(
    question: Serving, name: str, places: tuple[Term, ...], budget: Budget | None,
    fits: bool | None,
) -> str:  # fmt: skip
    place = fullest(places)
    model, engine = question.architecture.name, question.engine
    what = f"{model} in {name or question.format.name}, {engine.title}, "
    what += f"{question.batch:,} × {question.context:,} tokens{_rows(question)}: "
    what += format_bytes(place.value)
    if place.name.startswith("each of "):
        what += f" on {place.name}"
    elif len(places) > 1:
        several = sum(place.name not in ELSEWHERE for place in places) > 1
        what += f" on {place.name}, the fullest," if several else " on the device"
    host = next((p for p in places if p.name in ELSEWHERE), None)
    if host is not None:
        what += f" and {format_bytes(host.value)} on the {host.name}"
    what = what.removesuffix(",")
    if budget is None:
        return what
    return f"{what}, {'fits' if fits else 'does not fit'} in {format_bytes(budget.memory)}"


def _rows(question: Serving) -> str:
    """What is computed side by side for each sequence, in the headline's words."""
    if question.rows == 1:
        return ""
    return f", {question.rows} {'beams' if question.reordered else 'continuations'} each"


ROWS = (
    *("weights", "absorbed matrices", "rotary tables", "blocks beyond tensors", "KV cache"),
    *(
        "recurrent state",
        "activations",
        "layer on visit from the host",
        "left by quantizing",
        "matrix unpacked",
    ),
    *("room for a product", "CUDA graphs", "vision tower", "audio tower", "projector"),
    *("LoRA adapters", "draft model", "context and libraries"),
)
"""Parts of a place in the order in which they are shown."""


def _table(places: tuple[Term, ...]) -> Table:
    """Parts by place; of many devices the fullest alone."""
    devices = [place for place in places if place.name not in ELSEWHERE]
    if len(devices) > SHOWN_DEVICES:
        places = (fullest(places), *(place for place in places if place.name in ELSEWHERE))
    parts = {place.name: {part.name: part for part in place.parts} for place in places}
    rows = [
        Row(row, {place: held[row] for place, held in parts.items() if row in held})
        for row in ROWS
        if any(row in held and held[row].value for held in parts.values())
    ]
    rows.append(Row("total", {place.name: place for place in places}))
    names = tuple(place.name for place in places)
    return Table("memory", names, tuple(rows), heading="what", total=True)


def _bounds(question: Serving, accelerator: Accelerator, measured: Bandwidth | None) -> Table:
    """What the card allows, and what was reached on cards of its kind."""
    reached: Cell = Absent("no matrix product was measured on this card in the format")
    if accelerator.measured_matmul_tflops and asking.rate(question, accelerator) in SIXTEEN_BIT:
        reached = asking.first_token(question, accelerator, measured=True)
    first: dict[str, Cell] = {
        "at best": asking.first_token(question, accelerator),
        "as measured": reached,
    }
    decoded: Cell = Absent("the host computes with what it holds, and how fast is not known")
    if measured is not None:
        decoded = asking.tokens_per_second(question, accelerator, efficiency(measured))
    later: dict[str, Cell] = {
        "at best": asking.tokens_per_second(question, accelerator),
        "as measured": decoded,
    }
    rows = (Row("time to first token", first), Row("tokens/s", later))
    return Table("bounds of speed", ("at best", "as measured"), rows, heading="what")


def _reached(question: Serving, accelerator: Accelerator) -> Bandwidth:
    """What decoding reached of the bandwidth on cards of that kind with such weights."""
    known = presets.every(Bandwidth).values()
    return measured_bandwidth(known, accelerator, asking.bits_per_weight(question))


SIXTEEN_BIT = ("bf16", "fp16")
"""Rates that the measured matrix products stand for."""


def _assumptions(subject: Subject, question: Serving) -> Iterator[str]:
    engine = question.engine
    version = f"{engine.title} {engine.versions}".rstrip()
    if engine.measured:
        yield f"{version}: measured are {', '.join(engine.measured)}"
    else:
        yield f"{version}: by its rules; nothing was compared with logs"
    yield from options.taken_for(question.architecture)
    if subject.assumed:
        yield subject.assumed
    if question.drafting and (told := check_draft(engine, question.trace, question.drafting.trace)):
        yield told
    recipe, weights = question.recipe, question.trace.weights.values()
    left = recipe is not None and recipe.linear_layers and engine.stacks_experts
    if recipe and left and any(weight.experts for weight in weights):
        yield f"the experts of a layer are one tensor, which `{recipe.name}` leaves in 16 bit"
    if recipe and recipe.name in engine.unties and "head" not in {w.role for w in weights}:
        yield "the output matrix is held beside the embedding that it repeats, as was measured"
    if has_encoder(question.trace):
        read = question.prompt or question.context
        yield (
            f"the encoder reads {read:,} tokens, the decoder keeps {question.context:,} of its own"
        )
    yield from _uncounted(question)
    yield from options.beyond_positions(question.architecture, question.context)


def _uncounted(question: Serving) -> Iterator[str]:
    """Parts of the checkpoint beside the language model that are in no row."""
    apart = []
    for part, parameters in towers(question.architecture.config, ""):
        if parameters is None:
            yield f"the {part} is of a kind that llmsize does not know and is not counted"
        elif question.engine.allocation == "buffers":
            apart.append(f"{part} ({format_count(parameters)} parameters)")
    if apart:
        yield f"not counted, from a file of their own (`--mmproj`): {', '.join(apart)}"


def _host_computes(question: Serving) -> bool:
    """Whether layers or experts run in host memory, as llama.cpp's do."""
    layers = question.gpu_layers is not None and question.gpu_layers <= question.trace.depth
    return question.engine.allocation == "buffers" and (layers or question.host_experts > 0)


def _notes(
    subject: Subject, question: Serving, name: str, budget: Budget | None, fits: bool | None
) -> Iterator[str]:
    if budget is not None and question.engine.allocation == "pool":
        yield from _log_lines(question, budget)
    if crossing := asking.bus_bytes(question).value:
        yield f"{format_bytes(crossing)} cross the bus for every token"
    if question.host_experts and not _mixed(question):
        yield "no layer has experts: `--cpu-moe` changes nothing"
    elif subject.accelerator is not None and _host_computes(question):
        yield "the bounds leave out how slow the host computes with what it holds"
    if budget is not None and fits is False:
        yield _advice(subject, question, name, budget)


def _mixed(question: Serving) -> bool:
    """Whether any layer has experts."""
    return any(weight.experts for weight in question.trace.weights.values())


def _log_lines(question: Serving, budget: Budget) -> Iterator[str]:
    """What the engine would print when it starts."""
    left = pool(question, budget.memory, budget.utilization)
    if left.bytes <= 0:
        taken = format_bytes(int(budget.memory * (_share(question, budget) or 1)))
        yield (f"weights and activations leave nothing to the cache of the {taken} that "
               f"{question.engine.title} takes (`--gpu-memory-utilization`)")  # fmt: skip
        return
    if left.tokens:
        yield (f"Available KV cache memory: {left.bytes / units.GIB:.2f} GiB; "
               f"GPU KV cache size: {left.tokens:,} tokens")  # fmt: skip
    yield f"Maximum concurrency for {question.context:,} tokens per request: {left.sequences:.2f}x"


def _advice(subject: Subject, question: Serving, name: str, budget: Budget) -> str:
    """The cheapest single change that makes it fit."""
    formats = [presets.get(Format, n) for n in ("fp8", "q8_0") if n in question.engine.kv_formats]
    card = subject.accelerator
    kept = next(
        (f for f in formats if card is None or not obstacle_to(f, question.engine, card)), None
    )
    size = asking.stored_bytes_of(question)
    smaller: list[tuple[str, Serving]] = []
    for other in recipes(subject):
        if other and other != name:
            made = restored(question, subject, other)
            if asking.stored_bytes_of(made) < size:
                smaller.append((other, made))
    known = asking.changes(
        question, budget, smaller_cache=kept, requantized=smaller,
    )  # fmt: skip
    change = planning.single(question, known, lambda changed: asking.fits(changed, budget))
    if change is None:
        return "no single change that llmsize knows makes it fit"
    needed = fullest(need(change.apply(question))).value
    return f"to make it fit: {change.name} ({format_bytes(needed)}; costs {change.costs})"


def sweep(
    subject: Subject, asked: Sequence[tuple[Setting, Serving]], budget: Budget | None
) -> Estimate:
    """One row for each combination: parts of the fullest device."""
    rows = tuple(_of_setting(setting, question, budget) for setting, question in asked)
    fitting = sum(row.cells.get("fits") == "yes" for row in rows)
    columns = ("weights", "KV cache", "other", "total") + (("fits",) if budget else ())
    said = f"{subject.architecture.name}, {subject.engine.title}: {len(rows)} settings"
    if budget is not None:
        said += f", {fitting} fit in {format_bytes(budget.memory)}"
    settings = [setting for setting, _ in asked]
    return Estimate(
        command="infer",
        question={
            "model": subject.architecture.name,
            "engine": subject.engine.name,
            "quant": _several(each.stored for each in settings),
            "context": _several(each.context for each in settings),
            "batch": _several(each.batch for each in settings),
            "memory_bytes": budget.memory if budget else None,
        },
        headline=said,
        answer=(Table("memory", columns, rows, heading="setting"),),
        verdict=fitting > 0 if budget else None,
    )


def _of_setting(setting: Setting, question: Serving, budget: Budget | None) -> Row:
    place = fullest(need(question))
    cells: dict[str, Cell] = {
        part.name: part for part in place.parts if part.name in ("weights", "KV cache")
    }
    rest = [part for part in place.parts if part.name not in cells]
    cells |= {"other": total("other", *rest, unit="bytes"), "total": place}
    if budget is not None:
        cells["fits"] = "yes" if asking.fits(question, budget) else "no"
    stored = setting.stored or question.format.name
    return Row(f"{stored}, {setting.batch} × {setting.context:,} tokens", cells)


def _several(values: Iterable[str | int]) -> str | None:
    """Each value once, between commas; nothing for empty names."""
    return ", ".join(dict.fromkeys(str(value) for value in values)) or None
