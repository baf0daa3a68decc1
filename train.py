"""Multiple-norm adversarial training: E-AT (extreme norm adversarial training, arXiv 2105.12508), from scratch or by fine-tuning.

python train.py --attack=apgd --l_norms='Linf L1'                                    E-AT from scratch
python train.py --attack=apgd --l_norms=L2 --l_eps=0.5 --at_iter=10                  one norm
python train.py --attack=apgd --l_norms='Linf L1' --finetune_model --lr-schedule=piecewise-ft --model_name=pretr_Linf.pth
python train.py --attack=apgd --l_norms='Linf L1' --finetune_model --model_name=RB_Engstrom2019Robustness
python train.py --dataset=digits --attack=apgd --l_norms='Linf L1' --final_eval      on a laptop, in minutes
python train.py --resume=runs/RUN                                                    resume a run
torchrun --nproc_per_node=8 train.py --attack=apgd --l_norms='Linf L1' --resume      on 8 GPUs; resumes this command's newest run, if any

Without --attack the training is standard: no adversarial examples.
"""

from __future__ import annotations

import utils.installed  # noqa: F401

# isort: split

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.apgd import Model
from attacks.multinorm import SCHEMES, Scheme
from config import (
    TrainConfig,
    check_processes,
    completed,
    config_json,
    differences,
    evaluation_threats,
    flags_given,
    loaded_facts,
    make_parser,
    resolved,
)
from training.evaluation import final_evaluation, quick_evaluation
from training.export import check_export, export_run
from training.metrics import HEADER, best_networks, chance_warning, console_line, constant_loss, per_threat_sums
from training.optim import set_lr
from training.start import check_images, check_model, configured, load, new_run, resumed_run, run_to_resume
from training.trainer import MicroBatches, Trainer
from utils.checkpoint import NonFiniteError, check_finite, load_tensors, save_atomic, state_files
from utils.cli import UsageError, blame, described, usage_errors
from utils.distributed import barrier, choose_device, local_device, process_group, run_on_rank0
from utils.image_files import ImageError
from utils.precision import check_amp, set_up_torch
from utils.run_folder import append_json_line, environment, flat, json_lines
from utils.signals import Interrupted, Signals
from utils.text import printable


def train_epoch(trainer: Trainer) -> None:
    """The rest of the current epoch: one pass over the training set, two with --gradient_projection. Raises Interrupted, NonFiniteError."""
    trainer.train_mode()
    # One phase; RAMP's gradient projection has two, and combines their weights when the loop is over.
    for scheme, optimizer in trainer.phases():
        for batch in trainer.batches():
            trainer.before_step()
            set_lr(optimizer, trainer.lr_at(trainer.progress(batch.index)), trainer.frozen)
            micro_batches = trainer.adversarial_micro_batches(scheme, batch)
            optimizer.zero_grad()
            # Mean loss of the whole mini-batch: losses are summed here, and data parallelism averages gradients over the processes.
            weight = trainer.process.world_size / batch.size
            add_gradient = partial(
                forward_backward,
                trainer.train_model,
                scheme,
                micro_batches,
                weight,
                trainer.scaler,
                trainer.no_sync_unless,
            )
            with trainer.awp.perturbed(add_gradient) if trainer.awp else nullcontext():
                sums = add_gradient()
            optimizer_step(optimizer, trainer.scaler, trainer.config.grad_clip)
            trainer.after_step(sums, batch)


def forward_backward(
    network: Model,
    scheme: Scheme,
    micro_batches: MicroBatches,
    weight: float,
    scaler: torch.amp.GradScaler,
    no_sync_unless: Callable[[bool], AbstractContextManager[Any]] = lambda last: nullcontext(),
) -> Tensor:
    """Accumulate the gradients of weight * (sum of the scheme's loss) over the micro-batches (gradient accumulation).

    Returns the sum of the loss, then the `per_threat_sums` of each threat and of clean images: (1 + 3 (threats + 1),) on the device,
    without synchronising with it.
    """
    sums = []
    for number, (adversarial, y) in enumerate(micro_batches, 1):
        with no_sync_unless(number == len(micro_batches)):
            logits = network(adversarial.x.flatten(0, 1)).float().unflatten(0, adversarial.threat.shape)
            loss = scheme.loss(logits, y).sum()
            scaler.scale(loss * weight).backward()
        table = per_threat_sums(logits.detach(), y, adversarial.threat, len(scheme.threats) + 1)
        sums.append(torch.cat([loss.detach()[None], table.flatten()]))
    return torch.stack(sums).sum(0)


