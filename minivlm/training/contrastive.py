"""Training two towers, on drawn scenes with their captions or on your own pairs.

What is trained, and with which loss, is in contrastive_recipe.py. A step is short: vectors of n pictures,
vectors of their n captions, one loss of the [n, n] matrix. The towers may compute in bf16. The matrix, the
temperature and the bias stay in fp32, where a small difference between two cosines is not lost.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minivlm.data.lines import BadLines
from minivlm.data.pairs import FilePairs, Pair, read_captions, read_pairs
from minivlm.distributed import clip_loss, distillation_loss, siglip_loss
from minivlm.distributed.agreement import total
from minivlm.distributed.parallel import data_parallel
from minivlm.distributed.places import Place
from minivlm.errors import InputError
from minivlm.evaluation.columns import COLUMNS
from minivlm.evaluation.contrastive import distinct_scenes, encode, evaluate_own_pairs, retrieval_scores
from minivlm.losses import similarity
from minivlm.models.load import load
from minivlm.models.siglip import SigLIP
from minivlm.processing import CaptionTokenizer, PairProcessor
from minivlm.training.contrastive_recipe import ContrastiveConfig, Towers, build
from minivlm.training.digest import digest_of_lines, digest_of_weights
from minivlm.training.folder import run_folder
from minivlm.training.limits import require_room
from minivlm.training.loop import DEFAULT_LOOP, Loop, in_order, run_to_end
from minivlm.training.precision import bf16_pays, collect_gradients, follow_masters
from minivlm.training.schedule import warm_up_then_fall
from minivlm.training.trainable import Trainable
from minivlm.world.captions import DrawnPairs, Inputs
from minivlm.world.scenes import COLORS, SHAPES, SIZES

MEASURED_SCENES = 200
MOST_SCALE = math.log(100)  # CLIP's limit: temperatures below 1/100 make training unstable
MOST_THINGS = 5  # in a scene


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """What is trained: matrices, which decay, then norms, biases and the temperature, which do not.

    Saved states rely on the order.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    others = [parameter for parameter in trained if parameter.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


class ContrastiveRun(Trainable):
    """A training run of two towers at some step.

    Args:
        model, processor: as `build` made them.
        pairs: of a file; None draws scenes.
        validation: pairs to measure on; None measures on held-out scenes, if scenes are drawn.
        teacher: a model and its processor, for the objective distill.
        workers: processes that prepare batches.

    Raises InputError: fewer pairs than a batch has, or captions too long for one of the models.
    """

    losses = ("loss",)
    log_every, measure_every = 25, 250

    def __init__(
        self,
        config: ContrastiveConfig,
        model: Towers,
        processor: PairProcessor,
        pairs: Sequence[Pair] | None = None,
        validation: Sequence[Pair] | None = None,
        teacher: tuple[Towers, PairProcessor] | None = None,
        workers: int = 1,
    ) -> None:
        self.config, self.processor, self.workers = config, processor, workers
        self.pairs, self.validation = pairs, validation
        self.told = {"data": _told(pairs), "validation": _told(validation)}
        self.measures = pairs is None or validation is not None
        # In evaluation mode, batch norms keep the statistics of their file. Nothing else depends on the mode.
        self.model = self.masters = model.eval()
        self.teacher = None if teacher is None else teacher[0]
        if self.teacher is not None:
            self.told["teacher's weights"] = digest_of_weights(self.teacher)
        self.step = 0
        self.starts_trained = config.model is not None
        bf16 = config.bf16 if config.bf16 is not None else bf16_pays(model.device)
        self.working = copy.deepcopy(model).to(torch.bfloat16) if bf16 else model
        groups = parameter_groups(model, config.weight_decay)
        self.optimizers = {"adamw": torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95))}
        self.compute: Callable[[list[Inputs]], Tensor] = self._loss  # of the pairs of this process
        processors = [processor] if teacher is None else [processor, teacher[1]]
        numbers = {"seed": config.seed, "steps": config.steps, "batch_size": config.batch_size}
        self.data = (
            DrawnPairs(processors, **numbers) if pairs is None else FilePairs(pairs, processors, **numbers)
        )
        if pairs is None:
            for each in processors:  # a caption that is too long is refused now, not in some later batch
                each(texts=_longest_caption(each.tokenizer))

    @property
    def total_steps(self) -> int:
        return self.config.steps

    def settings(self) -> dict[str, Any]:
        return asdict(self.config) | self.told

    def place(self) -> dict[str, Any]:
        """The temperature that divides the cosines, and the bias; with pairs of a file, the epoch."""
        here: dict[str, Any] = {"temperature": round((-self.model.logit_scale).exp().item(), 5)}
        if isinstance(self.model, SigLIP):
            here["bias"] = round(self.model.logit_bias.item(), 4)
        if self.pairs is not None:
            per_epoch = len(self.pairs) // self.config.batch_size
            here = {"epoch": round(self.step / per_epoch, 2), **here}
        return here

    def advice(self) -> str:
        return f"try a lower learning rate in a new folder, such as --lr {self.config.lr / 2:g}"

    def batches(self) -> Iterator[list[Inputs]]:
        """The batch of each step from the present one on, for the student and, if there is one, the teacher.

        Raises InputError: a picture of a file turns out to be damaged.
        """
        for batch in in_order(self.data, range(self.step, self.total_steps), self.workers):
            if isinstance(batch, InputError):
                raise batch
            yield batch

    def advance(self, batch: list[Inputs]) -> dict[str, float]:
        """One optimization step."""
        self.masters.zero_grad()
        loss = self.compute(batch)
        value = self._mean(loss.item())
        self.check_finite("the loss", value)
        loss.backward()
        collect_gradients(self.masters, self.working)
        norm = nn.utils.clip_grad_norm_(self.masters.parameters(), self.config.clip)
        self.check_finite("the gradient", norm.item())
        for group in self.optimizers["adamw"].param_groups:
            group["lr"] = self.learning_rate()
        self.optimizers["adamw"].step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MOST_SCALE)
        follow_masters(self.masters, self.working)
        self.step += 1
        return {"loss": value}

    def spread(self, among: Place) -> None:
        """Pairs are divided; the loss compares them with those of all processes, SigLIP's in a ring."""
        if self.config.batch_size % among.size:
            raise InputError(
                f"batch_size is {self.config.batch_size}, for {among.size} processes that compare as many "
                f"pairs each: choose a multiple of {among.size}"
            )
        self.among, self.data.among = among, (among.rank, among.size)
        learns: nn.Module = self.working
        if self.working is not self.masters:  # temperature and bias are those of the masters, see `_loss`
            names = ("logit_scale", "logit_bias")
            numbers = [one for name, one in self.masters.named_parameters() if name in names]
            learns = nn.ModuleList([self.working, nn.ParameterList(numbers)])
        self.compute = data_parallel(learns, self._loss, among)

    def _mean(self, loss: float) -> float:
        """The loss of the whole batch, from that of each process."""
        return loss if self.among is None else total(self.among, [loss])[0] / self.among.size

    def _loss(self, batch: list[Inputs]) -> Tensor:
        towers, scale = self.working, self.model.logit_scale
        assert isinstance(towers, Towers)
        images, texts = (x.float() for x in self._embed(towers, batch[0]))  # [n, D] each
        if self.teacher is not None:
            with torch.no_grad():
                teacher = self._embed(self.teacher, batch[1])
            return distillation_loss(images, texts, scale, *teacher, self.teacher.logit_scale)
        if isinstance(self.model, SigLIP):
            return siglip_loss(images, texts, scale, self.model.logit_bias)
        return clip_loss(images, texts, scale)

    def _embed(self, towers: Towers, inputs: Inputs) -> tuple[Tensor, Tensor]:
        images = towers.encode_image(inputs["pixel_values"].to(towers.device))
        return images, towers.encode_text(inputs["input_ids"].to(towers.device))

    def learning_rate(self) -> float:
        """The rate of the next step."""
        return self.config.lr * warm_up_then_fall(self.step, self.total_steps, self.config.warmup_steps)

    def measure(self) -> dict[str, float]:
        """Recall@1 in both directions, on the validation pairs or on held-out scenes."""
        if self.validation is not None:
            scores = evaluate_own_pairs(self.model, self.processor, self.validation, progress=False)
        else:
            column = COLUMNS["held_out"]
            scenes = distinct_scenes(column, MEASURED_SCENES, seed=1)
            pictures = column.draw(scenes, self.processor.image_processor.image_size)
            embeds = encode(self.model, self.processor, pictures, [scene.caption() for scene in scenes])
            scores = retrieval_scores(similarity(*embeds))
        return {name: score.value for name, score in scores.items() if name.endswith("recall@1")}

    def save(self, folder: Path) -> None:
        """The trained towers so far, as a checkpoint folder in fp32."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def _told(pairs: Sequence[Pair] | None) -> str:
    """For `settings`."""
    if pairs is None:
        return "no file"
    lines = [(pair.image, pair.text) for pair in pairs]
    return f"{len(pairs)} pairs, {digest_of_lines(lines, (pair.path for pair in pairs))}"


def _longest_caption(tokenizer: CaptionTokenizer) -> str:
    names = [f"a {size} {color} {shape}" for size in SIZES for color in COLORS for shape in SHAPES]
    return ", ".join([max(names, key=lambda name: len(tokenizer.encode(name)))] * MOST_THINGS)


def train_contrastive(
    out: Path,
    config: ContrastiveConfig,
    data: Path | None = None,
    validation: Path | None = None,
    *,
    warn: Callable[[BadLines], object] | None = None,
    loop: Loop = DEFAULT_LOOP,
) -> ContrastiveRun:
    """Train two towers, or go on where a run in `out` was stopped, and leave a checkpoint folder in `out`.

    Args:
        data: a file of pairs, see `minivlm.data.pairs`; None draws scenes.
        validation: a file like `data`, to measure on; without it, only runs on drawn scenes are measured.
        warn: told about bad lines, which are then skipped; without it they are refused.

    Raises InputError: bad lines, or fewer good ones than a batch has; a model or teacher that cannot be
    loaded or is of another kind; `out` holds a run and `loop.resume` is not set, or the other way round, or
    the run has other settings; training diverges. See `minivlm.training.loop`.
    """
    # A folder is the same by whatever path.
    config = replace(config, model=_resolved(config.model), teacher=_resolved(config.teacher))
    for name, source in (("model", config.model), ("teacher", config.teacher)):
        if source == str(out.resolve()):
            raise InputError(f"{out} holds the {name} that training needs: choose another folder")
    with run_folder(out, loop.resume):
        teacher = None if config.teacher is None else _load_teacher(config.teacher, loop.device)
        new = config.parameters if config.model is None else 0  # a folder's were checked when it was loaded
        require_room(new, config.batch_size, config.image_size, loop.device)
        model, processor = build(config, None if data is None else read_captions(data))
        model.to(loop.device)
        tokenizers = [processor.tokenizer] if teacher is None else [processor.tokenizer, teacher[1].tokenizer]
        pairs = None if data is None else read_pairs(data, tokenizers, warn)
        others = None if validation is None else read_pairs(validation, tokenizers[:1], warn)
        run = ContrastiveRun(config, model, processor, pairs, others, teacher, loop.workers)
        run_to_end(run, out, loop)
        return run


def _resolved(name: str | None) -> str | None:
    return str(Path(name).resolve()) if name is not None and Path(name).is_dir() else name


def _load_teacher(name: str, device: torch.device | str) -> tuple[Towers, PairProcessor]:
    model, processor = load(name, device=device)
    if not isinstance(model, Towers):
        raise InputError(
            f"{name} holds a {type(model).__name__}, and a teacher has two towers: choose the folder "
            "of a CLIP or SigLIP model"
        )
    return model.requires_grad_(False), processor
