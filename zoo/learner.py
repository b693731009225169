"""The one LightningModule, and `train`, which fits it into a run folder."""

import hashlib
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.flop_counter import FlopCounterMode

from zoo.backbone import Backbone
from zoo.build import build_model, count_parameters
from zoo.callbacks import Checkpoints, Metrics
from zoo.checkpoints import reject
from zoo.config import plain
from zoo.data.corpora import Corpus, open_corpus
from zoo.data.loader import train_loader, valid_batch
from zoo.errors import RunError, UserError
from zoo.extend import extend, places
from zoo.files import one_line
from zoo.ops import backends
from zoo.ops.native import tune_allocator
from zoo.report import wandb
from zoo.run import RunFolder
from zoo.schema import Optim, TrainConfig

log = logging.getLogger("zoo")

FLOP_PROBE = 1024  # tokens; a longer window's operations are extrapolated from here


class NonFiniteError(RunError):
    """The loss or the gradient is no longer a number; says where, and what to go back to."""


class Learner(lightning.LightningModule):
    """Next-token prediction, or that of masked tokens, with AdamW, warm-up and a cosine decay.

    `state_passing="carry"` starts every window from the state that the row's previous window left
    (truncated backpropagation through time, Williams 1990; Transformer-XL's memory for softmax),
    detached, and from the empty state where the row's text starts anew.
    """

    def __init__(
        self,
        *,
        model: Backbone,
        optim: Optim,
        max_steps: int,
        seq_len: int,
        state_passing: str = "none",
    ) -> None:
        super().__init__()
        self.model, self.optim = model, optim
        self.max_steps, self.seq_len = max_steps, seq_len
        self.carries = state_passing == "carry"
        self.carried: Any = None

    def training_step(self, batch: dict[str, Tensor], _: int) -> Tensor:
        tokens = self._tokens = batch["tokens"]
        if self.carries:
            state = self.carried
            if state is None or bool(batch["restart"].any()):
                state = self.model.empty_state(len(tokens))
            loss, state = self.model.loss(tokens, state)
            self.carried = self.model.carry(state, self.seq_len)
        else:
            loss = self.loss(batch)
        self._check("loss", loss)
        self.log("train/loss", loss.detach())
        return loss

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean loss over a batch, each window from the empty state."""
        if "chosen" in batch:
            tokens = batch["tokens"][:, :-1]
            return self.model.masked_loss(batch["shown"], tokens, batch["chosen"])
        return self.model.loss(batch["tokens"], positions=batch.get("positions"))

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        """Clip to the configured norm, and stop before a broken gradient reaches the weights."""
        norm = nn.utils.clip_grad_norm_(self.parameters(), self.optim.clip)
        self._check("gradient norm", norm)
        self.log("train/grad_norm", norm)

    def _check(self, what: str, value: Tensor) -> None:
        if not torch.isfinite(value):
            fingerprint = hashlib.sha256(self._tokens.cpu().numpy().tobytes()).hexdigest()[:12]
            raise NonFiniteError(
                f"the {what} is {value.item()} at step {self.global_step + 1}, batch {fingerprint}"
            )

    def configure_optimizers(self) -> Any:
        """AdamW; weight decay on matrices alone, and not on those an architecture exempts."""
        trained = [p for p in self.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.ndim >= 2 and not getattr(p, "no_weight_decay", False)]
        kept = [p for p in trained if all(p is not other for other in decayed)]
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": self.optim.weight_decay},
                {"params": kept, "weight_decay": 0.0},
            ],
            lr=self.optim.lr,
            betas=self.optim.betas,
            eps=self.optim.eps,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.learning_rate_factor)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def learning_rate_factor(self, step: int) -> float:
        """Linear warm-up to 1, then a cosine down to `min_lr_ratio` at the last step."""
        warmup, floor = self.optim.warmup_steps, self.optim.min_lr_ratio
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, self.max_steps - warmup))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.carried is not None:  # its leaves: a checkpoint holds plain containers alone
            checkpoint["carried"] = tree_flatten(self.carried)[0]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if "carried" in checkpoint:
            leaves = checkpoint["carried"]
            batch = next(leaf for leaf in leaves if isinstance(leaf, Tensor)).shape[0]
            structure = tree_flatten(self.model.empty_state(batch))[1]
            leaves = [x.to(self.device) if isinstance(x, Tensor) else x for x in leaves]
            self.carried = tree_unflatten(leaves, structure)


class Windows(lightning.LightningDataModule):
    """The corpus as training windows in the order of (seed, step), from the step we are at."""

    def __init__(self, corpus: Corpus, config: TrainConfig) -> None:
        super().__init__()
        self.corpus, self.config = corpus, config

    def train_dataloader(self) -> "Windows":
        return self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        trainer, config = self.trainer, self.config
        assert trainer is not None
        accumulate = trainer.accumulate_grad_batches
        loader = train_loader(
            self.corpus.train,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
            start_step=trainer.global_step * accumulate,
            steps=(trainer.max_steps - trainer.global_step) * accumulate,
            contiguous=config.state_passing == "carry",
            rank=trainer.global_rank,
            world=trainer.world_size,
            workers=config.workers,
            masked=self.corpus.vocab_size if config.objective == "masked" else None,
            places=places(config.extension, config.seq_len),
            passkeys=self.corpus.passkeys,
        )
        return iter(loader)


def train(config: TrainConfig, folder: RunFolder) -> None:
    """Train the configured model in its run folder, from its last good checkpoint if it has one.

    Writes metrics, checkpoints and the status as it goes. Raises UserError for what the user can
    mend, NonFiniteError when the loss is lost, KeyboardInterrupt after a stop by signal.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    backends.forget()
    if config.allocator == "tuned" and (told := tune_allocator()):
        log.info("%s; allocator=system leaves it alone", told)
    corpus = open_corpus(config.data.model_dump(), Path(config.data.options["cache"]))
    _check_text(corpus, folder)
    lightning.seed_everything(config.seed, verbose=False)
    masked = corpus.vocab_size if config.objective == "masked" else None
    model, knobs = build_model(config, corpus.vocab_size + (masked is not None))
    last, state = last_checkpoint(folder)
    if config.finetune and not last:
        model.load_state_dict(trained_weights(RunFolder.open(config.finetune)))
    extend(model, config.extension, config.seq_len)
    if state:
        load_weights(model, state, folder)
        del state
    options = {**config.trainer.model_dump()}
    tokens_per_step = config.batch_size * config.seq_len * options.get("accumulate_grad_batches", 1)
    checkpoints = Checkpoints(folder, every=config.save_every, tokens_per_step=tokens_per_step)
    metrics = Metrics(
        folder,
        valid=valid_batch(corpus.valid, config.seq_len, config.valid_windows, masked),
        valid_every=config.valid_every,
        tokens_per_step=tokens_per_step,
    )
    trainer = lightning.Trainer(
        **{
            "max_epochs": -1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "log_every_n_steps": 10,
            **options,
        },
        callbacks=[metrics, checkpoints],
        logger=_logger(config, folder),
        enable_checkpointing=False,
        default_root_dir=folder.path,
    )
    folder.update(
        parameters=count_parameters(model),
        flops_per_token=forward_flops(model, config.seq_len),
        sized=knobs,
        tokens_per_step=tokens_per_step,
        fingerprint=corpus.fingerprint,
        tokenizer=corpus.tokenizer,
        data=corpus.summary,
        device=device_name(trainer.strategy.root_device),
        threads=torch.get_num_threads(),
    )
    learner = Learner(
        model=model,
        optim=config.optim,
        max_steps=trainer.max_steps,
        seq_len=config.seq_len,
        state_passing=config.state_passing,
    )
    try:
        trainer.fit(
            learner,
            datamodule=Windows(corpus, config),
            ckpt_path=str(last) if last else None,
            weights_only=True,
        )
    except NonFiniteError as error:
        good = folder.checkpoint()
        raise NonFiniteError(f"{error}; last good checkpoint: {good or 'none yet'}") from None
    except SIGTERMException:
        raise KeyboardInterrupt(f"stopped by SIGTERM at step {trainer.global_step}") from None
    finally:
        folder.update(backends=backends.chosen())
    if checkpoints.interrupted:
        raise KeyboardInterrupt(f"stopped by Ctrl-C at step {trainer.global_step}")
    folder.update(status="done", reason=None)


