"""Loading a text-to-image pipeline of diffusers, component by component, in the precision asked for.

The components are loaded one at a time and then handed to the pipeline, because only so do the libraries say which
weights were missing from a file: through the pipeline such weights are made up at random with no more than a remark.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from fedkeel.errors import ConfigError, DataError, PoolError
from fedkeel.generators.hub import check_weights, content_hash, missing_tokenizer, need, quiet, weight_files
from fedkeel.rng import isolated

Precision = Literal["fp32", "bf16", "fp16", "uint4", "nf4"]
Scheduler = Literal["own", "ddim", "dpm++", "unipc", "pndm", "heun", "euler", "euler_a", "lcm"]
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "pndm": "PNDMScheduler",
    "heun": "HeunDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
}
FLOWS = ("dpm++", "unipc")
"""Those of them that know the prediction_type flow_prediction."""
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
"""Components of a Stable Diffusion repository that making images from text does not need."""
QUANTISED = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Components held in four bits where these are asked for; the autoencoder is small and suffers most."""


def components(folder: Path) -> dict[str, tuple[str, str]]:
    """Library and class of each component that `model_index.json` names. Raises DataError when it is no pipeline."""
    index = read_index(folder)
    found = {}
    for name, entry in index.items():
        if name.startswith("_") or name in LEFT_OUT or not isinstance(entry, list) or entry == [None, None]:
            continue
        if len(entry) != 2 or not all(isinstance(word, str) for word in entry):
            raise DataError(f"{folder / 'model_index.json'}: {name} = {json.dumps(entry)} must be [library, class]")
        library, cls = entry
        if library not in ("diffusers", "transformers"):
            raise DataError(f"{folder / 'model_index.json'}: {name} is code of its own ({library}), which is not run")
        found[name] = (library, cls)
    return found


