"""Everything that changes in a run and goes into its checkpoints: networks, optimizers, averages."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from training.checkpointing import TrainingState, optimizer_tensors, restore_optimizer
from training.config import TrainConfig
from training.distributed import Processes, whole
from training.ema import Averages
from training.errors import TrainingError
from training.tasks import Task

__all__ = ["Trained"]

MODEL = "model"


class Trained:
    """The model and the networks trained beside it, with their optimizers and the model's averages.

    Args:
        state: To go on from; None starts with the weights that the networks have.
    """

    def __init__(self, task: Task, config: TrainConfig, processes: Processes, state: TrainingState | None) -> None:
        self.config, self.processes = config.optimizer, processes
        self.modules = {MODEL: task.model, **task.auxiliary()}
        if state is not None:
            _require_same(state.modules, self.modules)
            for name, module in self.modules.items():
                module.load_state_dict(state.modules[name])
        # carries the averages when they are looked at; made before the network is cut or its layers replaced
        self._network = copy.deepcopy(task.model).eval().requires_grad_(False) if processes.is_first else task.model
        if config.loop.compile:
            task.compile()
        for name, module in self.modules.items():
            module.train()
            processes.prepare(module, is_cut=name == MODEL)
        self.optimizers = {
            name: torch.optim.AdamW(
                _by_decay(module, self.config.weight_decay),
                lr=self.config.learning_rate,
                betas=self.config.betas,
                fused=processes.device.type == "cuda",
            )
            for name, module in self.modules.items()
        }
        self.averages = Averages(task.model, config.loop.ema_half_lives)
        if state is not None:
            self.averages.load(state.averages)
            for name, optimizer in self.optimizers.items():
                # no state was saved of a network that had not taken a step
                restore_optimizer(optimizer, self.modules[name], state.optimizers.get(name, {}))

    def descend(self, loss: Tensor, rate: float, step: int) -> dict[str, Tensor]:
        """One step of every network down the gradient of the loss; returns the gradients' norms before clipping."""
        loss.backward()  # type: ignore[no-untyped-call]
        norms = {}
        for name, optimizer in self.optimizers.items():
            parameters = list(self.modules[name].parameters())
            self.processes.average_gradients(parameters)
            norms[name] = (
                whole(nn.utils.clip_grad_norm_(parameters, self.config.gradient_clip)).detach().to(loss.device)
            )
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.averages.update(step)
        return norms

    def average_state(self, name: str) -> dict[str, Tensor]:
        """State of the model with one average's parameters; all processes must ask for it."""
        model = self.modules[MODEL]
        return {key: whole(value) for key, value in model.state_dict().items()} | self.averages.whole(name)

    def average_network(self, name: str) -> nn.Module:
        """The network with one average's weights, until another is asked for; of use in the first process only."""
        state = self.average_state(name)
        if self.processes.is_first:
            self._network.load_state_dict(state)
        return self._network

    def state(self, config: TrainConfig, step: int, seconds: float, metrics: dict[str, float]) -> TrainingState:
        """What a checkpoint holds; all processes must ask for it."""
        return TrainingState(
            config=config,
            step=step,
            seconds=seconds,
            metrics=metrics,
            modules={
                name: {key: whole(value) for key, value in module.state_dict().items()}
                for name, module in self.modules.items()
            },
            averages={name: self.averages.whole(name) for name in self.averages.names},
            optimizers={
                name: optimizer_tensors(optimizer, self.modules[name]) for name, optimizer in self.optimizers.items()
            },
        )


def _by_decay(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of parameters: decay is for matrices and kernels alone.

    Biases, gains and Mamba's ``A_log``, ``D`` and ``dt_bias`` have no scale that the next layer could make up for.
    """
    parameters = list(module.parameters())
    return [
        {"params": [parameter for parameter in parameters if parameter.dim() > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.dim() <= 1], "weight_decay": 0.0},
    ]


def _require_same(saved: Iterable[str], wanted: Iterable[str]) -> None:
    if set(saved) != set(wanted):
        raise TrainingError(
            f"the checkpoint holds the networks {', '.join(sorted(saved))}; this run trains {', '.join(sorted(wanted))}"
        )
