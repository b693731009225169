"""Which tasks measure which runs, by what their classes declare: nothing heavy is imported."""

from collections.abc import Iterable

from zoo.config.applicability import position_schemes
from zoo.config.schema.eval import EvalConfig
from zoo.config.schema.train import TrainConfig
from zoo.config.schemes import declared
from zoo.errors import UserError, sentence

RANKING = "zoo.compression.longllmlingua.compress"  # needs a question


def check_measurable(config: EvalConfig, runs: Iterable[TrainConfig]) -> None:
    """Refuse texts that are split where a task reads them whole, and an evaluation of which no task
    measures any run; of several runs or tasks, those that do not go together have their rows.
    """
    for name in config.task:
        if why := _not_together(name, config):
            raise UserError(why)
    first = ""
    for trained in runs:
        for name in config.task:
            why = unmeasurable(name, config, trained)
            if not why:
                return
            first = first or why
    if first:
        raise UserError(first)


def unmeasurable(task: str, config: EvalConfig, trained: TrainConfig) -> str:
    """Why a task cannot measure a run under the options, as a refusal, or nothing."""
    if why := _not_together(task, config):
        return why
    target, compress = config.task[task].target, config.compress
    reads, data = declared(target, "reads"), trained.data.name
    examples = trained.data.task is not None
    if examples and reads == "text":
        rule = f"reads a text, and data={data} is a synthetic task"
        return sentence(f"task={task}", rule, "Use task=accuracy")
    if not examples and reads == "examples":
        rule = f"measures examples of a synthetic task, and data={data} is a text"
        return sentence(f"task={task}", rule, "Use task=perplexity")
    if trained.objective == "masked":
        if not declared(target, "both_ways"):
            rule = "reads from left to right, and a model of objective=masked reads both ways"
            return sentence(f"task={task}", rule, "Use task=perplexity or task=speed")
        if (ranks := config.sequence_parallel or 1) > 1:
            rule = "a text that is read both ways is not split over processes"
            return sentence(f"sequence_parallel={ranks}", rule, "Leave it out")
    if declared(target, "rescales") and not _is_rotary(trained):
        rule = f"rescales rotary frequencies, and model={trained.model.name} has none"
        return sentence(f"task={task}", rule, "Measure a rotary model")
    if declared(target, "rescales") and config.extension.name != "none":
        rule = f"must be none with task={task}, which searches for the model as it was trained"
        return sentence(f"extension={config.extension.name}", rule)
    if compress.method is None:
        return ""
    if not declared(target, "compresses"):
        rule = f"task={task} has no prompt that compress={compress.name} could shorten"
        return sentence(f"compress={compress.name}", rule, "Leave it out")
    if compress.method.target == RANKING and not declared(target, "has_question"):
        rule = "ranks documents by a question, and the prompt has none"
        return sentence(f"compress={compress.name}", rule, "Use compress=llmlingua")
    return ""


def _is_rotary(trained: TrainConfig) -> bool:
    """Whether a scaling of rotary frequencies acts on the model."""
    return any("zoo.positions.scaling" in one.scaled_by for one in position_schemes(trained.model))


def _not_together(task: str, config: EvalConfig) -> str:
    """Why several processes do not read a task's texts together, or nothing."""
    ranks = config.sequence_parallel or 1
    if ranks == 1 or declared(config.task[task].target, "reads_together"):
        return ""
    rule = f"task={task} reads every text in one process"
    return sentence(
        f"sequence_parallel={ranks}", rule, "Use task=perplexity, passkey or facts, or leave it out"
    )
