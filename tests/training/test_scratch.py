"""What is trained, on what, how fast, and that it teaches something."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from small_run import CONFIG, EVERY, files, log_of
from torch import Tensor, nn

import minivlm
from minivlm.errors import InputError
from minivlm.evaluation import answers
from minivlm.evaluation.tables import Metric
from minivlm.layers import EncoderBlock
from minivlm.models.paligemma import PaliGemma
from minivlm.processing import Processor
from minivlm.processing.boxes import NUM_BINS
from minivlm.training import scratch
from minivlm.training.loop import Loop
from minivlm.training.muon import Muon
from minivlm.training.objectives import PatchHead, SoftTargets, answer_loss
from minivlm.training.recipe import TrainingConfig, build
from minivlm.training.scratch import Run, train
from minivlm.training.trainable import Diverged

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from its first step to its last."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, CONFIG, loop=EVERY)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"pictures": 0}, "pictures is 0: choose a number from 1"),
        ({"questions": 0}, "questions is 0"),
        ({"tower_layers": 0}, "tower_layers is 0"),
        ({"packed_steps": -1}, "packed_steps is -1: choose a number from 0"),
        ({"warmup_steps": 0}, "warmup_steps is 0"),
        ({"row_tokens": 5}, "row_tokens is 5: choose a number from 16"),
        ({"muon_lr": float("nan")}, "muon_lr is nan"),
        ({"adamw_lr": -0.1}, "adamw_lr is -0.1"),
        (
            {"clip": 0.0},
            "clip is 0.0: choose a number from 0.001",
        ),  # nothing would be learned, without a word
        ({"muon_lr": 0.0}, "muon_lr is 0.0: choose a number from 1e-09"),
        ({"warmup_steps": 2000}, "warmup_steps is 2000, and the run has 12 steps: .* Choose fewer"),
        ({"tower_width": 2**20}, "tower_width is 1048576: choose a number from 1 to 8192"),
        ({"text_layers": 10**9}, "text_layers is 1000000000: choose a number from 1 to 256"),
        ({"pictures": 10**6}, "pictures is 1000000: choose a number from 1 to 4096"),
        ({"row_tokens": 600}, "row_tokens is 600: choose a number from 16 to 512"),
        (dict.fromkeys(("tower_steps", "packed_steps", "prefix_steps"), 0), "no stage has any steps"),
        ({"patch_size": 7}, "image_size 32 does not divide into patches of 7"),
        ({"image_size": 256}, "leave no room for words"),
        ({"tower_width": 30}, "tower_width is 30: .* multiple of 4"),
        ({"tower_heads": 5}, "tower_width is 24: .* multiple of 20"),
        ({"text_heads": 3}, "text_width is 32: .* multiple of 6"),
    ],
)
def test_numbers_that_no_model_can_be_trained_with(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(CONFIG, **changes)


def test_a_model_that_does_not_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number is allowed; together they are too large. Nothing is built."""
    monkeypatch.setattr("minivlm.training.scratch.build", lambda config: pytest.fail("it began"))
    large = replace(CONFIG, text_width=8192, text_layers=256)
    with pytest.raises(InputError, match=r"137,439 million weights in training and 2 pictures at once take"):
        train(tmp_path, large)


@pytest.mark.parametrize(
    "changes",
    [{"workers": -1}, {"workers": 10**5}, {"save_every": 0}, {"log_every": 0}, {"measure_every": -1}],
)
def test_numbers_that_no_run_can_be_carried_out_with(changes: dict[str, int]) -> None:
    name, value = next(iter(changes.items()))
    with pytest.raises(InputError, match=f"{name} is {value}: choose a number"):
        Loop(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "steps",
    [(3, 0, 0, 0), (0, 3, 0, 0), (0, 0, 3, 0), (0, 0, 0, 3), (0, 2, 0, 1), (0, 1, 1, 1)],
    ids=lambda steps: "-".join(map(str, steps)),
)
def test_stages_may_be_left_out(steps: tuple[int, ...], tmp_path: Path) -> None:
    stages = dict(zip(("tower", "packed", "review", "prefix"), steps, strict=True))
    config = replace(CONFIG, **{f"{name}_steps": number for name, number in stages.items()})
    run = train(tmp_path, config, loop=Loop(log_every=1, measure_every=0))
    wanted = [name for name, number in stages.items() for _ in range(number)]
    assert [line["stage"] for line in log_of(tmp_path)] == wanted
    assert run.step == 3


