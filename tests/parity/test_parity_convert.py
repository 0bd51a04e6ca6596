"""Converted weights against timm, torchvision and the article's blocks, live."""

import importlib.util
import pickle
from collections import OrderedDict
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import flax_attn
from flax_attn import convert, presets
from flax_attn.resnet import BasicBlock, BottleneckBlock, ResNet, cifar_resnet
from tests import cases
from tests.convert.states import D_VARIANT, assert_same

pytestmark = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "timm"))),
    reason="the live comparison needs the group `parity`",
)

NORM = partial(nn.BatchNorm, use_running_average=True)
timm_cbam = presets.timm_cbam(train=False)


def randomize(model, seed=0):
    """Random weights, scales and statistics, so that each affects the output."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if key.endswith("running_var") or (
                key.endswith("weight") and tensor.ndim == 1
            ):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor.ndim == 1:
                tensor.normal_(0, 0.2, generator=generator)
            elif tensor.ndim:
                fan = tensor[0].numel()
                tensor.normal_(0, fan**-0.5, generator=generator)
    return model.eval()


def logits_of(model, images):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.moveaxis(images, -1, 1).copy())).numpy()


def arrays_of(model):
    """The state dict in NumPy, without what Flax does not keep."""
    return {
        key: tensor.numpy()
        for key, tensor in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }


# Names that are read, and the names written for them.
ALIASES = {
    "shortcut.": "downsample.",
    "linear.": "fc.",
    "fc.0.": "fc1.",
    "fc.2.": "fc2.",
}


def check(theirs, ours, images, naming, *, atol=1e-4, rewritten=None):
    """Same outputs, and a round trip that keeps every key and bit that has effect."""
    import torch

    like = jax.eval_shape(ours.init, jax.random.key(0), images)
    variables = convert.to_flax(theirs.state_dict(), naming=naming, like=like)
    expected = logits_of(theirs, images)
    # Only the forward pass: without optimization it compiles faster.
    actual = jax.jit(ours.apply)(variables, images)
    if actual.ndim == 4:
        actual = np.moveaxis(actual, -1, 1)
    scale = max(np.abs(expected).max(), 1)
    np.testing.assert_allclose(actual / scale, expected / scale, rtol=0, atol=atol)

    state = arrays_of(theirs)
    if rewritten is not None:
        for alias, usual in ALIASES.items():
            state = {key.replace(alias, usual): state[key] for key in state}
    ignored = [key for key in state if key.endswith("conv_attn.bias")]
    state |= {key: np.zeros_like(state[key]) for key in ignored}
    # timm's two global contexts have the same variables.
    back = convert.to_torch(variables, naming=naming, like=state if ignored else None)
    assert_same(back, state)
    tensors = {key: torch.from_numpy(array) for key, array in back.items()}
    (rewritten or theirs).load_state_dict(tensors, strict=True)
    if rewritten is not None:
        np.testing.assert_array_equal(logits_of(rewritten.eval(), images), expected)


def test_live_pooled_shortcuts_of_odd_maps(timm):
    from timm.models import resnet

    options = {"stem_width": 8, "stem_type": "deep", "avg_down": True}
    options |= {"channels": (16, 32, 64, 128), "num_classes": 10}
    stages = (1, 1, 1, 1)
    theirs = randomize(resnet.ResNet(resnet.BasicBlock, stages, **options))
    ours = ResNet(stages, block=BasicBlock, num_classes=10, width=16, **D_VARIANT)
    # The pooled shortcuts halve odd sizes: 9x9, 5x5 and 3x3.
    check(theirs, ours, cases.normal((2, 33, 33, 3), 0), "timm")


@pytest.mark.parametrize(
    "name, attention",
    [("gca", presets.timm_gca), ("coord", presets.timm_coordinate(train=False))],
)
def test_live_attention_in_a_network(timm, name, attention):
    from timm.models import resnet

    options = {"stem_width": 4, "stem_type": "deep", "avg_down": True}
    options |= {"channels": (8, 16, 32, 64), "num_classes": 10}
    options |= {"block_args": {"attn_layer": name}}
    stages = (1, 1, 1, 1)
    theirs = randomize(resnet.ResNet(resnet.BasicBlock, stages, **options))
    fields = {"num_classes": 10, "width": 8, "attention": attention, **D_VARIANT}
    ours = ResNet(stages, block=BasicBlock, **fields)
    check(theirs, ours, cases.normal((1, 32, 32, 3), 0), "timm")


def test_live_networks_of_torchvision(timm):
    from torchvision import ops
    from torchvision.models import resnet

    theirs = randomize(resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], num_classes=10))
    ours = ResNet((1, 1, 1, 1), block=BottleneckBlock, num_classes=10)
    check(theirs, ours, cases.normal((2, 64, 64, 3), 0), "torchvision")
    squeeze = randomize(ops.SqueezeExcitation(32, 4))
    block = flax_attn.SE(reduction=8, use_bias=True)
    check(squeeze, block, cases.normal((2, 5, 4, 32), 1), "torchvision", atol=1e-6)


def test_live_blocks_of_timm(timm):
    import torch
    from timm.layers import EcaModule, EffectiveSEModule, SEModule
    from timm.layers.cbam import CbamModule, ChannelAttn, LightCbamModule, SpatialAttn
    from timm.layers.coord_attn import CoordAttn
    from timm.layers.global_context import GlobalContext

    from tests.parity import timm_layers

    se = {"rd_ratio": 0.3, "rd_divisor": 4, "norm_layer": torch.nn.BatchNorm2d}
    add = {"fuse_add": True, "fuse_scale": False}
    # Its constructor would name them so, but fails.
    gathering = timm_layers.gather_excite(64, extent=4, extra_params=True, hidden=4)
    names = ("conv1", "norm1", "act1", "conv2", "norm2")
    layers = zip(names, gathering.gather, strict=True)
    gathering.gather = torch.nn.Sequential(OrderedDict(layers))
    gather = partial(flax_attn.GatherExcite, extent=4, use_mlp=True, use_bias=True)

    pairs = [
        (SEModule(64), presets.timm_se()),
        (
            SEModule(64, add_maxpool=True, **se),
            presets.timm_se(reduction=0.3, divisor=4, pool="avg+max", hidden_norm=NORM),
        ),
        (EffectiveSEModule(64), presets.timm_ese()),
        (EffectiveSEModule(64, add_maxpool=True), presets.timm_ese(pool="avg+max")),
        (LightCbamModule(64), presets.timm_lcbam(train=False)()),
        (EcaModule(64), flax_attn.ECA()),
        (ChannelAttn(64), flax_attn.ChannelAttention(hidden_features=4)),
        (SpatialAttn(5), flax_attn.SpatialAttention(kernel_size=5, norm=NORM)),
        (CbamModule(64, mlp_bias=True), timm_cbam(use_bias=True)),
        (GlobalContext(64), presets.timm_gc()),
        (GlobalContext(64, **add), presets.timm_gca()),
        (CoordAttn(64), presets.timm_coordinate(train=False)()),
        (gathering, gather(extra_params=True, hidden_norm=NORM)),
    ]
    for i, (theirs, ours) in enumerate(pairs):
        x = cases.normal((2, 6, 5, 64), i)
        check(randomize(theirs, i), ours, x, "timm", atol=1e-6)


def test_live_blocks_by_other_names():
    from tests.parity import torch_official, torch_schemes

    se = flax_attn.SE(hidden_features=4, use_bias=True)
    pairs = [
        ("timm", torch_official.SENet(64), se),
        ("efficientnet", torch_schemes.EfficientNetSE(64, 4), se.copy(act=nn.silu)),
        ("monai", torch_schemes.MonaiSE(64, 4), se),
        (
            "smp",
            torch_schemes.SmpSCSE(64, 4),
            flax_attn.scSE(hidden_features=4, use_bias=True),
        ),
        ("official", torch_official.CBAM(64), presets.official_cbam(train=False)()),
        ("official_bam", torch_official.BAM(64), presets.official_bam(train=False)()),
        ("official", torch_official.ECANet(5), flax_attn.ECA(kernel_size=5)),
        ("ca_sa", torch_schemes.CaSa(64, 4), flax_attn.CBAM()),
    ]
    for i, (naming, theirs, ours) in enumerate(pairs):
        x = cases.normal((2, 6, 5, 64), i)
        check(randomize(theirs, i), ours, x, naming, atol=1e-6)
    theirs = randomize(torch_schemes.CaSa(64, 4, sequential=True))
    rewritten = torch_schemes.CaSa(64, 4)
    x = cases.normal((2, 6, 5, 64), 0)
    check(theirs, flax_attn.CBAM(), x, "ca_sa", atol=1e-6, rewritten=rewritten)


@pytest.mark.parametrize("block", cases.ARTICLE)
def test_live_blocks_of_the_article(block):
    from tests.parity import torch_article

    theirs = randomize(torch_article.build(block, 36, ratio=9, k=5))
    ours = cases.Case(block, (), ratio=9, k=5).module()
    check(theirs, ours, cases.normal((2, 6, 5, 36), 0), "article", atol=1e-6)


@pytest.mark.parametrize("names", [{}, {"shortcut": "shortcut", "head": "linear"}])
def test_live_networks_for_cifar(names):
    from tests.parity import torch_article, torch_schemes

    make = partial(torch_article.build, "cbam", ratio=8, k=3)
    attention = partial(flax_attn.CBAM, reduction=8, spatial_kernel_size=3)
    theirs = randomize(torch_schemes.ResNet8(make, **names))
    ours = cifar_resnet(8, num_classes=10, attention=attention)
    # The names that are written are the usual ones.
    usual = torch_schemes.ResNet8(make)
    check(theirs, ours, cases.normal((2, 16, 16, 3), 0), "article", rewritten=usual)


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_live_code_in_a_file_is_not_run(tmp_path, monkeypatch, capsys):
    import torch

    monkeypatch.chdir(tmp_path)
    for protocol in (2, pickle.HIGHEST_PROTOCOL):
        Path("evil.pth").write_bytes(pickle.dumps({"a": Evil()}, protocol))
        with pytest.raises(ValueError, match="not loaded since it might be code"):
            convert.load("evil.pth")
    torch.save({"a": Evil(), "fc1.weight": torch.ones(1, 4, 1, 1)}, "evil.pt")
    assert convert.main(["evil.pt", "out.safetensors", "--to", "flax"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: evil.pt is damaged, or contains more than arrays")
    assert error.count("\n") == 1 and "weights_only" not in error
    Path("evil.pth").rename("evil.safetensors")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        convert.load("evil.safetensors")
    assert not Path("executed").exists() and not Path("out.safetensors").exists()
    # Unpickling the file would have run its code.
    pickle.loads(pickle.dumps(Evil()))
    assert Path("executed").exists()


def test_live_files_of_torch(tmp_path):
    import torch

    state = {
        "fc1.weight": torch.randn(4, 64, 1, 1).to(torch.bfloat16),
        "fc2.weight": torch.randn(64, 4, 1, 1).to(torch.float16).requires_grad_(),
    }
    path = tmp_path / "se.pth"
    torch.save(state, path)
    loaded = convert.load(path)
    assert loaded["fc1.weight"].dtype == jnp.bfloat16
    for key, tensor in state.items():
        np.testing.assert_array_equal(
            loaded[key].view(np.int16), tensor.detach().view(torch.int16).numpy()
        )
    assert_same(convert.to_torch(convert.to_flax(state)), loaded)

    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="se.pth is damaged"):
        convert.load(path)


def test_live_old_releases_of_torch_run_code(tmp_path, monkeypatch):
    import torch

    torch.save({}, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(ImportError, match="PyTorch 2.6 or newer"):
        convert.load(tmp_path / "a.pth")
