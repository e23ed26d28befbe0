import pytest

from utils.output_names import safe_name, stem_for_numbers, unique_stems


@pytest.mark.parametrize(
    ("paths", "stems"),
    [
        ([], []),
        (["/x/a.jpg"], ["a"]),
        (["/x/one/a.jpg", "/x/two/a.jpg", "/x/two/b.jpg"], ["one_a", "two_a", "b"]),
        (
            ["/d1/images/train/x.jpg", "/d2/images/train/x.jpg", "/d1/images/train/x.png"],
            ["d1_images_train_x", "d2_images_train_x", "d1_images_train_x_2"],
        ),
        (["/d/x.jpg", "/d/x.png", "/d/x_2.jpg"], ["x", "x_3", "x_2"]),
        (["/d/a_b/x.jpg", "/d/a/b_x.jpg", "/d/a/b/x.jpg"], ["a_b_x", "b_x", "a_b_x_2"]),
        (["/d/Cat.jpg", "/d/cat.png"], ["Cat", "cat_2"]),
        (["a.jpg", "two/a.jpg"], ["a", "two_a"]),
    ],
)
def test_equal_file_names_do_not_overwrite_each_other(paths, stems):
    assert unique_stems(paths) == dict(zip(paths, stems, strict=True))


def test_many_equal_file_names_stay_apart():
    paths = [f"/d/{number // 100}/{number % 100}.jpg" for number in range(20_000)]
    assert len(set(unique_stems(paths).values())) == 20_000


@pytest.mark.parametrize(
    ("stem", "others", "expected"),
    [
        ("clip", [], "clip"),
        ("clip", ["clip_a", "clip2", "my_clip_1"], "clip"),
        ("clip", ["CLIP_1"], "clip_video"),
        ("clip", ["clip_1", "clip_video_7"], "clip_video_video"),
        ("a.b", ["axb_1"], "a.b"),
    ],
)
def test_numbered_files_of_a_video_hit_no_image(stem, others, expected):
    assert stem_for_numbers(stem, others) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "_"),
        ("..", "_"),
        ("traffic light", "traffic light"),
        ("Tür 雨", "Tür 雨"),
        ("N/A", "N_A"),
        ("../../etc", "_.._etc"),
        ("a:b?\n", "a_b_"),
        ("x" * 300, "x" * 230),
        ("a" + "雨" * 100, "a" + "雨" * 76),
        ("x" * 229 + " " + "y" * 9, "x" * 229),
    ],
)
def test_safe_name(text, expected):
    assert safe_name(text) == expected
