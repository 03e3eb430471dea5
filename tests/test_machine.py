"""What the processor is told: the kernels that replace slow ones give the same numbers, and memory stays."""

import platform
import subprocess
import sys

import pytest
import timm
import torch
from torch.nn import functional

from octofold.train import machine

NETS = {  # and how far from float32 the gradients may be, as a multiple of plain bf16 autocast's distance
    "depthwise": ("tf_efficientnet_lite0", {}, 1.05),
    "depthwise, then a norm": ("convnext_atto", {}, 1.05),
    "attention": ("vit_tiny_patch16_224", {"img_size": 64}, 1.5),  # the weights of attention are rounded too
}


def gradients(net: torch.nn.Module, images: torch.Tensor, precision: str) -> torch.Tensor:
    net.zero_grad()
    with machine.computing("cpu", precision):
        outputs = net(images)
    outputs.float().square().mean().backward()
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


@pytest.mark.parametrize("which", NETS)
def test_the_gradients_are_those_of_the_network(which: str) -> None:
    name, options, factor = NETS[which]
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=5, **options).eval()  # no dropout; BatchNorm as it is
    images = torch.randn(4, 3, 64, 64)
    exact, ours = gradients(net, images, "fp32"), gradients(net, images, "bf16")
    net.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = net(images)
    outputs.float().square().mean().backward()
    plain = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
    assert not torch.equal(ours, plain)  # it does go another way
    assert (ours - exact).norm() <= factor * (plain - exact).norm()
    assert functional.cosine_similarity(ours, exact, dim=0) > 0.98


def test_float32_and_prediction_are_left_alone() -> None:
    torch.manual_seed(0)
    net, images = timm.create_model("convnext_atto", num_classes=5).eval(), torch.randn(2, 3, 64, 64)
    with machine.computing("cpu", "fp32"):
        assert torch.equal(net(images), net.forward(images))
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        plain = net(images)
    with torch.inference_mode(), machine.computing("cpu", "bf16"):
        assert torch.equal(net(images), plain)


@pytest.mark.parametrize(
    ("mask", "options"),
    [(mask, options) for mask in ("none", "added", "boolean") for options in ({}, {"scale": 0.3})]
    + [("none", {"is_causal": True})],
)
def test_attention_means_what_torchs_means(mask: str, options: dict[str, float]) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 7, 16) for _ in range(3))
    masks = {"none": None, "added": torch.randn(2, 1, 7, 7), "boolean": torch.rand(2, 1, 7, 7) > 0.3}
    wanted = functional.scaled_dot_product_attention(query, key, value, masks[mask], **options)
    with machine.computing("cpu", "bf16"):
        found = functional.scaled_dot_product_attention(query, key, value, attn_mask=masks[mask], **options)
    assert torch.allclose(found.float(), wanted, atol=0.03)


def test_dropout_of_attention_is_kept() -> None:
    torch.manual_seed(0)
    query = torch.randn(1, 1, 50, 8)
    with machine.computing("cpu", "bf16"):
        found = functional.scaled_dot_product_attention(query, query, torch.ones_like(query), dropout_p=0.5)
    assert found.float().std() > 0.1  # without dropout every weight row sums to 1, and so would these
    assert found.float().mean() == pytest.approx(1.0, abs=0.15)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.slow
def test_freed_memory_is_used_again() -> None:
    """A tensor of 64 MB is 16,384 pages; asked for anew each time they are faulted in, kept they are not."""
    code = (
        "import resource, sys, torch\n"
        "from octofold.train import machine\n"
        "if sys.argv[1] == 'keep': machine.keep_memory()\n"
        "faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(10): torch.ones(1 << 24)\n"  # until malloc has room for its alignment
        "begun = faults()\n"
        "for _ in range(5): torch.ones(1 << 24)\n"
        "print(faults() - begun)\n"
    )
    found = {
        how: int(subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "leave")
    }
    assert found["keep"] < 0.1 * found["leave"], found
