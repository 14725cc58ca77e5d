"""`drawplate preflight`: what a run will take, found by rehearsing all of it on a small scale.

Each stage is rehearsed in a process of its own, so that its memory is its own: with one layer and
with a few, all of full width, for a few steps and on a small share of the data; every point saves
what the next stage loads. What the full size takes lies on the lines through these points
(`drawplate.forecast`). Processes that train together are rehearsed as one, with parts of a batch as
small as theirs; its memory counts for each of them, though with `sharded` each holds less.

The processes are those of `flows.rehearse`.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from drawplate.core.errors import Exhausted, UserError
from stages.quiet import interruptible, quiet_environment

FORECAST = Path(".drawplate") / "forecast.json"
Tree = dict[str, Any]
Figures = dict[str, float]

_MODELS = ("pretrain", "compress", "quantize", "finetune")
"""Stages that make the models which evaluate reads."""
_FIRST_BYTES = 1_500_000
"""Of the sources' files, in the first rehearsal of prepare, which tells how much text they hold."""
_TEXT_BYTES = 3_200_000
"""Of text, in the larger of the two others; the smaller one takes half."""
_PROBLEMS = 6000
"""Training problems in it."""
_LAYERS = 900_000
"""Weights in the layers of the larger rehearsal, where that is more than two layers."""
_CYCLES = 3
"""Times that a rehearsal does all that a run repeats."""
_STEPS = 12
"""Most steps of training in a rehearsal, and"""
_WORTH = 4.0
"""how many seconds they may take at"""
_SPEED = 1e10
"""multiply-adds a second, if there are to be more than two."""
_USEFUL = 1 / 2
"""Share of the groups of answers that finetuning is taken to keep: what is dropped is drawn too."""