# What a step does


@pytest.fixture
def run() -> Run:
    return Run(CONFIG)


def test_muon_gets_exactly_the_matrices_of_blocks(run: Run) -> None:
    blocks = [m for m in run.model.vision_tower.modules() if isinstance(m, EncoderBlock)]
    blocks += list(run.model.language_model.layers)
    assert len(blocks) == CONFIG.tower_layers + CONFIG.text_layers
    matrices = {m.weight for block in blocks for m in block.modules() if isinstance(m, nn.Linear)}
    assert len(matrices) == 6 * CONFIG.tower_layers + 7 * CONFIG.text_layers
    held = {
        name: [p for group in optimizer.param_groups for p in group["params"]]
        for name, optimizer in run.optimizers.items()
    }
    assert set(held["muon"]) == matrices
    assert set(held["adamw"]) == set(run.masters.parameters()) - matrices
    assert len(held["muon"]) + len(held["adamw"]) == len(list(run.masters.parameters()))  # none twice
    assert run.model.language_model.embed_tokens.weight in set(held["adamw"])


def factors(config: TrainingConfig) -> list[float]:
    return [config.rate_factor(step) for step in range(config.total_steps)]


def test_the_schedule_rises_once_for_the_tower_and_once_for_all() -> None:
    config = replace(CONFIG, tower_steps=20, packed_steps=30, prefix_steps=10, warmup_steps=5)
    values = factors(config)
    for part in (values[:20], values[20:]):
        peak = part.index(max(part))
        assert peak == 4  # the last step of the warm-up
        assert part[0] == pytest.approx(1 / 5)
        assert part[:5] == sorted(part[:5])
        assert part[peak:] == sorted(part[peak:], reverse=True)
        falls = [a - b for a, b in pairwise(part[5:])]
        assert falls == pytest.approx([1 / len(part)] * len(falls))  # straight, also where stages meet
        assert part[-1] == pytest.approx(1 / len(part))  # one step before zero


def test_the_schedule_starts_once_more_in_the_review() -> None:
    """From a lower peak, and from there on straight to zero; before it, as if there was none."""
    config = replace(CONFIG, tower_steps=5, packed_steps=30, review_steps=20, prefix_steps=10, warmup_steps=5)
    values = factors(config)
    assert values[:35] == factors(replace(config, review_steps=0))[:35]
    again = values[35:]
    assert again[:5] == pytest.approx([0.5 * (n + 1) / 5 * (1 - n / 30) for n in range(5)])
    assert again[5:] == pytest.approx([0.5 * (1 - n / 30) for n in range(5, 30)])
    assert factors(replace(config, review_lr_factor=0.25))[35:] == pytest.approx([f / 2 for f in again])


def test_the_tower_learns_more_slowly_after_its_own_stage(run: Run) -> None:
    batches = run.batches()
    for stage in ("tower", "packed", "prefix"):
        while CONFIG.stage(run.step) != stage:
            run.advance(next(batches))
        factor = CONFIG.rate_factor(run.step)
        run.advance(next(batches))
        for name, peak in (("muon", CONFIG.muon_lr), ("adamw", CONFIG.adamw_lr)):
            for group in run.optimizers[name].param_groups:
                in_tower = any(p is q for p in group["params"] for q in run.model.vision_tower.parameters())
                slower = CONFIG.tower_lr_factor if in_tower and stage != "tower" else 1.0
                assert group["lr"] == pytest.approx(peak * factor * slower)


