import torch

from zoo.experiments.pictures import Collection, Pictures, RandomCrop
from zoo.experiments.teachers import measure_teachers
from zoo.features import at_grid
from zoo.teachers.pretext import MEAN, STD, Gradients, PretextTeacher
from zoo.train.distill.phi_s import fit


def test_targets_have_unit_variance_on_the_grid_of_the_student():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    pictures = Pictures(images, torch.zeros(64, dtype=torch.long))
    collection = Collection(pictures, pictures, {}, 1)
    network = Gradients(8, widths=(4, 6))
    teachers = {"edges": PretextTeacher("edges", network, size=(32, 32), mean=MEAN, std=STD)}
    crop = RandomCrop(size=32)
    for grid, compared in ((None, (8, 8)), ((2, 2), (2, 2)), ((16, 4), (8, 4))):
        moments = measure_teachers(teachers, collection, crop, batch=64, grid=grid)["edges"]
        normalizer = fit("phi_s", moments)
        batches = collection.feed(crop, batch=64, seed=5).batches(0, 8)
        maps = torch.cat([teachers["edges"](batch).spatial for batch in batches])
        variance = normalizer(at_grid(maps, compared)).flatten(0, 2).var(0)
        torch.testing.assert_close(variance, torch.ones(8), atol=0.15, rtol=0)
