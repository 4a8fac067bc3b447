"""Speed as a benchmark: the same case as `zoo bench`, by the model's own name."""

from zoo.eval.registry import Subject
from zoo.eval.speed.throughput import SpeedSettings, case_name, speed
from zoo.students.build import build_student


def test_speed_is_measured_of_the_backbone_that_was_built():
    student = build_student("test_vit", {}, size=64, options={"depth": 2}).eval()
    assert case_name(student) == "test_vit,num_classes=0,depth=2"
    subject = Subject(name="x", made=student, batch=2)
    found = dict(speed(subject, None, SpeedSettings(rounds=2)))
    parameters = sum(p.numel() for p in student.backbone.parameters())
    assert found["speed/img_s"] > 0 and found["speed/gmacs"] > 0
    assert found["speed/mparams"] == parameters / 1e6
    assert "speed/peak_gib" not in found
