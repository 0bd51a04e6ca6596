"""Pretrained networks from the Hugging Face Hub or from files written by timm."""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from flax_attn import convert
from flax_attn.resnet._network import ResNet
from flax_attn.resnet._timm import fields_of, group, is_count

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How to preprocess the input images of a network, in timm's terms.

    Attributes:
      mean: mean of each input channel, for values from 0 to 1.
      std: standard deviation of each input channel, for values from 0 to 1.
      input_size: height and width in training, in pixels.
      interpolation: interpolation for resizing, such as ``"bicubic"``.
      crop_pct: size of the crop divided by the size to which the image is resized.
      crop_mode: ``"center"``, ``"squash"`` or ``"border"``.
      test_input_size: recommended height and width for evaluation, often larger.
      test_crop_pct: ``crop_pct`` at that size.
    """

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    input_size: tuple[int, int] = (224, 224)
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    test_input_size: tuple[int, int] = (224, 224)
    test_crop_pct: float = 0.875

    def normalize(self, images: jax.Array) -> jax.Array:
        """Returns ``(images - mean) / std`` for images ``(..., C)`` from 0 to 1.

        Raises:
          ValueError: the images are integers.
        """
        images = jnp.asarray(images)
        if not jnp.issubdtype(images.dtype, jnp.floating):
            raise ValueError(
                f"`images` must be floats from 0 to 1, got {images.dtype}; pass images "
                "/ 255."
            )
        mean, std = (jnp.asarray(x, images.dtype) for x in (self.mean, self.std))
        shape = (1,) * (images.ndim - 1) + (-1,)
        return (images - mean.reshape(shape)) / std.reshape(shape)


class Pretrained(NamedTuple):
    """The result of ``from_pretrained``.

    Attributes:
      model: the network.
      variables: its parameters and batch statistics, float32.
      preprocessing: how to preprocess its input images.
    """

    model: ResNet
    variables: dict[str, Any]
    preprocessing: Preprocessing


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    dtype: Dtype = jnp.float32,
) -> Pretrained:
    """Loads a timm ResNet with its weights.

    ::

      model, variables, preprocessing = from_pretrained("timm/seresnet50.a1_in1k")
      logits = model.apply(variables, preprocessing.normalize(images))
      maps = model.apply(variables, images, method="features")

    The networks are those of ``timm/models/resnet.py`` with SE, ESE, ECA, CECA, CBAM or
    no attention; the guide on weights lists them. Dropout and stochastic depth, which
    timm may use in training, are omitted. CBAM uses its running averages; to train it,
    use ``model.clone(attention=presets.timm_cbam(train=True))``.

    Args:
      source: a repository of the Hugging Face Hub, ``"owner/name"``; or a folder that
        timm wrote with ``save_for_hf(..., safe_serialization=True)``, which holds
        ``config.json`` and ``model.safetensors``; or another weight file beside a
        ``config.json``. Local paths take precedence over the Hub.
      revision: a branch, tag or commit of the repository (default: None, the main
        branch).
      cache_dir: where to store downloads (default: None, the cache of huggingface_hub).
      dtype: the field ``dtype`` of the network (default: float32).

    Returns:
      The network, its variables and its preprocessing.

    Raises:
      ValueError: the repository, revision, folder or file does not exist; the network
        is not supported; or a file is damaged, was changed, or does not match the
        configuration.
      ConnectionError: the Hub cannot be reached and the files are not in the cache.
      ImportError: huggingface_hub or safetensors is not installed (extra ``hub``).
    """
    config_path, weights_path = _files(source, revision, cache_dir)
    config = _read_config(config_path)
    fields, channels = fields_of(config)
    model = ResNet(**fields, dtype=dtype)
    images = jax.ShapeDtypeStruct((1, 64, 64, channels), jnp.float32)
    like = jax.eval_shape(model.init, jax.random.key(0), images)
    state = convert.load(weights_path)
    try:
        variables = convert.to_flax(state, naming="timm", like=like)
    except convert.ConversionError as error:
        # The whole list may have hundreds of lines; it is in the cause.
        headline, *lines = str(error).splitlines()
        reason = " ".join(line.strip() for line in lines[:2]) or headline
        raise ValueError(
            f"{weights_path} does not fit the {config['architecture']!r} of "
            f"{config_path} ({reason}); one of the two files was changed."
        ) from error
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(variables)}
    if other := [d for d in dtypes if not jnp.issubdtype(d, jnp.floating)]:
        raise ValueError(
            f"{weights_path} must hold floating-point weights, got {other[0]}; "
            "dequantize them first."
        )
    variables = jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), variables, like)
    return Pretrained(model, variables, _preprocessing(config))


def _files(
    source: str | os.PathLike[str],
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
) -> tuple[Path, Path]:
    """The configuration and the weights."""
    path = Path(source)
    if path.is_dir():
        config, weights = path / CONFIG, path / WEIGHTS
    elif path.is_file():
        config, weights = path.with_name(CONFIG), path
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", os.fspath(source)):
        config, weights = (
            _download(os.fspath(source), name, revision, cache_dir)
            for name in (CONFIG, WEIGHTS)
        )
    else:
        raise ValueError(
            "`source` must be a repository of the Hugging Face Hub, a folder or a "
            f"weight file, got {os.fspath(source)!r}; pass e.g. "
            "'timm/seresnet50.a1_in1k'."
        )
    for file in (config, weights):
        if not file.is_file():
            raise ValueError(
                f"`source` must have a {file.name} as timm's `save_for_hf(model, "
                f"folder, safe_serialization=True)` writes it, but there is no {file}."
            )
    return config, weights


def _download(
    repository: str,
    name: str,
    revision: str | None,
    cache_dir: str | os.PathLike[str] | None,
) -> Path:
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise ImportError(
            f"{repository!r} is not a local folder, and the Hugging Face Hub needs "
            f"huggingface_hub: pip install 'flax-attn[hub]' ({error})."
        ) from error
    page = f"https://huggingface.co/{repository}"
    try:
        path = huggingface_hub.hf_hub_download(
            repository,
            name,
            revision=revision,
            cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        )
    except errors.GatedRepoError as error:
        raise ValueError(
            f"`source`: {page} asks you to agree to its terms; do it there, and log in "
            "with `hf auth login`."
        ) from error
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise ValueError(
            "`source` must be a folder or file here, or a repository of the Hugging "
            f"Face Hub, got {repository!r}, which is neither, or is private; pass e.g. "
            "'timm/seresnet50.a1_in1k'."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"`revision` must be a branch, tag or commit of {page}, got {revision!r}; "
            "leave it out for the newest."
        ) from error
    # It is an `EntryNotFoundError` too, so it comes first.
    except errors.LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"The Hugging Face Hub cannot be reached, and {name} of {repository!r} was "
            "not downloaded before; connect, or pass a folder with the files."
        ) from error
    except errors.EntryNotFoundError as error:
        raise ValueError(
            f"`source` must have a {name} as timm writes it, got {page}, which has "
            "none; pass another repository."
        ) from error
    except errors.HfHubHTTPError as error:
        reason = str(error).partition("\n")[0]
        raise ConnectionError(
            f"The Hugging Face Hub does not give {name} of {repository!r} ({reason}); "
            "try again later."
        ) from error
    _check_hash(Path(path))
    return Path(path)


def _check_hash(path: Path) -> None:
    """Raises ``ValueError`` unless a large file of the Hub's cache has its hash.

    The cache has links to files that are named by the SHA-256 of their contents.
    """
    blob = path.resolve()
    if not re.fullmatch("[0-9a-f]{64}", blob.name):
        return
    with blob.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != blob.name:
        raise ValueError(
            f"{path} was changed after the download (its SHA-256 is {digest}); delete "
            f"{blob} to download it again."
        )


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON, or is truncated ({error}).") from error
    if not (isinstance(config, dict) and isinstance(config.get("architecture"), str)):
        raise ValueError(
            f"{path} must be a timm configuration with an `architecture`; it has none."
        )
    return config


def _preprocessing(config: Mapping[str, Any]) -> Preprocessing:
    given = dict(group(config, "pretrained_cfg") or config)
    for suffix in ("input_size", "crop_pct"):
        if given.get(suffix) and not given.get(f"test_{suffix}"):
            given[f"test_{suffix}"] = given[suffix]
    names = [field.name for field in dataclasses.fields(Preprocessing)]
    values = {name: given[name] for name in names if given.get(name) is not None}
    for name, value in values.items():
        rule = _rule(name)
        if not rule.accepts(value):
            raise ValueError(
                f"`{name}` of timm must be {rule.text}, got {value!r}; correct it in "
                f"{CONFIG}."
            )
        if isinstance(value, list | tuple):
            # The channels come first.
            values[name] = tuple(value[1:] if name.endswith("input_size") else value)
    return Preprocessing(**values)


class _Rule(NamedTuple):
    text: str
    accepts: Callable[[Any], bool]


def _rule(name: str) -> _Rule:
    """What the field ``name`` of ``Preprocessing`` may be in timm's configuration."""
    if name.endswith("input_size"):
        return _Rule(
            "a list of channels, height and width",
            lambda value: _is_list(value, is_count) and len(value) == 3,
        )
    if name.endswith("crop_pct"):
        return _Rule("a positive number", _is_positive)
    if name == "mean":
        return _Rule("a list of numbers", lambda value: _is_list(value, _is_finite))
    if name == "std":
        rule = "a list of positive numbers"
        return _Rule(rule, lambda value: _is_list(value, _is_positive))
    return _Rule("a string", lambda value: isinstance(value, str))


def _is_finite(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_finite(value) and value > 0


def _is_list(value: Any, accepts: Callable[[Any], bool]) -> bool:
    return (
        isinstance(value, list | tuple) and len(value) > 0 and all(map(accepts, value))
    )
