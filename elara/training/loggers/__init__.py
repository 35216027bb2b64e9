"""Where the figures go: a CSV file, TensorBoard, Weights & Biases. The latter two are imported only when asked for."""

from elara.training.loggers.event_files import tensorboard
from elara.training.loggers.metrics_file import CSV
from elara.training.loggers.monitor import Monitor
from elara.training.loggers.weights_and_biases import wandb

__all__ = ["CSV", "Monitor", "tensorboard", "wandb"]
