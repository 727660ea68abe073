"""Hugging Face's Trainer with what a memzoo run needs: rates by part, FSDP anywhere, checkpoints that are whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from memzoo.training.parts import split_groups
from memzoo.training.sharding import check_kind, load_weights, shard_on_cpus


class MemzooTrainer(Trainer):
    """Trainer that saves the model's own `use_cache`, not the False that training runs with.

    Args:
        learning_rates: by part of the model, see memzoo.training.parts.
    """

    def __init__(self, model: PreTrainedModel, *args, learning_rates: dict[str, float] | None = None, **kwargs):
        self.saved_use_cache = model.config.use_cache
        self.learning_rates = learning_rates or {}
        super().__init__(model, *args, **kwargs)

    def _build_accelerator_args(self, **kwargs):
        shard_on_cpus(self.args)
        return super()._build_accelerator_args(**kwargs)

    def create_optimizer(self, model=None):
        optimizer = super().create_optimizer(model)
        if self.learning_rates:
            groups = split_groups(optimizer.param_groups, model or self.model, self.learning_rates)
            optimizer.param_groups[:] = groups
        return optimizer

    def log(self, logs, *args, **kwargs):
        """With rates by part, each of them at every log."""
        if "learning_rate" in logs and self.learning_rates:
            groups = self.optimizer.param_groups
            for group in groups:  # by now the schedule has made its step, and logs tell of the one before
                share = group["initial_lr"] / groups[0]["initial_lr"] if "initial_lr" in group else 1.0
                logs[f"learning_rate/{group['part']}"] = logs["learning_rate"] * share
        super().log(logs, *args, **kwargs)

    @contextmanager
    def _config_to_save(self) -> Iterator[None]:
        config = self.model.config
        in_training, config.use_cache = config.use_cache, self.saved_use_cache
        try:
            yield
        finally:
            config.use_cache = in_training

    def _save(self, output_dir=None, state_dict=None):
        if state_dict is not None:  # gathered by FSDP, which tells of a tied weight by each of its names
            state_dict = {name: w for name, w in state_dict.items() if name not in self.model.all_tied_weights_keys}
        with self._config_to_save():
            super()._save(output_dir, state_dict)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Under FSDP with sharded checkpoints too, the finished model is whole, and checkpoints have its tokenizer."""
        super().save_model(output_dir, _internal_call)
        if not self.is_fsdp_enabled or self.accelerator.state.fsdp_plugin.state_dict_type.name != "SHARDED_STATE_DICT":
            return
        folder = output_dir or str(self.args.output_dir)
        if not _internal_call:
            self._save(folder, self.accelerator.get_state_dict(self.model))
        elif self.args.should_save:
            with self._config_to_save():
                self.model.config.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def take(self, checkpoint: str) -> None:
        """The model, the best one if asked for, and the log of a run that is complete."""
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        if self.is_fsdp_enabled:
            load_weights(best or checkpoint, self.model)
            return
        self._load_from_checkpoint(checkpoint)
        if best is not None:
            self._load_best_model()

    def run(self, resume: str | None) -> bool:
        """Trains from the beginning or from a checkpoint to the end; False if the checkpoint is there already."""
        if resume is not None:
            check_kind(resume, self)
        if resume is not None and is_finished(resume, self.args):
            self.take(resume)  # Trainer would add a step
            return False
        self.train(resume_from_checkpoint=resume)
        return True

    def _save_rng_state(self, output_dir):
        """Every process has written its part before trainer_state.json, which comes next, says that all is there."""
        super()._save_rng_state(output_dir)
        self.args.distributed_state.wait_for_everyone()


def is_finished(checkpoint: str, args: TrainingArguments) -> bool:
    """Whether a checkpoint is already where the run is to end."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return float(state.epoch or 0) >= args.num_train_epochs