def optimizer_step(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, grad_clip: float | None) -> None:
    """Clip the gradient to L2 norm grad_clip, if given, and make the optimizer step."""
    if grad_clip:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], grad_clip)
    scaler.step(optimizer)
    scaler.update()


def finish_epoch(trainer: Trainer, board: Any) -> None:
    """After an epoch's last step: evaluate, append to metrics.jsonl, save checkpoints and the training state."""
    config, done = trainer.config, trainer.epoch + 1
    last = done == config.epochs
    record = trainer.epoch_record()
    if config.eval_freq and (done % config.eval_freq == 0 or last):
        trainer.save()  # a run that ends in the evaluation resumes after the epoch's last step
        for suffix, model in trainer.networks().items():
            record[f"eval{suffix}"] = quick_evaluation(trainer, model)
    if trainer.process.is_rank0:
        records = report_epoch(trainer, record, board)
        if last or done % (config.save_freq or 1) == 0:
            save_checkpoints(trainer, f"ep_{done}")
        for suffix in best_networks(records, config.select):
            save_checkpoints(trainer, "best", (suffix,))
    trainer.next_epoch()


def report_epoch(trainer: Trainer, record: dict[str, Any], board: Any) -> list[dict[str, Any]]:
    """An epoch's record in metrics.jsonl, on console and TensorBoard, a warning if training sits at chance; all epochs' records."""
    path, epochs = trainer.folder / "metrics.jsonl", trainer.config.epochs or 0
    append_json_line(path, record)
    print(console_line(record, epochs), flush=True)
    records = list(json_lines(path))
    if warning := chance_warning(records, constant_loss(trainer.dataset.train.labels), epochs):
        print(warning, flush=True)
    if board:
        for name, value in flat(record).items():
            board.add_scalar(name, value, record["epoch"])
        board.flush()
    return records


def save_checkpoints(trainer: Trainer, stem: str, suffixes: Sequence[str] = ("", "_ema")) -> None:
    """Write STEM.pth and, with --ema, STEM_ema.pth, or one of them. Raises NonFiniteError, OSError."""
    networks = {suffix: model for suffix, model in trainer.networks().items() if suffix in suffixes}
    for suffix, model in networks.items():
        content = trainer.about | {"state_dict": model.state_dict(), "epoch": trainer.epoch + 1}
        if trainer.config.save_optim and not suffix:
            content["optimizer"] = trainer.optimizer.state_dict()
        check_finite(model)
        save_atomic(content, trainer.folder / f"{stem}{suffix}.pth")


def train(trainer: Trainer) -> None:
    """The remaining epochs, then the final evaluation; deletes the training states, which are no longer needed."""
    board = tensorboard(trainer) if trainer.config.tensorboard and trainer.process.is_rank0 else None
    while trainer.epoch < (trainer.config.epochs or 0):
        train_epoch(trainer)
        finish_epoch(trainer, board)
    if trainer.config.final_eval:
        for suffix, model in trainer.networks().items():
            final_evaluation(trainer, model, suffix)
    if trainer.process.is_rank0:
        export_run(trainer.config, trainer.folder)
    trainer.checkpoints.forget()


def train_or_say_how_to_resume(trainer: Trainer) -> None:
    """`train`; what ends it early is one line: exit code 143 or 130 after SIGTERM or SIGINT, else 1. A traceback goes to error.txt."""
    how = resume_command(trainer)
    try:
        if trainer.epoch == trainer.step == 0:
            trainer.save()  # there is a state from the start
        try:
            train(trainer)
        except Interrupted:
            trainer.save()
            barrier()
            raise
    except Interrupted as end:
        if trainer.process.is_rank0:
            done = f"batch {trainer.step} of epoch {trainer.epoch + 1}"
            print(f"{end}: the state after {done} is saved; {how}", flush=True)
        sys.exit(end.code)
    except NonFiniteError as error:
        sys.exit(f"train.py: {error}; {last_state(trainer.folder)}. Try a lower --lr-max, or --grad_clip")
    except UsageError:
        raise
    except Exception as error:  # of several processes most often: another one ended
        what = str(error) if isinstance(error, ImageError) else described(error, trainer.folder)
        sys.exit(f"train.py: {printable(' '.join(what.split()), 1000)}; {last_state(trainer.folder)}; {how}")
    if trainer.process.is_rank0:
        print(f"saved {trainer.folder / f'ep_{trainer.config.epochs}.pth'}")


