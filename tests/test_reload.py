"""The package twice in one process: reloaded, deleted and imported again."""

from __future__ import annotations

import subprocess
import sys

import harness
import pytest

pytestmark = pytest.mark.skipif(
    bool(harness.SIMT_LIBRARY), reason="the emulator has no PyTorch binding"
)

USE = """
import importlib, sys, warnings
import torch
warnings.simplefilter("error")  # PyTorch warns of a kernel that takes the place of another
warnings.filterwarnings("ignore", category=DeprecationWarning)
warnings.filterwarnings("ignore", category=FutureWarning)

u, v, y = torch.randn(4, 5).requires_grad_(), torch.randn(4, 5), torch.arange(4)
maps = torch.randn(2, 3, 4, 4).requires_grad_()

def results():
    import selfkd
    torch.manual_seed(1)
    found = [
        selfkd.sd_dropout_kl(u, v),
        selfkd.distill(u, y, v),
        selfkd.simreg(u, v),
        selfkd.adversarial(u, v),
        selfkd.attention(maps, maps.detach() + 1),
        selfkd.bifpn_fuse(maps, maps),
        selfkd.dropout_views(u, torch.tensor(3)),
        selfkd.sd_dropout_head(u, v[:, :5], None, y % 4),
        selfkd.nn.SDDropout(torch.nn.Linear(5, 5)).double()(u.double(), y)[1],
        torch.compile(lambda x: selfkd.simreg(x, v), fullgraph=True, backend="aot_eager")(u),
    ]
    loss = sum(x.float().square().sum() for x in found)
    return [loss.detach(), *torch.autograd.grad(loss, (u, maps))]

def modules():
    return [x for x in sys.modules if x.partition(".")[0] == "selfkd"]

def reload():
    importlib.reload(sys.modules["selfkd"])

def delete():
    for name in modules():
        del sys.modules[name]

def delete_the_package_alone():
    del sys.modules["selfkd"]
    import selfkd
    assert set(selfkd.__all__) <= vars(selfkd).keys()

def reload_each_module():
    for name in modules():
        importlib.reload(sys.modules[name])

expected = results()
for way in (reload, delete, delete_the_package_alone, reload_each_module):
    for _ in range(2):
        way()
        torch._dynamo.reset()
        for x, y_ in zip(results(), expected, strict=True):
            assert torch.equal(x, y_), way
"""


def test_twice_in_one_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", USE],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
