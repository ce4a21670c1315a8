"""Fine-tuning a model that answers on your own pictures.

Each example is a row, under the mask that the model was trained with: in PaliGemma, picture and prompt see
each other, and the answer is read from left to right; in LLaVA, everything is. Only the answer has a loss.
Nothing is specific to the small model: any of the kind that `minivlm.load` opens can be trained, if memory
holds it four times in fp32 (weights, gradients and AdamW's two moments) and once more in bf16.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.data.augment import Augment, check_kinds
from minivlm.data.lines import BadLines
from minivlm.data.samples import Sample, SampleBatches, make_inputs, read_samples
from minivlm.data.shards import ShardItems
from minivlm.distributed.agreement import total
from minivlm.distributed.parallel import backward, data_parallel, without_exchange
from minivlm.distributed.places import Place, here
from minivlm.errors import InputError
from minivlm.evaluation.own import answer_own_words, box_iou_of
from minivlm.models.load import SHIPPED, load_answering
from minivlm.models.protocols import Answers
from minivlm.models.quantized import quantization_of
from minivlm.processing import AnswerProcessor
from minivlm.processing.inputs import IGNORE, Inputs, to_device
from minivlm.speed.checkpointing import blocks_of, checkpoint_blocks
from minivlm.training.best import METRICS, Choice
from minivlm.training.choosing import check_choice, has_boxes
from minivlm.training.digest import digest_of_lines
from minivlm.training.folder import run_folder
from minivlm.training.limits import check_numbers, check_warmup, require_room
from minivlm.training.log import Line
from minivlm.training.loop import DEFAULT_LOOP, Loop, in_order, run_to_end
from minivlm.training.memory import estimate, return_freed_memory
from minivlm.training.precision import bf16_pays, collect_gradients, follow_masters
from minivlm.training.replay import Scores, check_known, rows_of_the_world, world_scores
from minivlm.training.schedule import warm_up_then_fall
from minivlm.training.trainable import Trainable

EPOCHS = 10  # where neither epochs nor steps are given
LARGE = 1e8  # weights of a model that calls for lower rates
MAX_GRADIENT_NORM = 1.0
MOST_REPLAY = 0.9
# What can be frozen; only some models have a second tower.
PARTS = {"tower": ("vision_tower", "high_res_tower"), "decoder": ("language_model",)}


@dataclass(frozen=True)
class FinetuningConfig:
    """Everything that decides the result, besides the data."""

    model: str = str(SHIPPED)  # folder or repo id
    seed: int = 0
    epochs: int | None = None  # passes over all examples; None: 10, or what `steps` says
    steps: int | None = None
    batch_size: int = 8  # rows computed at once
    accumulate: int = 1  # batches whose gradients are added up for one step
    lr: float | None = None  # None: 1e-3 for a small model such as the shipped one, 2e-5 for a large one
    warmup_steps: int | None = None  # None: a twentieth of the steps
    freeze: tuple[str, ...] = ()  # of PARTS
    max_length: int | None = None  # tokens of a row; None: the model's context
    empty_answer: str | None = None  # what an empty answer stands for; None: it is refused
    bf16: bool | None = None  # None: where the device has instructions for it
    best: str | None = None  # of METRICS; None: the last state is what is left
    patience: int | None = None  # measurements without a better state, after which the run ends
    augment: tuple[str, ...] | None = None  # of `minivlm.data.augment.KINDS`; None: pictures as they are
    replay: float | None = None  # share of rows of the drawn world; None: none, and it is not measured
    quantize: str | None = None  # as in `minivlm.load`, of a model that an adapter is trained for

    def __post_init__(self) -> None:
        """Raises InputError: a number that nothing can be trained with, or both epochs and steps."""
        check_numbers(asdict(self))
        if self.epochs is not None and self.steps is not None:
            raise InputError("epochs and steps are both given, and each says when to stop: choose one")
        unknown = set(self.freeze) - set(PARTS)
        if unknown:
            raise InputError(f"{unknown.pop()!r} cannot be frozen: choose from {', '.join(PARTS)}")
        check_kinds(self.augment or ())
        if self.best is not None and self.best not in METRICS:
            raise InputError(f"best is {self.best!r}: choose from {', '.join(METRICS)}")
        if self.patience is not None and self.best is None:
            raise InputError(f"patience is {self.patience}, for a better state by no metric: choose `best`")
        if self.replay is not None and not 0 <= self.replay <= MOST_REPLAY:
            raise InputError(f"replay is {self.replay}: choose a share from 0 to {MOST_REPLAY}")


class Finetuning(Trainable):
    """A training run of a loaded model at some step."""

    losses = ("loss",)
    log_every, measure_every = 10, 50
    starts_trained = True
    grows: Mapping[str, Any] = {"epochs": EPOCHS, "steps": None, "patience": None}
    rates = (1e-3, 2e-5)  # of small models, and of large ones

    def __init__(
        self,
        config: FinetuningConfig,
        model: Answers,
        processor: AnswerProcessor,
        samples: Sequence[Sample],
        validation: Sequence[Sample] = (),
        workers: int = 1,
        divides: bool = False,
    ) -> None:
        self.config, self.processor, self.workers, self.divides = config, processor, workers, divides
        self.samples, self.validation = samples, validation
        assert isinstance(model, nn.Module)  # as every model that is loaded
        if config.best is not None:
            check_choice(config.best, samples, validation)
            self.choice = Choice(config.best, config.patience)
        check_kinds(config.augment or (), samples)
        self.measures = len(validation) > 0
        self.world: tuple[Scores, Scores] | None = None  # the drawn world before and after, with replay
        self.model = model
        self.step = 0
        self.told = {"data": _told(samples), "validation": _told(validation)}
        large = sum(parameter.numel() for parameter in model.parameters()) > LARGE
        if large:
            return_freed_memory()
        self.lr = config.lr if config.lr is not None else self.rates[large]
        self.masters, self.working = self.prepare()
        self.compute: Callable[[Inputs], Tensor] = self._loss  # of rows of this process
        self.optimizers = self._optimizers()
        self.rows_per_step = config.batch_size * config.accumulate
        if config.steps is not None:
            self.rows = config.steps * self.rows_per_step
        else:
            self.rows = (config.epochs or EPOCHS) * len(samples)
        check_warmup(config.warmup_steps or 1, self.total_steps)

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        trained = [parameter for parameter in self.masters.parameters() if parameter.requires_grad]
        return {"adamw": torch.optim.AdamW(trained, lr=self.lr, weight_decay=0.0)}

    def prepare(self) -> tuple[nn.Module, nn.Module]:
        """What the optimizer changes, and the copy of it that computes.

        Raises InputError: there is too little memory; the weights are to be quantized.
        """
        config, model = self.config, self.model
        assert isinstance(model, nn.Module)
        rounded = quantization_of(model)
        if rounded is not None:
            instead = "leave quantize out" if config.quantize else "take the folder that they were made from"
            raise InputError(
                f"weights in {rounded.weights} cannot be trained: train an adapter beside them, or {instead}"
            )
        if not self.divides:
            self.require_room(model)
        for part in (part for name in config.freeze for part in PARTS[name] if hasattr(model, part)):
            getattr(model, part).requires_grad_(False)
        bf16 = computes_in_bf16(config, model.device) and not self.divides
        return model, copy.deepcopy(model).to(torch.bfloat16) if bf16 else model

    def require_room(self, trained: nn.Module) -> None:
        """Raises InputError: the device cannot hold what is trained four times, and a batch of pictures."""
        weights = sum(weight.numel() for weight in trained.parameters())
        side = self.processor.image_processor.image_size
        require_room(weights, self.config.batch_size, side, self.model.device)

    def read(self, part: Inputs, learning: bool = False) -> Any:
        """Scores and loss of a batch, from the copy that learns or from the masters."""
        return (self.working if learning else self.masters)(**to_device(part, self.model.device))

    @property
    def rows_at_once(self) -> int:
        """Rows of a batch, those of the drawn world included."""
        return math.ceil(self.config.batch_size / (1 - (self.config.replay or 0)))

    @property
    def total_steps(self) -> int:
        return math.ceil(self.rows / self.rows_per_step)

    def settings(self) -> dict[str, Any]:
        return asdict(self.config) | self.told

    def place(self) -> dict[str, Any]:
        rows = min(self.step * self.rows_per_step, self.rows)
        return {"epoch": round(rows / len(self.samples), 2)}

    def how_it_goes_on(self, lines: Sequence[Line]) -> str | None:
        """What the learning rate will do. A run that goes on beyond its old end starts from a higher one."""
        if self.step >= self.total_steps:
            return None
        if self.choice is not None and self.choice.ran_out(lines):
            return (
                f"The run ended at step {self.step} of {self.total_steps} after {self.choice.patience} "
                "measurements that were no better: with a larger patience it goes on."
            )
        last = next((line["adamw_lr"] for line in reversed(lines) if line.get("adamw_lr")), None)
        was = "" if last is None else f" was {last:.2g} and"
        return (
            f"The run goes on after step {self.step} of {self.total_steps}: its learning rate{was} is now "
            f"{self.learning_rate():.2g}, and falls in a straight line to 0 at the end."
        )

    def advice(self) -> str:
        return f"try a lower learning rate in a new folder, such as --lr {self.lr / 2:g}"

    def batches(self) -> Iterator[list[Inputs]]:
        """The batches of each step, from the present one on. Raises InputError: as `make_inputs`."""
        replay = self.config.replay
        data = SampleBatches(
            self.samples,
            self.processor,
            seed=self.config.seed,
            rows=self.rows,
            batch_size=self.config.batch_size,
            accumulate=self.config.accumulate,
            change=Augment(kinds, self.config.seed) if (kinds := self.config.augment) else None,
            more=rows_of_the_world(replay, self.config.seed, self.processor) if replay else None,
            order=self.samples.order if isinstance(self.samples, ShardItems) else None,
            among=(0, 1) if self.among is None else (self.among.rank, self.among.size),
        )
        for batches in in_order(data, range(self.step, self.total_steps), self.workers):
            if isinstance(batches, InputError):
                raise batches
            yield batches

    def advance(self, batch: list[Inputs]) -> dict[str, float]:
        """One optimization step on the mean loss over all answer tokens of its batches."""
        self.masters.zero_grad()
        tokens = [_answer_tokens(part) for part in batch]
        whole = total(self.among, [sum(tokens)])[0]
        loss = 0.0
        for number, (part, count) in enumerate(zip(batch, tokens, strict=True), start=1):
            # A copy hands its gradients over after each batch, so they have to be complete by then.
            later = number < len(batch) and self.working is self.masters
            with without_exchange(self.compute, later):
                # In a mean of the batches' means, a token in a batch of short answers would count for more.
                share = self.compute(part) * (count / whole)
                loss += share.item()
                backward(self.among, share)
            collect_gradients(self.masters, self.working)
        loss = total(self.among, [loss])[0]
        self.check_finite("the loss", loss)
        norm = nn.utils.clip_grad_norm_(self.masters.parameters(), MAX_GRADIENT_NORM)
        if self.divides:
            from minivlm.distributed.sharded import whole as summed

            norm = summed(norm)
        self.check_finite("the gradient", norm.item())
        for group in self.optimizers["adamw"].param_groups:
            group["lr"] = self.learning_rate()
        self.optimizers["adamw"].step()
        follow_masters(self.masters, self.working)
        self.step += 1
        return {"loss": loss}

    def _loss(self, part: Inputs) -> Tensor:
        """The mean over the answer tokens of a batch; 0 if there are none, see `SampleBatches`."""
        output = self.read(part, learning=True)
        loss: Tensor = output.loss if _answer_tokens(part) else 0 * output.logits.sum()
        return loss

    def spread(self, among: Place) -> None:
        """Each process reads a part of every batch; with `divides`, it holds a part of all weights.

        Raises InputError: what cannot be done with divided weights.
        """
        self.among = among
        if not self.divides:
            self.compute = data_parallel(self.working, self._loss, among)
            return
        from minivlm.distributed.sharded import shard  # takes a second

        model = self.masters
        for name, given in (("best", self.config.best), ("replay", self.config.replay)):
            if given is not None:
                raise InputError(f"{name} needs the whole model in one process: leave it or --shard out")
        bf16 = computes_in_bf16(self.config, self.model.device)
        self.hull = shard(model, blocks_of(model), among, bf16)
        self.optimizers = self._optimizers()

    def learning_rate(self) -> float:
        """The rate of the next step."""
        warmup = self.config.warmup_steps or math.ceil(self.total_steps / 20)
        return self.lr * warm_up_then_fall(self.step, self.total_steps, warmup)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Loss and exact answers on the validation examples.

        No answer has to be generated: the greedy answer is the true one exactly if each of the true tokens is
        the most probable after the true tokens before it.
        """
        size = self.config.batch_size
        loss, tokens, right = 0.0, 0, 0
        for start in range(0, len(self.validation), size):
            part = make_inputs(self.processor, self.validation[start : start + size])
            output = self.read(part)
            labels = part["labels"][:, 1:].to(self.model.device)
            hits = (output.logits[:, :-1].argmax(dim=-1) == labels) | (labels == IGNORE)
            right += int(hits.all(dim=1).sum())
            loss += output.loss.item() * _answer_tokens(part)
            tokens += _answer_tokens(part)
        metrics = {"validation loss": loss / tokens, "exact match": right / len(self.validation)}
        if self.config.best == "iou":
            boxed = [sample for sample in self.validation if has_boxes(sample)]
            answers = answer_own_words(self.model, self.processor, boxed, progress=False)
            metrics["box IoU"] = box_iou_of(boxed, answers)
        return metrics

    def save(self, folder: Path) -> None:
        """The trained model so far, as a checkpoint folder in fp32."""
        model: Any = self.model
        if self.divides and self.among is not None:
            from minivlm.distributed.sharded import gathered

            model = gathered(self.masters, self.hull, self.among)
            if model is None:  # the first process has it
                return
        model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def computes_in_bf16(config: FinetuningConfig, device: torch.device) -> bool:
    """As the config says, or else where it pays."""
    return config.bf16 if config.bf16 is not None else bf16_pays(device)