def resume_command(trainer: Trainer) -> str:
    """In words: the command that resumes the run, of train.py or of one's own file that registers a scheme and calls `main`."""
    name = Path(sys.argv[0]).name
    script = name if name.endswith(".py") and name != "__main__.py" else "train.py"
    program = "torchrun ..." if trainer.process.world_size > 1 else "python"
    return f"resume with: {program} {script} --resume={trainer.folder}"


def last_state(folder: Path) -> str:
    """Which training state a resumed run starts from, in words."""
    states = state_files(folder)
    return f"the last good state is {states[-1]}" if states else f"no state was saved in {folder}"


def tensorboard(trainer: Trainer) -> Any:
    """A SummaryWriter for RUN/tensorboard; TensorBoard hides what an interrupted process wrote of epochs still to come."""
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(trainer.folder / "tensorboard"), purge_step=trainer.epoch + 1)


def main(argv: Sequence[str] | None = None) -> Path:
    """Train as the flags say. Returns the run's folder."""
    with usage_errors("train.py"), ExitStack() as stack:
        asked = flags_given(make_parser(TrainConfig, __doc__), argv)
        config = resolved(configured(asked))
        with blame("--device"):
            device = local_device(choose_device(config.device))
        with blame("--amp"):
            check_amp(device, config.amp)
        set_up_torch(config.threads, tf32=True)
        process = stack.enter_context(process_group(device))
        signals = stack.enter_context(Signals())
        with blame("--resume"):
            before = run_on_rank0(lambda: run_to_resume(config, asked, stack))
        with blame("--export"):
            run_on_rank0(lambda: check_export(config, before))
        if before and not before.state and (before.folder / f"ep_{config.epochs}.pth").exists():
            print(f"{before.folder} is complete")
            with blame("--export"):
                run_on_rank0(lambda: export_run(config, before.folder))
            return before.folder
        state = load_tensors(before.state) if before and before.state else None
        dataset, model, spec = load(config, state)
        config = completed(config, spec, dataset)
        check_model(config, model.to(device), dataset)
        if config.check_images:
            check_images(dataset, process)
        check_processes(config, process.world_size)
        trainer = Trainer(config, dataset, (model, spec), process, signals)
        env = environment(device, argv) | {"processes": process.world_size}
        content = config_json(config, asked, loaded_facts(spec, dataset))
        with blame("--resume" if before else "--save_dir"):
            epochs = state["epoch"] if state else 0
            folder = run_on_rank0(
                lambda: (
                    resumed_run(before.folder, content, epochs, env) if before else new_run(config, content, env, stack)
                )
            )
        trainer.store_in(folder)
        stack.callback(trainer.loader.close)
        if state:
            trainer.restore(state)
            state = None  # else it would stay in memory, beside the network and the optimizer, as long as the run
        if process.is_rank0:
            announce(trainer, differences(config, asked))
        train_or_say_how_to_resume(trainer)
    return folder


def announce(trainer: Trainer, settings: Mapping[str, Any]) -> None:
    """Print the settings that are not the default, the scheme, device and folder."""
    config, process, threats = trainer.config, trainer.process, trainer.scheme.threats
    if settings:
        print("settings:", "  ".join(f"{name}={setting(value)}" for name, value in settings.items()))
    if not config.attack:
        print(
            "\n!!! STANDARD TRAINING: without --attack there are no adversarial examples, and the network will not be robust."
        )
        print("!!! For adversarial training give --attack=apgd --l_norms='Linf L1'.\n")
    elif len(threats) > 1:
        name = config.multinorm or "eat"
        print(f"{name} for {', '.join(map(str, threats))}: {SCHEMES[name].summary}")
    else:
        print(f"adversarial training for {threats[0]}")
    if config.eval_freq or config.final_eval:
        print(f"evaluation in {', '.join(map(str, evaluation_threats(config)))}")
    if trainer.epoch or trainer.step:
        steps = trainer.phases_per_epoch * trainer.batches_per_pass
        print(f"resuming after batch {trainer.step} of {steps} of epoch {trainer.epoch + 1}")
    together = f"{process.world_size} processes, rank 0 " if process.world_size > 1 else ""
    print(f"{together}on {process.device}; run folder {trainer.folder}\n{HEADER}", flush=True)


def setting(value: Any) -> str:
    """A setting as it would be written on the command line."""
    return (
        repr(" ".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value))
        if isinstance(value, tuple)
        else str(value)
    )


if __name__ == "__main__":
    main()