def _logger(config: TrainConfig, folder: RunFolder) -> Any:
    """W&B's mirror of the run folder, or False for none."""
    if config.logger.name == "none":
        return False
    from lightning.pytorch.loggers import WandbLogger

    about = {"project": config.logger.project, "name": folder.name, "dir": str(folder.path)}
    run = wandb.begin(config.logger.mode, config=plain(config), job_type="train", **about)
    return WandbLogger(experiment=run)


def load(folder: RunFolder, device: torch.device | str = "cpu") -> Backbone:
    """The model of a run, with the weights of its last good checkpoint, ready to measure.

    UserError where there is none, or where it is of another model than config.yaml's.
    """
    path, state = _a_checkpoint(folder)
    vocabulary = state["state_dict"].get("model.embedding.weight")
    if not isinstance(vocabulary, Tensor) or vocabulary.ndim != 2:
        raise UserError(f"{path} holds no model of ours: it has no embedding")
    model, _ = build_model(folder.config, vocabulary.shape[0])
    extend(model, folder.config.extension, folder.config.seq_len)
    load_weights(model, state, folder)
    return model.to(device).eval().requires_grad_(False)


def load_weights(model: Backbone, state: dict[str, Any], folder: RunFolder) -> None:
    """Give a model the weights in a checkpoint. UserError where they are another model's."""
    weights = _weights(state)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as error:
        mine = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        theirs = {name: tuple(value.shape) for name, value in weights.items()}
        differ = [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)]
        told = f"{folder}: config.yaml's model does not fit the checkpoint"
        if not differ:
            raise UserError(f"{told}: {str(error).splitlines()[0]}") from None
        name = differ[0]
        one, other = (shapes.get(name, "none") for shapes in (mine, theirs))
        raise UserError(
            f"{told}: {len(differ)} of its {len(mine)} weights differ, such as {name}, which is "
            f"{one} there and {other} here"
        ) from None