def read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json`. Raises DataError when it is damaged."""
    path = folder / "model_index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        index["_class_name"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(f"{path} does not describe a pipeline of diffusers: {error}") from error
    assert isinstance(index, dict)
    return index


def missing_files(folder: Path, variant: str = "") -> list[str]:
    """The files that a folder lacks to be a whole pipeline, as paths below it."""
    if not (folder / "model_index.json").is_file():
        return ["model_index.json"]
    wanted: list[Path] = []
    for name, (library, cls) in components(folder).items():
        if is_model(cls):
            wanted += [folder / name / "config.json", *weight_files(folder / name, library, variant)]
        elif cls.endswith("Scheduler"):
            wanted.append(folder / name / "scheduler_config.json")
        elif "Tokenizer" in cls:
            wanted += [folder / name / lacking for lacking in missing_tokenizer(folder / name)]
        elif not any((folder / name).glob("*")):
            wanted.append(folder / name)
    return [path.relative_to(folder).as_posix() for path in wanted if not path.exists()]


def is_model(cls: str) -> bool:
    """Whether a component of this class has weights: not a scheduler, tokenizer or image processor."""
    return not any(word in cls for word in ("Scheduler", "Tokenizer", "Processor", "Extractor"))


def pipeline_hash(folder: Path, variant: str = "") -> str:
    """SHA-256 hex over all files that decide an image."""
    files = [folder / "model_index.json"]
    for name, (library, cls) in components(folder).items():
        if is_model(cls):
            files += [folder / name / "config.json", *weight_files(folder / name, library, variant)]
        else:
            files += [path for path in (folder / name).iterdir() if path.suffix in (".json", ".txt", ".model")]
    return content_hash(files, folder)


_loaded: WeakValueDictionary[tuple[str, str, str], Any] = WeakValueDictionary()


def shared_pipeline(folder: Path, precision: Precision, device: torch.device, variant: str = "") -> tuple[Any, str]:
    """The pipeline, and the SHA-256 of its files; raises as `load_pipeline` does.

    Whoever asks for the same content, precision and device while another still holds it gets that one, so that profiles
    of a run that differ in steps alone have one network in memory. Its scheduler is as the files say: see `scheduled`.
    """
    weights = pipeline_hash(folder, variant)
    key = (weights, precision, str(device))
    pipe = _loaded.get(key)
    if pipe is None:
        pipe = _loaded[key] = load_pipeline(folder, precision, device, variant)
    return pipe, weights


@contextmanager
def scheduled(pipe: Any, scheduler: Any) -> Iterator[None]:
    """The pipeline with another scheduler, and then with its own again."""
    own = pipe.scheduler
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.scheduler = own


def load_pipeline(folder: Path, precision: Precision, device: torch.device, variant: str = "") -> Any:
    """The pipeline on `device`, without a safety checker, ready for inference.

    Raises DataError, naming the file, for weights that are missing, cut off or of another architecture; ConfigError for
    a precision the device cannot do; PoolError when it does not fit into memory; MissingExtra.
    """
    need("diffusers", "transformers", "accelerate")
    import diffusers
    import transformers

    index, kinds = read_index(folder), components(folder)
    check_weights(
        path
        for name, (library, kind) in kinds.items()
        if is_model(kind)
        for path in weight_files(folder / name, library, variant)
    )
    quantised = quantisation(precision, device)
    dtype = compute_type(precision, device)
    parts: dict[str, Any] = {}
    with quiet(), isolated(torch.Generator()), _memory(precision):
        cls = getattr(diffusers, index["_class_name"], None)
        if cls is None:
            raise DataError(
                f"{folder / 'model_index.json'}: diffusers {diffusers.__version__} has no {index['_class_name']}"
            )
        for name, (library, kind) in kinds.items():
            part = getattr({"diffusers": diffusers, "transformers": transformers}[library], kind, None)
            if part is None:
                raise DataError(f"{folder / 'model_index.json'}: {library} has no {kind} ({name})")
            if is_model(kind):
                config = quantised.get(library) if name in QUANTISED else None
                parts[name] = _component(part, folder / name, library, dtype, variant, config)
            else:
                parts[name] = _setting(part, folder / name)
        taken = inspect.signature(cls.__init__).parameters
        settings = {key: value for key, value in index.items() if key in taken and not isinstance(value, list)}
        settings |= {key: None for key in LEFT_OUT if key in taken}
        if "requires_safety_checker" in taken:
            settings["requires_safety_checker"] = False
        pipe = cls(**settings, **parts)
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    if hasattr(getattr(pipe, "vae", None), "enable_slicing"):
        pipe.vae.enable_slicing()  # images are decoded one at a time: at 512 pixels this is where memory peaks
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
    _check_fit(folder, pipe)
    return pipe


def compute_type(precision: Precision, device: torch.device) -> torch.dtype:
    """The type of the numbers that pass through the network; weights in four bits are widened to it layer by layer."""
    if precision in ("uint4", "nf4"):
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if device.type != "cuda" or torch.cuda.is_bf16_supported() else torch.float16
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def quantisation(precision: Precision, device: torch.device) -> dict[str, Any]:
    """What each library is told to quantise, {} for plain weights. Raises ConfigError, MissingExtra."""
    if precision == "uint4":
        need("sdnq", what="generator.precision = 'uint4'")
        # it would try a compiler at import and compile each layer's unpacking; without it the same numbers come out on
        # every machine, also on one that has no compiler
        os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")
        logging.getLogger("sdnq").setLevel(logging.ERROR)  # it warns of every kernel it does not find
        from sdnq import SDNQConfig

        # without quant_conv two thirds of a Stable Diffusion U-Net would stay as they are; scales and zero points of
        # the groups of 32 or 64 weights in float16 instead of float32 halve what they take, at the same error
        config = partial(
            SDNQConfig, weights_dtype="uint4", quant_conv=True, scale_dtype="float16", zero_point_dtype="float16"
        )
        return {library: config() for library in ("diffusers", "transformers")}
    if precision == "nf4":
        if device.type != "cuda":
            raise ConfigError("generator.precision", "nf4", f"needs a CUDA device, this one is {device.type}", "uint4")
        need("bitsandbytes", what="generator.precision = 'nf4'", extra="nf4")
        import diffusers
        import transformers

        settings = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": compute_type(precision, device),
        }
        kinds: dict[str, Any] = {"diffusers": diffusers, "transformers": transformers}
        return {name: library.BitsAndBytesConfig(**settings) for name, library in kinds.items()}
    return {}


def new_scheduler(pipe: Any, name: Scheduler, steps: int) -> Any:
    """The scheduler of that name with the settings the pipeline's own was trained with.

    Raises ConfigError when it cannot do so many steps, or cannot follow a flow, which the pipeline is.
    """
    import diffusers

    matching = type(pipe.scheduler).__name__.startswith("FlowMatch")  # its settings do not say so
    if name != "own" and (matching or pipe.scheduler.config.get("prediction_type") == "flow_prediction"):
        able = ("own",) if matching else ("own", *FLOWS)
        if name not in able:
            allowed = f"cannot follow a flow, which this pipeline is: must be {' or '.join(map(repr, able))}"
            raise ConfigError("generator.scheduler", name, allowed)
    with quiet():
        made = (
            pipe.scheduler if name == "own" else getattr(diffusers, SCHEDULERS[name]).from_config(pipe.scheduler.config)
        )
        try:
            made.set_timesteps(steps)
        except (ValueError, IndexError) as error:
            raise ConfigError("generator.steps", steps, f"is nothing {type(made).__name__} can do: {error}") from error
    return made


def held_bytes(module: nn.Module) -> int:
    """Bytes of all tensors a module holds, quantised ones as they are packed, shared ones once."""
    places: dict[int, int] = {}
    for tensor in _tensors([*module.parameters(), *module.buffers()]):
        storage = tensor.untyped_storage()
        places[storage.data_ptr()] = storage.nbytes()
    return sum(places.values())


def _tensors(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    """Plain tensors inside wrapped ones (bitsandbytes' scales, tensor subclasses)."""
    for tensor in tensors:
        if hasattr(tensor, "__tensor_flatten__"):
            yield from _tensors(getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
            continue
        yield tensor.data
        state = getattr(tensor, "quant_state", None)
        while state is not None:
            yield from _tensors(each for each in (state.absmax, state.code) if each is not None)
            state = getattr(state, "state2", None)


def _component(cls: Any, folder: Path, library: str, dtype: torch.dtype, variant: str, quantised: Any) -> nn.Module:
    from safetensors import SafetensorError

    keyword = "torch_dtype" if library == "diffusers" else "dtype"
    options: dict[str, Any] = {keyword: dtype, "use_safetensors": True, "local_files_only": True}
    if variant:
        options["variant"] = variant
    if quantised is not None:
        options["quantization_config"] = quantised
    try:
        model, report = cls.from_pretrained(folder, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        if is_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{folder}: these weights are no {cls.__name__} of its config.json: {reason}") from error
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise DataError(
            f"{folder}: the weights are not those of the {cls.__name__} in config.json: {len(lacking)} are missing, "
            f"first {lacking[0]}"
        )
    assert isinstance(model, nn.Module)
    return model


def _setting(cls: Any, folder: Path) -> Any:
    """A tokenizer, scheduler or image processor."""
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{folder}: no {cls.__name__} can be read: {reason}") from error


def _check_fit(folder: Path, pipe: Any) -> None:
    """Components that each load and yet do not belong together fail deep inside the first step otherwise."""
    unet, text = getattr(pipe, "unet", None), getattr(pipe, "text_encoder", None)
    if unet is None or text is None or hasattr(pipe, "text_encoder_2"):
        return
    wanted, there = unet.config.cross_attention_dim, text.config.hidden_size
    if wanted != there:
        raise DataError(
            f"{folder}: the text encoder's embeddings have {there} numbers, the U-Net takes {wanted}: these components "
            f"are of different models"
        )
    if not hasattr(pipe.scheduler, "init_noise_sigma"):
        raise DataError(
            f"{folder}: {type(pipe.scheduler).__name__} does not work with {type(pipe).__name__}; for a flow use "
            f"DPMSolverMultistepScheduler with prediction_type flow_prediction and use_flow_sigmas true"
        )


def is_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


class _memory:
    """Out of memory while loading, as one line."""

    def __init__(self, precision: Precision) -> None:
        self.precision = precision

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None and is_memory(error):
            smaller = "" if self.precision in ("uint4", "nf4") else "; generator.precision = 'uint4' needs a quarter"
            raise PoolError(f"the pipeline does not fit into memory in {self.precision}{smaller}") from error