class Player:
    """A process that rehearses one stage."""

    def __init__(self, stage: str, root: Path, log: Path) -> None:
        self.stage, self.log = stage, log
        home = str(Path(__file__).resolve().parents[1])
        paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {k: v for k, v in os.environ.items() if k != "DRAWPLATE_STATE"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "flows.rehearse", stage],
            cwd=root,
            env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )

    def ask(self, do: str, **order: Any) -> dict[str, Any]:
        """Has one order carried out.

        Raises:
            DrawplateError: of the kind that the stage raised, or a plain one if the process died.
        """
        from drawplate.core import errors

        assert self.process.stdin is not None
        assert self.process.stdout is not None
        # Of a process that is gone nothing can be read either: that is the error raised below.
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **order}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            last = (self.log.read_text().strip() or f"exit status {code}").splitlines()[-1]
            if code == -9:
                raise errors.Exhausted(
                    f"rehearsing {self.stage}: its process was killed, most likely for its memory; "
                    "make pretrain.model smaller"
                )
            raise errors.DrawplateError(f"rehearsing {self.stage}: {last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            known = (errors.UserError, errors.Damaged, errors.Exhausted, errors.NotFinite)
            kinds = {kind.code: kind for kind in known}
            kind = kinds.get(answer["code"], errors.DrawplateError)
            raise kind(f"rehearsing {self.stage}: {answer['error']}")
        return answer

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


@contextmanager
def players(stages: Sequence[str], root: Path, folder: Path) -> Iterator[dict[str, Player]]:
    """A process for each stage, which begins by importing what it needs."""
    with ExitStack() as stack:
        found: dict[str, Player] = {}
        for stage in stages:
            found[stage] = Player(stage, root, folder / f"{stage}.log")
            stack.callback(found[stage].close)
        yield found


def _fewer_texts(how: Any, share: float) -> Tree:
    """The section of what a model makes, with a share of its steps, and of its texts in one round.

    One round learns from no text that it kept, which after so few steps may be none.
    """
    if how is None:
        return {}
    steps = how.warm + (how.rounds - 1) * how.updates
    less = {
        "rounds": 1,
        "documents": math.ceil(share * how.rounds * how.documents),
        "warm": math.ceil(share * steps),
    }
    return {"synthetic": {**how.model_dump(mode="json"), **less}}


class Rehearsal:
    """The rehearsals of all stages, one after the other, and what follows from them."""

    def __init__(self, tree: Tree, cast: Mapping[str, Player], folder: Path) -> None:
        from drawplate import settings
        from stages.evaluate import evaluate
        from stages.finetune import finetune
        from stages.prepare import prepare
        from stages.pretrain import pretrain
        from stages.run import Execution

        self.tree, self.cast, self.folder = tree, cast, folder

        def typed(stage: Any) -> Any:
            return settings.validate(stage.params, tree.get(stage.name), stage.name)

        self.prepare, self.pretrain = typed(prepare), typed(pretrain)
        self.finetune, self.evaluate = typed(finetune), typed(evaluate)
        if self.pretrain.budget is not None:
            self._plan()
        execution = settings.validate(Execution, tree.get("execution"), "execution")
        self.execution = {"threads": execution.threads, "device": execution.device}
        self.device = execution.device
        self.nproc, self.processes = execution.nproc, execution.processes
        self.layers = self._all_layers()
        self.sizes = sorted({1, min(self._deep(), self.layers)})
        self.documents = self.here = self.problems = 0.0
        self.answers: list[float] = []
        self.models: dict[tuple[str, int], Path] = {}
        self.stored: dict[tuple[str, int], float] = {}

    def _plan(self) -> None:
        """Puts what the budget plans in its place.

        How many tokens the full corpus has is not known yet; the stage refuses too few of them.
        """
        from drawplate.data.tokenizer import adopt
        from drawplate.pretrain.budget import SIZES
        from drawplate.pretrain.driver import follow

        params, theirs = self.pretrain, self.prepare.tokenizer
        vocabulary = self.prepare.vocabulary if theirs is None else len(adopt(theirs))
        per_step = params.batch * params.length
        plan = params.budget.plan(params.model, vocabulary, per_step, sys.maxsize)
        self.pretrain = follow(params, plan)
        section = self.tree["pretrain"]
        planned = _with(
            section,
            budget=None,
            model=_with(section.get("model"), **{key: getattr(plan, key) for key in SIZES}),
            training=_with(section.get("training"), steps=plan.steps),
        )
        self.tree = {**self.tree, "pretrain": planned}

    def _all_layers(self) -> int:
        if self.pretrain.adopt is None:
            return int(self.pretrain.model.layers)
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.pretrain.adopt, trust_remote_code=False)
        return int(config.num_hidden_layers)

    def _deep(self) -> int:
        """Layers of the larger rehearsal: two, or more where layers are so small that they hide.

        What a small layer takes can disappear in memory that was free anyway, and in noise.
        """
        from drawplate.forecast.shape import Shape

        if self.pretrain.adopt is not None:
            return 2
        return max(_LAYERS // Shape.of(self.pretrain.model, self.prepare.vocabulary).block, 2)

    def refuse_hopeless(self, free: int) -> None:
        """Refuses weights that do not fit before anything is rehearsed with them."""
        from drawplate.forecast.shape import Shape
        from drawplate.forecast.stages import size

        if self.pretrain.adopt is not None:
            return
        shape = Shape.of(self.pretrain.model, self.prepare.vocabulary)
        least = shape.training(states=0)
        if least > free:
            raise Exhausted(
                f"pretrain needs at least {size(least)} of memory for {shape.parameters:,} weights "
                f"and their gradients, {size(free)} are free; make pretrain.model smaller"
            )

    def run(self, last: str) -> dict[str, Any]:
        """What each stage up to `last` needs."""
        from stages import STAGES

        needs: dict[str, Any] = {}
        for player in self.cast.values():
            player.ask("nothing")  # so that no import is under way while another stage is timed
        steps: dict[str, Callable[[], Any]] = {
            "prepare": self.of_prepare,
            "pretrain": self.of_pretrain,
            "compress": self.of_compress,
            "quantize": self.of_quantize,
            "finetune": self.of_finetune,
            "evaluate": self.of_evaluate,
        }
        for stage in STAGES:
            needs[stage] = steps[stage]()
            if stage == last:
                break
        return needs

    # One stage each.

    def of_prepare(self) -> Any:
        """Two small shares of the sources and problems: all costs grow with the share."""
        from drawplate.forecast.lines import extrapolate
        from drawplate.forecast.stages import Need

        player, params = self.cast["prepare"], self.prepare
        section = self.tree["prepare"]
        total = player.ask("extent", params=section, steps=[])["bytes"]
        least = self._asked()[1]

        def ask(step: int, problems: float) -> Figures:
            changes = {
                "train_problems": max(math.ceil(problems * params.train_problems), 20),
                "heldout_problems": min(
                    max(math.ceil(problems * params.heldout_problems), least),
                    params.heldout_problems,
                ),
                **_fewer_texts(params.synthetic, problems),
            }
            answer = player.ask(
                "prepare",
                params=_with(section, **changes),
                out=str(self.folder / "corpus"),
                step=step,
                execution=self.execution,
            )
            self.answers = answer["answers"]
            told = answer["figures"]
            return {
                **{key: answer[key] for key in ("seconds", "memory", "disk")},
                "documents": told["heldout_texts"],
                "problems": told["heldout_problems"],
                "text": told["train_bytes"] + told["heldout_bytes"],
            }

        def shares(*steps: int) -> list[float]:
            left = player.ask("extent", params=section, steps=steps)["left"]
            return [
                bytes_ / total if total else 1 / step
                for step, bytes_ in zip(steps, left, strict=True)
            ]

        look = max(total // _FIRST_BYTES, 1)
        for attempt in itertools.count(1):
            try:
                # Another number each time, so that nothing of a failed attempt is taken up.
                first = ask(look, min(1.0, 200 * attempt / params.train_problems))
                break
            except UserError:  # too little to hold any text out, or it is wrong at any size
                if look == 1:
                    raise
                look = max(look // 4, 1)
        text = first["text"] / shares(look)[0]
        step = math.ceil(text / _TEXT_BYTES)
        if step > 1:
            steps = [2 * step, step]
            sizes = shares(*steps)
            rows = [ask(*both) for both in zip(steps, sizes, strict=True)]
        else:
            # The text is small enough to be taken whole; what grows is the number of problems.
            large = min(1.0, _PROBLEMS / params.train_problems)
            sizes = [large / 2, large] if large < 1 else [1.0]
            rows = [ask(1, size) for size in sizes]
        full = extrapolate(dict(zip(sizes, rows, strict=True)), 1.0)
        self.documents, self.here = full["documents"], rows[-1]["documents"]
        self.problems = rows[-1]["problems"]
        return Need(memory=full["memory"], seconds=full["seconds"], disk=full["disk"])

    def of_pretrain(self) -> Any:
        """Steps at one layer and at more."""
        section = self.tree.get("pretrain") or {}
        adopt = self.pretrain.adopt is not None
        if adopt and self.pretrain.position is None:
            return self._trained("pretrain", None, lambda layers, steps: section, adopt=True)

        def params(layers: int, steps: int) -> Tree:
            training = _with(
                section.get("training"),
                steps=steps,
                save_every=steps,
                accumulate=self.pretrain.training.accumulate * self.processes,
            )
            if adopt:
                return _with(section, training=training)
            model = _with(section.get("model"), layers=layers)
            return _with(section, training=training, model=model)

        tokens = self.pretrain.batch * self.pretrain.length
        return self._trained("pretrain", self.pretrain.training, params, tokens=tokens, adopt=adopt)

    def of_compress(self) -> Any:
        """All calibration rows through one block and more; recovery as training."""
        section = self.tree.get("compress") or {}
        from drawplate import settings
        from stages.compress import compress

        whole = settings.validate(compress.params, section, "compress")
        full = self._stored_at("pretrain", self.layers)

        def params(layers: int, steps: int) -> Tree:
            # As many bytes from each block as in the full model, where embeddings weigh less.
            here = whole.ratio * full * layers / self.layers / self.stored["pretrain", layers]
            changed = _with(section, ratio=here)
            if whole.recover is not None:
                recover = section.get("recover")
                given = (recover or {}).get("training")
                training = _with(
                    given or whole.recover.training.model_dump(mode="json"),
                    steps=steps,
                    save_every=steps,
                    accumulate=whole.recover.training.accumulate * self.processes,
                )
                changed["recover"] = _with(recover, training=training)
            return changed

        if whole.recover is None:
            return self._trained("compress", None, params, model="pretrain")
        tokens = whole.recover.rows * whole.recover.length
        return self._trained(
            "compress", whole.recover.training, params, model="pretrain", tokens=tokens
        )

    def of_quantize(self) -> Any:
        """All calibration rows through one block and more."""
        section = self.tree.get("quantize") or {}
        return self._trained("quantize", None, lambda layers, steps: section, model="compress")

    def of_finetune(self) -> Any:
        """Whole batches of rollouts that run to the limit, with sampling timed apart.

        A model that was not trained never ends an answer and earns nothing, so every group is kept
        here; the full run is taken to drop half of what it draws, unless it keeps every group, and
        its answers to be as long as the corpus' solutions.
        """
        how = self.finetune
        limits = [how.length.limit(step, how.steps) for step in range(how.steps)]
        most = max(limits)

        def params(layers: int, steps: int) -> Tree:
            changed = _with(
                self.tree.get("finetune"),
                steps=steps,
                save_every=steps,
                accumulate=how.accumulate * self.processes,
                length={"name": "constant", "tokens": most},
                select={"name": "every"},
            )
            if how.self_play is not None:
                # So that the few steps hold rounds, which are what takes time.
                changed["self_play"] = how.self_play.model_dump(mode="json") | {"warm": 1}
            return changed

        lengths = [min(limit, size) for limit in limits for size in self.answers]
        expected = sum(lengths) / len(lengths)
        drawn = 1 if how.select.name == "every" else 1 / _USEFUL

        def sampled(layers: int) -> float:
            seconds: float = self.cast["finetune"].ask(
                "sample",
                model=str(self.models["quantize", layers]),
                corpus=str(self.folder / "corpus"),
                params=params(layers, how.updates + 1),
                execution=self.execution,
            )["seconds"]
            # What a step samples more or less than it did in the rehearsal.
            return float(seconds / how.updates * (drawn * expected / most - 1))

        return self._trained(
            "finetune", how, params, model="quantize", cycle=how.updates, adjust=sampled
        )

    def _trained(
        self,
        stage: str,
        training: Any,
        params: Callable[[int, int], Tree],
        *,
        model: str | None = None,
        tokens: int = 0,
        cycle: int = 1,
        adopt: bool = False,
        adjust: Callable[[int], float] | None = None,
    ) -> Any:
        """A stage at one layer and at more, with steps of training or without.

        Args:
            stage: its name.
            training: settings of its loop; None where it has none.
            params: (layers, steps) -> the parameters of a rehearsal.
            model: stage whose models it reads.
            tokens: tokens of a step, where steps are cheap enough to take more than two.
            cycle: steps after which the same work comes again.
            adopt: whether it takes a model that is there, of which a part is rehearsed.
            adjust: layers -> seconds by which a step of the full run differs.
        """
        from drawplate.forecast.lines import extrapolate, split
        from drawplate.forecast.stages import Need

        player, label = self.cast[stage], "recover" if stage == "compress" else stage
        found: dict[float, Figures] = {}
        for layers in self.sizes:
            inputs = {"corpus": str(self.folder / "corpus")}
            if model is not None:
                inputs["model"] = str(self.models[model, layers])
            out = self.folder / f"{stage}-{layers}"
            answer = player.ask(
                "stage",
                params=params(layers, self._steps(layers, tokens) if tokens else _CYCLES * cycle),
                inputs=inputs,
                out=str(out),
                layers=layers if adopt else None,
                execution=self.execution,
            )
            figures = {k: answer[k] for k in ("memory", "disk", "work")}
            if answer["device"] is not None:
                figures["device"] = answer["device"]
            figures["once"], figures["each"] = answer["seconds"], 0.0
            if training is not None:
                times = split(answer["seconds"], answer["marks"][label], cycle)
                figures["once"], figures["each"] = times
            if adjust is not None:
                figures["each"] += adjust(layers)
            found[layers] = figures
            self.models[stage, layers] = out
            self.stored[stage, layers] = answer["stored"]
        full = extrapolate(found, self.layers)
        seconds = full["once"]
        work = full["work"]
        if training is not None:
            saves = math.ceil(training.steps / training.save_every)
            rate = player.ask("rate", folder=str(self.folder))["rate"]
            # Two checkpoints were written and kept; one more stands beside those that are kept.
            seconds += training.steps * full["each"] + (saves - 1) * work / 2 / rate
            work *= (training.keep + 1) / 2
        together = getattr(import_module(f"stages.{stage}"), stage).together
        return Need(
            memory=full["memory"],
            seconds=seconds,
            disk=full["disk"],
            work=work,
            device=full.get("device"),
            processes=self.nproc if together else 1,
        )

    def _steps(self, layers: int, tokens: int) -> int:
        """As many as are worth their time: forward and backward are 3 multiply-adds a weight."""
        from drawplate.forecast.shape import Shape

        if self.pretrain.adopt is not None:
            return 2
        model = self.pretrain.model.model_copy(update={"layers": layers})
        work = 3 * tokens * Shape.of(model, self.prepare.vocabulary).macs
        return min(max(int(_WORTH * _SPEED / work), 2), _STEPS)

    def _stored_at(self, stage: str, layers: int) -> float:
        from drawplate.forecast.lines import through

        sizes = self.sizes
        return through(sizes, [self.stored[stage, size] for size in sizes]).at(layers)

    def _asked(self) -> tuple[int, int]:
        """Problems of the rehearsals of evaluate: their answers fill one batch, and two."""
        params = self.evaluate
        batch = math.ceil(params.batch_size / params.samples)
        return min(batch, params.problems), min(2 * batch, params.problems)

    def of_evaluate(self) -> Any:
        """A dense model, its factors and these quantized, on two shares of the questions.

        What finetuning makes takes as long as the model that it began with. The probe comes apart.
        """
        from drawplate.forecast.lines import extrapolate
        from drawplate.forecast.stages import Need

        player, params = self.cast["evaluate"], self.evaluate
        documents = params.documents or round(self.documents)
        lengths = [min(size, params.max_new) for size in self.answers]
        mean = sum(lengths) / len(lengths)
        batches = max(params.problems * (1 + params.samples) / params.batch_size, 2)
        # Twice, greedy and drawn, places stay empty at the end until the longest answer is there.
        usual = max(round(mean + 2 * (max(lengths) - mean) / batches), 1)

        def ask(layers: int, problems: int, longest: int, models: int = 3) -> Figures:
            wanted = max(round(problems / params.problems * documents), 1)
            section = _with(
                self.tree.get("evaluate"),
                problems=problems,
                documents=int(min(wanted, self.here)),
                max_new=longest,
                probe=None,
            )
            folders = [self.models[stage, layers] for stage in _MODELS[:models]]
            answer = player.ask(
                "stage",
                params=section,
                inputs={
                    "model": [str(path) for path in folders],
                    "corpus": str(self.folder / "corpus"),
                },
                out=str(self.folder / f"report-{layers}-{problems}-{longest}-{models}"),
                layers=None,
                execution=self.execution,
            )
            kept = {k: answer[k] for k in ("memory", "disk", "device") if answer[k] is not None}
            if models < 3:
                return kept
            *_, factors, packed = answer["marks"]["evaluate"]
            return kept | {"seconds": answer["seconds"] + packed - factors}

        asked = sorted({min(n, int(self.problems)) for n in self._asked()})
        shares = [n / params.problems for n in asked]
        found: dict[float, Figures] = {}
        for layers in self.sizes:
            rows = [ask(layers, n, usual) for n in asked]
            found[layers] = extrapolate(dict(zip(shares, rows, strict=True)), 1.0)
            # Batches are full already, so more questions take no more memory; long answers do.
            widest = ask(layers, asked[-1], params.max_new)
            found[layers] |= {k: v for k, v in widest.items() if k in ("memory", "device")}
        full = extrapolate(found, self.layers)
        # The report has curves and answers of each model; three of them were in the rehearsals.
        three, two = (ask(self.sizes[0], asked[0], 1, models)["disk"] for models in (3, 2))
        full["disk"] += three - two
        seconds = full["seconds"]
        if params.probe is not None:
            seconds += self._probed()
        return Need(
            memory=full["memory"], seconds=seconds, disk=full["disk"], device=full.get("device")
        )

    def _probed(self) -> float:
        """Seconds of the fresh processes that measure memory and speed of each model."""
        from drawplate.forecast.lines import through

        probe = self.evaluate.probe.model_dump(mode="json")
        ask = partial(self.cast["evaluate"].ask, "probe", probe=probe, execution=self.execution)
        total = 0.0
        for stage in ("compress", "quantize"):  # two models are dense, two are packed
            times = [ask(model=str(self.models[stage, n]), fresh=False) for n in self.sizes]
            total += 2 * through(self.sizes, [t["seconds"] for t in times]).at(self.layers)
            if stage == "compress":
                whole = ask(model=str(self.models[stage, self.sizes[0]]), fresh=True)["seconds"]
                starting = max(whole - times[0]["seconds"], 0.0)
        return float(total + len(_MODELS) * starting)


def _with(section: Mapping[str, Any] | None, **changes: Any) -> Tree:
    return {**(section or {}), **changes}


def forecast(root: Path, tree: Tree, stages: Sequence[str] = (), limits: Any = None) -> Any:
    """Needs of the wanted stages (all where none is named), saved for `compared`.

    Args:
        root: folder of params.yaml.
        tree: its sections, with all changes.
        stages: stages to tell of.
        limits: what is free; measured where it is None.

    Raises:
        Exhausted: a stage does not fit; nothing is saved.
        UserError: the parameters are wrong, or this machine lacks the device that they name.
    """
    from drawplate.forecast import machine
    from drawplate.forecast.stages import refuse
    from flows.graph import refuse_unknown
    from stages import STAGES
    from stages.check import check
    from stages.run import device_called

    refuse_unknown(stages, STAGES)
    check(tree)
    device = str((tree.get("execution") or {}).get("device", "cpu"))
    device_called(device)
    wanted = [name for name in STAGES if not stages or name in stages]
    state = root / FORECAST.parent
    state.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="rehearsal-", dir=state) as temporary:
        folder = Path(temporary)
        needed = list(STAGES)[: list(STAGES).index(wanted[-1]) + 1]
        free = limits or machine.limits(root, device)
        with players(needed, root, folder) as cast:
            rehearsal = Rehearsal(tree, cast, folder)
            rehearsal.refuse_hopeless(free.memory)
            needs = rehearsal.run(wanted[-1])
    needs = {stage: needs[stage] for stage in wanted}
    refuse(needs, free)
    save(root, tree, {stage: need.model_dump(mode="json") for stage, need in needs.items()})
    return needs


def save(root: Path, tree: Tree, needs: Mapping[str, Mapping[str, Any]]) -> None:
    """Keeps the needs of stages, with the parameters for which they were found."""
    saved = {stage: {"needs": need, "params": tree.get(stage)} for stage, need in needs.items()}
    (root / FORECAST.parent).mkdir(exist_ok=True)
    temporary_file = root / FORECAST.with_suffix(".new")
    temporary_file.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    temporary_file.replace(root / FORECAST)


def compared(root: Path, stages: Collection[str] | None = None) -> str | None:
    """The saved forecast beside what the stages' records and outputs say.

    Args:
        root: folder of params.yaml.
        stages: those to tell of, if their parameters still are those of the forecast; None for all
            that it holds.

    Returns:
        A table; None where there is nothing to compare.
    """
    file = root / FORECAST
    if not file.exists():
        return None
    from drawplate import settings
    from drawplate.forecast.stages import Actual, Need, comparison
    from flows.rehearse import folder_size
    from flows.sync import lock, records

    kept = json.loads(file.read_bytes())
    if stages is not None:
        tree = settings.read(root / "params.yaml")
        kept = {k: v for k, v in kept.items() if k in stages and v.get("params") == tree.get(k)}
    if not kept:
        return None
    sizes = {out["path"]: out.get("size") for entry in lock(root).values() for out in entry["outs"]}
    actual = {}
    for stage, record in records(root).items():
        out = root / record["output"]
        size = folder_size(out) if out.is_dir() else sizes.get(record["output"])
        actual[stage] = Actual(record.get("peak_memory"), record.get("seconds"), size)
    return comparison({k: Need.model_validate(v["needs"]) for k, v in kept.items()}, actual)


def preflight(
    root: Path,
    stages: Sequence[str] = (),
    changes: Sequence[str] = (),
    presets: Sequence[str] = (),
    limits: Any = None,
) -> str:
    """The table of `forecast` for params.yaml of `root` with presets and `key=value` changes."""
    quiet_environment()
    interruptible()
    from drawplate import settings
    from drawplate.forecast.stages import table

    tree = settings.read(root / "params.yaml")
    for name in presets:
        tree = settings.merge(tree, settings.preset(name))
    tree = settings.override(tree, changes)
    return table(forecast(root, tree, stages, limits))