def trained_weights(folder: RunFolder) -> dict[str, Tensor]:
    """The model's weights in a run's last good checkpoint. UserError where it has none."""
    return _weights(_a_checkpoint(folder)[1])


def _a_checkpoint(folder: RunFolder) -> tuple[Path, dict[str, Any]]:
    path, state = last_checkpoint(folder)
    if path is None:
        step = folder.info["step"]
        raise UserError(
            f"{folder} has no checkpoint{f' of its {step:,} steps' if step else ' yet'}"
        )
    return path, state


def _weights(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): value for name, value in state["state_dict"].items()}


def last_checkpoint(folder: RunFolder) -> tuple[Path | None, dict[str, Any]]:
    """The file of a run's last checkpoint that can be read, and what it holds; (None, {}) before
    the first.

    What PyTorch cannot read, or refuses to, is passed over in words like what is damaged. UserError
    where none is left.
    """
    unread = ""
    for whole in folder.whole_checkpoints():
        try:
            state = torch.load(whole.path, map_location="cpu", weights_only=True)
            if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
                raise ValueError("it holds no weights")
            if type(state.get("global_step")) is not int:
                raise ValueError("it holds no step")
        except Exception as error:  # torch has no class of its own for what it cannot read
            unread = f"{whole.path.name} cannot be read ({one_line(error)[:120]})"
            log.warning("%s: %s: passed over", folder, unread)
            reject(whole.path)
            continue
        return whole.path, state
    if unread:
        raise UserError(f"{folder} has no checkpoint that can be read: {unread}")
    return None, {}


def _check_text(corpus: Corpus, folder: RunFolder) -> None:
    """Refuse to go on with a run on another text than it began on."""
    info = folder.info
    began = info.get("fingerprint")
    if info["step"] and began and began != corpus.fingerprint:
        raise UserError(
            f"data={corpus.name} is not the text that {folder} was trained on so far: its "
            f"fingerprint is {corpus.fingerprint[:8]}, the run's {began[:8]}. Put the text back, "
            "name it with data.path=, or begin a new run with fresh=true"
        )


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name; `auto` is the accelerator where there is one, else the CPU."""
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device={name} is not to be had here: {reason}") from None
    return device


def device_name(device: torch.device) -> str:
    """The model of an accelerator, `cpu` for the CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def forward_flops(model: Backbone, tokens: int) -> float:
    """Floating-point operations per token of reading `tokens` tokens once.

    Counted at that length up to `FLOP_PROBE`; beyond, at it and at its half: where a model is
    quadratic its cost per token is a + b * tokens.
    """
    long = min(tokens, FLOP_PROBE)
    # Without gradients of their own: the counter hooks any input that seems to want one.
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def per_token(length: int) -> float:
        sample = torch.zeros(1, length, dtype=torch.long)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            torch.func.functional_call(model, weights, (sample,))
        return counter.get_total_flops() / length

    count = per_token(long)
    if tokens == long:
        return count
    slope = (count - per_token(long // 2)) / (long - long // 2)
    return count + slope * (tokens - long)


# Lightning's advertisements and notes to itself; what matters here is said by the callbacks.
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
for noise in (".*does not have many workers.*", ".*LeafSpec.*", ".*weights_only.*"):
    warnings.filterwarnings("ignore", message=noise)