def test_each_stage_trains_its_part(run: Run) -> None:
    """First the tower and its head alone, then everything; the working copy follows the masters."""
    batches = run.batches()

    def changed() -> set[str]:
        before = {name: p.clone() for name, p in run.masters.named_parameters()}
        losses = run.advance(next(batches))
        assert set(losses) == ({"patch"} if run.step <= CONFIG.tower_steps else {"patch", "answer"})
        for a, b in zip(run.masters.parameters(), run.working.parameters(), strict=True):
            assert a is not b
            assert torch.equal(a, b)
        return {name for name, p in run.masters.named_parameters() if not torch.equal(p, before[name])}

    names = [name for name, _ in run.masters.named_parameters()]
    everything = {name for name in names if not name.startswith("points.")}
    tower = {name for name in everything if name.startswith(("model.vision_tower", "head."))}
    assert changed() == tower
    while run.step < CONFIG.tower_steps:
        changed()
    assert changed() == everything


def test_no_two_batches_of_a_run_are_alike(run: Run) -> None:
    pictures = [picture.numpy().tobytes() for batch in run.batches() for picture in batch.pixel_values]
    assert len(pictures) == 2 * CONFIG.total_steps
    assert len(set(pictures)) == len(pictures)


def test_only_the_last_stage_has_the_true_mask(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, each question has a row of its own, and the picture sees it."""
    sees = []

    def spy(*args: Any) -> Tensor:
        sees.append(args[3])
        return answer_loss(*args)

    monkeypatch.setattr(scratch, "answer_loss", spy)
    rows = []
    for batch in run.batches():
        run.advance(batch)
        rows.append(int(batch.blocks.max()) if batch.blocks.numel() else 0)
    assert sees == [False] * CONFIG.packed_steps + [True] * CONFIG.prefix_steps
    assert rows[: CONFIG.tower_steps] == [0] * CONFIG.tower_steps
    assert min(rows[CONFIG.tower_steps : -CONFIG.prefix_steps]) > 1
    assert rows[-CONFIG.prefix_steps :] == [1] * CONFIG.prefix_steps


def test_the_review_asks_more_about_relations_with_rates_that_start_once_more() -> None:
    config = replace(CONFIG, packed_steps=6, review_steps=6, prefix_steps=2, questions=30, warmup_steps=1)
    run = Run(config)
    shares, rates = {"packed": 0.0, "review": 0.0}, []
    tokenizer = run.processor.tokenizer
    for batch in run.batches():
        stage = config.stage(run.step)
        if stage in shares:
            asked = [tokenizer.decode(row[row > 0].tolist()) for row in batch.input_ids]
            words = ("left of", "right of", "above", "below")
            shares[stage] += sum(text.count(word) for text in asked for word in words) / int(
                batch.blocks.amax(1).sum()
            )
        run.advance(batch)
        rates.append(run.optimizers["adamw"].param_groups[0]["lr"] / config.adamw_lr)
    assert shares["review"] > 1.3 * shares["packed"]
    first, last = config.tower_steps + config.packed_steps, config.total_steps
    wanted = [config.review_lr_factor * (1 - done / 8) for done in range(8)]
    slow = config.tower_lr_factor if run.optimizers["adamw"].param_groups[0]["tower"] else 1.0
    assert rates[first:last] == pytest.approx([slow * rate for rate in wanted])


ALIKE = replace(CONFIG, alike_steps=3, last_steps=2, alike_share=1.0)


def test_the_log_has_a_column_for_pointing_where_it_is_learned(tmp_path: Path) -> None:
    train(tmp_path / "alike", replace(ALIKE, tower_steps=0, packed_steps=0, prefix_steps=0), loop=EVERY)
    assert all(line["point"] is not None for line in log_of(tmp_path / "alike"))
    assert Run(CONFIG).losses == ("patch", "answer")


def test_among_look_alikes_the_tower_stays_and_words_learn_to_point() -> None:
    run = Run(ALIKE)
    before: dict[str, Tensor] = {}
    columns, sees = [], []
    for batch in run.batches():
        if run.step == ALIKE.first_step("alike"):
            before = {name: tensor.clone() for name, tensor in run.masters.state_dict().items()}
        columns.append(tuple(run.advance(batch)))
        sees.append(int(batch.blocks.max()) if batch.blocks.numel() else 0)
    assert columns[: CONFIG.tower_steps] == [("patch",)] * CONFIG.tower_steps
    assert set(columns[CONFIG.tower_steps : -5]) == {("patch", "answer")}
    assert columns[-5:] == [("answer", "point")] * 5
    assert min(sees[-5:-2]) > 1
    assert sees[-2:] == [1, 1]
    changed = {
        name for name, tensor in run.masters.state_dict().items() if not torch.equal(tensor, before[name])
    }
    assert not any("vision_tower." in name or name.startswith("head.") for name in changed)
    assert {
        name for name in before if name.startswith(("points.", "model.language_model.layers."))
    } <= changed


def test_look_alikes_become_fewer_over_their_stage_and_stay_so(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(ALIKE, alike_share=0.75, last_share=0.25, alike_pairs=6, last_pairs=2)
    drawn: list[Any] = []
    monkeypatch.setattr(scratch, "in_order", lambda data, *_: drawn.extend(data.datasets))
    Run(config).batches()
    assert [(one.steps, one.first_step, one.packed, one.alike, one.pairs) for one in drawn[-2:]] == [
        (3, CONFIG.total_steps, True, (0.75, 0.25), (6, 2)),
        (2, CONFIG.total_steps + 3, False, (0.25, 0.25), (2, 2)),
    ]


def test_look_alikes_need_nothing_of_the_stages_before_but_weights() -> None:
    """So whoever has the weights can begin there: the optimizers start anew."""
    whole = Run(ALIKE)
    batches = list(whole.batches())
    for batch in batches[: CONFIG.total_steps]:
        whole.advance(batch)
    begun = Run(ALIKE)
    begun.masters.load_state_dict(whole.masters.state_dict())
    begun.working.load_state_dict(whole.working.state_dict())
    begun.step = whole.step
    for batch in batches[CONFIG.total_steps :]:
        assert whole.advance(batch) == begun.advance(batch)
    for name, tensor in whole.masters.state_dict().items():
        assert torch.equal(tensor, begun.masters.state_dict()[name]), name


def test_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(replace(CONFIG, clip=0.01))
    norms = []
    step = Muon.step

    def spy(optimizer: Muon) -> Any:
        gradients = [p.grad.flatten() for p in run.masters.parameters() if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))
        return step(optimizer)

    monkeypatch.setattr(Muon, "step", spy)
    for batch in run.batches():
        run.advance(batch)
    assert norms == pytest.approx([0.01] * CONFIG.total_steps, rel=1e-3)


def test_bf16_computes_with_a_copy_and_keeps_fp32(tmp_path: Path) -> None:
    config = replace(CONFIG, tower_steps=1, packed_steps=1, prefix_steps=1, bf16=True)
    run = train(tmp_path, config, loop=Loop(measure_every=0))
    assert {p.dtype for p in run.working.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in run.masters.parameters()} == {torch.float32}
    for master, copied in zip(run.masters.parameters(), run.working.parameters(), strict=True):
        assert torch.equal(copied, master.bfloat16())
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}


def test_the_log_holds_means_of_each_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float]] = []
    advance = Run.advance

    def spy(run: Run, batch: Any) -> dict[str, float]:
        seen.append(advance(run, batch))
        return seen[-1]

    monkeypatch.setattr(Run, "advance", spy)
    train(tmp_path, CONFIG, loop=Loop(log_every=3, measure_every=0))
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert [line["stage"] for line in lines] == ["tower", "packed", "prefix", "prefix"]
    for number, line in enumerate(lines):
        steps = seen[3 * number : 3 * number + 3]
        assert line["patch"] == pytest.approx(sum(step["patch"] for step in steps) / 3, rel=1e-5)
        answers = [step["answer"] for step in steps if "answer" in step]  # 0, then 2, then 3 of the 3 steps
        assert (line["answer"] is not None) == bool(answers)
        if answers:
            assert line["answer"] == pytest.approx(sum(answers) / len(answers), rel=1e-5)


def test_a_small_run_learns(run: Run) -> None:
    """The same batch again and again: the answers to it can be learned by heart."""
    config = replace(CONFIG, tower_steps=1, packed_steps=200, prefix_steps=1, warmup_steps=5)
    run = Run(config)
    batches = run.batches()
    next(batches)
    run.step = 1
    batch = next(batches)
    losses = [run.advance(batch) for _ in range(100)]
    assert losses[-1]["answer"] < 0.3 * losses[0]["answer"]
    assert losses[-1]["patch"] < 0.7 * losses[0]["patch"]


# Losses


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return build(CONFIG)[1].tokenizer


def test_targets_without_width_are_plain_cross_entropy(tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, tokenizer.vocab_size, generator=generator)
    labels = torch.randint(tokenizer.vocab_size, (40,), generator=generator)
    is_loc = torch.isin(labels, torch.tensor(tokenizer.loc_ids))
    assert 5 < is_loc.sum() < 35
    wanted = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(SoftTargets(tokenizer, 0.0).cross_entropy(logits, labels), wanted)
    soft = SoftTargets(tokenizer, 6.0).cross_entropy(logits, labels)
    torch.testing.assert_close(soft[~is_loc], wanted[~is_loc])
    assert (soft[is_loc] - wanted[is_loc]).abs().min() > 1e-3


def test_soft_targets_are_bells(tokenizer: Any) -> None:
    bells = SoftTargets(tokenizer, 6.0).bells
    assert bells.shape == (NUM_BINS, NUM_BINS)
    torch.testing.assert_close(bells.sum(dim=1), torch.ones(NUM_BINS))
    assert torch.equal(bells.argmax(dim=1), torch.arange(NUM_BINS))
    assert float(bells[500, 506] / bells[500, 500]) == pytest.approx(0.6065, abs=1e-3)  # one sigma beside
    # The loss is that of a distribution over the whole vocabulary.
    label = torch.tensor([tokenizer.loc_ids[3]])
    logits = torch.randn(1, tokenizer.vocab_size, generator=torch.Generator().manual_seed(1))
    target = torch.zeros(1, tokenizer.vocab_size)
    target[0, tokenizer.loc_ids] = bells[3]
    wanted = F.cross_entropy(logits, target)
    torch.testing.assert_close(SoftTargets(tokenizer, 6.0).cross_entropy(logits, label)[0], wanted)


def test_soft_targets_forgive_what_is_nearly_right(tokenizer: Any) -> None:
    def loss(guess: int, sigma: float) -> float:
        logits = torch.zeros(1, tokenizer.vocab_size)
        logits[0, tokenizer.loc_ids[guess]] = 8.0
        return float(
            SoftTargets(tokenizer, sigma).cross_entropy(logits, torch.tensor([tokenizer.loc_ids[300]]))
        )

    assert loss(300, 6) < loss(303, 6) < loss(310, 6) < loss(900, 6)
    assert loss(303, 0) == pytest.approx(loss(900, 0))


def test_the_loss_of_patches() -> None:
    """Right answers cost nothing, and the box counts on things only."""
    run = Run(CONFIG)
    batch = next(run.batches())
    head = PatchHead(CONFIG.tower_width)

    def loss(box_error: float, on_ground: float = 0.0) -> float:
        parts = [
            F.one_hot(labels, size).float() * 50
            for labels, size in zip(
                (batch.patch_color, batch.patch_shape, batch.patch_size), PatchHead.sizes[:3], strict=True
            )
        ]
        ground = (batch.patch_color == 0)[..., None]
        box = batch.patch_box / 16 + torch.where(ground, on_ground, box_error)
        output: Tensor = torch.cat([*parts, box], dim=-1)
        with torch.no_grad():
            head.forward = lambda tokens: output  # type: ignore[method-assign]
            return float(head.loss(torch.zeros(1), batch))

    assert loss(0.0) == pytest.approx(0, abs=1e-5)
    assert loss(0.0, on_ground=5.0) == pytest.approx(0, abs=1e-5)
    assert loss(0.5) == pytest.approx(0.5 - 0.05)  # smooth L1: the distance less half of beta


# What is left behind


def test_the_folder_is_a_checkpoint(whole: Path) -> None:
    wanted = {"config.json", "generation_config.json", "model.safetensors"}
    wanted |= {"tokenizer.json", "preprocessor_config.json"}
    assert files(whole) == wanted | {"tokenizer_config.json", "state.safetensors", "log.csv", "loss.png"}
    model, processor = minivlm.load(whole)
    state = load_file(whole / "state.safetensors")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[f"weights.model.{name}"])
    built, _ = build(CONFIG)
    assert model.config == built.config
    picture = torch.zeros(1, 3, 32, 32)
    inputs = processor(None, "caption en")
    inputs["input_ids"] = torch.cat(
        [torch.full((1, 16), processor.tokenizer.image_id), inputs["input_ids"]], dim=1
    )
    assert model.generate(inputs["input_ids"], pixel_values=picture, max_new_tokens=2).shape == (1, 2)


def test_an_untrained_model_is_a_function_of_the_seed() -> None:
    (first, _), (again, _), (other, _) = build(CONFIG), build(CONFIG), build(replace(CONFIG, seed=1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.multi_modal_projector.weight, other.multi_modal_projector.weight)


def test_neighbors_are_alike_from_the_start() -> None:
    """Positions of patches, and the words for coordinates."""
    model, processor = build(TrainingConfig())
    locs = model.language_model.embed_tokens.weight.detach()[processor.tokenizer.loc_ids]
    patches = model.vision_tower.embeddings.position_embedding.weight.detach().view(8, 8, -1)

    def alike(a: Tensor, b: Tensor) -> float:
        return float(F.cosine_similarity(a.flatten(0, -2), b.flatten(0, -2)).mean())

    assert alike(locs[:-1], locs[1:]) > 0.95
    assert alike(locs[:-100], locs[100:]) < 0.9
    assert alike(patches[:-1], patches[1:]) == pytest.approx(alike(patches[:, :-1], patches[:, 1:]))
    assert alike(patches[:-1], patches[1:]) > 0.8
    assert alike(patches[:-1], patches[1:]) > alike(patches[:-3], patches[3:]) + 0.1


# Numbers that are no longer finite


def test_a_learning_rate_that_diverges(tmp_path: Path) -> None:
    config = replace(CONFIG, muon_lr=4e9, adamw_lr=4e9)
    wanted = (
        r"not a number at step \d+: try a lower .* in a new folder, such as --muon-lr 2e\+09 --adamw-lr 2e"
    )
    with pytest.raises(Diverged, match=wanted) as caught:
        train(tmp_path, config, loop=Loop(save_every=100, log_every=2, measure_every=0))
    assert "keeps the state" not in str(caught.value)  # there is none
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("stage", ["tower", "prefix"])
def test_gradients_that_are_not_finite_change_nothing(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss may still be a number when its gradient is none."""
    run = Run(CONFIG)
    batches = run.batches()
    while CONFIG.stage(run.step) != stage:
        run.advance(next(batches))
    before = {name: tensor.clone() for name, tensor in run.masters.state_dict().items()}
    weight = run.working["model"].vision_tower.embeddings.patch_embedding.weight
    weight.register_hook(lambda gradient: gradient.index_fill(0, torch.tensor([3]), torch.nan))
    step = run.step
    with pytest.raises(Diverged, match=rf"the gradient is not a number at step {step + 1}: try a lower"):
        run.advance(next(batches))
    assert run.step == step
    assert all(torch.equal(before[name], tensor) for name, tensor in run.masters.state_dict().items())


# Workers, devices, measuring


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(workers: int, whole: Path, tmp_path: Path) -> None:
    train(tmp_path, CONFIG, loop=replace(EVERY, workers=workers))
    ours, wanted = load_file(tmp_path / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())
    assert log_of(tmp_path) == log_of(whole)


def test_everything_moves_to_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """`meta` is a device that every machine has, though it holds no numbers."""
    run = Run(CONFIG, device="meta", workers=0)
    tensors = [run.soft.bells, *run.masters.state_dict().values(), *run.working.state_dict().values()]
    for optimizer in run.optimizers.values():
        tensors += [p for group in optimizer.param_groups for p in group["params"]]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    pixels: list[Tensor] = []

    def see(pixel_values: Tensor) -> Tensor:
        pixels.append(pixel_values)
        raise StopIteration

    monkeypatch.setattr(run.working["model"].vision_tower, "forward", see)
    with pytest.raises(StopIteration):
        run.advance(next(run.batches()))
    assert pixels[0].device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("bf16", [False, None])
def test_training_on_cuda(bf16: bool | None, whole: Path, tmp_path: Path) -> None:
    """And a run that began there goes on on the CPU."""
    config = replace(CONFIG, bf16=bf16)
    train(tmp_path, config, loop=replace(EVERY, device="cuda"))
    for ours, wanted in zip(log_of(tmp_path), log_of(whole), strict=True):
        assert ours["patch"] == pytest.approx(wanted["patch"], rel=0.05)
    assert train(tmp_path, config, loop=replace(EVERY, resume=True)).step == CONFIG.total_steps


def test_metrics_are_measured_and_change_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the weights in fp32, from the second stage on; here by a stub that does all that could disturb."""
    calls: list[int] = []

    def evaluate(model: PaliGemma, processor: Processor, **options: Any) -> dict[str, dict[str, Metric]]:
        assert options == {"scenes": 100, "columns": ("held_out",), "progress": False}
        assert not model.training
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        inputs = processor([Image.new("RGB", (32, 32))], ["caption en"])
        model.generate(**inputs, max_new_tokens=2)
        torch.rand(3)
        calls.append(len(calls))
        return {"held_out": {"count": Metric(len(calls) / 10, 0.5, 7), "exact caption": Metric(1.0, 0.5, 7)}}

    monkeypatch.setattr(scratch, "evaluate", evaluate)
    state = torch.get_rng_state()
    run = train(tmp_path, CONFIG, loop=Loop(save_every=3, log_every=2, measure_every=3))
    assert run.masters.training
    ours, wanted = load_file(tmp_path / "state.safetensors"), load_file(whole / "state.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in wanted.items())
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 8, 9, 10, 12]
    counts = {line["step"]: line["count"] for line in lines if line["count"] is not None}
    assert counts == {6: 0.1, 9: 0.2, 12: 0.3}  # 3 is in the tower's own stage
    assert [line["exact caption"] for line in lines if line["step"] % 3 == 0] == [None, 1, 1, 1]
    assert list(lines[0])[:6] == ["step", "stage", "patch", "answer", "muon_lr", "adamw_lr"]
    torch.set_rng_state(state)


def test_the_real_evaluation_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "MEASURED_SCENES", 1)
    monkeypatch.setattr(answers, "LONGEST_ANSWER", 1)
    config = replace(CONFIG, tower_steps=0, packed_steps=0, prefix_steps=1)
    train(tmp_path, config, loop=Loop(log_every=1))
    (line,) = log_of(tmp_path)
    assert {"all questions", "exact caption", "box mean IoU"} < set(line)
