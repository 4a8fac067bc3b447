import pytest
import torch

from zoo.experiments.imposed import SCALES, Imposed
from zoo.experiments.phi_s.config import PhiSExperiment
from zoo.experiments.phi_s.networks import networks
from zoo.experiments.pictures import Collection, Pictures, RandomCrop
from zoo.experiments.teachers import measure_teachers, train_teacher


def test_the_imposed_scale_replaces_the_features_own():
    scale = Imposed(16, std=5.5, spread=0.6, offset=1.5, seed=3)
    x = 0.01 * torch.randn(64, 4, 4, 16) + 7
    scale.measure(x)
    z = scale(x).flatten(0, 2)
    torch.testing.assert_close(z.mean(0), scale.offset, rtol=0, atol=1e-3)
    overall = (z - z.mean(0)).square().mean().sqrt()
    torch.testing.assert_close(overall, torch.tensor(5.5), rtol=0.05, atol=0)


@pytest.mark.parametrize("label", SCALES)
def test_a_trained_teacher_has_the_deviation_and_the_means_that_were_imposed(label, tmp_path):
    chance = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 48, 48), generator=chance, dtype=torch.uint8)
    pictures = Pictures(images, torch.arange(64) % 2)
    crop, collection = RandomCrop(size=32), Collection(pictures, pictures, {}, 2)
    kind, network = networks(PhiSExperiment(size=32, tiny=True))[label]
    teacher = train_teacher(
        kind, network, collection, crop, steps=8, batch=32, seed=0, precision="float32",
        out=tmp_path / "teacher", scale=SCALES[label],
    )  # fmt: skip
    found = measure_teachers({label: teacher}, collection, crop, batch=32)[label]
    std, offset = SCALES[label]["std"], teacher.network.scale.offset
    overall = found.covariance().diagonal().mean().sqrt().item()
    # another draw of crops than the eight batches on which the scale was measured; gains differ
    # by channel, and so do the variances that they meet
    assert overall == pytest.approx(std, rel=0.35)
    assert (found.mean - offset).abs().max() < std
