"""Export a trained model: `python -m elara.export format=gguf quantize=Q4_K_M` writes it and reads it back."""

from __future__ import annotations

from typing import cast

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from elara.cli import hydra_main
from elara.errors import ElaraError
from elara.export.config import ExportConfig
from elara.runs import find_checkpoint


def export(config: DictConfig) -> None:
    """Write what the configuration asks for."""
    wanted = cast(ExportConfig, OmegaConf.to_object(config))
    given = [override for override in HydraConfig.get().overrides.task if override.startswith("quantize")]
    if given and wanted.format.kind == "safetensors":
        raise ElaraError(f"format=safetensors holds float32: leave {given[0]} out, or take format=gguf")
    folder = find_checkpoint(wanted.checkpoint)  # importing torch and gguf takes seconds: a typo should not wait
    try:
        from elara.export.run import run
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ElaraError("elara.export needs an extra: pip install 'elara-hivemind[export]'") from error
    run(wanted, folder)


def main() -> None:
    """Console script `elara-export`."""
    ConfigStore.instance().store(name="export_schema", node=ExportConfig)
    hydra_main("export", export)


if __name__ == "__main__":
    main()
