"""The classes that an Auto class finds for a folder whose structure its config does not describe.

They hand the folder to `storage.load`, and return the model that was saved: a BertForSequenceClassification,
say, with other layers in it. Imported by `auto`, only where transformers is.
"""

import transformers
from transformers.configuration_utils import PreTrainedConfig

from lmcompress.errors import BadSetting
from lmcompress.models.auto import AUTO_CLASSES, MODEL_TYPE

# What every Auto class passes on, and what means nothing for a model that is rebuilt from one file.
_PASSED_ON = {"trust_remote_code", "adapter_kwargs", "_from_auto", "cache_dir", "force_download", "token"}
_PASSED_ON |= {"local_files_only", "proxies", "revision", "subfolder", "low_cpu_mem_usage", "use_safetensors"}


class CompressedConfig(PreTrainedConfig):
    """The config of a saved model, every field of it, under the model type that only this package reads."""

    model_type = MODEL_TYPE


class _Compressed:
    """Stands for all models that one Auto class may load; `mapping` is transformers' table of these."""

    config_class = CompressedConfig
    mapping: str

    @classmethod
    def from_pretrained(
        cls,
        folder: str,
        *,
        config: PreTrainedConfig | None = None,
        dtype=None,
        torch_dtype=None,
        device_map=None,
        attn_implementation: str | None = None,
        output_loading_info: bool = False,
        **options,
    ):
        """Return the model in `folder`, in eval mode, as `storage.load` does; of its body for `AutoModel`.

        Raises `BadSetting` for an option that has no meaning here, and for a model of another Auto class.
        """
        import torch

        from lmcompress.models import assets, storage  # not before transformers is imported

        if unknown := sorted(name for name in set(options) - _PASSED_ON if options[name] is not None):
            raise BadSetting(
                f"{folder} holds a compressed model, which takes dtype, device_map (a device) and "
                f"attn_implementation, and no {', '.join(unknown)}."
            )
        dtype = dtype or torch_dtype
        dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype  # "auto": as it was saved
        model, _ = storage.load(
            assets.resolve(folder, kind="models"), device=_device(device_map), dtype=dtype
        )
        expected = getattr(transformers, cls.mapping).get(type(model.config), None)
        fitting = [part for part in (model, model.base_model) if expected and isinstance(part, expected)]
        if not fitting:
            raise BadSetting(
                f"{folder} holds a {type(model).__name__}, which {cls.__name__.removeprefix('Compressed')} "
                "does not load: use the Auto class of that name, or lmcompress.load_compressed(folder)."
            )
        # An Auto class moves the argument into the config that it makes.
        if attention := attn_implementation or (config and config._attn_implementation):
            fitting[0].set_attn_implementation(attention)
        report = {f"{kind}_keys": [] for kind in ("missing", "unexpected", "mismatched")} | {"error_msgs": []}
        return (fitting[0], report) if output_loading_info else fitting[0]


def register_config() -> None:
    """Let `AutoConfig` read the folders."""
    from transformers.models.auto.configuration_auto import AutoConfig

    AutoConfig.register(CompressedConfig.model_type, CompressedConfig, exist_ok=True)


def register_models() -> None:
    """Let each of the `AUTO_CLASSES` load them."""
    from transformers.models.auto import modeling_auto

    for name, kind in dict(AUTO_CLASSES.values()).items():
        mapping = f"MODEL_FOR_{kind}_MAPPING" if kind else "MODEL_MAPPING"
        loads = type(f"Compressed{name}", (_Compressed,), {"mapping": mapping})
        getattr(modeling_auto, name).register(CompressedConfig, loads, exist_ok=True)


def _device(device_map: object) -> str:
    """Return the one device that a `device_map` names."""
    devices = set(device_map.values()) if isinstance(device_map, dict) else {device_map}
    if len(devices) > 1 or "disk" in devices:
        raise BadSetting(
            f"device_map={device_map!r}: a compressed model goes to one device, such as 'cuda:0'."
        )
    device = devices.pop()
    if device in ("auto", "balanced", "sequential"):
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{device}" if isinstance(device, int) else str(device or "cpu")
