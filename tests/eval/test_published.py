"""Published figures: which are found for which name."""

from zoo.eval.published import ADE, COLUMNS, KNN, PUBLISHED_DENSE, published


def test_the_figures_of_a_size_come_before_those_of_others():
    first, *_ = published("mambavision_l3", 512)
    assert (first.value, first.size) == (88.1, 512)
    assert published("mambavision_l3", 256)[0].size == 256


def test_a_release_is_known_by_its_tag_and_its_random_twin_is_not():
    found = {
        figure.measure: figure.value for figure in published("radio_vit_huge_patch16.c_radio_v4")
    }
    assert (found[KNN], found[ADE]) == (86.59, 55.2)
    assert published("radio_vit_huge_patch16") == []
    assert published("nothing_of_the_kind", 224) == []


def test_every_line_has_a_source_and_a_place_for_each_column():
    for source, _, figures in PUBLISHED_DENSE.values():
        assert source and len(figures) == len(COLUMNS)
