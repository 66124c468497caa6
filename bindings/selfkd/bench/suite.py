"""The cases that are run when no shape is given.

Shapes are those of CIFAR-100 (128 x 100), ImageNet (1000), VOC segmentation (21 classes of pixels) and
the vocabularies of GPT-2 (50257) and of today's language models (128256, 151936).
"""

from __future__ import annotations

from dataclasses import replace

from .case import Case
from .cases import FORMS, make

# glibc gives blocks over 32 MB back on every free, so that each step pays for fresh pages. This
# setting keeps freed memory in the process, for every contender.
KEEP_MEMORY = {
    "GLIBC_TUNABLES": "glibc.malloc.mmap_max=0:"
    "glibc.malloc.trim_threshold=17179869184:"
    "glibc.malloc.top_pad=268435456"
}


def on_cpu() -> list[Case]:
    """Float32, for a machine with 16 GB."""
    vocabulary = make("sd_dropout_kl", 512, 32000, eager=15, compile=4.5, copy=2)
    return [
        make("sd_dropout_kl", 128, 100, eager=5, compile=2.5, part=1.3),
        make("sd_dropout_kl", 256, 1000, eager=10, compile=4),
        make("sd_dropout_kl", 1024, 1000, eager=12, compile=4),
        replace(vocabulary, environment=KEEP_MEMORY),
        replace(vocabulary, name=f"{vocabulary.name} (plain malloc)", need={}),
        replace(make("sd_dropout_kl", 256, 50257), environment=KEEP_MEMORY),
        replace(make("sd_dropout_kl", 128, 128256), environment=KEEP_MEMORY),
        make("sd_dropout_kl", 4, 21, 256, 256, eager=8, compile=5, copy=3),
        make("js_divergence", 256, 1000, eager=8, compile=4),
        replace(
            make("js_divergence", 512, 32000, eager=8, compile=4, copy=2.2),
            environment=KEEP_MEMORY,
        ),
        replace(
            make("js_divergence", 64, 151936, eager=8, compile=4, copy=2.2),
            environment=KEEP_MEMORY,
        ),
        replace(
            make("topk_divergence", 512, 32000, eager=5, compile=3, copy=2.2),
            environment=KEEP_MEMORY,
        ),
        make("adversarial", 128, 1),  # one score each
        make("adversarial", 16, 1, 256, 256),  # of patches
        make("distill", 128, 100),
        make("distill", 256, 1000, eager=5.5, compile=3),
        make("distill", 256, 1000, temperatures=(4.0, 4.0), part=1.5),
        make("distill", 256, 1000, temperatures=(4.0, 2.0), part=1.8),
        replace(make("distill", 256, 50257, temperatures=(1.0,)), environment=KEEP_MEMORY),
        replace(make("distill", 128, 128256, temperatures=(1.0,)), environment=KEEP_MEMORY),
        make(
            *("distill", 4, 21, 256, 256),
            temperatures=(1.0,),
            ignore_index=255,
            eager=6,
            compile=4,
            copy=2.2,
        ),
        make("simreg", 256, 2048, eager=4.5, compile=2.3),
        make(*("attention", 128, 64, 32, 32), teacher_channels=128, eager=5, compile=1.5, copy=1.7),
        make("attention", 128, 512, 4, 4, teacher_channels=1024),
        make("bifpn_fuse", 32, 128, 32, 32, resize="nearest", eager=4, compile=4),
        make("bifpn_fuse", 32, 128, 32, 32, resize="maxpool", eager=8, compile=9),
        make("BiFPN", 32, eager=1.35),
        make("dropout_views", 256, 2048),
        make("sd_dropout_head", 128, 512, 100, eager=4),
        make("sd_dropout_head", 256, 2048, 1000, eager=1.6),
        make("sd_dropout_head", 1024, 512, 32000, eager=2.5, memory=0.2),
    ]


def on_cuda() -> list[Case]:
    """Bfloat16 where nothing else is said, for a GPU with 80 GB."""
    roofline = 1 / 0.85  # at most, of the time of copying the bytes

    def half(operator: str, *shape: int, **options: float) -> Case:
        return make(operator, *shape, dtype="bfloat16", **({"compile": 1.5} | options))

    return [
        make("sd_dropout_kl", 128, 100, eager=3, compile=1.5),
        make("sd_dropout_kl", 1024, 1000, compile=1.5),
        half("sd_dropout_kl", 4096, 32000, copy=roofline),
        half("sd_dropout_kl", 8192, 50257),
        half("sd_dropout_kl", 8192, 128256, copy=roofline),
        half("sd_dropout_kl", 16, 21, 512, 512),
        half("js_divergence", 4096, 32000, copy=roofline),
        half("js_divergence", 8192, 151936, copy=roofline),
        half("topk_divergence", 4096, 32000, copy=roofline),
        make("adversarial", 64, 1, 256, 256, compile=1.5),
        make("distill", 128, 100, eager=3, compile=1.5),
        make("distill", 1024, 1000, compile=1.5),
        half("distill", 4096, 32000, copy=roofline),
        half("distill", 8192, 50257),
        half("distill", 8192, 128256, copy=roofline),
        make("distill", 16, 21, 512, 512, ignore_index=255, dtype="bfloat16", compile=1.5),
        half("simreg", 4096, 2048),
        half("attention", 128, 256, 56, 56),
        make("bifpn_fuse", 128, 128, 32, 32, resize="nearest", dtype="bfloat16", compile=1.5),
        make("bifpn_fuse", 128, 128, 32, 32, resize="maxpool", dtype="bfloat16", compile=1.5),
        make("BiFPN", 128),
        half("dropout_views", 8192, 4096),
        make("sd_dropout_head", 128, 512, 100),
        make("sd_dropout_head", 4096, 2048, 21843, dtype="bfloat16"),
        make("sd_dropout_head", 8192, 4096, 128256, dtype="bfloat16", memory=0.2),
    ]


def suite(device: str) -> list[Case]:
    """The cases above, and one of each operator that they do not have."""
    cases = on_cuda() if device == "cuda" else on_cpu()
    others = set(FORMS) - {case.operator for case in cases}
    return [*cases, *(make(operator, 1024, 1000) for operator in sorted(others))]