def _told(samples: Sequence[Sample]) -> str:
    """For `settings`."""
    if not samples:
        return "no file"
    if isinstance(samples, ShardItems):
        return f"{len(samples)} examples in shards, {samples.digest()}"
    lines = [(*sample.images, sample.prefix, sample.suffix) for sample in samples]
    return f"{len(samples)} examples, {digest_of_lines(lines, (p for one in samples for p in one.paths))}"


def _answer_tokens(part: Inputs) -> int:
    return int((part["labels"][:, 1:] != IGNORE).sum())


def finetune(
    out: Path,
    config: FinetuningConfig,
    data: Path,
    validation: Path | None = None,
    *,
    warn: Callable[[BadLines], object] | None = None,
    loop: Loop = DEFAULT_LOOP,
    make: Callable[..., Finetuning] = Finetuning,
    dtype: torch.dtype = torch.float32,
) -> Finetuning:
    """Train a model on the pictures of a JSONL file or of shards, and leave a checkpoint folder in `out`.

    Args:
        data: see `minivlm.data.samples` and `minivlm.data.shards`.
        validation: a file like `data`, to measure on; without it nothing is measured.
        warn: told about bad lines, which are then skipped; without it they are refused.
        make: the kind of run, which learns in its own way.
        dtype: of the model as it is loaded.

    Raises InputError: bad lines; a model that cannot be loaded; `out` holds a run and `loop.resume` is not
    set, or the other way round, or the run has other settings; training diverges. See
    `minivlm.training.loop`.
    """
    if Path(config.model).is_dir():  # the same folder by whatever path
        config = replace(config, model=str(Path(config.model).resolve()))
    if str(out.resolve()) == config.model:
        raise InputError(f"{out} is the model that training starts from: choose another folder")
    with run_folder(out, loop.resume):
        model, processor = load_answering(
            config.model, dtype=dtype, device=loop.device, quantize=config.quantize
        )
        context = model.language_model.config.max_position_embeddings
        limit = min(context, config.max_length or context)
        read = partial(
            read_samples, processor=processor, max_length=limit, warn=warn, empty_answer=config.empty_answer
        )
        samples, others = read(data), [] if validation is None else read(validation)
        if loop.shard and here() is None:
            raise InputError("shard divides the weights among processes: start several with torchrun")
        run = make(config, model, processor, samples, others, loop.workers, divides=loop.shard)
        if config.best is not None:
            if loop.measure_every == 0:
                raise InputError("measure_every is 0, and the best state is measured: choose another number")
            run.told["measure every"] = f"{loop.measure_every or run.measure_every} steps"
        before = (
            None if config.replay is None else world_scores(run.model, processor)
        )  # nothing is learned yet
        if before is not None:
            check_known(before, config.model)
        if loop.tell is not None and not loop.shard:  # it reads a row with the whole model
            loop.tell(estimate(run, loop.checkpointing).told(run.model.device))
        if loop.checkpointing:
            checkpoint_blocks(run.working) or checkpoint_blocks(run.model)
        run_to_end(run, out, loop)
        if before is not None:
            run.world = (before, world_scores(run.model, processor))
        return run
